"""What SA-Solver and ER-SDE reduce to, and the options that the suite of all solvers does not vary."""

from __future__ import annotations

import numpy as np
import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.samplers import Noise

EDM = checks.SCHEDULES["edm"]


@pytest.mark.parametrize("schedule", list(checks.SCHEDULES))
@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("sa_solver:predictor_order=1,corrector_order=0", "ddim:eta=1"),
        ("sa_solver:predictor_order=1,corrector_order=0,tau=0", "ddim"),
        (
            "sa_solver:predictor_order=2,corrector_order=0,lower_order_final=false",
            "dpmpp_2m_sde:solver_type=heun",
        ),
        (
            "sa_solver:predictor_order=2,corrector_order=0,tau=0,lower_order_final=false",
            "dpmpp_2m:solver_type=heun",
        ),
        ("er_sde:order=1,noise_scale=sde", "ddim:eta=1"),
        ("er_sde:order=1,noise_scale=ode", "ddim"),
    ],
)
def test_is_the_same_method(spec, same, schedule):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 9)
    results = [checks.solve(fs.compile(s, grid), grid) for s in (spec, same)]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-12)


PAIRS = [(1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3), (3, 2), (3, 3)]


@pytest.mark.parametrize("lower_order_final", ["true", "false"])
@pytest.mark.parametrize("predictor, corrector", PAIRS)
def test_sa_solver_without_noise_has_the_declared_order(predictor, corrector, lower_order_final):
    orders = f"predictor_order={predictor},corrector_order={corrector},lower_order_final={lower_order_final}"
    solver = fs.solver(f"sa_solver:tau=0,{orders}")
    assert abs(checks.slope(lambda grid: fs.compile(solver, grid), EDM, False) - solver.order) < 0.2


@pytest.mark.parametrize("predictor, corrector", PAIRS)
def test_sa_solver_has_the_declared_weak_order(predictor, corrector):
    orders = f"predictor_order={predictor},corrector_order={corrector},lower_order_final=false"
    solver = fs.solver(f"sa_solver:{orders}")
    assert checks.weak_slope(lambda grid: fs.compile(solver, grid), EDM) > solver.weak_order - 0.2


@pytest.mark.parametrize("at", ["target", "start"])
def test_sa_solver_draws_noise_inside_its_interval(at):
    grid = checks.ratio_grid(EDM, 9)
    low, high = grid[6].ratio * 0.99, grid[3].ratio * 1.01
    program = fs.compile("sa_solver", grid, s_min=low, s_max=high, tau_at=at)
    ends = [(program.nodes[op.start], program.nodes[op.stop]) for op in program.ops if isinstance(op, Noise)]
    assert [stop if at == "target" else start for start, stop in ends] == [grid[i] for i in (3, 4, 5, 6)]


@pytest.mark.parametrize("noise_scale", ["ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"])
def test_er_sde_integrates_what_riemann_sums_converge_to(noise_scale):
    grid = checks.ratio_grid(EDM, 4, high=80.0, low=0.002)
    options = {"noise_scale": noise_scale}
    exact, coarse, fine = (
        checks.solve(fs.compile("er_sde", grid, riemann=n, **options), grid)
        for n in (0, 1_000_000, 2_000_000)
    )
    extrapolated = 2 * fine - coarse  # the error of a left sum is first order in its width
    np.testing.assert_allclose(extrapolated, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_er_sde_is_first_order_with_riemann_sums():
    solver = fs.solver("er_sde:order=2,noise_scale=ode,riemann=1")
    assert abs(checks.slope(lambda grid: fs.compile(solver, grid), EDM, False) - solver.order) < 0.2
