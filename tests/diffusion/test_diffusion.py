"""Diffusion against published numbers and where everything is known."""

import pickle

import pytest
import torch

from diffusion import create_diffusion, create_objective, spaced_timesteps
from diffusion.noise import PerImageNoise, image_seeds
from diffusion.samplers import SAMPLERS, ddim, dpm_solver


def network(x, t):
    """The stand-in network of the golden file."""
    s = (t / 1000).view(-1, 1, 1, 1)
    return torch.cat([0.6 * x + 0.1 * torch.sin(3 * x) + 0.05 * s, torch.tanh(x) * (1 - s)], dim=1)


VARIANTS = {
    "cosine": dict(noise_schedule="squaredcos_cap_v2"),
    "xstart": dict(predict_xstart=True),
    "fixed_large": dict(learn_sigma=False),
    "fixed_small": dict(learn_sigma=False, sigma_small=True),
    "kl": dict(use_kl=True),
    "rescaled": dict(rescale_learned_sigmas=True),
}


def test_tables_and_losses_are_the_published_ones(golden):
    numbers, diffusion = golden("diffusion.npz"), create_diffusion("")
    x0, t, noise, x_t = (numbers[name] for name in ("x0", "t", "noise", "x_t"))
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        torch.testing.assert_close(getattr(diffusion, name), numbers[name], rtol=1e-11, atol=0)
    ours = {
        "x_t": diffusion.q_sample(x0, t, noise),
        **diffusion.training_losses(network, x0, t, noise=noise),
        **diffusion.p_mean_variance(network, x_t, t, clip_denoised=False),
        "mean_clipped": diffusion.p_mean_variance(network, x_t, t)["mean"],
    }
    del ours["variance"]  # not in the file
    assert len(ours) == 8
    for name, value in ours.items():
        torch.testing.assert_close(value, numbers[name], rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_loss_is_the_published_one(golden, variant):
    numbers, options = golden("diffusion.npz"), VARIANTS[variant]
    model = network if options.get("learn_sigma", True) else lambda x, t: network(x, t)[:, :3]
    loss = create_diffusion("", **options).training_losses(model, numbers["x0"], numbers["t"], noise=numbers["noise"])["loss"]
    torch.testing.assert_close(loss, numbers[f"loss.{variant}"], rtol=5e-5, atol=1e-6)


def test_the_rescaled_bound_has_the_weight_of_its_steps_among_a_thousand():
    x, t, noise = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 3]), torch.randn(3, 3, 4, 4)
    plain, rescaled = (
        create_diffusion("4", rescale_learned_sigmas=rescale).training_losses(network, x, t, noise=noise)
        for rescale in (False, True)
    )
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * 4 / 1000)
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + rescaled["vb"])


def test_a_clean_image_is_changed_first_and_clipped_afterwards():
    diffusion, x, t = create_diffusion("4"), torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 3])
    plain = diffusion.p_mean_variance(network, x, t, clip_denoised=False)["pred_xstart"]
    changed = diffusion.p_mean_variance(network, x, t, denoised_fn=lambda x: 2 * x)["pred_xstart"]
    torch.testing.assert_close(changed, (2 * plain).clamp(-1, 1))


def test_ddim_goes_on_with_the_noise_beside_the_clipped_image():
    diffusion, x, t, shown = create_diffusion("2"), 3 * torch.randn(2, 3, 4, 4), torch.ones(2, dtype=torch.long), []
    diffusion.ddim_sample_loop(lambda x, t: shown.append(x) or network(x, t), x.shape, x)
    clean = diffusion.p_mean_variance(network, x, t)["pred_xstart"]
    assert (clean.abs() == 1).any()
    torch.testing.assert_close(shown[1], diffusion.q_sample(clean, t - 1, diffusion.predict_noise(x, t, clean)))


@pytest.mark.parametrize("respacing", ["10", "ddim25", "5,5"])
def test_samples_are_the_published_ones(golden, respacing):
    numbers, diffusion = golden("diffusion.npz"), create_diffusion(respacing)
    z = numbers["z"]
    torch.manual_seed(123)
    ddpm = diffusion.p_sample_loop(network, z.shape, z, clip_denoised=False)
    ddim = diffusion.ddim_sample_loop(network, z.shape, z, clip_denoised=False)
    torch.testing.assert_close(ddpm, numbers[f"ddpm.{respacing}"], rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(ddim, numbers[f"ddim.{respacing}"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("respacing", ["", "250", "50", "ddim50", "10,15,20", "1"])
def test_timesteps_are_the_published_ones(golden, respacing):
    diffusion = create_diffusion(respacing)
    assert diffusion.timestep_map == golden("diffusion.npz")[f"timesteps.{respacing}"].tolist()
    assert diffusion.num_timesteps == len(diffusion.timestep_map)


@pytest.mark.parametrize("respacing", ["ddim300", "0", "-1", "2000", "600,300", "many", "ddimx"])
def test_impossible_respacings_are_named(respacing):
    with pytest.raises(ValueError, match=r"timesteps|stride"):
        spaced_timesteps(1000, respacing)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"sqrt.*known: linear"):
        create_diffusion("", noise_schedule="sqrt")


def test_a_linear_schedule_needs_steps_whose_variances_are_below_one():
    with pytest.raises(ValueError, match="more than 20 steps, not 20: its last variance is 20 / 20"):
        create_diffusion("", diffusion_steps=20)
    assert create_diffusion("", diffusion_steps=21).betas.max() < 1


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(use_kl=True), dict(learn_sigma=False)], ids=str)
def test_networks_may_answer_in_half_precision(half, options):
    """As under autocast; losses and samples are float32."""
    diffusion = create_diffusion("4", **options)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 3])

    def answers(kind):
        return lambda x, t: torch.cat([x, x], 1)[:, : 4 if diffusion.learn_sigma else 2].mul(0.5).to(kind)

    def losses_and_samples(kind):
        torch.manual_seed(0)
        found = diffusion.training_losses(answers(kind), x, t, noise=torch.ones_like(x))["loss"]
        return found, diffusion.p_sample_loop(answers(kind), x.shape, x)

    found = losses_and_samples(half)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    torch.testing.assert_close(found, losses_and_samples(torch.float32), rtol=0.02, atol=0.02)


def test_a_diffusion_may_be_handed_to_another_process():
    diffusion, x, t = create_diffusion("4"), torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 3])
    copy = pickle.loads(pickle.dumps(diffusion))
    assert torch.equal(*(one.training_losses(network, x, t, noise=torch.ones_like(x))["loss"] for one in (diffusion, copy)))


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_no_images_are_no_error(loop):
    diffusion = create_diffusion("4")
    none = torch.empty(0, 2, 4, 4)
    assert getattr(diffusion, loop)(lambda x, t: torch.cat([x, x], 1), none.shape, none).shape == none.shape


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_skipping_steps_keeps_the_marginals(schedule):
    whole, spaced = (create_diffusion(r, noise_schedule=schedule) for r in ("", "37"))
    torch.testing.assert_close(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map])
    torch.testing.assert_close((1 - spaced.betas).cumprod(0), spaced.alphas_cumprod)


LOOPS = [("p_sample_loop", {}), ("ddim_sample_loop", {}), ("ddim_sample_loop", {"eta": 1})]


def optimal_for_gaussian(diffusion, mean, std):
    """The best prediction of the noise if every pixel of the data is normal."""

    def model(x, t):
        abar = diffusion.alphas_cumprod.float()[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)

    return model


@pytest.mark.parametrize(("loop", "options"), LOOPS)
def test_a_perfect_network_samples_its_data(loop, options):
    diffusion = create_diffusion("", learn_sigma=False, sigma_small=True)
    mean, std = 0.3, 0.5
    model = optimal_for_gaussian(diffusion, mean, std)
    x = getattr(diffusion, loop)(model, (4, 1, 32, 32), device="cpu", clip_denoised=False, **options)
    assert x.mean() == pytest.approx(mean, abs=0.03)
    assert x.std() == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_classifier_guidance_shifts_the_mean(loop):
    """Tilting standard normal data by exp(s x_0) moves their mean to s; seen from x_t, the tilt's gradient is s sqrt(abar)."""
    diffusion, strength = create_diffusion("", learn_sigma=False, sigma_small=True), 0.5

    def gradient(x, t):
        return strength * diffusion.alphas_cumprod.float()[t].sqrt().view(-1, 1, 1, 1).expand_as(x)

    model = optimal_for_gaussian(diffusion, mean=0, std=1)
    x = getattr(diffusion, loop)(model, (4, 1, 32, 32), device="cpu", clip_denoised=False, cond_fn=gradient)
    assert x.mean() == pytest.approx(strength, abs=0.05)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_pass_on_what_they_are_given(loop):
    """A gradient sees what the network sees: timesteps of training, and its other inputs. The last step goes to the changed
    image."""
    diffusion, x, seen = create_diffusion("4"), torch.randn(2, 3, 4, 4), []

    def model(x, t, y):
        seen.append((t.tolist(), y))
        return network(x, t)

    def gradient(x, t, y):
        seen.append((t.tolist(), y))
        return torch.zeros_like(x)

    options = dict(cond_fn=gradient, denoised_fn=lambda x: torch.full_like(x, 0.25), model_kwargs=dict(y=3))
    out = getattr(diffusion, loop)(model, x.shape, x, **options)
    assert seen == [([t, t], 3) for t in (999, 666, 333, 0) for _ in range(2)]
    torch.testing.assert_close(out, torch.full_like(x, 0.25))


def test_ddim_at_eta_1_is_ddpm_with_the_variance_of_the_posterior():
    diffusion, x = create_diffusion("10", learn_sigma=False, sigma_small=True), torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def end(loop, **options):
        torch.manual_seed(1)
        return getattr(diffusion, loop)(lambda x, t: network(x, t)[:, :3], x.shape, x, **options)

    torch.testing.assert_close(end("ddim_sample_loop", eta=1.0), end("p_sample_loop"))


@pytest.mark.parametrize(("loop", "options"), LOOPS)
def test_noise_is_drawn_once_per_step(loop, options):
    """Also where it is not used, so that what is drawn next does not depend on the sampler."""
    drawn = []
    how = dict(device="cpu", randn_like=lambda x: drawn.append(1) or torch.randn_like(x))
    getattr(create_diffusion("5"), loop)(network, (1, 3, 2, 2), **how, **options)
    assert len(drawn) == 5


@pytest.mark.parametrize("sampler", SAMPLERS.values())
@pytest.mark.parametrize("steps", [1, 2, 3, 999, 1000])
def test_every_number_of_steps_begins_at_noise(sampler, steps):
    """One step, too: the public timesteps of "1" are another matter."""
    if sampler is dpm_solver and steps == 1000:
        pytest.skip("refused")
    shown = []

    def asked(x, t):
        shown.append(t)
        return network(x, t)

    x = sampler(create_objective("diffusion", steps), asked, torch.randn(2, 3, 2, 2))
    shown = torch.stack(shown)
    assert shown.shape == (steps, 2)
    assert shown[0].tolist() == [999, 999]
    assert (shown.diff(dim=0) < 0).all()
    assert x.isfinite().all()
    assert x.abs().max() <= 1


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", ["2", "3", "10"])
def test_ddim_as_noisy_as_ddpm_is_finite(schedule, steps):
    """Nothing may be left for the predicted noise, and rounding must not make that less than nothing."""
    diffusion = create_diffusion(steps, noise_schedule=schedule)
    assert diffusion.ddim_sample_loop(network, (1, 3, 2, 2), device="cpu", eta=1.0).isfinite().all()


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_one_step_goes_straight_to_the_clean_image(loop):
    diffusion, x = create_diffusion("1"), torch.randn(2, 3, 4, 4)
    expected = diffusion.p_mean_variance(network, x, torch.zeros(2, dtype=torch.long), clip_denoised=False)["pred_xstart"]
    out = getattr(diffusion, loop)(network, x.shape, x, clip_denoised=False)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("steps", "fixed"), [("1", {}), *((n, dict(sigma_small=s)) for n in "14" for s in (False, True))])
def test_the_last_step_has_a_variance(steps, fixed):
    """Its posterior has none: if fixed, that of the step before it, or beta where there is none."""
    diffusion, x = create_diffusion(steps, learn_sigma=not fixed, **fixed), torch.randn(2, 3, 4, 4)
    found = diffusion.p_mean_variance(lambda x, t: network(x, t)[:, : 3 if fixed else 6], x, torch.zeros(2, dtype=torch.long))
    expected = diffusion.posterior_variance[1] if steps == "4" else diffusion.betas[0]
    torch.testing.assert_close(found["variance"], torch.full_like(x, expected.item()), rtol=1e-4, atol=0)


def test_the_bound_does_not_train_the_mean():
    diffusion, x = create_diffusion(""), torch.randn(2, 3, 4, 4)
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    terms = diffusion.training_losses(lambda x, t: output, x, torch.tensor([0, 500]))
    terms["vb"].sum().backward()
    assert not output.grad[:, :3].any()
    assert output.grad[:, 3:].any()


def test_learned_variance_needs_twice_the_channels():
    with pytest.raises(ValueError, match="need 6 output channels; the network has 3"):
        create_diffusion("").p_mean_variance(lambda x, t: x, torch.randn(1, 3, 2, 2), torch.tensor([3]))


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    seeds = image_seeds(0, range(5), "sampling")
    together = PerImageNoise(seeds, "cpu")
    alone = PerImageNoise(seeds[3:4], "cpu")
    for _ in range(2):
        torch.testing.assert_close(together.randn(3, 2)[3:4], alone.randn(3, 2), rtol=0, atol=0)
    assert len({x.item() for x in PerImageNoise(image_seeds(0, range(1000), "sampling"), "cpu").randn()}) == 1000
    assert image_seeds(0, range(5), "sampling") != image_seeds(0, range(5), "training")
    assert image_seeds(0, range(5), "sampling") != image_seeds(1, range(5), "sampling")
    assert image_seeds(0, range(5), "sampling") != image_seeds(2**32, range(5), "sampling")
    assert len(PerImageNoise(image_seeds(2**63 - 1, [0, 2**32 - 1, 2**40], "sampling"), "cpu").randn(1)) == 3


def test_dpm_solver_needs_few_steps():
    """Of data from a Gaussian the best prediction of the noise is known, and with it where every sample must end."""
    mean, std = 0.3, 0.5
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def end(sampler, steps, **options):
        diffusion = create_diffusion(str(steps), learn_sigma=False, **options)
        abar = (1 - diffusion.training_betas).cumprod(0)

        def network(x, t):
            a = abar[t].view(-1, 1, 1, 1)
            noise = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
            return (x - (1 - a).sqrt() * noise) / a.sqrt() if diffusion.predict_xstart else noise

        return sampler(diffusion, network, x, clip_denoised=False)

    errors = [[(end(s, steps) - mean - std * x).abs().max() for s in (dpm_solver, ddim)] for steps in (10, 20, 40)]
    assert errors[0][0] < errors[0][1]
    assert errors[1][0] < errors[1][1] / 2
    assert errors[2][0] < errors[2][1] / 10
    torch.testing.assert_close(end(dpm_solver, 20, predict_xstart=True), end(dpm_solver, 20), rtol=1e-3, atol=1e-5)


def test_dpm_solver_takes_fewer_steps_than_training():
    with pytest.raises(ValueError, match="fewer steps than training's 1000, not 1000"):
        dpm_solver(create_diffusion(""), lambda x, t: torch.cat([x, x], 1), torch.randn(2, 3, 4, 4))
    assert dpm_solver(create_diffusion("999"), lambda x, t: torch.cat([x, x], 1), torch.randn(1, 1, 2, 2)).isfinite().all()


def test_every_uniform_number_is_a_timestep():
    p = torch.tensor([0, 0.5, 0.99999, 1])
    assert create_diffusion("").draw_times(p).tolist() == [0, 500, 999, 999]


def test_dpm_solver_clips_and_splits_off_the_variance():
    out = dpm_solver(create_diffusion("8"), lambda x, t: torch.cat([-3 * x, x], 1), torch.randn(2, 3, 4, 4))
    assert out.abs().max() <= 1


@pytest.mark.parametrize("predict_xstart", [True, False])
def test_min_snr_weights_the_error_of_the_image_by_the_ratio_but_no_more_than_gamma(predict_xstart):
    """At a timestep of little noise, one where the ratio is about gamma, and one of much noise."""
    options = dict(predict_xstart=predict_xstart, learn_sigma=False)
    plain, weighted = create_diffusion("", **options), create_diffusion("", min_snr=5.0, **options)
    t, x, noise = torch.tensor([0, 350, 900]), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    ratio = plain.alphas_cumprod[t] / (1 - plain.alphas_cumprod[t])
    assert (ratio > 5).tolist() == [True, False, False]
    per_image = torch.tensor([5, ratio[1], ratio[2]])
    weights = per_image if predict_xstart else per_image / ratio
    losses = weighted.training_losses(lambda x, t: 0 * x, x, t, noise=noise)
    torch.testing.assert_close(losses["mse"], plain.training_losses(lambda x, t: 0 * x, x, t, noise=noise)["mse"])
    torch.testing.assert_close(losses["loss"], losses["mse"] * weights.float(), rtol=1e-5, atol=0)


def test_min_snr_leaves_the_bound_of_the_variance_alone():
    diffusion, t = create_diffusion("", min_snr=1e-3), torch.tensor([100])
    losses = diffusion.training_losses(lambda x, t: torch.cat([x, x], 1), torch.randn(1, 2, 4, 4), t)
    torch.testing.assert_close(losses["loss"] - losses["vb"], losses["mse"] * diffusion.weight(t, losses["mse"]))
    with pytest.raises(ValueError, match="min_snr=5 weights squared errors, of which a loss with use_kl has none"):
        create_diffusion("", use_kl=True, min_snr=5)


def test_noise_may_be_drawn_elsewhere_than_it_is_used():
    meta, image = torch.device("meta"), torch.empty(2, 3)
    noise = PerImageNoise([1, 2], meta, drawn_on="cpu")
    assert noise.rand(3).device == noise.randn(3).device == noise(image).device == meta
