"""The levels that searches choose from: nodes of the converged trajectories, with what is known there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..samplers import Solver
from ..schedules import TimeGrid
from .table import Table, levels_at, table_of
from .teacher import Source, Trajectories


@dataclass(frozen=True)
class Candidates:
    """Levels from the noisiest to 0, and the converged solution at each, in the frame z.

    Shapes: ``angles`` and ``levels`` (n + 1,), ``states`` (n + 1, B, ...), ``predictions`` (n, B, ...): nothing is
    predicted without noise.
    """

    angles: np.ndarray
    levels: np.ndarray
    states: torch.Tensor
    predictions: torch.Tensor

    def __len__(self) -> int:
        return len(self.levels)


def candidates(source: Source, truth: Trajectories, nfe: int, most: int) -> Candidates:
    """At most ``most`` levels with noise, evenly over the teacher's nodes, and the end without.

    Raises ValueError if there are not as many as evaluations.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, (int, np.integer)) or nfe < 1:
        raise ValueError(f"the number of evaluations must be an integer >= 1, got {nfe!r}")
    nodes = len(truth.angles)
    chosen = np.unique(np.rint(np.linspace(0, nodes - 1, min(most, nodes))).astype(int))
    if len(chosen) < nfe:
        raise ValueError(
            f"{nfe} levels cannot be chosen from {len(chosen)}; take trajectories of more steps or more candidates"
        )
    keep = chosen.tolist()
    inner = levels_at(source.noise_schedule, truth.angles[chosen[1:]].tolist())
    return Candidates(
        np.append(truth.angles[chosen], 0.0),
        np.array([source.top, *inner, 0.0]),
        torch.cat([truth.states[keep], truth.result[None]]),
        truth.predictions[keep],
    )


def student(solver: str | Solver, levels: Sequence[float], source: Source) -> Table:
    """What runs on the levels of a search: the table of a solver."""
    return table_of(solver, TimeGrid.from_levels(source.noise_schedule, levels))


def shortest_path(cost: np.ndarray, steps: int, growth: float = 1.0) -> list[int]:
    """The cheapest path of exactly ``steps`` jumps from the first to the last index, by dynamic programming.

    ``cost[i, j]`` is that of a jump from i to j > i, infinite where there is none. The value of a path is
    ``sum_k growth^k cost_k``, k counting jumps from the start: ``V_i^k = min_j cost_ij + growth V_j^{k-1}``.
    """
    last = len(cost) - 1
    value = np.full(last + 1, np.inf)
    value[last] = 0.0
    following = []
    for _ in range(steps):
        total = cost + growth * value
        following.append(np.argmin(total, axis=1))
        value = np.min(total, axis=1)
    path = [0]
    for choice in following[::-1]:
        path.append(int(choice[path[-1]]))
    if not np.isfinite(value[0]):
        raise ValueError(f"no path of {steps} jumps over {last + 1} levels")
    return path
