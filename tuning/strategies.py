"""What ``fewstep tune --method`` means: ways from trajectories to a table, all judged against the fixed choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..schedules import TimeGrid
from . import dc, solver_search
from .fit import error
from .table import Table, table_of
from .teacher import Source, Trajectories
from .tune import Outcome, Say, best_fixed, check_trajectories, tune

DC_TRAJECTORIES = 10
"""As published."""


class Strategy(Protocol):
    """A way to tune; ``budget`` is a number of evaluations of single samples, for those that have one."""

    def __call__(
        self,
        source: Source,
        nfe: int,
        truth: Trajectories,
        *,
        grids: Mapping[str, TimeGrid],
        memory: int,
        budget: float,
        seconds: float,
        seed: int,
        say: Say,
    ) -> Outcome: ...


def fit(source: Source, nfe: int, truth: Trajectories, *, grids, memory, say, **_) -> Outcome:
    """Weights in closed form, then levels and weights together: what gives the least error."""
    return tune(source, nfe, truth, grids=grids, memory=memory, say=say)


def closed_form(source: Source, nfe: int, truth: Trajectories, *, grids, memory, say, **_) -> Outcome:
    """Weights in closed form on the best grid: much faster, less exact."""
    return tune(source, nfe, truth, grids=grids, memory=memory, refine=False, say=say)


def compensation(source: Source, nfe: int, truth: Trajectories, *, grids, say, **_) -> Outcome:
    """DC-Solver: UniPC with compensation ratios found on ten trajectories, on the grid that suits UniPC best."""
    errors = {name: error(table_of(dc.SOLVER, grid), source, truth) for name, grid in grids.items()}
    name = min(errors, key=errors.__getitem__)
    some, rest = split(truth, DC_TRAJECTORIES)
    ratios = dc.search_ratios(
        source, some, grids[name], say=lambda step, error: say(f"ratio of step {step + 1} on {name}", error)
    )
    table = table_of(dc.spec_of(ratios), grids[name])
    return _judged(source, table, f"{dc.SOLVER}+dc on {name}", some, rest, grids, say, ratios)


def search(
    source: Source, nfe: int, truth: Trajectories, *, grids, budget, seconds, seed, say, **_
) -> Outcome:
    """Order, prediction space and corrector of every step and the levels, by an evolutionary search within a budget."""
    some, rest = split(truth, 3 * len(truth.indices) // 4)
    table = solver_search.search_solver(
        source, some, nfe, grids=grids, evaluations=budget, seconds=seconds, seed=seed, say=say
    )
    return _judged(source, table, "searched solver and levels", some, rest, grids, say)


STRATEGIES: dict[str, Strategy] = {
    "fit": fit,
    "closed-form": closed_form,
    "dc": compensation,
    "search": search,
}


def split(truth: Trajectories, count: int) -> tuple[Trajectories, Trajectories]:
    """The first ``count`` trajectories, at most three quarters, and the others."""
    check_trajectories(len(truth.indices))
    count = min(count, 3 * len(truth.indices) // 4)
    return truth.subset(range(count)), truth.subset(range(count, len(truth.indices)))


def _judged(
    source: Source,
    table: Table,
    method: str,
    some: Trajectories,
    rest: Trajectories,
    grids: Mapping[str, TimeGrid],
    say: Say,
    ratios: tuple[float, ...] = (),
) -> Outcome:
    """A table found on some trajectories, or the best method without tuning if it is better on the others."""
    name, fixed_table, _ = best_fixed(source, some, grids, say)
    fixed, held_out = error(fixed_table, source, rest), error(table, source, rest)
    if not held_out < fixed:
        return Outcome(fixed_table, "fixed", name, error(fixed_table, source, some), fixed, fixed)
    return Outcome(table, "fitted", method, error(table, source, some), held_out, fixed, ratios)
