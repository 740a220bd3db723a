"""What an evaluation asks of a model. A sample is known by its index alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance import Denoiser
from ..schedules import NoiseSchedule
from .networks import CLASSES

REFERENCE_SEED = 1 << 40
"""Far from any seed + index of the start noise, so that references and start noise share no random numbers."""


@dataclass(frozen=True)
class EvalModel:
    """A model with what an evaluation asks of it.

    Attributes:
        name: canonical spec, ``"builtin:digits-exact"`` or ``"builtin:digits-exact:bandwidth=0.2"``.
        noise_schedule: of the denoiser.
        shape: of one sample, without the batch.
        dtype: in which the model computes; start noise is best given in it.
        bind: see :meth:`denoiser`.
        reference: indices -> (B, *shape), samples of the data distribution itself, one an index and of the class that
            the model's sample has; None if there are none.
        reference_size: how many different references there are; None for fresh samples without end.
        labels: indices -> (B,) int64 class labels; None for a model without classes.
        guided: whether there is an unconditional network, for guidance.
        truth_is_exact: whether ``reference`` draws from exactly the distribution that the converged solution has.
        features: name of the feature network for its samples (``fewstep.eval.digits.feature_network``), or None.
        description: one sentence.
        licence: of data and weights.
        fingerprint: changes when data, weights or options do; part of what identifies a result.
    """

    name: str
    noise_schedule: NoiseSchedule
    shape: tuple[int, ...]
    bind: Callable[[Sequence[int], torch.device], Denoiser]
    description: str
    licence: str
    fingerprint: str
    truth_is_exact: bool = False
    reference: Callable[[Sequence[int]], Tensor] | None = None
    reference_size: int | None = None
    labels: Callable[[Sequence[int]], Tensor] | None = None
    guided: bool = False
    features: str | None = None
    dtype: torch.dtype = torch.float32

    def denoiser(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Denoiser:
        """A fresh denoiser, its counter at zero, for the samples with these indices: rows of x in this order."""
        return self.bind(indices, torch.device(device))

    def noise(self, indices: Sequence[int], seed: int = 0) -> Tensor:
        """Unit start noise (B, *shape) in the model's dtype, on the CPU; the start is that times the first sigma."""
        return initial_noise(indices, self.shape, seed).to(self.dtype)


def initial_noise(indices: Sequence[int], shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal noise, float32 (B, *shape) on the CPU: row j is a function of seed + indices[j] alone."""
    noise = torch.empty((len(indices), *shape))
    for row, index in zip(noise, indices):
        torch.randn(row.shape, generator=generator(seed + index), out=row)
    return noise


def generator(seed: int) -> torch.Generator:
    """A new one on the CPU."""
    return torch.Generator().manual_seed(seed)


def cycle_labels(indices: Sequence[int]) -> Tensor:
    """Label of each sample: index mod 10, int64 (B,)."""
    return torch.as_tensor(list(indices), dtype=torch.int64) % CLASSES


def matched(labels: Tensor, x: Tensor) -> Tensor:
    """The labels, if there is one for each sample of x; else ValueError."""
    if len(labels) != x.shape[0]:
        raise ValueError(
            f"this denoiser is bound to {len(labels)} sample indices, x has {x.shape[0]} samples"
        )
    return labels
