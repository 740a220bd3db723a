"""Langevin moves on Gaussian data, where their effect on the variance is known in closed form."""

from __future__ import annotations

import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.samplers import Trace
from fewstep.samplers.langevin import langevin_move

SCHEDULES = list(checks.SCHEDULES)
SQUARE = 0.25


def level(schedule: str):
    """One node with its variance on data of variance SQUARE."""
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 4)
    return grid.part(0, 1), grid[0].alpha ** 2 * SQUARE + grid[0].sigma ** 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rate", [0.4, 0.05, 0.01])
def test_a_move_leaves_the_marginal_up_to_the_square_of_its_length(schedule, rate):
    grid, v = level(schedule)
    node, e = grid[0], rate * grid[0].sigma ** 2
    trace = Trace(grid)
    program = trace.finish(langevin_move(trace, trace.start, node, rate))
    assert checks.gaussian_variance(program, [node, node], SQUARE) == pytest.approx(
        1 + (e / v) ** 2, rel=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("spec", "rate"),
    [
        ("predictor_corrector:corrector_steps=400,snr=0.16", 2 * 0.16**2),
        ("predictor_corrector:corrector_steps=400,snr=0.3,predictor=ancestral", 2 * 0.3**2),
        ("annealed_langevin:steps_each=400", 0.1),
        ("annealed_langevin:steps_each=400,step_size=0.4", 0.2),
    ],
)
def test_many_moves_end_a_known_share_above_the_level(schedule, spec, rate):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 1, 1.0, 0.7)
    v = grid[1].alpha ** 2 * SQUARE + grid[1].sigma ** 2
    expected = 1 / (1 - rate * grid[1].sigma ** 2 / (2 * v))
    found = checks.gaussian_variance(fs.compile(spec, grid), grid, SQUARE)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_the_corrector_mends_the_predictor(schedule, predictor):
    """A long step of the predictor misses the variance; moves at the new level bring it back."""
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 2)
    miss = [
        abs(checks.gaussian_variance(fs.compile(spec, grid), grid, SQUARE) - 1)
        for moves in (0, 1, 4)
        for spec in [f"predictor_corrector:predictor={predictor},corrector_steps={moves},snr=0.16"]
    ]
    assert miss[0] > miss[1] > miss[2]


def test_moves_are_counted_from_one():
    with pytest.raises(ValueError, match="option 'steps_each' of solver 'annealed_langevin' must be .*>= 1"):
        fs.solver("annealed_langevin:steps_each=0")
