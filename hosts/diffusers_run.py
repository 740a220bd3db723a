"""The mutable side of a scheduler: one run, the noise it draws, and what a step returns."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..samplers import Stepper
from ..schedules import Node
from .diffusers_compile import handle_of
from .diffusers_plan import Plan


@dataclass
class FewStepSchedulerOutput(BaseOutput):
    """What ``step`` returns: the next state and the prediction of the clean sample, both of the sample's shape."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class Result(tuple):
    """``(prev_sample, pred_original_sample)``; the second is computed when it is asked for, which is rarely."""

    denoised: Any
    """x_0 or the function that computes it."""

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

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.generator: Any = None
        self.given: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None

    @contextmanager
    def from_(self, generator: Any, given: torch.Tensor | None, dtype: torch.dtype) -> Iterator[None]:
        """Draw from a generator, or take what is given first. Generators can be neither copied nor pickled."""
        self.generator, self.given, self.dtype = generator, given, dtype
        try:
            yield
        finally:
            self.generator = self.given = None

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        if self.given is not None:
            noise, self.given = self.given.to(like.device), None
        else:
            shape = tuple(like.shape)
            noise = randn_tensor(shape, generator=self.generator, device=like.device, dtype=self.dtype)
        return noise if self.scale == 1.0 else self.scale * noise


class History(Sequence):
    """The registers of a stepper, but for the state that is evaluated next."""

    def __init__(self, stepper: Stepper | None) -> None:
        self._registers = {} if stepper is None else stepper._registers
        # Before the first evaluation the only register is a place for the state.
        self._kept: list[int] = []
        if stepper is not None and stepper.evaluations:
            self._kept = [r for r in sorted(self._registers) if self._registers[r] is not stepper.x]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._registers[r] for r in self._kept[index]]
        return self._registers[self._kept[index]]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        self._registers[self._kept[index]] = value


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
    plain: bool = False
    """Whether a step is nothing but the program's."""
    keeps_float32: bool = False
    rounded: tuple[torch.Tensor, torch.Tensor] | None = None
    """The 16-bit state that was returned and what it was before it was rounded."""
    rows: list[Run] | None = None
    """A run for each sample, where a batch has several timesteps at once."""
    copied: bool = False
    """Whether this is a copy that has not gone on yet: the host holds the tensors of the original."""

    def handed_back(self, sample: torch.Tensor, returned: torch.Tensor) -> bool:
        """Whether a host gives back what it was given; after a copy in mid-run the values are compared, once."""
        if sample is returned or sample.data_ptr() == returned.data_ptr():
            return True
        return self.copied and sample.shape == returned.shape and torch.equal(sample, returned)


class PerThread:
    """The state of a run as a scheduler shows it; each thread that calls ``set_timesteps`` has its own."""

    _threads: threading.local
    _latest: Run

    @property
    def _run(self) -> Run:
        return getattr(self._threads, "run", None) or self._latest

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_threads"}
        run = replace(self._run, copied=True)
        run.rows = None if run.rows is None else [replace(row, copied=True) for row in run.rows]
        return state | {"_latest": run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _threads=threading.local(), _handle=handle_of(self))

    @property
    def timesteps(self) -> torch.Tensor:
        """What the network is told at each evaluation, shape (evaluations,), on the device of ``set_timesteps``."""
        return self._run.timesteps

    @timesteps.setter
    def timesteps(self, value: torch.Tensor) -> None:
        self._run.timesteps = value

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels of the evaluations and of the end, float32 on the CPU, shape (evaluations + 1,).

        sigma / alpha for discrete and EDM models, sigma for flow models. Changes made before the first step are used.
        """
        return self._run.sigmas

    @sigmas.setter
    def sigmas(self, value: torch.Tensor) -> None:
        self._run.sigmas = value

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps asked for; None before ``set_timesteps``."""
        return self._run.num_inference_steps

    @num_inference_steps.setter
    def num_inference_steps(self, value: int | None) -> None:
        self._run.num_inference_steps = value

    @property
    def begin_index(self) -> int | None:
        """The evaluation that the run starts with, if a pipeline has said so."""
        return self._run.begin_index

    @property
    def step_index(self) -> int | None:
        """The number of the next evaluation; None before the first step."""
        return self._run.step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say with which evaluation the run starts; spares the look-up of the first timestep."""
        self._run.begin_index = begin_index

    @property
    def _begin_index(self) -> int | None:
        return self._run.begin_index

    @_begin_index.setter
    def _begin_index(self, value: int | None) -> None:
        self._run.begin_index = value

    @property
    def _step_index(self) -> int | None:
        return self._run.step_index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        run = self._run
        if value is None:  # from the start again
            run.step_index, run.stepper = None, None
        elif run.step_index is None or value == run.step_index:
            run.step_index = value
        elif value == run.step_index - 1 and run.before is not None:  # Cosmos takes a trial step first
            run.step_index, run.stepper, run.before = value, run.before, None
        else:
            raise ValueError(
                f"step_index cannot be moved from {run.step_index} to {value}; call set_timesteps instead"
            )

    @property
    def model_outputs(self) -> History:
        """What the solver keeps from earlier evaluations, oldest first; elements may be replaced (cropped frames)."""
        return History(self._run.stepper)

    @model_outputs.setter
    def model_outputs(self, value: list[torch.Tensor | None]) -> None:
        kept = self.model_outputs
        if kept and len(kept) != len(value):
            raise ValueError(f"the solver keeps {len(kept)} tensors, got {len(value)}")
        for i, tensor in enumerate(value[: len(kept)]):
            if tensor is not None:
                kept[i] = tensor

    @property
    def last_sample(self) -> None:
        """None: all that a solver keeps is in ``model_outputs``."""
        return None
