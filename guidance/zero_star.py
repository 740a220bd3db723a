"""CFG-Zero*: a scaled unconditional prediction, and no velocity in the first steps."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from ..kernels import Rule, guided
from ..schedules import conversion
from ..schedules.spec import Range
from .method import Method, method
from .run import Call, Run
from .tensors import inner

if TYPE_CHECKING:
    from .composition import Guidance


@method(
    "cfg_zero",
    rank=41,
    reference="CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, https://arxiv.org/abs/2503.18886",
)
@dataclass(frozen=True)
class CFGZeroStar(Method):
    """CFG-Zero*: ``s u + w (c - s u)`` with ``s = <c, u> / |u|^2`` of each sample; zero velocity in the first steps.

    ``scale`` is w; left out, another method gives it. ``zero_steps`` is how many steps move the state nowhere: a
    velocity of 0, or no noise predicted where the network predicts noise or data (x_0 = x / alpha). They cost no
    evaluation, but an interval of the schedule. -1 is 4% of the steps, rounded down; diffusers has 1. ``form=comfy``
    is ComfyUI's node: s of the predictions of noise, multiplied to those of data.
    """

    scale: float | None = None
    _: KW_ONLY
    zero_steps: Annotated[int, Range(-1)] = -1
    form: Literal["paper", "comfy"] = "paper"

    needs_scale = True

    @property
    def weight(self) -> float | None:
        return self.scale

    def check(self, run: Run, guidance: Guidance) -> None:
        if self.zero_steps > 0 and not run.nodes:
            raise ValueError("option 'zero_steps' of guidance 'cfg_zero' counts steps; use fs.sample")

    def plan(self, call: Call, state: None) -> None:
        steps = self.zero_steps if self.zero_steps >= 0 else int(0.04 * call.run.steps)
        if call.guided and call.step < steps:
            zero = torch.zeros_like(call.x)
            if call.run.prediction == "denoised":
                zero = conversion("epsilon", "denoised", call.node)[0] * call.x
            call.answer = zero

    def unconditional(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: None) -> torch.Tensor:
        if self.form == "paper":
            return self.factor(c, u) * u
        s = self.factor(call.to(c, "epsilon"), call.to(u, "epsilon"))
        return call.back(s * call.to(u, "denoised"), "denoised")

    def fused(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: None) -> torch.Tensor | None:
        if self.form != "paper":
            return None
        return guided([c, u], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], Rule("scaled", gain=call.scale))[0]

    def factor(self, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """s of each sample."""
        return inner(c, u) / (inner(u, u) + 1e-8)
