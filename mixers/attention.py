"""Self-attention, timm's, as in DiT."""

from timm.models.vision_transformer import Attention

from mixers.options import Mixer


def read(weights):
    """Returns the options of an attention layer with these weights, of which it has none; None for another layer's."""
    return {} if "qkv.weight" in weights else None


MIXER = Mixer("attention", Attention, read)
