"""``fewstep tune``: from a model's name to a recipe, with its error on noise that the fit has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..guidance import Predictor
from ..guidance import parse as parse_guidance
from ..tuning import Recipe, Source, error, schedule_digest, solve, tune
from ..tuning.recipe import finite
from ..tuning.teacher import SOLVER, SPACING
from ..tuning.tune import FEWEST, Say, seeds
from .store import digest
from .targets import Target

TEACHER_STEPS, TEST_STEPS = 160, 240


def source_of(target: Target, guidance: float | None = None, batch: int = 64) -> Source:
    """A model as a fit sees it, with guidance of a scale if it has an unconditional network."""
    if guidance is not None and not target.guidable:
        raise ValueError(
            f"model {target.name} has no unconditional network: it cannot be tuned with guidance"
        )

    def bind(indices: Sequence[int]) -> Predictor:
        denoiser = target.denoiser(indices)
        return denoiser if guidance is None else parse_guidance(guidance).bind(denoiser)

    return Source(bind, lambda indices: target.noise(indices, 0), target.noise_schedule, batch)


def check(nfe: int, trajectories: int, teacher_steps: int) -> None:
    """Raise ValueError for numbers that cannot be used, before the network is called."""
    if nfe < 1:
        raise ValueError(f"--nfe must be at least 1, got {nfe}")
    if trajectories < FEWEST:
        raise ValueError(f"--trajectories must be at least {FEWEST}, better 32, got {trajectories}")
    if teacher_steps < 4 * nfe:
        raise ValueError(
            f"--teacher-steps must be at least four times the evaluations, {4 * nfe}, got {teacher_steps}"
        )


def fit(
    target: Target,
    nfe: int,
    *,
    guidance: float | None = None,
    trajectories: int = 32,
    teacher_steps: int = TEACHER_STEPS,
    seed: int = 0,
    memory: int = 4,
    refine: bool = True,
    test: int = 0,
    batch: int = 64,
    cache: Path | None = None,
    solved: Callable[[int], None] = lambda n: None,
    say: Say = lambda what, error: None,
) -> Recipe:
    """A recipe for a model at one number of evaluations.

    Args:
        target: the model.
        nfe: evaluations, each counted once.
        guidance: scale, None for none.
        trajectories: how many converged ones the fit sees.
        teacher_steps: evaluations of each of them.
        seed: another seed takes other noise.
        memory: how many predictions a step combines.
        refine: whether levels and weights are refined together.
        test: fresh samples on which the finished recipe is measured as well; 0 for none.
        batch: most samples in a network call.
        cache: folder of solved trajectories; what is there is not solved again.
        solved, say: told about progress.

    Raises:
        ValueError: numbers that cannot be used, guidance without an unconditional network.
        NumericalError: the network is not finite on the way of a converged trajectory.
    """
    check(nfe, trajectories, teacher_steps)
    source = source_of(target, guidance, batch)
    key = digest([target.fingerprint, guidance, SOLVER, SPACING])[:16]
    chosen = list(seeds(trajectories, seed))
    truth = solve(source, chosen, teacher_steps, cache=cache, key=key, advance=solved)
    outcome = tune(source, nfe, truth, memory=memory, refine=refine, say=say)
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
        fewstep=__version__,
    )
