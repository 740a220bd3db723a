"""The grids that a fit starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..schedules import NoiseSchedule, TimeGrid, make_grid, schedule
from ..schedules.spec import suggestion
from .searches import SEARCHES, search
from .teacher import Source, Trajectories

SPACINGS = (
    *(f"arctan:scale={scale:g}" for scale in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)),
    *(f"arctan:scale=0.7,sigma_max={k:g}" for k in (5, 10)),
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
"""Spacings that are tried; one that a noise schedule or a number of steps does not have is left out."""
PREFIX = "search:"
"""Marks a search among names of spacings, as some are called like the published tables that they made."""
CHEAP = ("search:spectrum", "search:gits")
"""Searches that are tried: they ask the network for little or nothing beyond the trajectories."""


def free_start(noise_schedule: NoiseSchedule) -> bool:
    """Whether a run may start below the noisiest level.

    Not of flow models: their hosts hand over unit noise whatever the levels are, and below the noisiest a state of the
    flow is smaller than that.
    """
    return noise_schedule.frame != "flow"


def grid_of(noise_schedule: NoiseSchedule, levels: ArrayLike) -> TimeGrid:
    """A grid of levels, its first at the noisiest where a run must start there."""
    values = np.array(levels, dtype=np.float64)
    if not free_start(noise_schedule):
        values[0] = noise_schedule.level_max
    return TimeGrid.from_levels(noise_schedule, values)


def check_names(names: Sequence[str]) -> None:
    """ValueError with the nearest name for what is neither a spacing nor a search."""
    for name in names:
        if not name.startswith(PREFIX):
            schedule(name)
        elif (word := name.removeprefix(PREFIX)) not in SEARCHES:
            raise ValueError(
                f"no search {word!r}; allowed: {', '.join(SEARCHES)}{suggestion(word, SEARCHES)}"
            )


def starting_grids(
    source: Source, truth: Trajectories, steps: int, names: Sequence[str] = (*SPACINGS, *CHEAP)
) -> dict[str, TimeGrid]:
    """The grids of spacings and searches that exist for these steps, each under the first of its names."""
    found: dict[str, TimeGrid] = {}
    for name in names:
        try:
            if name.startswith(PREFIX):
                levels = np.asarray(search(name.removeprefix(PREFIX), source, truth, steps))
            else:
                levels = make_grid(source.noise_schedule, steps, name).level
            grid = grid_of(source.noise_schedule, levels)
        except ValueError:
            continue
        if not any(np.array_equal(grid.level, other.level) for other in found.values()):
            found[name] = grid
    if not found:
        raise ValueError(f"none of the schedules {', '.join(names)} exists for {steps} steps on this model")
    return found
