"""replace_attention on the models of three libraries."""

import threading
from copy import deepcopy

import diffusers
import pytest
import timm
import torch
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTokenRefiner
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from timm.models import beit, davit, efficientformer, eva, swin_transformer, vision_transformer_relpos, xcit
from timm.models.vision_transformer import Attention
from torch import nn

from mixers import MIXERS
from mixers.ss2d import SS2D
from models import DiT
from pde_ssm import PDESSMBlock, replace_attention


def our_dit():
    model = DiT((8, 12), hidden_size=32, depth=2, num_heads=4, num_classes=10)
    return model, (torch.randn(2, 4, 8, 12), torch.tensor([3, 500]), torch.tensor([1, 2])), (4, 6)


def timm_vit():
    return timm.create_model("vit_tiny_patch16_224", num_classes=10), (torch.randn(2, 3, 224, 224),), (14, 14)


def timm_vit_with_registers():
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=(56, 84), num_classes=10, depth=2)
    return model, (torch.randn(2, 3, 56, 84),), (4, 6)


def diffusers_dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 2])), None


def diffusers_unet():
    """Its attention takes maps (B, D, h, w), and norms and residuals are inside."""
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32), norm_num_groups=8, **blocks)


def diffusers_sd3():
    """Its attention takes text beside the image's tokens."""
    heads = dict(attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16)
    return diffusers.SD3Transformer2DModel(sample_size=8, num_layers=2, pooled_projection_dim=16, in_channels=4, **heads)


def timm_rope_vit():
    model = timm.create_model("vit_small_patch16_rope_224", img_size=(32, 48), depth=2, num_classes=3)
    return model, (torch.randn(2, 3, 32, 48),), (2, 3)


BUILD = [our_dit, timm_vit, timm_vit_with_registers, diffusers_dit]


def output(model, inputs):
    out = model(*inputs)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize("build", BUILD, ids=lambda f: f.__name__)
def test_the_model_trains_a_step_with_every_attention_replaced(build, capsys, randomize):
    model, inputs, grid = build()
    shape = output(model, inputs).shape
    model.train()
    assert replace_attention(model) is model
    blocks = [m for m in model.modules() if isinstance(m, PDESSMBlock)]
    assert f"replaced {len(blocks)} attention layers of {type(model).__name__}" in capsys.readouterr().out
    assert not [name for name, _ in model.named_modules() if name.endswith(("qkv", "to_q"))]
    assert {block.grid_size for block in blocks} == {grid}
    assert all(block.training for block in blocks)

    randomize(model).eval()  # no dropout, so that the loss must fall
    out = output(model, inputs)
    assert out.shape == shape
    loss = out.square().mean()
    loss.backward()
    for block in blocks:
        assert all(p.grad.isfinite().all() for p in block.parameters())
        assert block.pde.R.weight.grad.any()  # the last block's K and b never reach a class token, which sees the mean
    slope = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    torch.optim.SGD(model.parameters(), lr=1e-3 * loss.item() / slope.item()).step()
    assert output(model, inputs).square().mean() < loss


@torch.no_grad()
def test_a_class_token_sees_every_token_and_is_seen_by_every_token():
    model = replace_attention(timm.create_model("vit_tiny_patch16_224", depth=1)).eval()
    images = torch.randn(1, 3, 224, 224)

    def change(i, j):
        other = images.clone()
        other[:, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16] += 1
        return (model.forward_features(other) - model.forward_features(images))[0].norm(dim=1)

    assert all(change(i, j)[0] > 1e-4 for i in (0, 7, 13) for j in (0, 13))
    before = model.forward_features(images)
    model.cls_token += 1 + torch.randn_like(model.cls_token)
    assert ((model.forward_features(images) - before).norm(dim=2) > 1e-4).all()


def test_new_layers_have_the_type_device_and_mode_of_the_old():
    model = timm.create_model("vit_tiny_patch16_224", depth=1).to(torch.bfloat16).eval()
    block = replace_attention(model, gate=True, coupling="pairwise", groups=192).blocks[0].attn
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert not block.training
    with torch.device("meta"):
        model = our_dit()[0]
    assert {p.device.type for p in replace_attention(model).parameters()} == {"meta"}


def test_rotary_embeddings_are_ignored():
    block = PDESSMBlock(16)
    tokens = torch.randn(1, 16, 16)
    torch.testing.assert_close(block(tokens, rope=torch.randn(16, 16), attn_mask=None), block(tokens))


def test_a_failure_leaves_the_model_as_it_was():
    model = nn.ModuleList([Attention(16), Attention(8)])
    before = str(model)
    with pytest.raises(ValueError, match="8 channels cannot be split into 16"):
        replace_attention(model, coupling="pairwise", groups=16)
    assert str(model) == before


def test_a_shared_layer_stays_shared():
    layer = Attention(8)
    model = replace_attention(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert isinstance(model["a"], PDESSMBlock)
    assert model["b"][0] is model["a"]


@pytest.mark.parametrize("build", [diffusers_dit, timm_rope_vit], ids=lambda f: f.__name__)
def test_a_hybrid_takes_what_the_model_passes_to_attention(build):
    model, inputs, grid = build()
    replace_attention(model, MIXERS["pdessm-gla"], grid_size=grid or (4, 4), attention_every=2)
    assert output(model, inputs).isfinite().all()


@pytest.mark.parametrize("build", [lambda: nn.Sequential(Attention(8)), lambda: timm_vit()[0]], ids=["a layer", "a model"])
def test_hooks_see_the_models_own_tokens_alone(build):
    seen, model = [], build()
    for part in model.modules():
        part.register_forward_hook(lambda layer, tokens, out: seen.append(layer))
    replace_attention(model)
    assert not seen


def test_a_model_that_cannot_be_copied_is_exchanged_as_it_stands():
    model, inputs, _ = timm_vit()
    model.lock = threading.Lock()
    assert output(replace_attention(model), inputs).isfinite().all()


def test_a_layer_that_keeps_a_map_of_its_attention():
    layer = Attention(8)
    layer.map, before = layer.qkv.weight[:8].softmax(1), layer.qkv.weight.clone()      # a result with gradients
    assert isinstance(replace_attention(nn.Sequential(layer))[0], PDESSMBlock)
    assert torch.equal(layer.qkv.weight, before)


class Around(nn.Module):
    """A model of someone's own around timm's."""

    def __init__(self, model):
        super().__init__()
        self.backbone = model

    def forward(self, images):
        return self.backbone(images)


def test_the_grid_and_the_prefix_of_a_model_inside_another():
    size = dict(img_size=(32, 128), depth=1, num_classes=3)                # 2 x 8 tokens, which could be 4 x 4
    for options in ({}, dict(class_token=False, global_pool="avg")):
        model = replace_attention(Around(timm.create_model("vit_tiny_patch16_224", **size, **options)))
        block = model.backbone.blocks[0].attn
        assert (block.grid_size, block.prefix_tokens) == ((2, 8), 0 if options else 1)
        assert model(torch.randn(1, 3, 32, 128)).shape == (1, 3)
    naflex = timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, num_heads=2, depth=1, num_classes=3)
    assert replace_attention(Around(naflex))(torch.randn(1, 3, 64, 64)).shape == (1, 3)        # it states a prefix alone


def test_every_transformer_of_a_model_has_a_grid_and_a_prefix_of_its_own():
    sizes = dict(img_size=(32, 128), class_token=False, global_pool="avg"), dict(img_size=64), dict(img_size=(128, 32))
    model = nn.ModuleList(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, **size) for size in sizes)
    blocks = [part.blocks[0].attn for part in replace_attention(model)]
    assert [(block.grid_size, block.prefix_tokens) for block in blocks] == [((2, 8), 0), ((4, 4), 1), ((8, 2), 1)]
    model.append(timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="cannot be replaced: PDESSMBlock got 98 tokens"):
        replace_attention(model)


def test_attention_over_frames_stays():
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=16,
        sample_size=8, patch_size=2, caption_channels=16, video_length=4,
    )  # fmt: skip
    replace_attention(model)
    assert [name for name, part in model.named_modules() if isinstance(part, PDESSMBlock)] == ["transformer_blocks.0.attn1"]


@pytest.mark.parametrize(
    "model",
    [
        TransformerTemporalModel(2, 8, in_channels=16, norm_num_groups=4),
        nn.Sequential(I2VGenXLTransformerTemporalEncoder(16, 2, 8)),
        HunyuanVideoTokenRefiner(16, num_attention_heads=2, attention_head_dim=8, num_layers=1),
        diffusers.PriorTransformer(2, 8, num_layers=1, embedding_dim=16, num_embeddings=5),
        nn.Sequential(GatedSelfAttentionDense(16, 16, 2, 8)),
        IPAdapterPlusImageProjection(16, 16, 16, depth=1, dim_head=8, heads=2),
    ],
    ids=lambda model: type(model[0] if isinstance(model, nn.Sequential) else model).__name__,
)
def test_attention_over_frames_text_or_more_than_an_image_stays(model):
    """Layers of diffusers' that are plain self-attention by themselves; what their models pass to them is not an image."""
    with pytest.raises(ValueError, match="no layer of self-attention over all tokens"):
        replace_attention(model)


def test_attention_with_biases_in_a_layer_of_its_own_is_replaced():
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    for options in ({}, dict(class_token=True, global_pool="token"), dict(rel_pos_type="bias")):
        model = replace_attention(vision_transformer_relpos.VisionTransformerRelPos(**size, **options))
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("kind", [eva.EvaAttention, eva.AttentionRope], ids=lambda kind: kind.__name__)
def test_attention_whose_queries_have_a_layer_of_their_own_is_replaced(kind):
    """As in EVA-02."""
    model = replace_attention(nn.Sequential(kind(16, num_heads=2, qkv_fused=False, norm_layer=nn.LayerNorm)))
    assert model(torch.randn(1, 9, 16)).shape == (1, 9, 16)
    assert isinstance(model[0], PDESSMBlock)


def test_a_layer_whose_eval_returns_nothing():
    """timm's EfficientFormer has such layers, for tokens of one grid only."""
    with pytest.raises(ValueError, match="no layer of self-attention over all tokens"):
        replace_attention(nn.Sequential(efficientformer.Attention(dim=32, key_dim=8, num_heads=2, resolution=3)))


def test_tokens_that_are_dropped_in_training_are_refused():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="cannot be replaced: PDESSMBlock got 98 tokens on the grid after 1 prefix_tokens"):
        replace_attention(model)


def test_the_tokens_of_other_mixers_are_checked_too():
    model = timm.create_model("pit_ti_224")
    with pytest.raises(ValueError, match="cannot be replaced: ss2d is on a grid of 27 x 27"):
        replace_attention(model, MIXERS["ss2d"])
    assert not any(isinstance(layer, SS2D) for layer in model.modules())


def test_any_class_may_take_attentions_place(capsys):
    model = replace_attention(our_dit()[0], MIXERS["pdessm"], coupling="coupled")
    assert {block.attn.pde.coupling for block in model.blocks} == {"coupled"}
    assert "replaced 2 attention layers" in capsys.readouterr().out


def test_an_option_counts_more_than_the_presets():
    pde = replace_attention(nn.Sequential(Attention(16)), "pdessm-g", components=2)[0].pde
    assert (pde.equation.components, pde.gate is None) == (2, False)


def test_a_mixer_that_asks_is_told_its_layer_and_heads():
    model = timm.create_model("vit_tiny_patch16_224", depth=3, class_token=False, global_pool="avg")
    replace_attention(model, MIXERS["window"])
    assert [(block.attn.num_heads, block.attn.shifted) for block in model.blocks] == [(3, False), (3, True), (3, False)]
    assert all(block.attn.qkv.bias is not None for block in model.blocks)  # as the old layers had


def test_cross_attention_stays():
    model = nn.ModuleDict(
        {
            "own": diffusers.models.attention_processor.Attention(query_dim=16, heads=2, dim_head=8),
            "cross": diffusers.models.attention_processor.Attention(16, cross_attention_dim=24, heads=2, dim_head=8),
        }
    )
    replace_attention(model)
    assert isinstance(model["own"], PDESSMBlock)
    assert not isinstance(model["cross"], PDESSMBlock)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), {}, "Sequential has no layer of self-attention"),
        (timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), {}, "no layer of self-attention"),
        (diffusers_unet(), {}, "UNet2DModel has no layer of self-attention over all tokens"),
        (diffusers_sd3(), {}, "SD3Transformer2DModel has no layer of self-attention over all tokens"),
        (our_dit()[0], dict(mixer="attention"), "unknown mixer 'attention'; known: pdessm"),
        (our_dit()[0], dict(conditioned=True), "conditioned needs blocks that pass"),
        (our_dit()[0], dict(coupling="pairwise", groups=5), "32 channels cannot be split into 5"),
        (timm_vit()[0], dict(mixer=MIXERS["ss2d"]), "VisionTransformer has 1 prefix_tokens, .* takes tokens of a grid"),
    ],
)
def test_mistakes_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        replace_attention(model, **options)


@pytest.mark.parametrize(
    "layer",
    [
        davit.ChannelAttention(32, num_heads=4),
        xcit.XCA(32, num_heads=4),
        swin_transformer.WindowAttention(32, 2, window_size=(2, 2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_that_is_not_over_all_tokens_stays(layer, device):
    with pytest.raises(ValueError, match="no layer of self-attention over all tokens"):
        replace_attention(torch.nn.Sequential(deepcopy(layer)).to(device))


def test_attention_that_has_no_window_after_all_is_replaced():
    layer = beit.Attention(32, 2)
    assert layer.window_size is None
    assert isinstance(replace_attention(nn.Sequential(layer))[0], PDESSMBlock)


def test_attention_over_all_tokens_with_a_bias_is_replaced():
    model = torch.nn.Sequential(beit.Attention(32, 2, window_size=(3, 5)))
    shapes = replace_attention(deepcopy(model).to("meta"), grid_size=(3, 5), prefix_tokens=1)
    assert isinstance(shapes[0], PDESSMBlock)
    replace_attention(model, grid_size=(3, 5), prefix_tokens=1)
    assert isinstance(model[0], PDESSMBlock)
    assert model(torch.randn(2, 16, 32)).shape == (2, 16, 32)


@pytest.mark.parametrize("name", ["pit_ti_224", "cait_xxs24_224"])
def test_tokens_that_are_not_on_one_grid_are_refused_and_the_model_stays(name):
    """One merges tokens on the way, the other joins its class token after most layers."""
    model = timm.create_model(name)
    before = [type(layer) for layer in model.modules()]
    with pytest.raises(ValueError, match=r"cannot be replaced: PDESSMBlock got \d+ tokens"):
        replace_attention(model)
    assert [type(layer) for layer in model.modules()] == before
