"""Classifier-free guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..schedules import Node
from ..schedules.parametrization import Prediction
from .predictor import Denoiser


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance, ``u + w (c - u)``; w = 1 is the plain conditional network.

    c and u are the predictions with and without the condition, in the network's own space (an affine rule: the same
    in every space). Costs two evaluations a sample, one at w = 1 (u is not needed) and at w = 0 (c is not).

    Ho, Salimans, "Classifier-Free Diffusion Guidance", https://arxiv.org/abs/2207.12598.
    """

    scale: float

    def __post_init__(self) -> None:
        if (
            isinstance(self.scale, bool)
            or not isinstance(self.scale, (int, float))
            or not math.isfinite(self.scale)
        ):
            raise ValueError(f"the guidance scale must be a finite number, got {self.scale!r}")
        if self.scale < 0:
            raise ValueError(f"the guidance scale must be >= 0 (1 means no guidance), got {self.scale:g}")

    def bind(self, denoiser: Denoiser) -> GuidedDenoiser:
        """The predictor for one run; ValueError if the denoiser has no unconditional network and needs one."""
        if self.scale != 1.0 and denoiser.unconditional is None:
            raise ValueError(
                f"guidance scale {self.scale:g} needs an unconditional network: Denoiser(..., unconditional=fn)"
            )
        return GuidedDenoiser(denoiser, self.scale)


@dataclass
class GuidedDenoiser:
    """A denoiser under classifier-free guidance."""

    denoiser: Denoiser
    scale: float

    @property
    def prediction(self) -> Prediction:
        """The denoiser's own space."""
        return self.denoiser.prediction

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        if self.scale == 1.0:
            return self.denoiser(x, node)
        unconditional = self.denoiser.without_condition(x, node)
        if self.scale == 0.0:
            return unconditional
        return torch.lerp(unconditional, self.denoiser(x, node), self.scale)
