"""The grids that a fit starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..schedules import NoiseSchedule, TimeGrid, make_grid

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


def free_start(noise_schedule: NoiseSchedule) -> bool:
    """Whether a run may start below the noisiest level, from sigma_0 times unit noise.

    Hosts of flow models hand over unit noise whatever the levels are, so there it may not.
    """
    return noise_schedule.frame != "flow"


def grid_of(noise_schedule: NoiseSchedule, levels: ArrayLike) -> TimeGrid:
    """A grid of levels, its first at the noisiest where a run must start there."""
    values = np.array(levels, dtype=np.float64)
    if not free_start(noise_schedule):
        values[0] = noise_schedule.level_max
    return TimeGrid.from_levels(noise_schedule, values)


def named(noise_schedule: NoiseSchedule, steps: int, names: Sequence[str] = SPACINGS) -> dict[str, TimeGrid]:
    """The grids of spacings that exist for these steps, each under the first of its names."""
    found: dict[str, TimeGrid] = {}
    for name in names:
        try:
            grid = grid_of(noise_schedule, make_grid(noise_schedule, steps, name).level)
        except ValueError:
            continue
        if not any(np.array_equal(grid.level, other.level) for other in found.values()):
            found[name] = grid
    return found
