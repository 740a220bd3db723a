"""The mutable side of a scheduler: one run, the noise it draws, and what a step returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..samplers import Stepper
from ..schedules import Node
from .diffusers_plan import Plan


@dataclass
class FewStepSchedulerOutput(BaseOutput):
    """What ``step`` returns: the next state and the prediction of the clean sample, both of the sample's shape."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class Result(tuple):
    """``(prev_sample, pred_original_sample)``; the second is computed when it is asked for, which is rarely."""

    def __new__(cls, previous: torch.Tensor, denoised: Any) -> Result:
        self = super().__new__(cls, (previous, None))
        self.denoised = denoised
        return self

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0) if index == 0 else tuple(self)[index]

    def __iter__(self) -> Iterator[Any]:
        yield super().__getitem__(0)
        self.denoised = resolved(self.denoised)
        yield self.denoised


def resolved(denoised: Any) -> Any:
    """x_0 from x_0 or from the function that computes it."""
    return denoised() if callable(denoised) else denoised


class Draws:
    """Noise as diffusers draws it: from the pipeline's generators, in the order of the steps."""

    def __init__(self) -> None:
        self.generator: Any = None
        self.given: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        if self.given is not None:
            given, self.given = self.given, None
            return given.to(like.device)
        return randn_tensor(tuple(like.shape), generator=self.generator, device=like.device, dtype=self.dtype)


@dataclass(eq=False)
class Run:
    """Everything that changes from ``set_timesteps`` on; one for each thread that calls it."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor
    plan: Plan | None = None
    num_inference_steps: int | None = None
    begin_index: int | None = None
    step_index: int | None = None
    stepper: Stepper | None = None
    draws: Draws | None = None
    before: Stepper | None = None
