"""What the exact multistep rules reduce to, and the options that the suite of all solvers does not vary."""

from __future__ import annotations

import numpy as np
import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.samplers import Combine
from fewstep.schedules import TimeGrid, VPContinuous, make_grid

EDM, VP = checks.SCHEDULES["edm"], checks.SCHEDULES["vp"]


@pytest.mark.parametrize("form", ["denoised", "epsilon"])
@pytest.mark.parametrize("corrector", ["none", "pec", "pece"])
@pytest.mark.parametrize("start", ["corrected", "runge_kutta", "euler"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_exp_adams_has_the_declared_order_and_cost(order, start, corrector, form):
    solver = fs.solver(f"exp_adams:order={order},start={start},corrector={corrector},form={form}")
    observed = checks.slope(lambda grid: fs.compile(solver, grid), VP, False, order > 3)
    assert abs(observed - solver.order) < 0.2
    nfe = fs.compile(solver, checks.ratio_grid(VP, 9)).nfe
    assert nfe == 9 * solver.evaluations_per_step + solver.startup_evaluations


def test_exp_adams_of_order_five_is_of_order_five_from_the_first_step():
    solver = fs.solver("exp_adams:order=5")
    assert abs(checks.slope(lambda grid: fs.compile(solver, grid), EDM, False) - 5) < 0.2
    assert solver.startup_evaluations == 3


@pytest.mark.parametrize("schedule", list(checks.SCHEDULES))
@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("exp_adams:order=2", "dpmpp_2m:solver_type=heun"),
        ("exp_adams:order=2,form=epsilon", "dpmpp_2m:solver_type=heun,form=epsilon"),
        ("exp_adams:order=1", "ddim"),
        ("ipndm_v:frame=edm", "deis:order=4,variable=rho"),
        ("ipndm_v:order=2,weights=published", "ipndm_v:order=2"),
        ("gradient_estimation:gamma=1", "euler"),
        ("gradient_estimation:gamma=1.5", "ipndm:order=2"),
    ],
)
def test_is_the_same_method(spec, same, schedule):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 9)
    results = [checks.solve(fs.compile(s, grid), grid) for s in (spec, same)]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-11)


def test_variable_weights_are_the_uniform_ones_on_a_uniform_grid():
    grid = TimeGrid.from_levels(EDM, np.linspace(1.0, 0.1, 10))
    results = [checks.solve(fs.compile(f"ipndm:weights={w}", grid), grid) for w in ("variable", "uniform")]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-12)


def last_weights(spec: str, grid: TimeGrid) -> dict[int, float]:
    """Register -> coefficient of the last step, network outputs alone."""
    program = fs.compile(spec, grid, prediction="epsilon")
    op = next(op for op in program.ops if op.dst == program.output)
    assert isinstance(op, Combine)
    return dict(op.terms[1:])


@pytest.mark.parametrize("schedule, adds_up", [("karras", False), ("exponential", True)])
def test_published_weights_of_ipndm_v_add_up_on_geometric_grids_only(schedule, adds_up):
    levels = make_grid(EDM, 8, schedule).level[:-1]
    grid = TimeGrid.from_levels(EDM, levels)
    step = levels[-1] - levels[-2]
    for rule, exact in (("variable", True), ("published", adds_up)):
        total = sum(last_weights(f"ipndm:weights={rule}", grid).values())
        assert (abs(total / step - 1.0) < 1e-9) == exact


@pytest.mark.parametrize("variable", ["t", "vp", "rho", "log_rho"])
@pytest.mark.parametrize("schedule", list(checks.SCHEDULES))
def test_sums_of_deis_approach_the_integrals(schedule, variable):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 6)
    exact = checks.solve(fs.compile(f"deis:variable={variable}", grid), grid)
    for both_ends in ("false", "true"):
        error = [
            np.abs(checks.solve(fs.compile(spec, grid), grid) - exact).max()
            for n in (100, 1000)
            for spec in [f"deis:variable={variable},riemann={n},both_ends={both_ends}"]
        ]
        assert 9 < error[0] / error[1] < 11


def test_deis_has_the_published_coefficients(golden):
    """The tables act on x for tAB and on x / alpha for rhoAB; the first column is the state's coefficient."""
    cases = [golden.case(name) for name in golden.names("deis")]
    tables = [case for case in cases if "coef_ref" in case]
    assert tables
    for case in tables:
        for table, points in (("coef_exact", 0), ("coef_ref", 10000)):
            variable = {"t_ab": "t", "rho_ab": "rho"}[case.meta["method"]]
            order = case.meta["ab_order"] + 1
            grid = TimeGrid.from_times(VPContinuous(case.meta["beta0"], case.meta["beta1"]), case["ts"])
            spec = f"deis:order={order},variable={variable},riemann={points}"
            program = fs.compile(spec, grid, prediction="epsilon")
            steps = [op for op in program.ops if isinstance(op, Combine)]
            for row, op, (s, t) in zip(case[table], steps, grid.intervals(), strict=True):
                scale = (1 / t.alpha, 1 / s.alpha) if variable == "rho" else (1.0, 1.0)
                got = [c * scale[0] for _, c in op.terms]
                got[0] /= scale[1]
                np.testing.assert_allclose(got, row[: len(got)], rtol=1e-8, atol=1e-9)


def test_an_analytical_first_step_starts_without_signal():
    grid = TimeGrid.from_levels(checks.SCHEDULES["flow"], np.linspace(1.0, 0.0, 6))
    for frame in ("flow", "edm"):
        program = fs.compile(f"ipndm:frame={frame}+afs", grid)
        assert program.nfe == 4
        (first, *_), _ = program.unroll()
        # x_0 = 0 and eps = x, in both frames
        assert first == pytest.approx({0: 0.8})


@pytest.mark.parametrize(
    "spec",
    ["exp_adams:order=0", "exp_adams:order=5,start=runge_kutta", "deis:riemann=2", "ipndm:order=5"],
)
def test_refuses_what_it_cannot_do(spec):
    with pytest.raises(ValueError, match=r"option '(order|riemann)' .* got"):
        fs.compile(spec, checks.ratio_grid(EDM, 6))
