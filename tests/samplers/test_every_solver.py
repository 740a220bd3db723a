"""The suite that every registered solver gets by itself: exactness, order, cost, determinism, hosts, precision."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import solver_checks as checks
import torch

import fewstep as fs
from fewstep.samplers import Stepper, WhiteNoise
from fewstep.schedules import TimeGrid, make_grid

VARIANTS = checks.variants()
NAMES = list(fs.solvers())
SCHEDULES = list(checks.SCHEDULES)


def full_grid(schedule: str, steps: int) -> TimeGrid:
    """From the noisiest level (alpha = 0 for flow) to no noise at all."""
    if schedule == "flow":
        return TimeGrid.from_levels(checks.SCHEDULES["flow"], 1.0 - np.arange(steps + 1) / steps)
    return make_grid(checks.SCHEDULES[schedule], steps, "karras")


@pytest.mark.parametrize("spec", [v for v in VARIANTS if v not in checks.INEXACT])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_is_exact_on_a_point_mass(spec, schedule):
    for grid in (
        checks.ratio_grid(checks.SCHEDULES[schedule], 7),
        full_grid(schedule, 6),
        full_grid(schedule, 1),
    ):
        error = checks.exactness_error(fs.compile(spec, grid), grid, spec in checks.SIGNAL_ONLY)
        assert error < 1e-11 * grid[0].sigma


@pytest.mark.parametrize("spec", sorted(checks.SIGNAL_ONLY))
def test_exceptions_from_exactness_are_needed(spec):
    grid = checks.ratio_grid(checks.SCHEDULES["vp"], 7)
    assert checks.exactness_error(fs.compile(spec, grid), grid) > 1e-4


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_has_the_declared_order(spec, schedule):
    solver = fs.solver(spec)
    factory = lambda grid: fs.compile(solver, grid)  # noqa: E731
    # Twice the steps would bring fifth order down to rounding.
    observed = checks.slope(factory, checks.SCHEDULES[schedule], solver.stochastic, solver.order == 4)
    if solver.order == 0:  # noise that does not shrink with the step: nothing converges
        assert observed < 0.5
    elif solver.stochastic:  # strong order; a good drift can show more until its error is below the noise's
        assert observed > solver.order - 0.2
    else:
        assert abs(observed - solver.order) < 0.2, f"{spec}: order {observed:.2f}, declared {solver.order}"


@pytest.mark.parametrize("spec", [v for v in VARIANTS if fs.solver(v).stochastic])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_has_the_declared_weak_order(spec, schedule):
    solver = fs.solver(spec)
    observed = checks.weak_slope(lambda grid: fs.compile(solver, grid), checks.SCHEDULES[schedule])
    if solver.weak_order > 0:
        assert observed > solver.weak_order - 0.2, f"{observed:.2f}, declared {solver.weak_order}"


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_planted_wrong_coefficient_is_caught(spec):
    solver, schedule = fs.solver(spec), checks.SCHEDULES["vp"]
    grid = checks.ratio_grid(schedule, 7)
    planted = checks.plant_inconsistent(fs.compile(solver, grid))
    assert checks.exactness_error(planted, grid, spec in checks.SIGNAL_ONLY) > 1e-4
    # A wrong coefficient that keeps the sum is invisible to a point mass; the order shows it.
    if solver.order > 1 and planted != checks.plant_lower_order(planted):
        observed = checks.slope(lambda g: checks.plant_lower_order(fs.compile(solver, g)), schedule, False)
        assert observed < solver.order - 0.2


@pytest.mark.parametrize("spec", [v for v in VARIANTS if "+skip" not in v and "+restart" not in v])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_spends_the_evaluations_it_declares(spec, schedule):
    solver = fs.solver(spec)
    cost, extra = solver.evaluations_per_step, solver.startup_evaluations
    fewer = checks.FEWER.get(solver.name, 0)
    assert fs.compile(spec, checks.ratio_grid(checks.SCHEDULES[schedule], 7)).nfe == 7 * cost + extra - fewer
    # A step to sigma = 0 has one stage; in the EDM frame so has one from alpha = 0.
    nfe = fs.compile(spec, full_grid(schedule, 7)).nfe
    assert 7 + 5 * (cost - 1) + min(extra, 0) - fewer <= nfe <= 7 + 6 * (cost - 1) + max(extra, 0)


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_prediction_gives_the_same_sample(spec, schedule):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 6)
    results = [
        checks.solve(fs.compile(spec, grid, prediction=p), grid) for p in ("denoised", "epsilon", "v", "flow")
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-9)


def tensors(schedule: str, dtype=torch.float32) -> tuple[fs.Denoiser, torch.Tensor]:
    """A small network with fixed weights and a start state, for tests of the machinery."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(6, 6, generator=generator) / 3).to(dtype)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.to(dtype) @ weight + t[:, None].to(dtype) / 1000)

    noise_schedule = checks.SCHEDULES[schedule]
    x = torch.randn(3, 6, generator=generator) * float(
        noise_schedule.alpha_sigma_at(noise_schedule.level_max)[1]
    )
    return fs.Denoiser(network, noise_schedule, "flow" if schedule == "flow" else "epsilon"), x


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_host_driven_equals_library_driven_to_the_bit(spec, schedule):
    denoiser, x = tensors(schedule)
    expected = fs.sample(denoiser, x, spec, steps=6, seed=3)
    assert torch.equal(expected, fs.sample(denoiser, x, spec, steps=6, seed=3))
    program = fs.compile(spec, make_grid(denoiser.noise_schedule, 6), prediction=denoiser.prediction)
    assert denoiser.nfe == 2 * 3 * program.nfe

    stepper = Stepper(program, x, WhiteNoise([3, 4, 5]))
    twins = []
    while not stepper.done:
        if stepper.evaluations == program.nfe // 2:
            twins = [copy.deepcopy(stepper), pickle.loads(pickle.dumps(stepper))]
        stepper.step(denoiser(stepper.x, stepper.node))
    assert torch.equal(stepper.x, expected)
    for twin in twins:  # a run can be copied or stored in the middle and continued
        while not twin.done:
            twin.step(denoiser(twin.x, twin.node))
        assert torch.equal(twin.x, expected)


@pytest.mark.parametrize("spec", VARIANTS)
def test_starts_in_the_middle_of_a_grid(spec):
    denoiser, x = tensors("vp")
    grid = make_grid(denoiser.noise_schedule, 8)
    tail = fs.compile(spec, grid.tail(3), prediction=denoiser.prediction)
    stepper = Stepper(tail, x, WhiteNoise([0, 1, 2]))
    while not stepper.done:
        stepper.step(denoiser(stepper.x, stepper.node))
    assert torch.equal(stepper.x, fs.sample(denoiser, x, spec, sigmas=grid.level[3:], seed=0))


@pytest.mark.parametrize("spec", ["euler", "ddim:eta=1", "heun", "euler_ancestral"])
def test_a_one_step_method_continues_itself(spec):
    denoiser, x = tensors("vp")
    levels = make_grid(denoiser.noise_schedule, 8).level
    middle = fs.sample(denoiser, x, spec, sigmas=levels[:5], seed=0)
    assert torch.equal(
        fs.sample(denoiser, middle, spec, sigmas=levels[4:], seed=0),
        fs.sample(denoiser, x, spec, sigmas=levels, seed=0),
    )


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_of_the_network_bounds_the_error(spec, dtype):
    reference, x = tensors("vp", torch.float64)
    coarse, _ = tensors("vp", dtype)
    options = {"steps": 6, "schedule": "karras:sigma_max=20"}
    exact = fs.sample(reference, x.double(), spec, **options)
    result = fs.sample(coarse, x, spec, **options)
    assert result.dtype == torch.float32
    # The error of the network is amplified by the sum of its coefficients, some 1 / sqrt(epsilon) at most here.
    assert (result - exact).abs().max() < 60 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("spec", VARIANTS)
def test_results_do_not_depend_on_the_batch(spec):
    denoiser, x = tensors("vp")
    whole = fs.sample(denoiser, x, spec, steps=5, seed=10)
    alone = torch.cat([fs.sample(denoiser, x[i : i + 1], spec, steps=5, seed=10 + i) for i in range(3)])
    assert torch.allclose(whole, alone, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_program_survives_json_and_describes_itself(spec, schedule):
    program = fs.compile(spec, full_grid(schedule, 5))
    assert fs.Program.from_json(program.to_json()) == program
    assert str(program.nfe) in program.describe()
    solver = fs.solver(spec)
    assert program.history <= max(4, solver.all_options.get("order", 0)) + 1 + 2 * len(solver.transforms)
