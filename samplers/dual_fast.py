"""DualFast: every noise prediction is moved away from the first one, which is the least wrong."""

from __future__ import annotations

import numpy as np

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative
from .registry import Solver, transform
from .trace import Evaluation, Linear, Trace, View


@transform(
    "dual_fast",
    order=lambda order, inner, c, **_: 0 if c > 0 else order,
    reference="DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models, https://arxiv.org/abs/2506.13058",
)
def dual_fast(inner: Solver, trace: Trace, x: Linear, grid: TimeGrid, *, c: NonNegative = 0.1) -> Linear:
    """DualFast (experimental): ``eps' = (1 + c_t) eps(x_t) - c_t eps(x_T)``, x_T the first state.

    Made against the error of the network, which is smallest in nearly pure noise. ``c_t`` falls linearly in the number
    of the step, from ``c`` at the first node to 0 at the last; ``c=0`` is the inner solver. The idea is the paper's,
    the constants are ours, to be fitted to a model. The bias does not shrink with the steps, so there is no order, and
    stochastic solvers lose their exactness on one point. An evaluation at alpha = 0 is left as it is.
    """
    return inner.solve(_Mixing(trace, grid, c) if c > 0 else trace, x, grid)


class _Mixing(View):
    """Adds the difference from the first prediction to every later one."""

    def __init__(self, inner: Trace, grid: TimeGrid, c: float) -> None:
        super().__init__(inner)
        self.times, self.c = -grid.t, c
        self.first: Linear | None = None

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Evaluation]:
        x, m = self.inner.evaluate(x, node)
        if self.first is None:
            self.first = m.epsilon
            return x, m
        steps = len(self.times) - 1
        c = self.c * (1.0 - float(np.interp(-node.t, self.times, np.arange(steps + 1.0))) / steps)
        if node.alpha == 0.0 or c == 0.0:  # noise alone says nothing about x_0
            return x, m
        mixed = self.inner.keep((1.0 + c) * m.epsilon - c * self.first)
        return x, Evaluation(self.inner, x, mixed, node, "epsilon")
