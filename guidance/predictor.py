"""Predictors: what a run asks for a prediction. A :class:`Denoiser` is a network; guidance wraps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from ..schedules import PREDICTIONS, Node, NoiseSchedule
from ..schedules.parametrization import Prediction
from ..schedules.spec import suggestion

Network = Callable[..., torch.Tensor]
"""``network(x, t) -> output``; the conditional one of a denoiser with a ``condition`` is called with it as well."""


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
        condition: the condition as a tensor of shape (B, ...), for guidance that changes it (CADS); fn is then called
            as ``fn(x, t, condition)``.
        branches: further networks of the form ``network(x, t)`` by the name of the guidance that asks for them, such
            as ``{"autoguidance": weak_network}``.

    ``nfe`` counts evaluations: one sample through one network once. Raises ValueError for an unknown prediction and
    TypeError for a network that cannot be called.
    """

    def __init__(
        self,
        fn: Network,
        noise_schedule: NoiseSchedule,
        prediction: Prediction = "epsilon",
        shape: Sequence[int] | None = None,
        unconditional: Network | None = None,
        *,
        condition: torch.Tensor | None = None,
        branches: Mapping[str, Network] | None = None,
    ) -> None:
        self.branches = dict(branches or {})
        for name, function in (("fn", fn), ("unconditional", unconditional), *self.branches.items()):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable as {name}(x, t), got {type(function).__name__}")
        if not isinstance(noise_schedule, NoiseSchedule):
            raise TypeError(
                f"noise_schedule must be one of fewstep.schedules, got {type(noise_schedule).__name__}"
            )
        if prediction not in PREDICTIONS:
            hint = suggestion(str(prediction), PREDICTIONS)
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}{hint}")
        if condition is not None and not isinstance(condition, torch.Tensor):
            raise TypeError(f"condition must be a tensor of shape (B, ...), got {type(condition).__name__}")
        self.fn, self.unconditional, self.condition = fn, unconditional, condition
        self.noise_schedule = noise_schedule
        self.prediction: Prediction = prediction
        self.shape = None if shape is None else tuple(shape)
        self.nfe = 0

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The (conditional) network at a node."""
        return self.run(self.fn, x, node, self.condition)

    def without_condition(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The unconditional network at a node; ValueError if there is none."""
        if self.unconditional is None:
            raise ValueError("guidance needs an unconditional network: Denoiser(..., unconditional=fn)")
        return self.run(self.unconditional, x, node)

    def run(
        self, network: Network, x: torch.Tensor, node: Node, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Any network at a node, counted."""
        self.nfe += x.shape[0]
        t = torch.full((x.shape[0],), node.t, dtype=torch.float32, device=x.device)
        return network(x, t) if condition is None else network(x, t, condition)
