"""Finds the self-attention of other people's models, and puts another mixer of tokens in its place."""

import math
from copy import deepcopy
from inspect import signature
from itertools import count

import torch
from torch import nn

# Arguments of timm's Attention besides its channels, heads and qkv_bias.
ARGUMENTS = {"attn_head_dim", "qk_norm", "scale_norm", "proj_bias", "attn_drop", "proj_drop", "norm_layer", "gated"}
# Classes, and a list of layers, of diffusers in which no attention is over the tokens of one image and nothing else: it is over
# the frames of a video or of sound, or over text, or it sees text, embeddings or objects as well.
KEPT = {
    "TransformerTemporalModel", "AnimateDiffTransformer3D", "I2VGenXLTransformerTemporalEncoder", "T5FilmDecoder",
    "HunyuanVideoTokenRefiner", "HunyuanVideo15TokenRefiner", "HunyuanImageTokenRefiner", "PriorTransformer",
    "GatedSelfAttentionDense", "IPAdapterPlusImageProjection", "SDCascadeAttnBlock",
}, "temporal_transformer_blocks"  # fmt: skip
# Names of the processors that run diffusers' self-attention over nothing but tokens.
PROCESSORS = {
    "AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor",
    "SanaLinearAttnProcessor2_0",
}  # fmt: skip


def exchange(model, mixer, options):
    """Replaces every self-attention layer of `model` by mixer(its channels, **options), in place, prints how many, and returns
    the model. A mixer that takes `num_heads`, `qkv_bias`, `layer` or `prefix_tokens` is told the old layer's number of heads,
    whether its queries have a bias, the layer's index from 0, and the number of the model's leading tokens off the grid.

    It replaces global self-attention, as in timm (`qkv` or `q_proj`, `proj`, `num_heads`: its ViTs, DiT, SiT) or in diffusers
    (`to_q`, `to_k`, `to_v`, `to_out`: its DiT, Sana, Transformer2DModel, UNet2DConditionModel). Cross-attention, attention that
    also sees text, and attention in windows, over channels, over frames or on feature maps are kept, as is timm's GPSA.

    The new layers have new weights, on the device and in the type of the old ones. ValueError if there is no such layer, if the
    model has prefix tokens and the mixer takes none, or if the tokens are not on one grid in all layers, for example because
    the model merges tokens; the model is then left unchanged.
    """
    takes, numbers = signature(mixer).parameters, count()
    takes_prefix = "prefix_tokens" in takes or any(parameter.kind == parameter.VAR_KEYWORD for parameter in takes.values())
    parts = {layer: part for part in parts_with_tokens(model) for layer in part.modules()}         # the innermost one counts
    first = next(iter(parts.values()), model)

    def build(layer):
        part, heads = parts.get(layer, first), getattr(layer, "num_heads", getattr(layer, "heads", 8))
        prefix = options.get("prefix_tokens", getattr(part, "num_prefix_tokens", 0))
        if prefix and not takes_prefix:
            raise ValueError(
                f"{type(part).__name__} has {prefix} prefix_tokens, such as a class token, and this mixer takes tokens of a "
                "grid only; build the model without them (timm: class_token=False, global_pool='avg') or choose another mixer"
            )
        biased = any(name in layer.state_dict() for name in ("qkv.bias", "q_bias", "q_proj.bias", "to_q.bias"))
        told = dict(num_heads=heads, qkv_bias=biased, layer=next(numbers))
        given = dict(grid_size=options["grid_size"] or grid_of(part)) | (dict(prefix_tokens=prefix) if prefix else {})
        return mixer(widths[layer], **{name: value for name, value in told.items() if name in takes} | options | given)

    windows = [owner for owner in model.modules() if hasattr(owner, "partition_size") or window_of(owner) is not None]
    classes, name = KEPT
    others = [x for place, x in model.named_modules() if type(x).__name__ in classes or place.endswith(name)]
    inside = {layer for owner in windows + others for layer in owner.modules() if layer is not owner}
    widths = {layer: attention_width(layer) for layer in model.modules() if layer not in inside}
    replaced = replace_layers(model, build, lambda layer, _: widths.get(layer))
    if not replaced:
        names = "qkv (or q_proj) and proj, or to_q, to_k, to_v and to_out"
        raise ValueError(f"{type(model).__name__} has no layer of self-attention over all tokens with {names}")
    checked = dict.fromkeys(parts.get(layer, first) for layer, _ in replaced.values())
    if reason := next(filter(None, map(misfit, checked)), None):
        for place, (layer, _) in replaced.items():
            model.set_submodule(place, layer)
        raise ValueError(f"the attention of {type(model).__name__} cannot be replaced: {reason}")
    new = {layer: type(mixer).__name__ for layer, mixer in replaced.values()}
    print(f"replaced {len(new)} attention layers of {type(model).__name__} by {', '.join(dict.fromkeys(new.values()))}")
    return model


def parts_with_tokens(model):
    """Returns the parts of a model that state the grid or the prefix of their tokens, such as timm's transformers in a class
    around them."""

    def states(part):
        if getattr(part, "grid_size", None) is not None or hasattr(part, "patch_embed"):
            return True
        return hasattr(part, "num_prefix_tokens") and not queries_of(part)         # attention, which may have it, has no grid

    return [part for part in model.modules() if states(part)]


def grid_of(part):
    """Returns the (h, w) of the tokens if a part, or its `patch_embed`, states it as `grid_size`, else None."""
    return getattr(part, "grid_size", None) or getattr(getattr(part, "patch_embed", None), "grid_size", None)


def replace_layers(model, build, is_meant):
    """Replaces every layer of a model for which is_meant(layer, its owner) is true by build(layer), in place, on the device and
    in the type of its first nn.Linear. Returns {place: (old layer, new layer)}; a layer in several places gets one replacement
    in all of them."""
    found = {
        place: layer
        for place, layer in model.named_modules(remove_duplicate=False)
        if place and is_meant(layer, model.get_submodule(place.rpartition(".")[0]))
    }
    new = {}
    for layer in dict.fromkeys(found.values()):
        mixer = build(layer)  # must come first: it raises a clear error if a layer has no nn.Linear
        weight = next(part.weight for part in layer.modules() if isinstance(part, nn.Linear))
        new[layer] = mixer.to(weight.device, weight.dtype).train(layer.training)
    for place, layer in found.items():
        model.set_submodule(place, new[layer])
    return {place: (layer, new[layer]) for place, layer in found.items()}


def attention_width(layer):
    """Returns the channels of a global self-attention layer, timm's or diffusers'; 0 for any other module."""
    if queries_of(layer) and hasattr(layer, "proj") and hasattr(layer, "num_heads"):
        return queries_of(layer).in_features if sees_all_tokens(layer) else 0
    if all(hasattr(layer, name) for name in ("to_q", "to_k", "to_v", "to_out")) and is_called_with_tokens(layer):
        return layer.to_q.in_features
    return 0


def window_of(layer):
    """Returns the `window_size` of a layer, None if it has none, as timm's BEiT without a bias of relative positions."""
    return getattr(layer, "window_size", None)


def queries_of(layer):
    """Returns the nn.Linear that makes the queries of timm-style attention, perhaps with keys and values, or None."""
    return next((x for x in (getattr(layer, name, None) for name in ("qkv", "q_proj")) if isinstance(x, nn.Linear)), None)


def is_called_with_tokens(layer):
    """Returns whether a diffusers attention layer maps (B, N, D) to (B, N, D) from tokens alone: no text, maps or rotations."""
    plain = getattr(layer, "is_cross_attention", None) is False and getattr(layer, "added_kv_proj_dim", None) is None
    around = any(getattr(layer, name, None) for name in ("group_norm", "spatial_norm", "residual_connection"))
    return plain and not around and type(getattr(layer, "processor", None)).__name__ in PROCESSORS


@torch.no_grad()
def sees_all_tokens(layer):
    """Returns whether timm-style attention, (1, N, D) -> (1, N, D), is over all tokens. With zero queries every token gets a
    mean of all values, so that a change of the last token changes all others. Over channels or in windows it does not, and a
    layer that needs more than tokens raises an error."""
    bias = getattr(layer, "relative_position_index", None)                 # (N, N); includes a class token unless for a window
    if window_of(layer) is not None and (bias is None or len(bias) != math.prod(window_of(layer)) + 1):
        return False
    layer, width = without_hooks(layer), queries_of(layer).in_features
    if queries_of(layer).weight.is_meta:                                   # without values: any will do
        layer.to_empty(device="cpu")
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).sin().view(tensor.shape))
    layer.to("cpu", torch.float32)
    layer.eval()                                                           # which returns None in some of timm's layers
    queries = queries_of(layer)
    for parameter in filter(lambda p: p is not None, (queries.weight, queries.bias, getattr(layer, "q_bias", None))):
        parameter[:width] = 0
    n = 5 if bias is None else len(bias)
    if hasattr(positions := getattr(layer, "rel_pos", None), "get_bias"):  # timm's VisionTransformerRelPos
        n = positions.get_bias().shape[-1]
    tokens = torch.arange(n * width, dtype=torch.float32).sin().view(1, n, width)          # no random numbers are drawn
    other = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], dim=1)
    try:
        moved = (layer(tokens) - layer(other)).abs()
    except Exception:  # it is not called with tokens alone
        return False
    return moved.shape == tokens.shape and bool((moved[0, :-1].amax(-1) > 0).all())


def misfit(model):
    """Returns the error message of a mixer for images of the size that timm built the model for, in evaluation or in training,
    or None. Only shapes are computed, on the meta device."""
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", [None])[1:]
    if not size or not hasattr(model, "pretrained_cfg"):
        return None
    for training in (False, True):                                         # in training it may drop tokens
        try:
            with torch.no_grad():
                images = torch.empty(2, getattr(model, "in_chans", 3), *size, device="meta")
                without_hooks(model).to("meta").train(training)(images)
        except ValueError as error:
            return str(error)
        except Exception:  # the model itself failed or cannot be copied, or an operator has no shape rule
            pass
    return None


def without_hooks(module):
    """Returns a copy of a module for a trial, without hooks of its forward passes, which are for the model's own tokens. What
    was computed with gradients and kept, such as a map of attention, cannot be copied and is detached."""
    computed = (x for part in module.modules() for x in vars(part).values() if isinstance(x, torch.Tensor))
    module = deepcopy(module, {id(x): x.detach().clone() for x in computed})
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return module
