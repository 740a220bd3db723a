"""Guidance in a plain run: the denoiser's networks behind a session."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..schedules import Node
from ..schedules.parametrization import Prediction
from .cfg import CFG
from .predictor import Denoiser, Network
from .run import CONDITIONAL, UNCONDITIONAL, Run

if TYPE_CHECKING:
    from .composition import Guidance, Session


class GuidedDenoiser:
    """A denoiser under guidance, for one run. Evaluations are counted by the denoiser, for the rows that really ran.

    ``session`` is None where nothing but a constant scale is asked for; there is no trace then.
    """

    def __init__(self, denoiser: Denoiser, scale: float, session: Session | None = None) -> None:
        self.denoiser, self.scale, self.session = denoiser, scale, session

    @property
    def prediction(self) -> Prediction:
        """The denoiser's own space."""
        return self.denoiser.prediction

    @property
    def moves(self) -> bool:
        """Whether :meth:`move` is to be called between the steps."""
        return self.session is not None and self.session.moves

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        if self.session is None:
            return self._plain(x, node)
        call = self.session.begin(x, node, self._evaluate)
        with torch.enable_grad() if call.gradient else nullcontext():
            rows = call.branches.items()
            predictions = {name: self._evaluate(name, call.x, node, chosen) for name, chosen in rows}
            return self.session.finish(call, predictions)

    def move(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """The state to go on from, given the one that the solver arrived at."""
        assert self.session is not None
        return self.session.move(x, node, self._evaluate)

    def _plain(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        if self.scale == 1.0:
            return self.denoiser(x, node)
        unconditional = self.denoiser.without_condition(x, node)
        if self.scale == 0.0:
            return unconditional
        return torch.lerp(unconditional, self.denoiser(x, node), self.scale)

    def _evaluate(
        self, branch: str | Network, x: torch.Tensor, node: Node, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        denoiser = self.denoiser
        if rows is not None:
            x = x[rows]
        if branch == CONDITIONAL:
            y = denoiser.condition
            if y is not None and self.session is not None:
                y = self.session.condition(y)
            return denoiser.run(denoiser.fn, x, node, y)
        if branch == UNCONDITIONAL:
            return denoiser.without_condition(x, node)
        if isinstance(branch, str):
            assert self.session is not None
            return denoiser.run(self.session.network(branch) or denoiser.branches[branch], x, node)
        return denoiser.run(branch, x, node)


def bind(guidance: Guidance, denoiser: Denoiser, run: Run | None) -> GuidedDenoiser:
    """The predictor of a run, checked; see :meth:`Guidance.bind`."""
    run = run or Run(denoiser.noise_schedule, denoiser.prediction, condition=denoiser.condition is not None)
    branches = {CONDITIONAL, *denoiser.branches}
    if denoiser.unconditional is not None:
        branches.add(UNCONDITIONAL)
    session = guidance.session(replace(run, branches=frozenset(branches)))
    (first, *others) = guidance.methods
    constant = not others and isinstance(first, CFG) and first.constant
    return GuidedDenoiser(denoiser, guidance.weight, None if constant else session)
