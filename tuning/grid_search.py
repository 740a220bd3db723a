"""Search over few noise levels by running the sampler: a coarse grid over all of them, then one after the other.

Chen, Zhang, Zen, Weiss, Norouzi, Chan, "WaveGrad: Estimating Gradients for Waveform Generation",
https://arxiv.org/abs/2009.00713, searched six levels on a grid in this way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from ..samplers import Solver
from .candidates import candidates, student
from .fit import error
from .table import levels_at
from .teacher import Source, Trajectories

FINEST = 0.02
"""The refinement ends when levels move by less than this share of a gap (in angle)."""


def grid_search(
    source: Source,
    truth: Trajectories,
    nfe: int,
    *,
    solver: str | Solver = "dpmpp_2m",
    runs: int = 200,
    seed: int = 0,
) -> tuple[float, ...]:
    """Levels of least error of the ``solver`` on the trajectories, by at most ``runs`` runs over all of them.

    1. *Coarse*: the inner levels are chosen from a few candidates, evenly spaced in angle; all choices are tried if
       there are no more than half of the runs, otherwise as many, drawn with ``seed``.
    2. *Refinement*: each level in turn is moved up and down by a share of the gap to its neighbour, half a gap to begin
       with; the share is halved when no move helps.

    Nothing is assumed of the solver or the data, at the price of ``runs * nfe`` evaluations a trajectory.
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    known = candidates(source, truth, nfe, len(truth.angles))
    top, count = float(known.angles[0]), 0

    def levels(inner: np.ndarray) -> tuple[float, ...]:
        return (source.top, *levels_at(source.noise_schedule, inner.tolist()).tolist(), 0.0)

    def cost(inner: np.ndarray) -> float:
        nonlocal count
        count += 1
        try:
            return error(student(solver, levels(inner), source), source, truth)
        except ValueError:  # two levels that coincide
            return math.inf

    best, least = np.empty(0), math.inf
    for trial in _coarse(top, nfe, max(1, runs // 2), seed):
        if (value := cost(trial)) < least:
            best, least = trial, value
    share = 0.5
    while share > FINEST and count < runs and nfe > 1:
        before = least
        for i, sign in itertools.product(range(nfe - 1), (-1.0, 1.0)):
            if count >= runs:
                break
            around = np.concatenate([[top], best, [0.0]])
            gap = around[i + 1] - around[i + 1 - int(sign)]  # towards the noisier or the cleaner neighbour
            trial = best.copy()
            trial[i] -= share * gap
            if (value := cost(trial)) < least:
                best, least = trial, value
        if least == before:
            share /= 2.0
    return levels(best)


def _coarse(top: float, nfe: int, most: int, seed: int) -> Iterator[np.ndarray]:
    """Choices of nfe - 1 descending angles below ``top``: as fine a grid as can be tried in full, at least 3 nfe."""
    inner = nfe - 1
    size = inner
    while math.comb(size + 1, inner) <= most and 0 < inner and size < 40:
        size += 1
    size = max(size, 3 * inner)
    angles = top * (1.0 - np.arange(1, size + 1) / (size + 1))
    yield angles[np.rint(np.linspace(0, size - 1, inner)).astype(int)] if inner else angles[:0]
    if math.comb(size, inner) <= most:
        for chosen in itertools.combinations(range(size), inner):
            yield angles[list(chosen)]
        return
    generator = np.random.default_rng(seed)
    for _ in range(most - 1):
        yield angles[np.sort(generator.choice(size, inner, replace=False))]
