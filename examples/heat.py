"""Learns the coefficients of diffusion and advection from data: pairs of a field and the same field at a later time.

A Gaussian that spreads by K and drifts by v stays a Gaussian: its covariance grows by 2 K t and its centre moves by v t, so the
later field is known exactly. One layer of the operator, initialised with other coefficients, is trained on pairs on 32 x 32
points and finds tau K and tau b; then it is evaluated on 48 x 48 points.
"""

import torch

from pde_ssm import PDESSM

K = torch.tensor([[0.004, 0.0015], [0.0015, 0.002]])     # at t = 1, on the unit torus
DRIFT = torch.tensor([0.10, -0.06])                      # which is -b: dh/dt = div(K grad h) + b . grad h


def gaussians(centres, covariance, n):
    """Sums Gaussians over the torus, with unit mass each: centres (B, 2), covariance (B, 2, 2) -> (B, 1, n, n)."""
    points = torch.arange(n) / n
    y, x = torch.meshgrid(points, points, indexing="ij")
    turns = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))             # the images of a point on the torus
    offset = torch.stack([x, y], -1)[None, None] + turns[None, :, None, None] - centres[:, None, None, None]
    exponent = torch.einsum("btyxi,bij,btyxj->btyx", offset, torch.linalg.inv(covariance), offset)
    return (exponent.mul(-0.5).exp().sum(1) / (2 * torch.pi * torch.linalg.det(covariance).sqrt())[:, None, None])[:, None]


def pairs(count, n):
    """Draws fields, one Gaussian each, and returns them and what they are at t = 1: (count, 1, n, n) twice."""
    centres, width = torch.rand(count, 2), 0.06 + 0.06 * torch.rand(count)
    covariance = width[:, None, None] ** 2 * torch.eye(2)
    return gaussians(centres, covariance, n), gaussians(centres + DRIFT, covariance + 2 * K, n)


def main(steps=80):
    """Trains the layer. Returns the largest errors of its tau K and tau b, and its relative error on the finer grid."""
    torch.manual_seed(0)
    layer = PDESSM(1, grid_size=(32, 32), terms=("diffusion", "convection"))
    torch.nn.init.ones_(layer.R.weight)
    for derivative in (layer.equation.gx, layer.equation.gy):  # of the input: it could stand for a part of the drift
        derivative.requires_grad_(False)
    free = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(free, max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=0)
    before, after = pairs(16, 32)

    def loss():
        optimizer.zero_grad()
        error = (layer(before) - after).square().mean() / after.square().mean()
        error.backward()
        return error

    optimizer.step(loss)
    found, b, _, tau = (x.detach()[0] for x in layer.coefficients())
    with torch.no_grad():
        before, after = pairs(32, 48)
        finer = ((layer(before) - after).norm() / after.norm()).item()
    print(f"tau K   learnt {(tau * found).flatten().tolist()}\n        true   {K.flatten().tolist()}")
    print(f"-tau b  learnt {(-tau * b).tolist()}\n        true   {DRIFT.tolist()}")
    print(f"relative error on 48 x 48 points, where it was not trained: {finer:.2e}")
    return (tau * found - K).abs().max().item(), (tau * b + DRIFT).abs().max().item(), finer


if __name__ == "__main__":
    main()
