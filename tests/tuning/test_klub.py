"""Align Your Steps: the bound in closed form on Gaussian data, its minimum by other means, what it is good for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize

import fewstep as fs
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import source_of
from fewstep.schedules import EDM, VP, Flow, NoiseSchedule, make_grid
from fewstep.tuning import Source, error, solve, table_of
from fewstep.tuning.candidates import shortest_path, student
from fewstep.tuning.klub import (
    align_your_steps,
    descend,
    doubled,
    gaussian_integral,
    resampled,
    step_costs,
    sweep,
    table_ratios,
)

DEVIATION = 0.5


def gaussian(noise_schedule: NoiseSchedule) -> Source:
    """Data N(0, c^2) in 16 dimensions, whose denoised prediction is known."""

    def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (torch.from_numpy(a)[:, None] for a in noise_schedule.alpha_sigma(t.double().numpy()))
        return alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * x

    def noise(indices):
        return torch.stack(
            [torch.randn(16, generator=torch.Generator().manual_seed(i)) for i in indices]
        ).double()

    return Source(lambda _: fs.Denoiser(denoised, noise_schedule, "denoised"), noise, noise_schedule)


def klub(levels: np.ndarray) -> float:
    """An element, on that data: the closed form."""
    return DEVIATION**4 * float(gaussian_integral(levels[1:], levels[:-1], levels[:-1], DEVIATION).sum())


@pytest.mark.parametrize(("low", "high"), [(0.002, 0.02), (0.1, 3.0), (2.0, 80.0), (1.0, math.inf)])
def test_the_closed_form_is_the_integral(low, high):
    def integrand(t: float) -> float:
        return t**-3 * (1 / (DEVIATION**2 + t**2) - 1 / (DEVIATION**2 + high**2))

    expected = integrate.quad(integrand, low, high, epsabs=0, epsrel=1e-10)[0]
    assert gaussian_integral(low, high, high, DEVIATION) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("noise_schedule", [VP.linear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_the_cost_of_every_step_is_the_closed_form(noise_schedule):
    """The quadrature is exact on this data, so that only the random numbers are left: 2,048 times 16 of them."""
    source = gaussian(noise_schedule)
    indices = range(256)
    data = DEVIATION * source.noise(indices)
    high = noise_schedule.level_max
    high = math.inf if high == 1.0 else high
    ratios = table_ratios(0.02, high, DEVIATION, 20)
    cost = step_costs(source, list(indices), data, ratios, paths=8)
    assert np.isinf(cost[np.tril_indices(len(cost))]).all()
    for i in range(len(ratios) - 1):
        expected = DEVIATION**4 * gaussian_integral(ratios[i + 1], ratios[i], ratios[i], DEVIATION)
        assert cost[i, i + 1] == pytest.approx(float(expected), rel=0.05)
        assert cost[i, -1] == pytest.approx(klub(ratios[[i, -1]]), rel=0.05)


@pytest.mark.parametrize("steps", [3, 6, 10])
def test_the_search_finds_the_optimum_on_a_gaussian(steps):
    """By coordinates on a table against dynamic programming on it, and against direct minimisation off it."""
    ratios = table_ratios(0.02, 80.0, DEVIATION, 160)
    shape = 1.0 / (DEVIATION**2 + ratios**2)
    i, j = np.triu_indices(len(ratios), 1)
    cost = np.full((len(ratios),) * 2, np.inf)
    cost[i, j] = DEVIATION**4 * gaussian_integral(ratios[j], ratios[i], ratios[i], DEVIATION)
    assert np.all(np.diff(shape) > 0)
    start = np.rint(np.linspace(0, len(ratios) - 1, steps + 1)).astype(int).tolist()
    found, exact = (ratios[path] for path in (descend(cost, start), shortest_path(cost, steps)))
    assert klub(exact) <= klub(found) <= 1.07 * klub(exact)

    def objective(inner: np.ndarray) -> float:
        levels = np.exp(np.concatenate([[math.log(80.0)], np.sort(inner)[::-1], [math.log(0.02)]]))
        return math.log(klub(levels))

    direct = optimize.minimize(
        objective, np.log(ratios[start[1:-1]]), method="Powell", options={"xtol": 1e-8}
    )
    assert klub(exact) == pytest.approx(math.exp(direct.fun), rel=5e-3)
    np.testing.assert_allclose(np.log(exact[1:-1]), np.sort(direct.x)[::-1], atol=0.1)


def test_many_optimal_levels_are_uniform_in_the_logarithm_of_the_precision():
    ratios = table_ratios(0.02, 80.0, DEVIATION, 400)
    cost = np.full((len(ratios),) * 2, np.inf)
    i, j = np.triu_indices(len(ratios), 1)
    cost[i, j] = gaussian_integral(ratios[j], ratios[i], ratios[i], DEVIATION)
    levels = ratios[shortest_path(cost, 40)]
    gaps = np.diff(np.log(DEVIATION**-2 + levels**-2))
    assert gaps[2:].std() / gaps[2:].mean() < 0.2


def test_every_sweep_lowers_the_bound_and_moves_nothing_that_is_frozen():
    generator = np.random.default_rng(3)
    cost = np.where(np.triu(np.ones((60, 60)), 1) > 0, generator.random((60, 60)), np.inf)

    def total(path):
        return cost[path[:-1], path[1:]].sum()

    path = [0, 10, 20, 30, 40, 50, 59]
    for _ in range(5):
        moved = sweep(cost, path, frozen=(2, 4))
        assert total(moved) <= total(path) and moved[2] == 20 and moved[4] == 40
        assert moved == sorted(set(moved)) and moved[0] == 0 and moved[-1] == 59
        path = moved
    seen = []
    best = descend(cost, [0, 10, 20, 59], judge=lambda p: seen.append(p) or float(abs(p[1] - 10)))
    assert (
        best == [0, 10, 20, 59] and len(seen) <= 4
    )  # the first look was the best: stopped after three others


def test_doubling_and_resampling():
    assert doubled([0, 4, 9, 11]) == [0, 2, 4, 6, 9, 10, 11]
    levels = np.array([np.inf, 8.0, 4.0, 1.0, 0.5])
    np.testing.assert_allclose(resampled(levels, 2), [np.inf, 4.0, 0.5])
    np.testing.assert_allclose(resampled(levels, 4), levels)


@pytest.fixture(scope="module", params=["gmm", "gmm:noise=flow"])
def problem(request):
    source = source_of(load_target(f"builtin:{request.param}"))
    return source, solve(source, range(1000, 1024), 80), solve(source, range(32), 80)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_it_beats_the_hand_made_schedules(problem, solver):
    source, truth, fresh = problem
    for nfe in (5, 8):
        found = error(
            student(solver, align_your_steps(source, truth, nfe, solver=solver), source), source, fresh
        )
        for name in ("karras", "exponential", "linspace", "trailing", "kl_optimal", "arctan"):
            grid = make_grid(source.noise_schedule, nfe, name)
            assert found < error(table_of(solver, grid), source, fresh), name


def test_more_than_ten_steps_are_made_by_doubling(problem):
    source, truth, _ = problem
    for nfe in (14, 25):
        levels = align_your_steps(source, truth, nfe, size=48, paths=2)
        assert len(levels) == nfe + 1 and levels[0] == source.top and levels[-1] == 0.0
        assert all(a > b for a, b in zip(levels, levels[1:]))


def test_a_judge_of_ones_own(problem):
    source, truth, _ = problem
    levels = align_your_steps(source, truth, 6, judge=lambda levels: abs(levels[-2] - 0.15))
    assert abs(levels[-2] - 0.15) < 0.1
    assert align_your_steps(source, truth, 6, seed=1, early=False) == align_your_steps(
        source, truth, 6, seed=1, early=False
    )
