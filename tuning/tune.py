"""From a model and a budget to a table: methods as they are, closed form, refinement; judged on held-out noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..samplers import NumericalError
from ..schedules import TimeGrid
from .fit import distances, error, ridge, rms
from .grids import free_start, starting_grids
from .recipe import Kind
from .refine import Family, Fitted, attempt, fitted, gauss_newton, newton
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
STRENGTHS = (1e-5, 1e-3)
PRIORS = (1e-2, 1e-4, 1e-6)
"""Strong to weak: each refinement goes on from the one before."""
FOLDS = 4
FEWEST = 8
"""Trajectories below which a fit is refused: two for every fold."""

Say = Callable[[str, float], None]
"""Told what is being tried and its error."""


@dataclass(frozen=True)
class Outcome:
    """A table and how it was come by; errors are RMS distances per element to the converged solution.

    ``fixed`` is the error of the best method without tuning, ``held_out`` that of the table on trajectories which its
    fit has not seen. ``ratios`` are those of dynamic compensation, if that is what was fitted.
    """

    table: Table
    kind: Kind
    method: str
    train: float
    held_out: float
    fixed: float
    ratios: tuple[float, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A fitted table, and how far every trajectory is from the run of a fit that has not seen it.

    ``held_out`` are the distances of the results, ``strayed`` the roots of the losses, both of shape (B,).
    """

    method: str
    table: Table
    held_out: torch.Tensor
    strayed: torch.Tensor

    @property
    def score(self) -> float:
        """What candidates are ranked by: the mean root of the loss, where one stray sample counts less than in an RMS.

        Of two that end equally near, the one that is nearer on the way has fewer stray samples on other noise.
        """
        return float(self.strayed.mean())


def tune(
    source: Source,
    nfe: int,
    truth: Trajectories,
    *,
    grids: Mapping[str, TimeGrid] | None = None,
    memory: int = 4,
    refine: bool = True,
    keep: int = 1,
    say: Say = lambda what, error: None,
) -> Outcome:
    """The best table for ``nfe`` evaluations.

    1. Methods without tuning run on every grid (``grids``, by name; :func:`starting_grids` if not given); the best of
       these is the fixed choice (:func:`best_fixed`).
    2. On every grid weights are fitted in closed form, and the best are judged by cross-validation
       (:func:`closed_forms`).
    3. From the best ``keep`` of these levels and weights are refined together (:func:`refinements`); ``memory``
       predictions are combined in a step.
    4. The candidate with the least held-out error is the result, unless the fixed choice has less; then that is.

    Raises ValueError for too few trajectories, evaluations below one, or a model on which nothing works.
    """
    if nfe < 1:
        raise ValueError(f"the number of evaluations must be at least 1, got {nfe}")
    check_trajectories(len(truth.indices))
    grids = starting_grids(source, truth, nfe) if grids is None else grids
    method, table, fixed = best_fixed(source, truth, grids, say)
    candidates = closed_forms(source, truth, grids, memory, say)
    if refine:
        for candidate in _starts(candidates, keep):
            candidates += refinements(source, truth, candidate, memory, say)
    best = min(candidates, key=lambda c: c.score, default=None)
    if best is None or not rms(best.held_out) < fixed:
        return Outcome(table, "fixed", method, fixed, fixed, fixed)
    train = error(best.table, source, truth)
    return Outcome(best.table, "fitted", best.method, train, rms(best.held_out), fixed)


def check_trajectories(count: int) -> None:
    """ValueError for too few."""
    if count < FEWEST:
        raise ValueError(f"{count} trajectories are too few for a fit; take at least {FEWEST}, better 32")


def best_fixed(
    source: Source, truth: Trajectories, grids: Mapping[str, TimeGrid], say: Say
) -> tuple[str, Table, float]:
    """Name, table and error of the best method without tuning; all but the first on the better half of the grids."""
    errors = {(SOLVERS[0], name): error(table_of(SOLVERS[0], g), source, truth) for name, g in grids.items()}
    better = sorted(grids, key=lambda name: errors[SOLVERS[0], name])[: (len(grids) + 1) // 2]
    for solver in SOLVERS[1:]:
        for name in better:
            errors[solver, name] = error(table_of(solver, grids[name]), source, truth)
    best = min(errors, key=errors.__getitem__)
    if not math.isfinite(errors[best]):
        raise ValueError("no method gives finite results on this model")
    method = f"{best[0]} on {best[1]}"
    say(method, errors[best])
    return method, table_of(best[0], grids[best[1]]), errors[best]


def closed_forms(
    source: Source,
    truth: Trajectories,
    grids: Mapping[str, TimeGrid],
    memory: int,
    say: Say,
    keep: int = 6,
) -> list[Candidate]:
    """Fits in closed form on all grids; the ``keep`` best of them with every ridge strength, and judged."""
    trained: dict[str, float] = {}
    for name, grid in grids.items():
        try:
            table = ridge(table_of(SOLVERS[0], grid), source, truth, memory=memory, strength=STRENGTHS[0])
            trained[name] = float(distances(table, source, truth)[1].mean())
        except NumericalError:
            continue
        say(f"closed form on {name}", trained[name])
    found = []
    for name in sorted(trained, key=trained.__getitem__)[:keep]:
        start = table_of(SOLVERS[0], grids[name])
        for strength in STRENGTHS:

            def fit(some: Trajectories) -> Table:
                return ridge(start, source, some, memory=memory, strength=strength)  # noqa: B023

            try:
                method = f"{SOLVERS[0]} on {name}, closed form"
                found.append(Candidate(method, fit(truth), *_cross_validated(fit, source, truth)))
            except NumericalError:
                continue
            say(f"{method}, ridge {strength:g}", found[-1].score)
    return found


def _cross_validated(
    fit: Callable[[Trajectories], Table], source: Source, truth: Trajectories
) -> tuple[torch.Tensor, torch.Tensor]:
    held_out, strayed = torch.full((2, len(truth.indices)), torch.inf, dtype=torch.float64)
    for fold in folds(len(held_out)):
        rest = [i for i in range(len(held_out)) if i not in fold]
        held_out[fold], strayed[fold] = _on(fit(truth.subset(rest)), source, truth, fold)
    return held_out, strayed


def _on(table: Table, source: Source, truth: Trajectories, fold: Sequence[int]) -> Sequence[torch.Tensor]:
    return [d.double().cpu() for d in distances(table, source, truth.subset(fold))]


def folds(count: int) -> list[list[int]]:
    """Positions of the trajectories of each part."""
    return [list(range(i, count, FOLDS)) for i in range(FOLDS)]


def _starts(candidates: Sequence[Candidate], keep: int) -> list[Candidate]:
    """The best candidate of every grid, the best grids first; one that starts at another level is among them."""
    ranked = sorted(candidates, key=lambda c: c.score)
    best = list({c.table.levels: c for c in reversed(ranked)}.values())[::-1]
    chosen = best[:keep]
    if keep > 1 and len({c.table.levels[0] for c in chosen}) == 1:
        other = next((c for c in best if c.table.levels[0] != chosen[0].table.levels[0]), None)
        chosen = chosen if other is None else [*chosen[:-1], other]
    return chosen


def refinements(
    source: Source, truth: Trajectories, start: Candidate, memory: int, say: Say
) -> list[Candidate]:
    """Levels and weights refined together from a table, with priors from strong to weak."""
    grid = start.table.grid(source.noise_schedule)
    family = Family(SOLVERS[0], grid, memory, free_start(source.noise_schedule))
    found = []
    try:
        parameters = family.start(start.table, source, truth)
        at = fitted(family, attempt(family, parameters, source, truth), source, truth)
        for prior in PRIORS:
            at = gauss_newton(family, at, source, truth, prior=prior)
            method = start.method.replace("closed form", "refined")
            judged = _left_out(family, at, prior, source, truth)
            found.append(Candidate(method, family.table(at.run.parameters), *judged))
            say(f"{method}, prior {prior:g}", found[-1].score)
    except NumericalError:
        pass
    return found


def _left_out(
    family: Family, at: Fitted, prior: float, source: Source, truth: Trajectories
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_cross_validated`, for fits without a part that are one Newton step from the fit to all."""
    held_out, strayed = torch.full((2, len(truth.indices)), torch.inf, dtype=torch.float64)
    for fold in folds(len(held_out)):
        try:
            step = newton(family, at, prior, without=fold)
            table = family.table(at.run.parameters + step)
        except (ValueError, np.linalg.LinAlgError):
            continue
        held_out[fold], strayed[fold] = _on(table, source, truth, fold)
    return held_out, strayed


def seeds(count: int, seed: int) -> Sequence[int]:
    """Indices of trajectories, far from those that evaluations use."""
    return range(1_000_000 + seed, 1_000_000 + seed + count)
