"""Epsilon extrapolation (FSampler): some evaluations are replaced by an extrapolation of earlier ones.

FSampler, https://github.com/obisin/ComfyUI-FSampler.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from ..schedules import Node, TimeGrid
from .coefficients import lagrange
from .registry import Solver, transform
from .trace import Evaluation, Linear, Trace, View, combination

Variable = Literal["epsilon", "denoised"]
UNIFORM = {2: (2.0, -1.0), 3: (3.0, -3.0, 1.0), 4: (4.0, -6.0, 4.0, -1.0)}
"""Weights of the newest predictions that continue a polynomial in the number of the step."""


def _order(order: int, inner: Solver, pattern: str, **_: object) -> int:
    return min(order, _parse(pattern)[0] if inner.evaluations_per_step == 1 else 1)


@transform(
    "skip",
    order=_order,
    reference="FSampler, https://github.com/obisin/ComfyUI-FSampler",
)
def skip(
    inner: Solver,
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    pattern: str = "h2/s2",
    variable: Variable = "epsilon",
    sigma_aware: bool = False,
    protect_first: int = 2,
    protect_last: int = 2,
    indices: tuple[int, ...] = (),
) -> Linear:
    """Epsilon extrapolation: after every K steps with the network one on predictions continued from before.

    ``pattern=hN/sK`` (N = 2, 3, 4; N <= K <= 6; ``hN`` alone is ``hN/sN``) continues the polynomial through the N
    newest real predictions: ``2 e_0 - e_1``, ``3 e_0 - 3 e_1 + e_2``, ``4 e_0 - 6 e_1 + 4 e_2 - e_3``, fewer where
    there are fewer. e is ``x_0 - x / alpha = -k eps`` for ``variable=epsilon``, x_0 itself for ``denoised``; with
    ``sigma_aware`` the polynomial is one in k = sigma / alpha and not in the number of the step. The first
    ``protect_first`` and the last ``protect_last`` steps are never skipped. ``indices`` names the steps to skip
    instead (the first two never are; two real steps must lie before the first skip and between two runs of skips).
    All stages of a skipped step use the same e, which is first order.
    """
    order, interval = _parse(pattern)
    if indices:
        skipped = _explicit(indices, grid.steps)
    else:
        first, last = max(protect_first, order), grid.steps - protect_last
        skipped = {i for i in range(first, last) if (i - first) % (interval + 1) == interval}
    return inner.solve(_Skipping(trace, inner, grid, skipped, order, variable, sigma_aware), x, grid)


def _parse(pattern: str) -> tuple[int, int]:
    match = re.fullmatch(r"h([234])(?:/s([2-6]))?", pattern)
    order, interval = (int(g or match[1]) for g in match.groups()) if match else (1, 0)
    if interval < order:
        raise ValueError(
            f"option 'pattern' of transform 'skip' must be h2/s2 to h2/s6, h3/s3 to h3/s6 or h4/s4 to h4/s6, "
            f"got {pattern!r}"
        )
    return order, interval


def _explicit(indices: tuple[int, ...], steps: int) -> set[int]:
    skipped: set[int] = set()
    real, needed = 0, 2  # real steps in a row, and how many a skip waits for
    for i in range(steps):
        if i in indices and i > 1 and (real >= needed or i - 1 in skipped):
            skipped.add(i)
            real = 0
        else:
            real += 1
    return skipped


class _Skipping(View):
    """Answers the evaluations of the chosen steps from earlier ones."""

    def __init__(
        self,
        inner: Trace,
        solver: Solver,
        grid: TimeGrid,
        skipped: set[int],
        order: int,
        variable: Variable,
        sigma_aware: bool,
    ) -> None:
        super().__init__(inner)
        self.stages, self.startup = solver.evaluations_per_step, solver.startup_evaluations
        self.steps, self.skipped, self.order = grid.steps, skipped, order
        self.variable, self.sigma_aware = variable, sigma_aware
        self.calls = 0
        self.history: list[tuple[Node, Linear]] = []
        self.continued: Linear | None = None

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Evaluation]:
        step, stage = divmod(max(0, self.calls - self.startup), self.stages)
        self.calls += 1
        if stage == 0:
            self.continued = self._continue(node) if step in self.skipped else None
        if self.continued is not None and node.alpha > 0.0:
            x = self.inner.keep(x)
            own = x / node.alpha if self.variable == "epsilon" else Linear({})
            return x, Evaluation(self.inner, x, self.inner.keep(own + self.continued), node, "denoised")
        x, m = self.inner.evaluate(x, node)
        if stage == 0 and node.alpha > 0.0:
            value = -node.ratio * m.epsilon if self.variable == "epsilon" else m.denoised
            self.history = [(node, value), *self.history][: self.order]
        return x, m

    def _continue(self, node: Node) -> Linear | None:
        n = len(self.history)
        if n < 2:
            return None
        if self.sigma_aware:
            ratios = [s.ratio for s, _ in self.history]
            weights = [float(w[0]) for w in lagrange(ratios, np.array([node.ratio]))]
        else:
            weights = UNIFORM[n]
        return self.inner.keep(combination(*zip(weights, (value for _, value in self.history))))
