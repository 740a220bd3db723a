"""Optimal steps: dynamic programming over states that the student itself has reached.

Pei, Hu, Gu, "Optimal Stepsize for Diffusion Sampling", https://arxiv.org/abs/2503.21774.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..samplers import NumericalError, Solver
from ..schedules import Node, TimeGrid
from .candidates import candidates
from .table import advance, table_of
from .teacher import Source, Trajectories


@dataclass(frozen=True)
class _Reached:
    """The best student state at one candidate after some steps: how it came there, its predictions (newest first)."""

    path: tuple[int, ...]
    state: torch.Tensor
    history: tuple[torch.Tensor, ...] = ()


def optimal_steps(
    source: Source,
    truth: Trajectories,
    nfe: int,
    *,
    solver: str | Solver = "dpmpp_2m",
    most: int = 40,
) -> tuple[float, ...]:
    """Levels on which the student stays nearest to the converged trajectories.

    For k = 1 .. nfe and every candidate j, of the steps to j from the best states after k - 1 steps the one is kept
    whose result is nearest (mean square, frame z) to the converged state at j. Unlike GITS it sees errors add up and
    cancel, and steps with the history that the ``solver`` has on that path; the original has Euler steps. As the state
    kept is the best *so far*, the end need not be the best of all paths.

    Costs ``nfe * most`` evaluations a trajectory. ``most`` is the number of candidate levels.
    """
    known = candidates(source, truth, nfe, most)
    last = len(known) - 1
    best: dict[int, _Reached] = {0: _Reached((0,), known.states[0])}
    for k in range(1, nfe + 1):
        evaluated = {i: _evaluated(source, truth, known.levels[i], reached) for i, reached in best.items()}
        goals = [last] if k == nfe else range(k, last - (nfe - k) + 1)
        best = {}
        for j in goals:
            trials = []
            for i, start in evaluated.items():
                if i < j and start is not None:
                    row = _row(source, known.levels, solver, (*start.path, j), nfe)
                    trials.append((start, advance(row, start.state, start.history)))
            if not trials:
                continue
            distance = [float((state - known.states[j]).square().mean()) for _, state in trials]
            start, state = trials[int(np.argmin(distance))]
            best[j] = _Reached((*start.path, j), state, start.history)
    if last not in best:
        raise ValueError("the network fails on every path")
    return tuple(known.levels[list(best[last].path)].tolist())


def _evaluated(source: Source, truth: Trajectories, level: float, reached: _Reached) -> _Reached | None:
    """With the prediction of its own state; None where the network fails."""
    schedule = source.noise_schedule
    alpha, sigma = (float(c) for c in schedule.alpha_sigma_at(level))
    try:
        new = source.predict(truth.indices, reached.state, Node(float(schedule.time(level)), alpha, sigma))
    except NumericalError:
        return None
    return _Reached(reached.path, reached.state, (new, *reached.history))


def _row(
    source: Source, levels: np.ndarray, solver: str | Solver, path: tuple[int, ...], nfe: int
) -> tuple[float, ...]:
    """Weights of the last step of a path. A solver may count the steps that are left: they follow, anywhere."""
    steps = len(path) - 1
    inner = [float(levels[i]) for i in path]
    if steps < nfe:
        low = inner[-1]
        rest = [low * (1.0 - (i + 1) / (nfe - steps)) for i in range(nfe - steps)]
        inner += rest
    grid = TimeGrid.from_levels(source.noise_schedule, inner)
    return table_of(solver, grid).rows[steps - 1]
