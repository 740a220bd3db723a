"""``fewstep tune``: from a model's name to a recipe, with its error on noise that the fit has never seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import __version__
from ..guidance import Predictor
from ..guidance import parse as parse_guidance
from ..schedules.spec import suggestion
from ..tuning import Recipe, Source, Trajectories, error, from_spectrum, schedule_digest, solve
from ..tuning.grids import CHEAP, SPACINGS, check_names, grid_of, starting_grids
from ..tuning.recipe import finite
from ..tuning.strategies import STRATEGIES
from ..tuning.teacher import SOLVER, SPACING
from ..tuning.tune import Say, check_trajectories, seeds
from .launched import Group
from .store import digest
from .targets import Target

TEACHER_STEPS, TEST_STEPS = 160, 240
SEARCH_BUDGET = 100_000.0
"""Evaluations of single samples that the search for a solver may spend."""


def source_of(target: Target, guidance: float | str | None = None, batch: int = 64) -> Source:
    """A model as a fit sees it, under a guidance (a scale, or the text of methods) if one is given.

    Raises ValueError for guidance that needs an unconditional network where there is none.
    """
    if guidance is not None and not target.guidable:
        raise ValueError(
            f"model {target.name} has no unconditional network: it cannot be tuned with guidance"
        )

    def bind(indices: Sequence[int]) -> Predictor:
        denoiser = target.denoiser(indices)
        return denoiser if guidance is None else parse_guidance(guidance).bind(denoiser)

    noise_schedule, dtype = target.noise_schedule, target.model.dtype
    return Source(bind, lambda indices: target.noise(indices, 0), noise_schedule, batch, dtype)


def check(
    nfe: int,
    trajectories: int,
    teacher_steps: int,
    method: str = "fit",
    schedules: Sequence[str] = (),
    budget: float = SEARCH_BUDGET,
) -> None:
    """Raise ValueError for what cannot be used, before the network is called."""
    if nfe < 1:
        raise ValueError(f"--nfe must be at least 1, got {nfe}")
    try:
        check_trajectories(trajectories)
    except ValueError as problem:
        raise ValueError(f"--trajectories: {problem}") from None
    if teacher_steps < 4 * nfe:
        raise ValueError(
            f"--teacher-steps must be at least four times the evaluations, {4 * nfe}, got {teacher_steps}"
        )
    if method not in STRATEGIES:
        raise ValueError(
            f"no method {method!r}; allowed: {', '.join(STRATEGIES)}{suggestion(method, STRATEGIES)}"
        )
    if not budget > 0:
        raise ValueError(f"--budget must be positive, got {budget:g}")
    check_names(schedules)


def fit(
    target: Target,
    nfe: int,
    *,
    method: str = "fit",
    guidance: float | str | None = None,
    trajectories: int = 32,
    teacher_steps: int = TEACHER_STEPS,
    schedules: Sequence[str] = (),
    eigenvalues: np.ndarray | None = None,
    seed: int = 0,
    memory: int = 4,
    budget: float = SEARCH_BUDGET,
    seconds: float = math.inf,
    test: int = 0,
    batch: int = 64,
    cache: Path | None = None,
    group: Group = Group(),  # noqa: B008
    solved: Callable[[int], None] = lambda n: None,
    say: Say = lambda what, error: None,
) -> Recipe | None:
    """A recipe for a model at one number of evaluations; None on the ranks above 0 of a launcher.

    Args:
        target: the model.
        nfe: evaluations, each counted once.
        method: one of ``STRATEGIES``.
        guidance: scale or text, None for none.
        trajectories: how many converged ones the fit sees.
        teacher_steps: evaluations of each of them.
        schedules: spacings and searches whose grids are tried; many spacings and the cheap searches if not given.
        eigenvalues: the data's covariance spectrum, from which one more grid is computed.
        seed: another seed takes other noise.
        memory: how many predictions a step combines.
        budget, seconds: what the search for a solver may spend.
        test: fresh samples on which the finished recipe is measured as well; 0 for none.
        batch: most samples in a network call.
        cache: folder of solved trajectories; what is there is not solved again.
        group: the processes that share the trajectories (through the cache).
        solved, say: told about progress.

    Raises:
        ValueError: what cannot be used, guidance without an unconditional network.
        NumericalError: the network is not finite on the way of a converged trajectory.
    """
    check(nfe, trajectories, teacher_steps, method, schedules, budget)
    source = source_of(target, guidance, batch)
    key = trajectories_key(target, guidance)
    chosen = list(seeds(trajectories, seed))
    truth = solve_together(source, chosen, teacher_steps, cache, key, group, solved)
    if truth is None:
        return None
    names = schedules or ((*SPACINGS, *CHEAP) if eigenvalues is None else SPACINGS)
    grids = starting_grids(source, truth, nfe, names)
    if eigenvalues is not None:
        levels = from_spectrum(source.noise_schedule, nfe, eigenvalues)
        grids["spectrum"] = grid_of(source.noise_schedule, levels)
    outcome = STRATEGIES[method](
        source,
        nfe,
        truth,
        grids=grids,
        memory=memory,
        budget=budget,
        seconds=seconds,
        seed=seed,
        say=say,
    )
    errors = {"train": outcome.train, "held_out": outcome.held_out, "fixed": outcome.fixed}
    if test:
        fresh = solve(source, range(test), TEST_STEPS, cache=cache, key=key)
        errors |= {"test": error(outcome.table, source, fresh), "test_samples": float(test)}
    return Recipe(
        nfe=nfe,
        levels=outcome.table.levels,
        rows=outcome.table.rows,
        kind=outcome.kind,
        method=outcome.method,
        model=target.name,
        fingerprint=target.fingerprint,
        frame=target.noise_schedule.frame,
        noise_schedule=schedule_digest(target.noise_schedule),
        prediction=target.denoiser([0]).prediction,
        guidance="" if guidance is None else parse_guidance(guidance).spec,
        teacher=f"{SOLVER} on {SPACING}, {teacher_steps} steps",
        seeds=tuple(chosen),
        errors={k: finite(v) for k, v in errors.items()},
        ratios=outcome.ratios,
        fewstep=__version__,
    )


def trajectories_key(target: Target, guidance: float | str | None) -> str:
    """Names converged trajectories in a cache."""
    return digest([target.fingerprint, guidance, SOLVER, SPACING])[:16]


def solve_together(
    source: Source,
    indices: Sequence[int],
    steps: int,
    cache: Path | None,
    key: str,
    group: Group,
    solved: Callable[[int], None],
) -> Trajectories | None:
    """The converged trajectories, each rank of a launcher solving its share into the cache; None above rank 0."""
    if group.world > 1:
        if cache is None:
            raise ValueError("several processes share trajectories through a folder; give one with --cache")
        share = math.ceil(len(indices) / group.world)
        source = replace(source, batch=min(source.batch, share))
        mine = indices[group.rank * share : (group.rank + 1) * share]
        if mine:
            solve(source, mine, steps, cache=cache, key=key)
        group.wait()
        if group.rank > 0:
            return None
    return solve(source, indices, steps, cache=cache, key=key, advance=solved)


def read_eigenvalues(file: Path) -> np.ndarray:
    """The numbers of a ``.npy`` or JSON file, a covariance spectrum; ValueError for anything else."""
    try:
        values = np.load(file) if file.suffix == ".npy" else np.array(json.loads(file.read_text()), float)
    except (ValueError, OSError) as problem:
        raise ValueError(f"cannot read a spectrum from {str(file)!r}: {problem}") from None
    values = np.ravel(values).astype(np.float64)
    if not len(values) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ValueError(f"{str(file)!r}: a spectrum is a list of eigenvalues, none below 0 and not all 0")
    return values
