"""Adaptive guidance: the unconditional branch is left out once it agrees with the conditional one."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

import torch

from ..kernels import available, products
from ..schedules import conversion
from ..schedules.spec import Range
from .method import Method, method
from .run import CONDITIONAL, UNCONDITIONAL, Call, Run
from .tensors import cosine, ratio, wide


@dataclass
class _Latch:
    """Which samples agree; the rows that this step guides (None: all), and how many steps have been guided."""

    agree: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    closed: bool = False
    steps: int = 0


@method(
    "adaptive",
    rank=14,
    reference="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, "
    "https://arxiv.org/abs/2312.12487",
)
@dataclass(frozen=True)
class AdaptiveGuidance(Method):
    """Adaptive guidance: guided until the cosine of c and u reaches a threshold, conditional from the next step on.

    ``cos = <c, u> / (|c| |u|)`` over all dimensions of a sample. The step that reaches ``threshold`` is still guided,
    as both branches have run. NFE is ``2 n + (N - n)`` with n guided steps of N. A threshold above 1 is CFG, one of
    -1 guides ``min_guided_steps`` steps.

    ``space`` is where the cosine is taken. The paper's is the network's; but predictions of the noise are nearly
    parallel from the first step on, so here it is the ``denoised`` prediction (0.99 to 0.9999). ``policy`` for a
    batch: ``all`` runs u for every sample until all agree, ``any`` until one does, ``per_sample`` for the samples
    that do not yet, so that the result of a sample does not depend on the others; the unconditional network is then
    called with fewer rows. Once left out u does not come back, and what other methods keep of it stays as it is.
    Measured at the first evaluation of a step, never while CADS changes the condition.

    The host waits for the device once a guided step, to read whether u is needed.
    """

    threshold: Annotated[float, Range(-1.0)] = 0.991
    _: KW_ONLY
    space: Literal["denoised", "network", "epsilon", "v", "flow"] = "denoised"
    policy: Literal["all", "any", "per_sample"] = "all"
    min_guided_steps: Annotated[int, Range(1)] = 1

    needs_scale = True
    needs_steps = True
    reads_values = True

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"when the unconditional branch runs"})

    def begin(self, run: Run) -> _Latch:
        return _Latch()

    def plan(self, call: Call, state: _Latch) -> None:
        if not call.guided:
            return
        if (
            call.first
            and state.agree is not None
            and not state.closed
            and state.steps >= self.min_guided_steps
        ):
            self._decide(state.agree, state)
        call.guided = not state.closed
        call.rows = state.rows

    def branches(self, predictions: dict[str, torch.Tensor], call: Call, state: _Latch) -> None:
        if not call.guided or not call.first:
            return
        state.steps += 1
        if call.noised:
            return
        c, u = predictions[CONDITIONAL], predictions[UNCONDITIONAL]
        if state.agree is None:
            state.agree = torch.zeros(c.shape[0], dtype=torch.bool, device=c.device)
        value = self.measure(c if call.rows is None else c[call.rows], u, call)
        if call.rows is None:
            call.cosine = value
            state.agree = state.agree | (value >= self.threshold)
        else:
            call.cosine = torch.full_like(state.agree, torch.nan, dtype=value.dtype)
            call.cosine[call.rows] = value
            state.agree = state.agree | (call.cosine >= self.threshold)

    def measure(self, c: torch.Tensor, u: torch.Tensor, call: Call) -> torch.Tensor:
        """The cosine of each sample, shape (B,)."""
        x = call.x if call.rows is None else call.x[call.rows]
        if available([c, u, x]):
            c_x, c_m = conversion(call.run.prediction, call.space(self.space), call.node)
            inputs, p, q = (
                ([c, u, x], [c_m, 0.0, c_x], [0.0, c_m, c_x]) if c_x else ([c, u], [c_m, 0.0], [0.0, c_m])
            )
            cc, cu, uu = products(inputs, p, q)
            return ratio(cu, (cc * uu).sqrt(), 0.0)
        if call.space(self.space) != call.run.prediction:
            c_x, c_m = conversion(call.run.prediction, call.space(self.space), call.node)
            c, u = c_x * wide(x) + c_m * c, c_x * wide(x) + c_m * u
        return cosine(c, u)

    def _decide(self, agree: torch.Tensor, state: _Latch) -> None:
        if self.threshold > 1.0:
            return
        if self.policy == "any":
            state.closed = bool(agree.any())
        elif self.policy == "all":
            state.closed = bool(agree.all())
        else:
            rows = (~agree).nonzero().reshape(-1)
            state.closed = len(rows) == 0
            state.rows = None if len(rows) == len(agree) else rows
