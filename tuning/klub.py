r"""Align Your Steps: levels of least KLUB, a bound on the distance between two stochastic processes.

Sabour, Fidler, Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models",
https://arxiv.org/abs/2404.14507.

A solver of the reverse SDE that keeps the denoised prediction of the beginning of a step over the step errs by at most

``KLUB = sum_i int_{t_i+1}^{t_i} t^-3 E |D(x_t, t) - D(x_{t_i}, t_i)|^2 dt``,  ``x_t = x_0 + W(t^2)``,

with t = sigma / alpha, t_0 > t_1 > ... and W a Brownian motion, so that the noisier state is the cleaner one with noise
added. On data N(0, c^2) the expectation is ``c^4 (1 / (c^2 + t^2) - 1 / (c^2 + t_i^2))`` an element, which has a
closed form integral (:func:`gaussian_integral`).

The original draws new times and samples for every trial of a level. Here the network is called once, at all times of
a table along the same paths; what any grid on the table costs is then a sum over its steps, and all grids are compared
on the same random numbers. The Gaussian's integrand is the weight of the quadrature in t (their importance density),
and the table is dense where optimal grids are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..samplers import Solver
from ..schedules import Node, make_grid
from .candidates import candidates, shortest_path, student
from .fit import error
from .teacher import Source, Trajectories

TRIALS = 11
"""Positions of a level, spread between its neighbours, that are compared at a time."""
SWEEPS = 300
PATIENCE = 3
"""Sweeps without a better result after which the search stops early."""
BASE = 10
"""Steps of the grid that is searched as a whole; larger ones are made of it by doubling."""
STARTS = ("karras", "linspace", "arctan")
"""Where the search begins: as the authors do for models of continuous and of discrete time, and the default here.

Up to ten steps, stopped early, it never ends at levels that are worse on the trajectories than these, as near as the
table has them."""
ENDS = (0.0, 0.02, 0.05, 0.1)
"""Where the bound ends: at the cleanest trained level or these. It grows without limit as the end goes to 0."""


def gaussian_integral(low: ArrayLike, high: ArrayLike, up: ArrayLike, c: float) -> np.ndarray:
    """``int_low^high t^-3 (1 / (c^2 + t^2) - 1 / (c^2 + up^2)) dt``; the upper ends may be infinite."""
    s, r = (np.asarray(t, dtype=np.float64) ** -2.0 for t in (low, high))
    inner = (s - r) / c**2 - (np.log1p(c**2 * s) - np.log1p(c**2 * r)) / c**4
    return 0.5 * (inner - (s - r) / (c**2 + np.asarray(up, dtype=np.float64) ** 2))


def table_ratios(low: float, high: float, c: float, size: int) -> np.ndarray:
    """About ``size`` ratios sigma / alpha, descending: half uniform in ``log(1 / c^2 + 1 / t^2)``, half in atan(t).

    Many levels of least KLUB on data N(0, c^2) lie in the first way; few of them, and other data, ask for more above c.
    """
    v = np.linspace(math.log(c**-2 + high**-2.0), math.log(c**-2 + low**-2.0), size // 2)[1:-1]
    angles = np.linspace(math.atan(high), math.atan(low), size - size // 2)[1:-1]
    ratios = np.concatenate([(np.exp(v) - c**-2) ** -0.5, np.tan(angles)])
    return np.array([high, *np.unique(ratios)[::-1], low])


def step_costs(
    source: Source,
    indices: Sequence[int],
    data: torch.Tensor,
    ratios: np.ndarray,
    *,
    paths: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """KLUB an element of a step from ratio i down to ratio j > i, infinite for j <= i; (n, n).

    Args:
        source: the model.
        indices: samples that the network is bound to (labels).
        data: (B, ...) clean samples, one an index.
        ratios: descending, sigma / alpha; the first may be infinite.
        paths: noise paths for every sample. Costs ``n * B * paths`` evaluations.
        seed: of the paths.
    """
    n, c = len(ratios), float(data.double().std())
    nodes = [_node(source, r) for r in ratios]
    gram = torch.zeros((n, n), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(data.shape, generator=generator, dtype=torch.float64).to(data)

    for _ in range(paths):
        x, previous, predictions = data, 0.0, []
        for ratio, node in zip(ratios[::-1], nodes[::-1]):
            if math.isinf(ratio):
                z = normal()
            else:
                x = x + math.sqrt(ratio**2 - previous**2) * normal()
                z = x / math.hypot(1.0, ratio)
                previous = ratio
            predictions.append(source.predict(indices, z, node).flatten().double())
        stack = torch.stack(predictions[::-1])
        gram += (stack @ stack.T).cpu() / (stack.shape[1] * paths)
    norms = gram.diagonal()
    distance = (norms[:, None] + norms[None] - 2.0 * gram).clamp(min=0.0).numpy()
    return _accumulated(distance, ratios, c)


def _accumulated(distance: np.ndarray, ratios: np.ndarray, c: float) -> np.ndarray:
    n = len(ratios)
    cost, shape = np.full((n, n), np.inf), 1.0 / (c**2 + ratios**2)
    for i in range(n - 1):
        # against the Gaussian's distance the network's is nearly constant in t: the mean of a cell's ends will do
        against = distance[i, i + 1 :] / (shape[i + 1 :] - shape[i])
        middle = np.append(against[0], 0.5 * (against[1:] + against[:-1]))
        cost[i, i + 1 :] = np.cumsum(middle * gaussian_integral(ratios[i + 1 :], ratios[i:-1], ratios[i], c))
    return cost


def sweep(cost: np.ndarray, path: list[int], frozen: Sequence[int] = (), room: int = 1) -> list[int]:
    """Every inner level but those at frozen positions, in turn at the best of some positions between its neighbours.

    ``TRIALS`` are spread between the neighbours, ``room`` entries of the table away from them; the entries beside the
    present one are tried as well, so that what stays is best among all near it.
    """
    path = list(path)
    for k in range(1, len(path) - 1):
        if k in frozen:
            continue
        left, here, right = path[k - 1 : k + 2]
        low, high = left + room, right - room
        spread = np.rint(np.linspace(low, high, TRIALS)).astype(int)
        # the present one first: of equals it stays
        trials = np.array([here, *(i for i in (here - 1, here + 1, *spread) if low <= i <= high)])
        path[k] = int(trials[np.argmin(cost[left, trials] + cost[trials, right])])
    return path


def descend(
    cost: np.ndarray,
    path: list[int],
    frozen: Sequence[int] = (),
    room: int = 1,
    judge: Callable[[list[int]], float] | None = None,
) -> list[int]:
    """Sweeps until nothing changes; with a ``judge`` the best path on the way by it, stopping early."""
    best, least, waited = path, math.inf if judge is None else judge(path), 0
    for _ in range(SWEEPS):
        moved = sweep(cost, path, frozen, room)
        if moved == path:
            break
        path = moved
        if judge is None:
            best = path
            continue
        value = judge(path)
        if value < least:
            best, least, waited = path, value, 0
        elif (waited := waited + 1) >= PATIENCE:
            break
    return best


def doubled(path: Sequence[int]) -> list[int]:
    """A path with a level in the middle of every step."""
    inner = [i for a, b in zip(path, path[1:]) for i in (a, (a + b) // 2)]
    return [*inner, path[-1]]


def align_your_steps(
    source: Source,
    truth: Trajectories,
    nfe: int,
    *,
    solver: str | Solver = "dpmpp_2m",
    paths: int = 4,
    size: int = 80,
    early: bool = True,
    judge: Callable[[tuple[float, ...]], float] | None = None,
    seed: int = 0,
) -> tuple[float, ...]:
    """Levels of least KLUB, stopped early where the ``solver`` is best on the trajectories.

    Up to ten steps are searched together, from the levels of ``STARTS``, one after the other among ``TRIALS``
    positions, until nothing changes; where that ends, dynamic programming over the table tells exactly. More are had
    by doubling, where only the new levels move, and interpolation in the logarithm of the level over the index. The
    bound runs to the cleanest trained level or another of ``ENDS``, which is then replaced by 0.

    The authors stop early by image quality and choose the end by hand; here ``judge`` decides both, after each sweep:
    a number for levels, the less the better, the error of the solver if not given (a stochastic solver needs one, such
    as a Frechet distance). ``early=False`` is the bare minimum down to the cleanest trained level.

    Costs ``size * paths`` evaluations a trajectory, twice as many for each doubling, and ``nfe`` for each look at the
    error.
    """
    candidates(source, truth, nfe, len(truth.angles))  # checks the numbers
    high, trained = _node(source, source.top, level=True).ratio, source.noise_schedule.level_min
    c = float(truth.result.double().std())
    doublings = max(0, math.ceil(math.log2(nfe / BASE)))
    room = 2**doublings  # entries between two levels of the first grid
    ratios = table_ratios(_node(source, trained, level=True).ratio, high, c, size * room)
    cost = step_costs(source, truth.indices, truth.result, ratios, paths=paths, seed=seed)
    levels = np.array([source.top, *source.noise_schedule.level_at_ratio(ratios[1:])])

    def finished(path: Sequence[int]) -> tuple[float, ...]:
        steps = min(nfe, len(path) - 1)  # a grid that is not doubled yet is judged as it is
        return (*resampled(levels[list(path)], steps)[:-1].tolist(), 0.0)

    def total(path: Sequence[int]) -> float:
        return float(cost[path[:-1], path[1:]].sum())

    def quality(path: Sequence[int]) -> float:
        levels = finished(path)
        return judge(levels) if judge else error(student(solver, levels, source), source, truth)

    found = []
    for end in ENDS if early else ENDS[:1]:
        last = max(min(nfe, BASE) * room, int(np.argmin(np.abs(ratios - max(end, ratios[-1])))))
        starts = [_snapped(source, ratios[: last + 1], min(nfe, BASE), s, room) for s in STARTS]
        ends = [descend(cost, start, room=room, judge=quality if early else None) for start in starts]
        for left in range(doublings):
            ends = [
                descend(cost, path, range(0, len(path), 2), room >> (left + 1)) for path in map(doubled, ends)
            ]
        found += ends
        if not doublings:
            found.append(shortest_path(cost[: last + 1, : last + 1], nfe))
    return finished(min(found, key=quality if early else total))


def resampled(levels: np.ndarray, steps: int) -> np.ndarray:
    """Fewer steps from more: linear in the logarithm of the level over the index; both ends stay."""
    at = np.linspace(0.0, len(levels) - 1.0, steps + 1)
    inner = np.exp(np.interp(at[1:], np.arange(1, len(levels)), np.log(levels[1:])))
    return np.append(levels[0], inner)


def _snapped(source: Source, ratios: np.ndarray, steps: int, spacing: str, room: int) -> list[int]:
    """Positions nearest to the levels of a spacing, ``room`` apart at least, from the first to the last."""
    wanted = [node.ratio for node in make_grid(source.noise_schedule, steps, spacing)]
    path = [int(np.argmin(np.abs(np.arctan(ratios) - math.atan(w)))) for w in wanted]
    path[0], last = 0, len(ratios) - 1
    for k in range(1, steps + 1):
        path[k] = min(max(path[k], path[k - 1] + room), last - (steps - k) * room)
    return path


def _node(source: Source, value: float, level: bool = False) -> Node:
    schedule = source.noise_schedule
    at = value if level else float(schedule.level_at_ratio(value))
    alpha, sigma = (float(a) for a in schedule.alpha_sigma_at(at))
    return Node(float(schedule.time(at)), alpha, sigma)
