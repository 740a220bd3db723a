"""Stochastic solvers: what they reduce to."""

from __future__ import annotations

import numpy as np
import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.schedules import VP, Flow, TimeGrid, make_grid

INDEXED = VP.scaled_linear()


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("res_multistep_ancestral:eta=0", "res_2m"),
        ("dpmpp_2m_sde:eta=0", "dpmpp_2m"),
        ("dpmpp_3m_sde:variant=exact", "sa_solver:corrector_order=0,lower_order_final=false"),
        ("ddpm", "ddim:eta=1"),
        ("lcm", "cps:eta=1"),
        ("tcd:gamma=0", "ddim"),
        ("predictor_corrector:corrector_steps=0", "ddpm:variance=large"),
        ("predictor_corrector:predictor=ancestral,corrector_steps=0", "ddpm"),
    ],
)
@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_reduces_to(spec, same, schedule):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 8)
    results = [checks.solve(fs.compile(s, grid), grid) for s in (spec, same)]
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-11)


def test_both_variances_of_ddpm_are_exact_on_the_data_they_are_made_for():
    grid = make_grid(INDEXED, 6)
    for square, variance in ((0.0, "small"), (1.0, "large")):
        end = grid.part(0, grid.steps - 1)
        program = fs.compile("ddpm", end, variance=variance)
        assert checks.gaussian_variance(program, end, square) == pytest.approx(1.0, abs=1e-12)


def test_the_boundary_condition_of_lcm_keeps_the_state_at_time_zero():
    grid = TimeGrid.from_times(INDEXED, [0], final_zero=True)
    _, form = fs.compile("lcm:timestep_scaling=10", grid).unroll()
    assert form == {0: 1.0, 1: 0.0} or form == {0: 1.0}
    far = TimeGrid.from_times(INDEXED, [999], final_zero=True)
    _, form = fs.compile("lcm:timestep_scaling=10", far).unroll()
    assert abs(form[0]) < 1e-8 and form[1] == pytest.approx(1.0, abs=1e-8)


def test_tcd_goes_by_a_training_index_below_and_to_the_clean_end_for_gamma_one():
    grid = TimeGrid.from_times(INDEXED, [999, 499])
    (_, t), low = grid, INDEXED.alpha_sigma(np.floor(0.7 * 499))
    program = fs.compile("tcd", grid, prediction="epsilon")
    _, form = program.unroll()
    noise = np.sqrt(t.sigma**2 - (t.alpha / low[0] * low[1]) ** 2)
    assert form[max(form)] == pytest.approx(noise, rel=1e-12)

    flow = checks.ratio_grid(Flow(), 8)
    results = [checks.solve(fs.compile(s, flow), flow) for s in ("tcd:gamma=1", "lcm")]
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-12)
