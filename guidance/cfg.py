"""Classifier-free guidance, where it acts, and how its scale changes with the time."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from ..schedules.spec import Fraction, NonNegative
from .method import Method, method
from .run import Call, Run


@method("cfg", rank=10, reference="Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598")
@dataclass(frozen=True)
class CFG(Method):
    """Classifier-free guidance, ``u + w (c - u)``; w = 1 is the plain conditional network.

    c and u are the predictions with and without the condition, in the network's own space (an affine rule: the same
    in every space). Costs two evaluations a sample, one at w = 1 and outside the interval (u is not needed) and at
    a constant w = 0 (c is not).

    ``scale`` is w; left out, another method gives it. Guided are the steps i of N with ``int(start N) <= i < int(stop
    N)`` whose noise level k = sigma / alpha has ``low < k <= high`` (Kynkaanniemi et al., "Applying Guidance in a
    Limited Interval Improves Sample and Distribution Quality in Diffusion Models"; a flow model's sigma is ``k / (1 +
    k)``); the others are plainly conditional. The decision is the step's, for all its evaluations. ``stop=0.6`` is
    guidance for the first steps only (Step AG).

    ``schedule``: ``constant``; ``linear`` and ``cosine`` rise from 1 with the mean w, ``1 + (w - 1) f`` with f = 2 i /
    (N - 1) and ``1 - cos(pi i / (N - 1))``; ``cogvideox`` is that pipeline's dynamic scale for parity,
    ``1 + w (1 - cos(pi ((N - t) / N)^5)) / 2`` with the training index t, where N counts steps.

    ValueError for a scale below 0 and for steps that are not known in advance where start, stop or schedule count
    them.
    """

    scale: float | None = None
    _: KW_ONLY
    start: Fraction = 0.0
    stop: Fraction = 1.0
    low: NonNegative = 0.0
    high: NonNegative = math.inf
    schedule: Literal["constant", "linear", "cosine", "cogvideox"] = "constant"

    needs_scale = True

    @property
    def weight(self) -> float | None:
        return self.scale

    @property
    def constant(self) -> bool:
        """Whether it is one scale in every step."""
        return self == CFG(self.scale)

    def check(self, run: Run, guidance: object) -> None:
        if (self.start, self.stop, self.schedule) != (0.0, 1.0, "constant") and not run.nodes:
            raise ValueError(
                "options start, stop and schedule of guidance 'cfg' count steps, which this host chooses on the way; "
                "use low and high, or fs.sample"
            )

    def begin(self, run: Run) -> dict[str, tuple[bool, float]]:
        return {}

    def plan(self, call: Call, state: dict[str, tuple[bool, float]]) -> None:
        if call.stage == 0 or "step" not in state:
            state["step"] = self._inside(call), self._scale(call)
        inside, scale = state["step"]
        if scale != call.scale:
            call.guided, call.scale = call.guided and scale != 1.0, scale
        call.guided = call.guided and inside

    def _inside(self, call: Call) -> bool:
        n = call.run.steps
        index = not n or int(self.start * n) <= call.step < int(self.stop * n)
        return index and self.low < call.node.ratio <= self.high

    def _scale(self, call: Call) -> float:
        w, n = call.scale, call.run.steps
        if self.schedule == "constant":
            return w
        if self.schedule == "cogvideox":
            return 1.0 + w * (1.0 - math.cos(math.pi * ((n - call.node.t) / n) ** 5)) / 2.0
        u = call.step / (n - 1) if n > 1 else 0.5
        return 1.0 + (w - 1.0) * (2.0 * u if self.schedule == "linear" else 1.0 - math.cos(math.pi * u))
