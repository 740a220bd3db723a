"""Analytical first step: the first evaluation, where a state is all but noise, is replaced by a formula.

Dockhorn et al., "GENIE: Higher-Order Denoising Diffusion Solvers", https://arxiv.org/abs/2210.05475.
"""

from __future__ import annotations

import math

from ..schedules import Node, TimeGrid
from .registry import Solver, transform
from .trace import Evaluation, Linear, Trace, View


@transform(
    "afs",
    order=lambda order, inner, **_: min(order, 1),
    startup_evaluations=lambda startup, inner, **_: startup - 1,
    reference="GENIE: Higher-Order Denoising Diffusion Solvers, https://arxiv.org/abs/2210.05475",
)
def afs(inner: Solver, trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    """Analytical first step: the first evaluation is taken to be ``eps = x / sqrt(alpha^2 + sigma^2)``, and is saved.

    The noise of unit variance in a state of data of zero mean and unit variance (diff-sampler's formula; for standard
    normal data the exact prediction is smaller by the factor ``sigma / sqrt(alpha^2 + sigma^2)``, which is 1 where
    sampling starts). At alpha = 0 it means x_0 = 0. First order, since the first step keeps its error, except where a
    method gives the first slope no weight (dpm_2). The last transform of a spec should be this one, so that it is the
    first evaluation of the whole run; a run of one step is left as it is.
    """
    return inner.solve(_Assuming(trace) if grid.steps > 1 else trace, x, grid)


class _Assuming(View):
    """Answers the first evaluation itself."""

    def __init__(self, inner: Trace) -> None:
        super().__init__(inner)
        self.first = True

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Evaluation]:
        if not self.first:
            return self.inner.evaluate(x, node)
        self.first = False
        x = self.inner.keep(x)
        total = math.hypot(node.alpha, node.sigma)
        share = node.alpha / (total * (total + node.sigma))  # x_0 = (x - sigma eps) / alpha
        return x, Evaluation(self.inner, x, share * x, node, "denoised")
