"""Noise sources: what ``Noise(start, stop)`` draws. Results depend on the seed of a sample and the interval, on
nothing else: not on batch size, device, order of calls or the number of samples before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..schedules import Node


class NoiseSource(Protocol):
    """Gives a standard normal of the shape, dtype and device of ``like`` for the interval start -> stop."""

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor: ...


def standard_normal(seeds: Sequence[int], like: torch.Tensor, *key: int) -> torch.Tensor:
    """One normal per sample (first dimension of ``like``), a pure function of the sample's seed and ``key``.

    Drawn on the CPU in fp32, as generators of different devices give different streams.
    """
    if len(seeds) != like.shape[0]:
        raise ValueError(
            f"{len(seeds)} seeds for a batch of {like.shape[0]} samples; one seed a sample is needed"
        )
    out = torch.empty(like.shape, dtype=torch.float32)
    for row, seed in zip(out, seeds, strict=True):
        state = int(np.random.SeedSequence([seed & (2**64 - 1), *key]).generate_state(1, np.uint64)[0])
        torch.randn(row.shape, generator=torch.Generator().manual_seed(state >> 1), out=row)
    return out.to(like)


def _bits(*values: float) -> list[int]:
    """Whole numbers for levels; in fp32, so that a level keeps its noise where another machine rounds it otherwise."""
    return [int(b) for b in np.array(values, dtype=np.float32).view(np.uint32)]


class WhiteNoise:
    """Independent noise for every interval; ``seeds`` holds one integer a sample.

    An interval that is visited again (Restart) gets fresh noise each time.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self._visits: dict[tuple[Node, Node], int] = {}

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        visit = self._visits[start, stop] = self._visits.get((start, stop), -1) + 1
        return standard_normal(self.seeds, like, visit, *_bits(start.ratio, stop.ratio))


class BrownianNoise:
    r"""Increments of one Brownian path a sample: the same path for any number of steps.

    The clock is ``u = (alpha / sigma)^2``; in it the noise of the reverse SDE is a plain increment,
    ``z = (W(u_stop) - W(u_start)) / sqrt(u_stop - u_start)``. The path is a virtual tree: independent increments over
    the octaves of u, Brownian bridges inside, each point a function of the seed alone. An interval towards more noise
    (churn, Restart) is not on the path and gets white noise; what comes after it is another path.
    """

    DEPTH = 24

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self._white = WhiteNoise(seeds)
        self._path = 0

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        if stop.ratio >= start.ratio:
            self._path += 1
            return self._white(like, start, stop)
        low, high = (max(node.ratio, 2.0**-500) ** -2 if node.alpha > 0 else 0.0 for node in (start, stop))
        (octave, offset), (last, end) = self._offset(like, max(low, 2.0**-80)), self._offset(like, high)
        increment = end - offset
        for j in range(octave, last):
            increment = increment + 2.0 ** (j / 2) * self._normal(like, j)
        return increment / math.sqrt(high - low)

    def _normal(self, like: torch.Tensor, octave: int, *position: int) -> torch.Tensor:
        path = (self._path,) if self._path else ()
        return standard_normal(self.seeds, like, *path, octave + 2000, *position)

    def _offset(self, like: torch.Tensor, u: float) -> tuple[int, torch.Tensor]:
        """``(j, W(u) - W(2^j))`` with ``2^j <= u < 2^(j+1)``, by bisection of the octave."""
        octave = math.floor(math.log2(u))
        fraction = u / 2.0**octave - 1.0
        left, right = (
            torch.zeros_like(like),
            2.0 ** (octave / 2) * self._normal(like, octave),
        )
        position = 1
        for level in range(1, self.DEPTH + 1):
            deviation = 2.0 ** (octave / 2) * 2.0 ** (-(level + 1) / 2)
            middle = (left + right) / 2 + deviation * self._normal(like, octave, position)
            fraction *= 2.0
            if fraction >= 1.0:
                left, fraction = middle, fraction - 1.0
                position = 2 * position + 1
            else:
                right = middle
                position = 2 * position
            if fraction == 0.0:
                return octave, left
        return octave, left + fraction * (right - left)
