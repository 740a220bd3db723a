"""Searches for noise levels: everything that finds a grid for one model from its converged trajectories.

All are called alike, ``search(source, truth, nfe, solver="...")``, and return ``nfe + 1`` levels (of the noise
schedule) from the noisiest down, ending at the end of the run. What runs on the levels is a deterministic solver of
one evaluation a step; ``fewstep.tuning.from_spectrum`` takes any.
"""

from __future__ import annotations

from collections.abc import Callable

from ..schedules.spec import suggestion
from . import spectrum
from .gits import gits
from .grid_search import grid_search
from .klub import align_your_steps
from .optimal_steps import optimal_steps
from .teacher import Source, Trajectories

Search = Callable[..., tuple[float, ...]]

SEARCHES: dict[str, Search] = {
    "spectrum": spectrum.search,
    "gits": gits,
    "ays": align_your_steps,
    "optimal_steps": optimal_steps,
    "grid_search": grid_search,
}


def search(
    name: str, source: Source, truth: Trajectories, nfe: int, solver: str = "dpmpp_2m"
) -> tuple[float, ...]:
    """The levels that a named search finds; ValueError with the nearest name for one that is not there."""
    if name not in SEARCHES:
        raise ValueError(f"no search {name!r}; allowed: {', '.join(SEARCHES)}{suggestion(name, SEARCHES)}")
    return SEARCHES[name](source, truth, nfe, solver=solver)
