"""From a model and a budget to a table: fixed methods, closed-form fits and refinement, judged by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..samplers import NumericalError
from ..schedules import NoiseSchedule, TimeGrid, make_grid
from .fit import Family, error, gauss_newton, ridge
from .recipe import Kind
from .table import Table, table_of
from .teacher import Source, Trajectories

SOLVERS = (
    "dpmpp_2m",
    "dpmpp_2m:solver_type=heun",
    "unipc",
    "unipc:order=3",
    "deis",
    "ipndm",
    "exp_adams:start=euler",
)
"""Methods without tuning that a fit has to beat; the first is what fits start from."""
SPACINGS = (
    *(f"arctan:scale={scale:g}" for scale in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)),
    *(f"karras:rho={rho},sigma_min={low:g}" for rho in (5, 9) for low in (0.02, 0.05)),
    "exponential:sigma_min=0.05",
    "karras",
    "exponential",
    "linspace",
    "leading",
    "trailing",
    "kl_optimal",
    "beta",
)
"""Grids that are tried; one that a noise schedule or a number of steps does not have is left out."""
STRENGTHS = (1e-5, 1e-3)
PRIORS = (1e-6, 1e-4, 1e-2)
FOLDS = 4
FEWEST = 8
"""Trajectories below which a fit is refused: two for every fold."""


@dataclass(frozen=True)
class Outcome:
    """A table and how it was come by; errors are RMS distances per element to the converged solution."""

    table: Table
    kind: Kind
    method: str
    train: float
    held_out: float
    fixed: float


Say = Callable[[str, float], None]
"""Told what is being tried and its error."""


def tune(
    source: Source,
    nfe: int,
    truth: Trajectories,
    *,
    memory: int = 4,
    refine: bool = True,
    keep: int = 2,
    say: Say = lambda what, error: None,
) -> Outcome:
    """The best table for ``nfe`` evaluations.

    1. Every method of ``SOLVERS`` on every grid of ``SPACINGS`` runs on the trajectories; the best is the fixed choice.
    2. On every grid weights are fitted in closed form (:func:`ridge`), judged by cross-validation over trajectories.
    3. The best ``keep`` of these are refined (:func:`gauss_newton`), judged in the same way; ``memory`` predictions are
       combined in a step.
    4. What has the least cross-validated error is fitted to all trajectories; if that is the fixed choice, it stays.

    Raises ValueError for too few trajectories, evaluations below one, or a model on which nothing works.
    """
    if nfe < 1:
        raise ValueError(f"the number of evaluations must be at least 1, got {nfe}")
    if len(truth.indices) < FEWEST:
        raise ValueError(
            f"{len(truth.indices)} trajectories are too few for a fit; take at least {FEWEST}, better 32"
        )
    grids = _grids(source.noise_schedule, nfe)
    fixed = {
        (solver, spacing): error(table_of(solver, grid), source, truth)
        for spacing, grid in grids.items()
        for solver in SOLVERS
    }
    solver, spacing = best = min(fixed, key=fixed.__getitem__)
    if not math.isfinite(fixed[best]):
        raise ValueError("no method gives finite results on this model")
    say(f"{solver} on {spacing}", fixed[best])
    outcome = Outcome(
        table_of(solver, grids[spacing]),
        "fixed",
        f"{solver} on {spacing}",
        fixed[best],
        fixed[best],
        fixed[best],
    )
    nominal = SOLVERS[0]
    folds = [list(range(i, len(truth.indices), FOLDS)) for i in range(FOLDS)]

    def validated(fit: Callable[[Trajectories], Table]) -> float:
        squares = []
        for fold in folds:
            rest = [i for i in range(len(truth.indices)) if i not in fold]
            try:
                squares.append(error(fit(truth.subset(rest)), source, truth.subset(fold)) ** 2 * len(fold))
            except (NumericalError, ValueError, np.linalg.LinAlgError):
                return math.inf
        return math.sqrt(sum(squares) / len(truth.indices))

    closed = {}
    for spacing, grid in grids.items():
        start = table_of(nominal, grid)
        for strength in STRENGTHS:
            fit = _closed(start, source, memory, strength)
            closed[spacing, strength] = validated(fit)
            say(f"closed form on {spacing}, ridge {strength:g}", closed[spacing, strength])
            if closed[spacing, strength] < outcome.held_out:
                table = fit(truth)
                method = f"{nominal} on {spacing}, closed form"
                train = error(table, source, truth)
                outcome = Outcome(table, "fitted", method, train, closed[spacing, strength], fixed[best])
    if not refine:
        return outcome
    ranked = sorted(closed, key=closed.__getitem__)
    chosen = [next(key for key in ranked if key[0] == s) for s in dict.fromkeys(s for s, _ in ranked)][:keep]
    for spacing, strength in chosen:
        for prior in PRIORS:
            fit = _refined(nominal, grids[spacing], source, memory, strength, prior)
            held_out = validated(fit)
            say(f"refined on {spacing}, prior {prior:g}", held_out)
            if held_out < outcome.held_out:
                table = fit(truth)
                method = f"{nominal} on {spacing}, refined"
                outcome = Outcome(table, "fitted", method, error(table, source, truth), held_out, fixed[best])
    return outcome


def _grids(noise_schedule: NoiseSchedule, nfe: int) -> dict[str, TimeGrid]:
    """The grids of all spacings from the noisiest level down."""
    found: dict[str, TimeGrid] = {}
    top = noise_schedule.level_max
    for spacing in SPACINGS:
        try:
            grid = make_grid(noise_schedule, nfe, spacing)
            if abs(grid.level[0] / top - 1.0) > 1e-9:  # the start is the trajectories'
                grid = TimeGrid.from_levels(noise_schedule, [top, *grid.level[1:]])
        except ValueError:
            continue
        if not any(np.array_equal(grid.level, other.level) for other in found.values()):
            found[spacing] = grid
    return found


def _closed(start: Table, source: Source, memory: int, strength: float) -> Callable[[Trajectories], Table]:
    return lambda truth: ridge(start, source, truth, memory=memory, strength=strength)


def _refined(
    nominal: str, grid: TimeGrid, source: Source, memory: int, strength: float, prior: float
) -> Callable[[Trajectories], Table]:
    def fit(truth: Trajectories) -> Table:
        start = ridge(table_of(nominal, grid), source, truth, memory=memory, strength=strength)
        family = Family(nominal, grid, memory)
        parameters = family.start(start, source, truth)
        return family.table(gauss_newton(family, parameters, source, truth, prior=prior))

    return fit


def seeds(count: int, seed: int) -> Sequence[int]:
    """Indices of trajectories, far from those that evaluations use."""
    return range(1_000_000 + seed, 1_000_000 + seed + count)
