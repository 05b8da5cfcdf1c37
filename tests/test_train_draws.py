"""What a training step is about: draws, noise and loss."""

from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler

from tests.small_pipeline import SCHEDULE
from train.config import Optimizer, Stream
from train.diffusion import Diffusion
from train.optimizer import learning_rate
from train.stages import STAGES, draw, plan

CPU = torch.device("cpu")


# --- what a step is about -----------------------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls():
    config = Optimizer(lr=1.0, warmup=4, final=0.1)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_steps_draw_streams_and_tasks_in_their_shares():
    streams = {"video": Stream(share=3.0), "image": Stream(share=1.0, num_frames=1)}
    plans = [plan(STAGES["joint"], streams, 0, step) for step in range(2000)]
    counts = Counter(one.stream for one in plans) + Counter(one.task for one in plans)
    for name, share in {"video": 0.75, "image": 0.25, "t2v": 0.25, "i2v": 0.25, "ti2v": 0.5}.items():
        assert counts[name] / 2000 == pytest.approx(share, abs=0.04)
    again = plan(STAGES["joint"], streams, 0, 7)
    assert (again.stream, again.task) == (plans[7].stream, plans[7].task)
    assert torch.equal(torch.rand(3, generator=again.generator), torch.rand(3, generator=plans[7].generator))
    assert {plan(STAGES["t2v"], streams, 0, step).task for step in range(9)} == {"t2v"}


def test_samples_draw_their_conditions_in_their_shares():
    latents = torch.zeros(4000, 1, 1, 1, 1)
    t2v, i2v, ti2v = (draw(task, 0, latents, 1000, 0, 1) for task in ("t2v", "i2v", "ti2v"))

    def share(x: torch.Tensor) -> float:
        return x.double().mean().item()

    assert share(t2v.empty_text) == pytest.approx(0.1, abs=0.015)
    assert (t2v.text_weight, t2v.image_weight) == (1.0, 0.0)
    assert i2v.empty_text.all()
    assert share(i2v.text_weight) == pytest.approx(0.5, abs=0.03)
    assert share(i2v.image_weight) == pytest.approx(0.9, abs=0.015)
    dropped = torch.stack([ti2v.empty_text, ti2v.image_weight == 0])
    assert ti2v.text_weight == 1.0
    for text, image in ((True, False), (False, True), (True, True)):
        both = (dropped[0] == text) & (dropped[1] == image)
        assert share(both) == pytest.approx(0.05, abs=0.012)
    assert share(ti2v.t) == pytest.approx(499.5, abs=15)
    assert (int(ti2v.t.min()), int(ti2v.t.max())) == pytest.approx((0, 999), abs=2)


def test_a_sample_draws_the_same_on_any_rank():
    latents = torch.zeros(4, 2, 4, 3, 3)
    whole = draw("ti2v", 0, latents, 1000, 5, 6)
    part = draw("ti2v", 2, latents[:2], 1000, 5, 6)
    assert torch.equal(whole.noise[2:], part.noise)
    assert torch.equal(whole.t[2:], part.t)
    assert whole.noise.std().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(whole.noise[0], whole.noise[1])
    assert not torch.equal(draw("ti2v", 0, latents, 1000, 5, 7).noise, whole.noise)


def test_a_samples_noise_tells_nothing_of_its_noise_level():
    draws = [draw("ti2v", 0, torch.zeros(500, 1, 1, 4, size), 1000, 5, size) for size in (1, 8)]  # two ways to draw
    for one in draws:
        drawn = torch.cat([one.noise.flatten(1), one.t[:, None]], 1).double().T
        assert drawn.corrcoef()[-1, :-1].abs().max() < 0.2


# --- noise and loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_noise_and_targets_are_the_schedulers(prediction):
    zero = prediction != "epsilon"
    schedule = SCHEDULE | {"prediction_type": prediction, "rescale_betas_zero_snr": zero}
    theirs = DDIMScheduler.from_config(schedule)
    x, noise, t = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5), torch.tensor([0, 400, 999])
    noisy, target = Diffusion(schedule, CPU).noisy(x, noise, t)
    torch.testing.assert_close(noisy, theirs.add_noise(x, noise, t))
    expected = {"v_prediction": theirs.get_velocity(x, noise, t), "epsilon": noise, "sample": x}[prediction]
    torch.testing.assert_close(target, expected)
    assert torch.equal(noisy[2], noise[2]) == zero  # the last step shows nothing of x


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_min_snr_weighs_the_error_of_x0(prediction):
    schedule = SCHEDULE | {"prediction_type": prediction, "rescale_betas_zero_snr": False}
    diffusion = Diffusion(schedule, CPU, min_snr=5.0)
    x, noise, t = torch.randn(8, 1, 4, 4, 4).double(), torch.randn(8, 1, 4, 4, 4).double(), torch.arange(50, 850, 100)
    noisy, target = (y.double() for y in diffusion.noisy(x, noise, t))
    error = torch.randn_like(target) * 0.1
    a, s = (table.double()[t].view(-1, 1, 1, 1, 1) for table in (diffusion.signal, diffusion.noise))
    x0 = {
        "v_prediction": a * noisy - s * (target + error),
        "epsilon": (noisy - s * (target + error)) / a,
        "sample": target + error,
    }[prediction]
    weight = (a / s).square().clamp(max=5.0).flatten()
    expected = (weight * (x0 - x).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(diffusion.loss(target + error, target, t).double(), expected, rtol=1e-3, atol=1e-5)


def test_the_noise_cannot_be_predicted_where_there_is_nothing_else():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr with prediction_type epsilon"):
        Diffusion(SCHEDULE | {"prediction_type": "epsilon"}, CPU)
