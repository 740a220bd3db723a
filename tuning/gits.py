"""GITS: levels by dynamic programming over the error of single jumps along the converged trajectory.

Chen, Zhou, Wang, Shen, Lyu, "On the Trajectory Regularity of ODE-based Diffusion Sampling",
https://arxiv.org/abs/2405.11326.
"""

from __future__ import annotations

import numpy as np

from ..samplers import Solver
from .candidates import Candidates, candidates, shortest_path, student
from .fit import error
from .teacher import Source, Trajectories

GROWTHS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)
"""How much more the error of each next jump counts; what is best depends on the model, so each is tried."""


def jump_costs(known: Candidates) -> np.ndarray:
    r"""Error of one Euler jump from candidate i to j, started on the converged trajectory; (n + 1, n + 1).

    With angles a and in the frame z, ``z_j = (sin a_j z_i + sin(a_i - a_j) D_i) / sin a_i``; the cost is the RMS
    distance per element of it to the converged state, averaged over trajectories. What an error in z leaves of itself
    at the end depends little on where it was made, so it is this frame that is compared. Infinite for j <= i.
    """
    n = len(known)
    cost, angles = np.full((n, n), np.inf), known.angles
    for i in range(n - 1):
        later = known.states[i + 1 :]
        shape = (-1,) + (1,) * (later.ndim - 1)
        a, b = (
            later.new_tensor(c / np.sin(angles[i])).view(shape)
            for c in (np.sin(angles[i + 1 :]), np.sin(angles[i] - angles[i + 1 :]))
        )
        gap = (a * known.states[i] + b * known.predictions[i] - later).flatten(2)
        cost[i, i + 1 :] = gap.square().mean(2).sqrt().mean(1).cpu().numpy()
    return cost


def gits(
    source: Source,
    truth: Trajectories,
    nfe: int,
    *,
    solver: str | Solver = "dpmpp_2m",
    growth: float | None = None,
    most: int = 80,
) -> tuple[float, ...]:
    """Levels of the path of least :func:`jump_costs`, each jump weighted ``growth`` times the one before.

    Without a ``growth`` those of ``GROWTHS`` are run with ``solver`` on the trajectories, and the best path is
    returned; with one the network is not called at all. ``most`` is the number of candidate levels.

    The original measures the deviation from the chord of the trajectory and has one growth (1.15) for all.
    """
    known = candidates(source, truth, nfe, most)
    if growth is not None and not growth > 0:
        raise ValueError(f"growth must be positive, got {growth:g}")
    cost = jump_costs(known)
    paths = dict.fromkeys(
        tuple(shortest_path(cost, nfe, g)) for g in (GROWTHS if growth is None else (growth,))
    )
    grids = [tuple(known.levels[list(path)].tolist()) for path in paths]
    if len(grids) == 1:
        return grids[0]
    return min(grids, key=lambda levels: error(student(solver, levels, source), source, truth))
