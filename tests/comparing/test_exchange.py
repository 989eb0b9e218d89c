"""Which layers of a model are exchanged."""

import timm
import torch
from torch import nn

from comparing import exchange
from pde_ssm import PDESSMBlock


def test_a_model_of_timm_within_a_model_keeps_its_attention(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = timm.create_model("vit_tiny_patch16_224", depth=1)
            self.attn = self.again = timm.layers.Attention(96)

    net, replace = Net(), exchange.Exchange("pdessm", {}, tmp_path)
    assert list(replace(net)) == ["attn", "again"]
    assert net.attn is net.again
    assert replace.count == 1
    assert isinstance(net.attn, PDESSMBlock)
    assert isinstance(net.encoder.blocks[0].attn, timm.layers.Attention)
    named = exchange.Exchange("pdessm", {}, tmp_path, "timm.models.vision_transformer:Attention")
    assert list(named(net)) == ["encoder.blocks.0.attn"]


def test_layers_keep_device_type_and_mode(tmp_path):
    net = nn.Sequential(timm.layers.Attention(96)).to("meta", torch.bfloat16).eval()
    exchange.Exchange("pdessm", {}, tmp_path)(net)
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {("meta", torch.bfloat16)}
    assert not net[0].training
