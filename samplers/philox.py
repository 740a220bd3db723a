"""Noise by a counter: a kernel computes each number where it is used, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..kernels.reference import philox_normal
from ..schedules import Node
from .noise import _bits


class PhiloxNoise:
    """Independent noise for every interval, by Philox4x32-10 on the device of the state; one integer a sample.

    A noise of its own: other numbers than :class:`WhiteNoise`, equal on every device up to roundings of fp32. A number
    depends on the sample's seed, the interval and the place in the sample alone. Nothing is drawn in a first
    pass over memory where a kernel combines the tensors (:mod:`fewstep.kernels`), and it can be captured in a graph. An
    interval that is visited again (Restart) gets fresh noise each time.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self._visits: dict[tuple[Node, Node], int] = {}
        self._on: dict[torch.device, torch.Tensor] = {}

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        return philox_normal(self.keys(like), self.key(start, stop), like).to(like.dtype)

    def again(self) -> PhiloxNoise:
        """The same noise from the start."""
        other = PhiloxNoise(self.seeds)
        other._on = self._on
        return other

    def keys(self, like: torch.Tensor) -> torch.Tensor:
        """The seeds on the device of ``like``, int64 of shape (B,); ValueError if there is not one a sample."""
        if len(self.seeds) != like.shape[0]:
            raise ValueError(
                f"{len(self.seeds)} seeds for a batch of {like.shape[0]} samples; one seed a sample is needed"
            )
        if like.device not in self._on:
            words = [int(np.uint64(seed & (2**64 - 1)).astype(np.int64)) for seed in self.seeds]
            self._on[like.device] = torch.tensor(words, dtype=torch.int64, device=like.device)
        return self._on[like.device]

    def key(self, start: Node, stop: Node) -> int:
        """The number of the next draw for an interval, 62 bits."""
        visit = self._visits[start, stop] = self._visits.get((start, stop), -1) + 1
        words = [visit, *_bits(start.ratio, stop.ratio)]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 2
