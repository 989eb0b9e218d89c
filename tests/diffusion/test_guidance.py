"""Classifier-free guidance by its formula."""

import pytest
import torch

from diffusion import create_diffusion, create_flow
from diffusion.guidance import Guidance, acts, guided
from models import DiT_models


@torch.no_grad()
def test_guidance_on_a_part_of_the_way_and_on_all_channels(randomize):
    model = randomize(DiT_models["DiT-N/4"](input_size=8, in_channels=4, num_classes=10, learn_sigma=False)).eval()
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    flow, null = create_flow(), torch.full((2,), 10)

    def network(t, *settings):
        return guided(model, flow, Guidance(2.5, *settings))(x, t, y)

    t = torch.full((2,), 400.0)
    plain, without = model(x, t, y), model(x, t, null)
    all_channels = without + 2.5 * (plain - without)
    torch.testing.assert_close(network(t, None), all_channels)
    torch.testing.assert_close(network(t)[:, :3], all_channels[:, :3])
    torch.testing.assert_close(network(t)[:, 3], plain[:, 3])
    for interval in ((0.3, 0.5), (0.4, 0.9), (0.1, 0.4)):  # of which both ends are a part
        torch.testing.assert_close(network(t, None, interval), all_channels)
    torch.testing.assert_close(network(t, None, (0.5, 0.9)), plain)
    t[1] = 800  # of a sampler in which every image has steps of its own
    plain, without = model(x, t, y), model(x, t, null)
    expected = torch.stack([without[0] + 2.5 * (plain - without)[0], plain[1]])
    torch.testing.assert_close(network(t, None, (0.3, 0.5)), expected)
    expected = torch.stack([without[0], plain[1]])
    half = guided(model, flow, Guidance(0, None, (0.3, 0.5)))
    torch.testing.assert_close(half(x, t, y), expected)
    diffusion = create_diffusion("10")
    assert [diffusion.progress(t) for t in (1000, 250, 0)] == [0, 0.75, 1]


@torch.no_grad()
def test_a_guided_network_is_led_away_from_a_weaker_one(randomize):
    size, x, t = dict(input_size=8, in_channels=3, num_classes=10), torch.randn(2, 3, 8, 8), torch.tensor([250.0, 800.0])
    model, guide = (randomize(DiT_models[name](**size)).eval() for name in ("DiT-N/2", "DiT-N/4"))
    y, diffusion = torch.tensor([3, 7]), create_diffusion("10")
    for scale in (1, 2.5):
        plain = guided(model, diffusion, Guidance(scale))(x, t, y)
        led = guided(model, diffusion, Guidance(scale, guide=guide, guide_scale=3.0))(x, t, y)
        weak = guide(x, t, y)[:, :3]
        torch.testing.assert_close(led[:, :3], weak + 3 * (plain[:, :3] - weak), rtol=1e-4, atol=1e-4)
        assert torch.equal(led[:, 3:], plain[:, 3:])  # the variances are not
        part = guided(model, diffusion, Guidance(scale, None, (0.5, 1.0), guide, 3.0))(x, t, y)
        torch.testing.assert_close(part[0, :3], led[0, :3])
        torch.testing.assert_close(part[1], guided(model, diffusion, Guidance(scale, None, (0.5, 1.0)))(x, t, y)[1])
    same = guided(model, diffusion, Guidance(1, guide=model, guide_scale=3.0))(x, t, y)
    torch.testing.assert_close(same, model(x, t, y), rtol=1e-4, atol=1e-4)
    weaker = Guidance(0, guide=guide, guide_scale=3.0)  # nothing depends on the class
    assert torch.equal(guided(model, diffusion, weaker)(x, t, y), guided(model, diffusion, weaker)(x, t, 10 - y))
    without = randomize(DiT_models["DiT-N/4"](**size | dict(num_classes=0))).eval()
    led = guided(model, diffusion, Guidance(1, guide=without, guide_scale=0))(x, t, y)
    torch.testing.assert_close(led[:, :3], without(x, t, torch.zeros_like(y))[:, :3])


@torch.no_grad()
def test_all_channels_of_an_image_are_guided_and_its_variances_are_not(randomize):
    model = randomize(DiT_models["DiT-N/4"](input_size=8, in_channels=1, num_classes=10)).eval()
    x, y, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 7]), torch.full((2,), 400.0)
    plain, led = model(x, t, y), guided(model, create_diffusion("10"), Guidance(2.5))(x, t, y)
    assert (led[:, 0] != plain[:, 0]).any()
    torch.testing.assert_close(led[:, 1], plain[:, 1])


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_guide_may_be_of_any_type(randomize, kind):
    size, t, y = dict(input_size=8, in_channels=3, num_classes=10), torch.tensor([250.0, 800.0]), torch.tensor([3, 7])
    model, guide = (randomize(DiT_models[name](**size)).eval().to(kind) for name in ("DiT-N/2", "DiT-N/4"))
    network = guided(model, create_diffusion("10"), Guidance(1, guide=guide, guide_scale=3.0))
    led = network(torch.randn(2, 3, 8, 8).to(kind), t.to(kind), y)
    assert led.dtype == kind
    assert led.isfinite().all()


@pytest.mark.parametrize("objective", [create_flow(), create_flow(time_scale=1), create_diffusion("10")])
def test_a_part_of_the_way_is_that_of_the_time_that_the_network_sees(objective):
    way = torch.tensor([0.2, 0.4, 0.6])
    t = way * objective.time_scale if hasattr(objective, "time_scale") else 1000 * (1 - way)
    assert acts(Guidance(2.5, None, (0.3, 0.5)), objective, t).tolist() == [False, True, False]
