"""``fs.sample_adaptive``: error against tolerance, counts, the published controller, ends, noise and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import solver_checks as checks
import torch

import fewstep as fs
from fewstep.schedules import EDM, VP, Flow, NoiseSchedule, VPContinuous

PREDICTIONS: dict[str, Any] = {"vp": "epsilon", "edm": "denoised", "flow": "flow"}
SPAN: Any = checks.SPAN


def denoiser(schedule: NoiseSchedule, prediction: Any) -> fs.Denoiser:
    """The mixture of the order measurements as a network."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # Denoiser hands over fp32 times; what the steps are compared with has none
        alpha, sigma = schedule.alpha_sigma(float(t[0]))
        model = getattr(checks.mixture(), prediction)
        return torch.from_numpy(model(x.numpy(), float(alpha), float(sigma)))

    return fs.Denoiser(network, schedule, prediction)


def run(name: str, y: np.ndarray, high: float = SPAN[0], low: float = SPAN[1], **options: Any):
    """From ratio ``high`` to ``low``, in and out in the frame x / alpha: (result, y at the end, denoiser)."""
    schedule = checks.SCHEDULES[name]
    start, end = (float(schedule.level_at_ratio(k)) for k in (high, low))
    model = denoiser(schedule, PREDICTIONS[name])
    x = torch.from_numpy(y) * float(schedule.alpha_sigma_at(start)[0])
    result = fs.sample_adaptive(model, x, start=start, end=end, **options)
    return result, result.x.numpy() / float(schedule.alpha_sigma_at(end)[0]), model


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", checks.SCHEDULES)
def test_the_error_falls_with_the_tolerance(name: str, order: int) -> None:
    y, truth = checks.start_and_truth()
    errors, spent = [], []
    for rtol in (1e-1, 1e-2, 1e-3):
        result, found, _ = run(name, y, order=order, rtol=rtol, atol=rtol / 10)
        errors.append(float(np.sqrt(np.mean((found - truth) ** 2))))
        spent.append(result.nfe)
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 2e-4
    assert spent == sorted(spent) and spent[0] < spent[2]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", checks.SCHEDULES)
def test_counts_and_levels(name: str, order: int) -> None:
    y, _ = checks.start_and_truth()
    result, _, model = run(name, y, order=order, h_init=2.0, rtol=1e-2)
    assert result.rejected > 0
    assert result.nfe == order * result.accepted + (order - 1) * result.rejected
    assert model.nfe == result.nfe * len(y)
    assert len(result.levels) == result.accepted + 1
    assert all(a > b for a, b in zip(result.levels, result.levels[1:]))
    ends = checks.SCHEDULES[name].level_at_ratio(np.array(SPAN))
    assert result.levels[0] == ends[0] and result.levels[-1] == ends[1]


@pytest.mark.parametrize("order", [2, 3])
def test_one_model_takes_the_same_steps_under_every_schedule(order: int) -> None:
    y = 20.0 * np.random.default_rng(1).standard_normal((16, 2))
    results = [run(name, y, 20.0, 0.02, order=order) for name in checks.SCHEDULES]
    (first, found, _), *others = results
    for result, other, _ in others:
        assert (result.accepted, result.rejected) == (first.accepted, first.rejected)
        np.testing.assert_allclose(other, found, atol=1e-4)  # times are fp32


def eps(y: np.ndarray, t: float) -> np.ndarray:
    return checks.mixture().epsilon(y, 1.0, math.exp(-t))


def moved(y: np.ndarray, t: float, h: float, *terms: tuple[float, np.ndarray]) -> np.ndarray:
    return y - math.exp(-(t + h)) * sum(weight * value for weight, value in terms)


def two_stage(
    y: np.ndarray, t: float, h: float, first: np.ndarray, r: float
) -> tuple[np.ndarray, np.ndarray]:
    """DPM-Solver-2 and the change of eps at its stage."""
    change = eps(moved(y, t, r * h, (math.expm1(r * h), first)), t + r * h) - first
    return moved(y, t, h, (math.expm1(h), first), (math.expm1(h) / (2 * r), change)), change


def published(y: np.ndarray, order: int, rtol: float, atol: float, h: float, p: float, i: float, d: float):
    """The loop of k-diffusion's dpm_adaptive, from its formulas in sigma = exp(-t): (y, accepted, rejected)."""
    t, end, before, past = -math.log(SPAN[0]), -math.log(SPAN[1]), y, None
    accepted = rejected = 0
    while t < end - 1e-5:
        u = min(end, t + h)
        step, first = u - t, eps(y, t)
        if order == 2:
            low, (high, _) = moved(y, t, step, (math.expm1(step), first)), two_stage(y, t, step, first, 1 / 2)
        else:
            low, change = two_stage(y, t, step, first, 1 / 3)
            r = 2 / 3 * step
            inside = moved(y, t, r, (math.expm1(r), first), (2 * (math.expm1(r) / r - 1), change))
            change = eps(inside, t + r) - first
            high = moved(y, t, step, (math.expm1(step), first), (1.5 * (math.expm1(step) / step - 1), change))
        tolerated = np.maximum(atol, rtol * np.maximum(abs(low), abs(before)))
        inverse = 1 / (np.sqrt(np.mean(((low - high) / tolerated) ** 2)) + 1e-8)
        past = past or [inverse, inverse]
        factor = inverse ** ((p + i + d) / order) * past[0] ** (-(p + 2 * d) / order) * past[1] ** (d / order)
        factor = 1 + math.atan(factor - 1)
        h *= factor
        if factor >= 0.81:
            y, before, t, past, accepted = high, low, u, [inverse, past[0]], accepted + 1
        else:
            rejected += 1
    return y, accepted, rejected


@pytest.mark.parametrize("pid", [(0.0, 1.0, 0.0), (0.4, 0.6, 0.1)], ids=["i", "pid"])
@pytest.mark.parametrize("order", [2, 3])
def test_it_is_the_published_loop(order: int, pid: tuple[float, float, float]) -> None:
    y, _ = checks.start_and_truth()
    expected, accepted, rejected = published(y, order, 1e-3, 1e-4, 1.0, *pid)
    result, found, _ = run(
        "edm",
        y,
        order=order,
        rtol=1e-3,
        atol=1e-4,
        h_init=1.0,
        pcoeff=pid[0],
        icoeff=pid[1],
        dcoeff=pid[2],
    )
    assert rejected > 0 and (result.accepted, result.rejected) == (accepted, rejected)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # times are fp32


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (VPContinuous(), "denoised"),
        (EDM(), "denoised"),
        (Flow(), "denoised"),
        (VP.linear(zero_terminal_snr=True), "denoised"),
    ],
    ids=["vp", "edm", "flow", "zero-snr"],
)
def test_from_the_noisiest_level_to_none_a_point_mass_is_exact(schedule, prediction) -> None:
    model = fs.Denoiser(lambda x, t: torch.full_like(x, 0.7), schedule, prediction)
    x = float(schedule.alpha_sigma_at(schedule.level_max)[1]) * torch.randn(4, 3, dtype=torch.float64)
    result = fs.sample_adaptive(model, x, order=2)
    assert torch.allclose(result.x, torch.full_like(x, 0.7), atol=1e-12)
    assert result.levels[0] == schedule.level_max and result.levels[-1] == 0.0
    assert result.levels[-2] == pytest.approx(schedule.level_min)


def test_it_spends_fewer_evaluations_on_an_easy_model_than_on_a_hard_one() -> None:
    y = 20.0 * np.random.default_rng(1).standard_normal((16, 2))
    easy = fs.Denoiser(lambda x, t: torch.zeros_like(x), EDM(), "denoised")
    spent = fs.sample_adaptive(easy, torch.from_numpy(y), start=20.0, end=0.02).nfe
    assert 1.5 * spent < run("edm", y, 20.0, 0.02)[0].nfe


def gaussian(variance: float = 0.25, **kwargs: Any) -> fs.Denoiser:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return variance * x / (variance + t[:, None].to(x.dtype) ** 2)

    return fs.Denoiser(network, EDM(0.01, 20.0), "denoised", **kwargs)


@pytest.mark.parametrize("noise", ["white", "brownian"])
def test_the_ancestral_version_is_a_function_of_the_seed(noise: Any) -> None:
    x = 20.0 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        fs.sample_adaptive(gaussian(), x, eta=1.0, noise=noise, seed=seed, rtol=0.2) for seed in (3, 3, 4)
    )
    assert torch.equal(first.x, again.x) and first.levels == again.levels
    assert not torch.equal(first.x, other.x)
    still = fs.sample_adaptive(gaussian(), x, eta=1.0, s_noise=0.0, seed=3)
    assert torch.equal(still.x, fs.sample_adaptive(gaussian(), x, eta=1.0, s_noise=0.0, seed=4).x)


def test_the_ancestral_version_keeps_the_variance_of_a_gaussian() -> None:
    x = 20.0 * torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    result = fs.sample_adaptive(gaussian(), x, eta=1.0, rtol=1e-3, atol=1e-4)
    assert abs(float(result.x.std()) - 0.5) < 0.01


def test_guidance_costs_two() -> None:
    model = gaussian(unconditional=gaussian(1.0).fn)
    result = fs.sample_adaptive(model, 20.0 * torch.randn(4, 3), guidance=2.0)
    assert model.nfe == 2 * 4 * result.nfe


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_state_keeps_its_type(dtype: torch.dtype) -> None:
    result = fs.sample_adaptive(gaussian(), (20.0 * torch.randn(4, 3)).to(dtype))
    assert result.x.dtype == dtype and torch.isfinite(result.x).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 4}, "option 'order' of sample_adaptive must be one of 2, 3, got 4"),
        ({"rtol": -0.1}, "'rtol' of sample_adaptive must be a number >= 0, got -0.1"),
        ({"atol": 0.0}, "'atol' of sample_adaptive must be a number > 0, got 0"),
        ({"h_init": 0.0}, "'h_init' .* a number > 0"),
        ({"accept_safety": 1.5}, "'accept_safety' .* > 0 and <= 1, got 1.5"),
        ({"pcoeff": math.nan}, "'pcoeff' .* a number, got nan"),
        ({"eta": -1.0}, "'eta' .* a number >= 0"),
        ({"noise": "pink"}, "noise must be 'white', 'brownian', 'philox' or a source"),
        ({"seed": [1, 2]}, "2 seeds for a batch of 4"),
        ({"start": 0.1, "end": 0.2}, "strictly decreasing"),
        ({"end": -0.1}, "numbers >= 0"),
        ({"guidance": 2.0}, "needs an unconditional network"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_first_call(options: dict[str, Any], words: str) -> None:
    model = gaussian()
    with pytest.raises(ValueError, match=words):
        fs.sample_adaptive(model, torch.randn(4, 3), **options)
    assert model.nfe == 0


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a fewstep\.Denoiser, got str"):
        fs.sample_adaptive("unet", torch.randn(4, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating-point tensor"):
        fs.sample_adaptive(gaussian(), torch.ones(4, 3, dtype=torch.int64))


def test_a_prediction_that_is_not_finite_stops_the_run() -> None:
    model = fs.Denoiser(lambda x, t: x / 0.0 if float(t[0]) < 1.0 else 0.0 * x, EDM(), "denoised")
    with pytest.raises(fs.NumericalError, match=r"not finite .* t = ") as caught:
        fs.sample_adaptive(model, 80.0 * torch.randn(4, 3))
    assert caught.value.state is not None and torch.isfinite(caught.value.state).all()


def test_tolerances_that_no_step_meets_stop_the_run() -> None:
    noisy = fs.Denoiser(lambda x, t: torch.randn_like(x), EDM(), "denoised")
    with pytest.raises(fs.NumericalError, match="no step meets rtol = 0 and atol = 1e-13"):
        fs.sample_adaptive(noisy, 80.0 * torch.randn(4, 3), rtol=0.0, atol=1e-13)
