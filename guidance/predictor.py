"""Predictors: what a run asks for a prediction. A :class:`Denoiser` is a network; guidance wraps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..schedules import PREDICTIONS, Node, NoiseSchedule
from ..schedules.parametrization import Prediction
from ..schedules.spec import suggestion

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Predictor(Protocol):
    """``predictor(x, node) -> prediction`` of the shape of x, in the space that ``prediction`` names."""

    @property
    def prediction(self) -> Prediction:
        """What it returns."""
        ...

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor: ...


class Denoiser:
    """A network with what is needed to sample from it.

    Args:
        fn: ``fn(x, t) -> output``; x of shape (B, ...), t float32 of shape (B,): the training index for VP schedules,
            sigma for EDM, sigma in [0, 1] for flow models. The output has the shape of x.
        noise_schedule: one of :mod:`fewstep.schedules`.
        prediction: what the output is: ``"epsilon"``, ``"denoised"``, ``"v"`` or ``"flow"``.
        shape: shape of one sample, checked against the start state if given.
        unconditional: a second network of the same form without the condition, for guidance.

    ``nfe`` counts evaluations: one sample through one network once. Raises ValueError for an unknown prediction and
    TypeError for a network that cannot be called.
    """

    def __init__(
        self,
        fn: Network,
        noise_schedule: NoiseSchedule,
        prediction: Prediction,
        shape: Sequence[int] | None = None,
        unconditional: Network | None = None,
    ) -> None:
        for name, function in (("fn", fn), ("unconditional", unconditional)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable as {name}(x, t), got {type(function).__name__}")
        if not isinstance(noise_schedule, NoiseSchedule):
            raise TypeError(
                f"noise_schedule must be one of fewstep.schedules, got {type(noise_schedule).__name__}"
            )
        if prediction not in PREDICTIONS:
            hint = suggestion(str(prediction), PREDICTIONS)
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}{hint}")
        self.fn, self.unconditional = fn, unconditional
        self.noise_schedule = noise_schedule
        self.prediction: Prediction = prediction
        self.shape = None if shape is None else tuple(shape)
        self.nfe = 0

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The (conditional) network at a node."""
        return self._run(self.fn, x, node)

    def without_condition(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The unconditional network at a node; ValueError if there is none."""
        if self.unconditional is None:
            raise ValueError("guidance needs an unconditional network: Denoiser(..., unconditional=fn)")
        return self._run(self.unconditional, x, node)

    def _run(self, network: Network, x: torch.Tensor, node: Node) -> torch.Tensor:
        self.nfe += x.shape[0]
        return network(x, torch.full((x.shape[0],), node.t, dtype=torch.float32, device=x.device))
