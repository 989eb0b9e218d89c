"""Flow matching where everything is known: data from a Gaussian, or from two of them."""

import math

import pytest
import torch

from diffusion import PATHS, create_flow
from diffusion.samplers import FLOW_SAMPLERS, SHORTEST, euler, heun, rk45, sde

f64 = torch.float64
MEANS = torch.tensor([[1.5, -0.5], [-1.0, 0.75]], dtype=f64)  # of two modes; the first is the Gaussian's


def exact(flow, means, std):
    """The velocity E[alpha' u + sigma' z | x] for u from equally likely Gaussians: a network (x, 1000 t)."""

    def network(x, t):
        alpha, sigma, d_alpha, d_sigma = flow.coefficients(t / 1000, x)
        variance = (alpha * std) ** 2 + sigma**2                           # (B, 1, 1, 1)
        offset = x[:, None] - alpha[:, None] * means.view(1, -1, 2, 1, 1)  # (B, modes, 2, 1, 1)
        share = (-offset.square().sum(2, keepdim=True) / variance[:, None] / 2).softmax(1)
        u = means.view(1, -1, 2, 1, 1) + (alpha * std**2 / variance)[:, None] * offset
        z = (sigma / variance)[:, None] * offset
        return (share * (d_alpha[:, None] * u + d_sigma[:, None] * z)).sum(1)

    return network


def start(n=64):
    return torch.randn(n, 2, 1, 1, dtype=f64)


def run(sampler, path, steps, means, x, **options):
    flow = create_flow(steps, path)
    return sampler(flow, exact(flow, means, 0.4), x, clip_denoised=False, **options)


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_from_noise_to_the_image_and_know_their_derivatives(path):
    t = torch.linspace(0, 1, 11, dtype=f64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = PATHS[path](t)
    torch.testing.assert_close(torch.autograd.grad(alpha.sum(), t, retain_graph=True)[0], d_alpha)
    torch.testing.assert_close(torch.autograd.grad(sigma.sum(), t)[0], d_sigma)
    ends = torch.stack([alpha, sigma])[:, [0, -1]]
    torch.testing.assert_close(ends, torch.tensor([[0, 1], [1, 0]], dtype=f64))


@pytest.mark.parametrize("path", PATHS)
def test_velocity_gives_back_image_and_noise(path):
    flow, u, z = create_flow(path=path), start(), start()
    t = torch.linspace(0, 1, 64, dtype=f64)
    alpha, sigma, d_alpha, d_sigma = flow.coefficients(t, u)
    x, velocity = alpha * u + sigma * z, d_alpha * u + d_sigma * z
    torch.testing.assert_close(flow.clean(x, t, velocity), u)
    torch.testing.assert_close(flow.noise(x, t, velocity), z)
    if path == "linear":
        torch.testing.assert_close(flow.clean(x, t, velocity), x + (1 - t).view(-1, 1, 1, 1) * velocity)  # Eq. (13)


@pytest.mark.parametrize("path", PATHS)
def test_the_loss_is_that_of_the_velocity(path):
    flow, u, z = create_flow(path=path), start(), start()
    t = torch.rand(64, dtype=f64)
    _, _, d_alpha, d_sigma = flow.coefficients(t, u)
    seen = []
    losses = flow.training_losses(lambda x, t, y: seen.append((x, t, y)) or 0 * x, u, t, dict(y=3), z)
    torch.testing.assert_close(losses["loss"], (d_alpha * u + d_sigma * z).square().mean((1, 2, 3)))
    x, shown, y = seen[0]
    torch.testing.assert_close(shown, 1000 * t)
    assert y == 3
    if path == "linear":
        torch.testing.assert_close(x, t.view(-1, 1, 1, 1) * u + (1 - t.view(-1, 1, 1, 1)) * z)  # Eq. (12)


def clean_by(flow, velocity):
    """The network that predicts the image to which that one's velocity points."""
    plain = create_flow(path=flow.path.__name__)
    return lambda x, t: plain.clean(x, t / 1000, velocity(x, t))


@pytest.mark.parametrize("path", PATHS)
def test_a_predicted_image_gives_the_field_of_its_velocity(path):
    flow, x = create_flow(path=path, predict="x"), start()
    t = torch.linspace(0, 0.999, 64, dtype=f64)
    network = exact(flow, MEANS, 0.4)
    velocity = flow.velocity(clean_by(flow, network), x, t)
    torch.testing.assert_close(velocity, network(x, 1000 * t))
    torch.testing.assert_close(flow.clean(x, t, velocity), clean_by(flow, network)(x, 1000 * t))
    if path == "linear":
        torch.testing.assert_close(velocity, (clean_by(flow, network)(x, 1000 * t) - x) / (1 - t.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("path", PATHS)
def test_the_loss_of_a_predicted_image_is_that_of_the_velocity(path):
    """Up to the last twentieth, where the noise is divided by that much at least."""
    flow, plain, u, z, guess = create_flow(path=path, predict="x"), create_flow(path=path), start(), start(), start()
    t = torch.linspace(0, 0.94, 64, dtype=f64)
    losses = flow.training_losses(lambda x, t: guess, u, t, noise=z)["loss"]
    velocity = lambda x, t: flow.velocity(lambda *_: guess, x, t / 1000)  # noqa: E731
    torch.testing.assert_close(losses, plain.training_losses(velocity, u, t, noise=z)["loss"])
    losses = flow.training_losses(lambda x, t: guess, u, torch.ones(64, dtype=f64), noise=z)["loss"]
    length = {"linear": 1, "cosine": math.pi / 2}[path]
    torch.testing.assert_close(losses, (length / 0.05 * (guess - u)).square().mean((1, 2, 3)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 6, 50])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS.values())
def test_samplers_follow_a_predicted_image(path, steps, sampler):
    """To where they follow its velocity, but for the last step, which goes to the image."""
    x, flow = start(), create_flow(steps, path, predict="x")
    torch.manual_seed(0)
    expected = run(sampler, path, steps, MEANS[:1], x)
    torch.manual_seed(0)
    end = sampler(flow, clean_by(flow, exact(flow, MEANS[:1], 0.4)), x, clip_denoised=False)
    if sampler is sde or (sampler, path) == (euler, "linear"):
        torch.testing.assert_close(end, expected)
    else:
        assert (end - expected).abs().mean() < (0.001 if sampler is rk45 else 1 / steps)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("modes", [1, 2])
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_fixed_steps_converge_at_their_order(path, modes, sampler, order):
    x, means = start(), MEANS[:modes]
    if modes == 1 and path == "linear":
        expected = means.view(1, 2, 1, 1) + 0.4 * x  # an affine map takes the one Gaussian to the other
        torch.testing.assert_close(run(rk45, path, 1, means, x, rtol=1e-9, atol=1e-9), expected, rtol=0, atol=1e-7)
    else:
        expected = run(rk45, path, 1, means, x, rtol=1e-10, atol=1e-10)
    errors = [(run(sampler, path, n, means, x) - expected).abs().mean() for n in (64, 128, 256)]
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert rates == pytest.approx([order, order], abs=0.15)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-7, 1e-9])
def test_adaptive_steps_meet_their_tolerance(tolerance):
    x = start()
    error = run(rk45, "linear", 1, MEANS[:1], x, rtol=tolerance, atol=tolerance) - (MEANS[0].view(1, 2, 1, 1) + 0.4 * x)
    assert error.square().mean().sqrt() < 5 * tolerance


def test_adaptive_steps_are_an_image_s_own():
    """Of images for which they are of another length, and beside one that is not finite."""
    flow = create_flow()
    speeds = torch.tensor([1, 3, 5, math.nan, 0.1], dtype=f64).view(-1, 1, 1, 1)
    x, calls = start(5), []

    def network(x, t, speed):
        calls.append(t)
        return speed * torch.sin(5 * speed * x + 0.01 * t.view(-1, 1, 1, 1))

    together = rk45(flow, network, x, clip_denoised=False, model_kwargs=dict(speed=speeds))
    asked = len(calls)
    alone = [rk45(flow, network, x[i : i + 1], clip_denoised=False, model_kwargs=dict(speed=speeds[i])) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9, equal_nan=True)
    assert together.isfinite().all((1, 2, 3)).tolist() == [True, True, True, False, True]
    assert torch.stack(calls[:asked]).std(1).max() > 10  # thousandths of the way: they are not at one place
    assert len(calls) - asked > 1.5 * asked  # the slowest decides how many, not all of them together


@pytest.mark.parametrize("path", PATHS)
def test_adaptive_steps_end_where_torchdiffeq_s_do(path):
    """To 1e-6 where both keep to 1e-9 in each step; between the two modes errors grow."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    flow, x = create_flow(path=path), start()
    network = exact(flow, MEANS, 0.4)
    tolerance = dict(rtol=1e-9, atol=1e-9)
    ends = torch.tensor([0, 1], dtype=f64)
    expected = odeint(lambda t, x: flow.velocity(network, x, t.expand(len(x))), x, ends, method="dopri5", **tolerance)[1]
    torch.testing.assert_close(rk45(flow, network, x, clip_denoised=False, **tolerance), expected, rtol=1e-6, atol=1e-6)


def test_adaptive_steps_end_where_none_is_short_enough():
    """Of a velocity that points to zero from both sides, so that it jumps in every step once zero is reached."""
    asked, x = [], torch.tensor([0.1, -0.2], dtype=f64).view(2, 1, 1, 1)

    def network(x, t):
        asked.append(t)
        return torch.where(t.view(-1, 1, 1, 1) < 900, 0, -10 * x.sign())

    end = rk45(create_flow(), network, x, clip_denoised=False)
    torch.testing.assert_close(end, torch.zeros_like(x), rtol=0, atol=10 * SHORTEST)
    assert len(asked) < 2 * 6 * 0.1 / SHORTEST  # of a tenth of the way in the shortest steps


def test_adaptive_steps_pass_over_a_jump():
    x = start(3)
    end = rk45(create_flow(), lambda x, t: (t < 700).to(x).view(-1, 1, 1, 1).expand_as(x), x, clip_denoised=False)
    torch.testing.assert_close(end, x + 0.7, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", [sampler for sampler in FLOW_SAMPLERS.values() if sampler is not rk45])
@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000, 1001])
def test_every_number_of_steps_leads_from_noise_to_the_image(sampler, steps):
    asked = []
    x = sampler(create_flow(steps), lambda x, t: asked.append(t) or -x, torch.randn(2, 1, 2, 2))
    asked = torch.stack(asked)
    assert asked.shape == (steps * (1 + (sampler is heun)), 2)
    assert asked.min() == asked[0, 0] == 0
    assert asked.max() <= 1000
    assert x.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", [euler, sde])
def test_samples_have_the_mean_and_covariance_of_the_data(path, sampler):
    x = start(20_000)
    samples = run(sampler, path, 200, MEANS, x)[:, :, 0, 0]
    mean = MEANS.mean(0)
    covariance = 0.16 * torch.eye(2, dtype=f64) + torch.einsum("mi,mj->ij", MEANS - mean, MEANS - mean) / 2
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=0.05)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_stochastic_sampler_leaves_no_noise(steps):
    flow, x = create_flow(steps), start()
    samples = sde(flow, exact(flow, MEANS[:1], 0.0), x, clip_denoised=False)
    torch.testing.assert_close(samples, MEANS[0].view(1, 2, 1, 1).expand_as(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS.values())
def test_the_network_is_asked_within_its_times_alone(sampler):
    flow, asked = create_flow(7), []
    sampler(flow, lambda x, t: asked.append(t) or exact(flow, MEANS, 0.4)(x, t), start())
    asked = torch.cat(asked)
    assert asked.min() == 0
    assert asked.max() <= 1000


def test_the_stochastic_sampler_draws_noise_once_per_step():
    drawn = []
    x = start(4)
    run(sde, "linear", 10, MEANS, x, randn_like=lambda x: drawn.append(1) or torch.randn_like(x))
    assert len(drawn) == 10
    assert torch.equal(run(euler, "linear", 10, MEANS, x), run(euler, "linear", 10, MEANS, x))


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS.values())
def test_pixels_can_be_kept_in_range(sampler):
    flow = create_flow(10)
    assert sampler(flow, exact(flow, 2 * MEANS, 0.4), start()).abs().max() == 1


def test_times_in_training():
    p = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(create_flow().draw_times(p), p)
    t = create_flow(times="logit-normal").draw_times(p)
    torch.testing.assert_close(torch.logit(t).std(), torch.tensor(1.0), rtol=0.01, atol=0)
    assert t.median() == pytest.approx(0.5, abs=1e-3)
    assert create_flow(times="logit-normal").draw_times(torch.zeros(1)).isfinite().all()


def test_shifted_times_are_sd3s_from_its_noise_to_its_image():
    """There t = 1 is noise: t' = s t / (1 + (s - 1) t)."""
    p = (torch.arange(100, dtype=f64) + 0.5) / 100
    noise = 1 - p
    flow = create_flow(4, time_shift=3.0)
    torch.testing.assert_close(1 - flow.draw_times(p), 3 * noise / (1 + 2 * noise))
    drawn = 1 - create_flow(times="logit-normal").draw_times(p)
    shifted = create_flow(times="logit-normal", time_shift=3.0).draw_times(p)  # drawn first, as SD3 does
    torch.testing.assert_close(1 - shifted, 3 * drawn / (1 + 2 * drawn))
    expected = [1 - 3 * left / (1 + 2 * left) for left in (1, 0.75, 0.5, 0.25)]
    assert [start for start, _ in flow.steps()] == pytest.approx(expected)
    assert [start + length for start, length in flow.steps()] == pytest.approx([*expected[1:], 1])


@pytest.mark.parametrize("sampler", [euler, heun, sde])
@pytest.mark.parametrize("shift", [0.3, 4.0])
def test_samplers_go_all_the_way_in_shifted_steps(sampler, shift):
    flow, x = create_flow(200, time_shift=shift), start()
    end = sampler(flow, exact(flow, MEANS[:1], 0.4), x, clip_denoised=False, randn_like=torch.zeros_like)
    if sampler is sde:  # without its noise
        assert end.isfinite().all()
    else:
        torch.testing.assert_close(end, MEANS[0].view(1, 2, 1, 1) + 0.4 * x, rtol=0, atol=0.04)


WRONG = [dict(path="curved"), dict(times="late"), dict(predict="noise"), dict(time_shift=0.0), dict(num_timesteps=0)]


@pytest.mark.parametrize("options", WRONG)
def test_unknown_options_are_named(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        create_flow(**options)
