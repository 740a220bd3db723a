"""From what a host asks of ``set_timesteps`` to the levels of a run. Knows neither tensors nor diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..samplers import Solver, parse, steps_for
from ..schedules import TimeGrid, make_grid
from ..schedules.align_your_steps import family
from ..schedules.diffusers_config import Source, source_of
from ..schedules.diffusers_levels import (
    consistency_levels,
    final_level,
    is_default_sigmas,
    native_levels,
    stretched,
)
from ..schedules.noise import Array
from ..tuning import Recipe

VANISHING = 1e-9
"""The relative length of a step that a host wants to have none: its evaluation still corrects the state."""

Settings = tuple[tuple[str, Any], ...]
"""The items of a scheduler config that matter for a run, hashable."""

Numbers = tuple[float, ...] | None


class Request(NamedTuple):
    """Everything that the levels of a run depend on; see ``FewStepScheduler`` and its ``set_timesteps``.

    ``denoised`` says whether the solver is fed x_0 (clipping, EDM preconditioning) instead of what the network
    predicts, ``recipe`` is JSON and replaces solver, schedule and the host's levels.
    """

    settings: Settings
    solver: str
    schedule: str | None = None
    denoised: bool = False
    integer_timesteps: bool = False
    count_evaluations: bool = False
    recipe: str | None = None
    steps: int | None = None
    mu: float | None = None
    sigmas: Numbers = None
    timesteps: Numbers = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | None = None
    original_inference_steps: int | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Answer:
    """The grid of a run, the model and the solver it is for, and what a host wants its network to be told."""

    source: Source
    solver: Solver
    grid: TimeGrid
    told: Array | None = None


def answer(request: Request) -> Answer:
    """The grid that a request means.

    Raises ValueError for a request that contradicts itself or the model, and for levels that do not decrease.
    """
    config = dict(request.settings)
    if request.original_inference_steps is not None:
        config["original_inference_steps"] = request.original_inference_steps
    n = _count(request)
    source = source_of(config, mu=request.mu)
    if source.prediction == "flow" and config.get("use_dynamic_shifting") and request.mu is None:
        raise ValueError(
            "set_timesteps needs mu (pipelines compute it from the image size): use_dynamic_shifting is set"
        )
    if request.recipe is not None:
        tuned = Recipe.from_dict(json.loads(request.recipe))
        if n != tuned.nfe:
            raise ValueError(
                f"this recipe is for {tuned.nfe} evaluations: num_inference_steps must be that, got {n}"
            )
        return Answer(source, tuned.solver, tuned.grid(source.noise_schedule))
    if source.clock == "angle":
        request, n = _by_angle(request, n)
    levels, end, told = _levels(request, config, source, n)
    if told is not None and len(told) != len(levels):
        raise ValueError(f"timesteps and sigmas must have the same length, got {len(told)} and {len(levels)}")
    if end == levels[-1]:  # the model's config may ask for a last step of length zero
        end = 0.0 if len(levels) == 1 else end * (1.0 - VANISHING)
    nodes = np.append(levels, end)
    try:
        grid = TimeGrid.from_levels(source.noise_schedule, nodes)
        if told is not None and source.clock == "index":
            grid = grid_of(source, nodes, np.append(told, grid.t[-1]))
    except ValueError as error:
        given = told is not None or request.sigmas
        name = "the given" if given else request.schedule or "the model's own"
        raise ValueError(f"{name} schedule with {n} steps: {error}") from None
    return Answer(source, parse(request.solver), grid, told)


def by_evaluations(request: Request) -> Request:
    """The request with as many steps as make its number of steps the number of evaluations.

    Levels that a host sends are somebody's choice and stay, unless they are those that flow pipelines always send.
    Raises ValueError naming the nearest numbers if the solver cannot spend exactly so many.
    """
    n, sigmas = _count(request), request.sigmas
    default = sigmas is not None and is_default_sigmas(sigmas)
    if request.recipe is not None or request.timesteps is not None or (sigmas is not None and not default):
        return request

    def of(steps: int) -> Request:
        uniform = tuple((1.0 - np.arange(steps) / steps).tolist()) if default else None
        return request._replace(steps=steps, sigmas=uniform)

    return of(steps_for(request.solver, n, lambda steps: answer(of(steps)).grid))


def grid_of(source: Source, levels: Array, times: Array) -> TimeGrid:
    """A grid whose times are not those of its levels."""
    return TimeGrid(times, *source.noise_schedule.alpha_sigma_at(levels), source.noise_schedule)


def _levels(
    request: Request, config: Mapping[str, Any], source: Source, n: int
) -> tuple[Array, float, Array | None]:
    """The levels of the evaluations, that of the end, and the timesteps if they are the host's."""
    sigmas, timesteps, schedule = request.sigmas, request.timesteps, request.schedule
    if schedule is not None and sigmas is not None and source.clock == "sigma" and is_default_sigmas(sigmas):
        # The pipeline sends these although nobody asked for them; the schedule that somebody did ask for counts.
        sigmas = timesteps = None
    told = None if timesteps is None else np.asarray(timesteps, dtype=np.float64)
    if sigmas is not None and source.clock != "sigma":
        levels = np.asarray(sigmas, dtype=np.float64)
        if len(levels) > 1 and levels[-1] in (0.0, levels[-2]):  # Euler sends the level of the end as well
            return levels[:-1], float(levels[-1]), told
        return levels, 0.0, told
    if told is not None and sigmas is None:
        if source.clock == "250log":  # consistency models: timesteps are places on their training schedule
            levels = consistency_levels(config, source, told[::-1])
            return levels, final_level(config, source, levels), None
        last = source.train_steps - (source.clock == "index")
        if source.clock in ("index", "sigma") and not np.all((told >= 0) & (told <= last)):
            raise ValueError(f"timesteps must lie in [0, {last}], got {told.min():g} to {told.max():g}")
        levels = source.levels(told)
        if source.clock == "angle":  # the last is where the run ends
            return levels[:-1], float(levels[-1]), told[:-1]
        return levels, final_level(config, source, levels), told
    if schedule is not None and sigmas is None:
        # The strength of LCM's image to image: the last n of so many steps.
        whole = round(n / request.strength)
        levels = make_grid(source.noise_schedule, whole, _named(schedule, source, config)).level[-1 - n : -1]
        return (stretched(config, levels) if source.noise_schedule.frame == "flow" else levels), 0.0, None
    if sigmas is not None and len(sigmas) > 1 and sigmas[-1] == 0.0 and sigmas[0] != 0.0:
        sigmas, n = sigmas[:-1], n - 1
    levels = native_levels(config, source, n, sigmas=sigmas, strength=request.strength)
    return levels, final_level(config, source, levels), told


def _named(schedule: str, source: Source, config: Mapping[str, Any]) -> str:
    """The schedule; ``ays`` of the family that the config tells, as SDXL has the noise schedule of its ancestors."""
    if schedule not in ("ays", "align_your_steps", "AlignYourStepsScheduler"):
        return schedule
    known = family(source.noise_schedule, config)
    return schedule if known is None else f"ays:model={known}"


def _by_angle(request: Request, n: int) -> tuple[Request, int]:
    """The angles that the arguments of ``SCMScheduler`` mean, as timesteps, unless a schedule stands in for them.

    Its pipelines send pi / 2 and, in the middle of two steps, 1.3 although nobody asked for them.
    """
    first, middle = request.max_timesteps, request.intermediate_timesteps
    if request.timesteps is not None:
        if len(request.timesteps) < 2:
            raise ValueError("timesteps must have the angle of the end too: [1.57, 0] is one step")
        return request, n - 1
    if middle is not None and n != 2:
        raise ValueError(f"intermediate_timesteps is the middle of 2 steps, got {n} steps")
    usual = (first is None or abs(first - 0.5 * math.pi) < 1e-4) and middle in (None, 1.3)
    if request.sigmas is not None or (request.schedule is not None and usual):
        return request, n
    first = 0.5 * math.pi if first is None else first
    times = [first, 1.3 if middle is None else middle, 0.0] if n == 2 else np.linspace(first, 0.0, n + 1)
    return request._replace(timesteps=tuple(map(float, times))), n


def _count(request: Request) -> int:
    steps, sigmas, timesteps = request.steps, request.sigmas, request.timesteps
    if steps is not None and (
        isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1
    ):
        raise ValueError(f"num_inference_steps must be an integer >= 1, got {steps!r}")
    if not 0.0 < request.strength <= 1.0:
        raise ValueError(f"strength must lie in (0, 1], got {request.strength!r}")
    lengths = {len(v) for v in (sigmas, timesteps) if v is not None}
    if steps is None and not lengths:
        raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas")
    if 0 in lengths:
        raise ValueError("timesteps and sigmas must not be empty")
    if len(lengths) > 1:
        raise ValueError(f"timesteps and sigmas must have the same length, got {sorted(lengths)}")
    if steps is not None and lengths and steps not in lengths and steps + 1 not in lengths:
        raise ValueError(f"num_inference_steps is {steps}, but {lengths.pop()} timesteps or sigmas are given")
    return lengths.pop() if lengths else int(steps or 0)
