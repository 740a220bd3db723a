"""Noise for the methods of guidance inside a pipeline, without drawing from the pipeline's own generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...samplers.noise import standard_normal


class SampleNoise:
    """A standard normal that is a pure function of a sample's seed and a key.

    The seeds are those of the pipeline's generators, plus the number of the sample where one generator serves a batch.
    """

    def __init__(self, seeds: Sequence[int], single: bool) -> None:
        self.seeds, self.single = seeds, single
        self.row: int | None = None

    @classmethod
    def of(cls, generator: Any) -> SampleNoise:
        """From what a pipeline was given; without a generator, from the global one, whose state stays as it is."""
        if isinstance(generator, (list, tuple)):
            if len(generator) > 1:
                return cls([g.initial_seed() for g in generator], False)
            generator = generator[0] if generator else None
        if generator is None:
            copied = torch.Generator()
            copied.set_state(torch.get_rng_state())
            return cls([int(torch.randint(2**62, (), generator=copied))], True)
        return cls([generator.initial_seed()], True)

    def __call__(self, like: torch.Tensor, *key: int) -> torch.Tensor:
        if self.row is not None:
            return standard_normal([self._seed(self.row)], like, *key)
        return standard_normal([self._seed(i) for i in range(like.shape[0])], like, *key)

    def _seed(self, i: int) -> int:
        return self.seeds[0] + i if self.single else self.seeds[i % len(self.seeds)]

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Inside, tensors have the row of one sample."""
        self.row = row
        try:
            yield
        finally:
            self.row = None
