"""The search for a solver: its designs are what they say, and it beats what it starts from within its budget."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from fewstep.eval.targets import load_target
from fewstep.eval.tuning import source_of
from fewstep.schedules import make_grid
from fewstep.tuning import error, search_solver, solve, table_of
from fewstep.tuning.grids import starting_grids
from fewstep.tuning.solver_search import Choice, Design, _predictor
from fewstep.tuning.table import angle
from fewstep.tuning.tune import SOLVERS

SOURCE = source_of(load_target("builtin:gmm"))


@pytest.fixture(scope="module")
def truth():
    return solve(SOURCE, range(1000, 1012), 60)


def design(kind: Choice, steps: int = 6) -> Design:
    grid = make_grid(SOURCE.noise_schedule, steps, "karras")
    return Design(tuple(angle(node) for node in list(grid)[:-1]), (kind,) * steps)


@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        (Choice(1, "denoised", False), "euler"),
        (Choice(2, "denoised", False), "unipc:corrector=false,lower_order_final=false"),
        (Choice(3, "denoised", True), "unipc:order=3,lower_order_final=false"),
        (Choice(2, "epsilon", True), "unipc:form=epsilon,lower_order_final=false"),
    ],
)
def test_a_design_of_equal_steps_is_the_solver_of_that_name(kind, solver):
    found = design(kind).table(SOURCE.noise_schedule)
    expected = table_of(solver, make_grid(SOURCE.noise_schedule, 6, "karras"))
    np.testing.assert_allclose(found.levels, expected.levels, rtol=1e-9)
    for row, other in zip(found.rows, expected.rows):
        np.testing.assert_allclose(row, other, atol=1e-8)


def test_the_search_beats_every_fixed_choice(truth):
    grids = starting_grids(SOURCE, truth, 5, ["arctan", "karras"])
    found = search_solver(SOURCE, truth, 5, grids=grids, evaluations=8_000)
    fixed = min(error(table_of(solver, grid), SOURCE, truth) for solver in SOLVERS for grid in grids.values())
    assert error(found, SOURCE, truth) < 0.9 * fixed
    assert found == search_solver(SOURCE, truth, 5, grids=grids, evaluations=8_000)


def test_more_budget_is_not_worse(truth):
    grids = starting_grids(SOURCE, truth, 4, ["arctan", "karras"])
    found = [search_solver(SOURCE, truth, 4, grids=grids, evaluations=n) for n in (2_000, 5_000)]
    errors = [error(table, SOURCE, truth) for table in found]
    assert errors[1] <= errors[0]


def test_the_budget_is_kept(truth):
    calls = [0]
    counted = SOURCE.__class__(
        lambda indices: cast(Any, _Counting(SOURCE.bind(indices), calls)), SOURCE.noise, SOURCE.noise_schedule
    )
    grids = starting_grids(SOURCE, truth, 4, ["arctan", "karras"])
    search_solver(counted, truth, 4, grids=grids, evaluations=3_000)
    assert 2_000 < calls[0] <= 3_000 + 4 * len(truth.indices)
    with pytest.raises(ValueError, match="is too small"):
        search_solver(SOURCE, truth, 4, seconds=0.0)


class _Counting:
    prediction = "denoised"

    def __init__(self, inner, calls) -> None:
        self.inner, self.calls = inner, calls
        self.prediction = inner.prediction

    def __call__(self, x: torch.Tensor, node) -> torch.Tensor:
        self.calls[0] += len(x)
        return self.inner(x, node)


def test_the_predictor_ranks_what_it_has_not_seen():
    """Of designs whose error is a smooth function of their levels."""
    kind, rng = Choice(2, "denoised", False), np.random.default_rng(0)
    base = np.array(design(kind).angles)

    def some() -> Design:
        gaps = -np.diff([*base, 0.0]) * np.exp(0.2 * rng.standard_normal(len(base)))
        return Design(tuple(np.cumsum(gaps[::-1])[::-1]), (kind,) * len(base))

    def cost(d: Design) -> float:
        return float(np.exp(np.abs(np.array(d.angles) - base).sum()))

    guess = _predictor({d: cost(d) for d in (some() for _ in range(100))})
    fresh = [some() for _ in range(60)]
    ranks = [np.argsort(np.argsort(v)) for v in ([guess(d) for d in fresh], [cost(d) for d in fresh])]
    assert np.asarray(np.corrcoef(np.stack(ranks)))[0, 1] > 0.6
