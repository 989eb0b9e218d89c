"""How the time steps of selective scans start: log-uniform from 0.001 to 0.1, as Mamba's do (arXiv 2312.00752), and how
they follow from tokens."""

import math

import torch
from torch import nn
from torch.nn.functional import linear

from pde_ssm_kernels.modes import runs_alone


def time_step_biases(*shape):
    """Returns biases of this shape whose softplus is a log-uniform time step from 0.001 to 0.1."""
    steps = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1)).exp()
    return steps + (-torch.expm1(-steps)).log()                            # the inverse of softplus


@torch.no_grad()
def initialize_time_steps(layer):
    """Initialises an nn.Linear from a token's R numbers to its channels' time steps: weights uniform, biases as above."""
    bound = layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    layer.bias.copy_(time_step_biases(layer.out_features))


def product_and_bias(layer, x):
    """Returns the product of tokens (..., R) with a linear layer's weights, and the bias, which a scan adds in float32 whatever
    the type of the product; of a layer with hooks or adapters, which run only when it is called, the result and None."""
    if runs_alone(layer, nn.Linear):
        return linear(x, layer.weight.to(x.dtype)), layer.bias
    weight = getattr(layer, "weight", None)                                # of quantised layers a method
    return layer(x.to(weight.dtype) if isinstance(weight, torch.Tensor) else x), None
