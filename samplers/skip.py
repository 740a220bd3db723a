"""Epsilon extrapolation (FSampler): some evaluations are replaced by an extrapolation of earlier ones.

FSampler, https://github.com/obisin/ComfyUI-FSampler.
"""

from __future__ import annotations

from typing import Literal

from ..schedules import Node, TimeGrid
from ..schedules.skipping import continuation, explicit_steps, parse_pattern, patterned_steps
from .registry import Solver, transform
from .trace import Evaluation, Linear, Trace, View, combination

Variable = Literal["epsilon", "denoised"]
_OWNER = "transform 'skip'"


def _order(order: int, inner: Solver, pattern: str, **_: object) -> int:
    return min(order, parse_pattern(pattern, _OWNER)[0] if inner.evaluations_per_step == 1 else 1)


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
    variable: Variable = "denoised",
    sigma_aware: bool = False,
    protect_first: int = 2,
    protect_last: int = 2,
    indices: tuple[int, ...] = (),
) -> Linear:
    """Epsilon extrapolation: after every K steps with the network one on predictions continued from before.

    ``pattern=hN/sK`` (N = 2, 3, 4; N <= K <= 6; ``hN`` alone is ``hN/sN``) continues the polynomial through the
    N newest real predictions: ``2 e_0 - e_1``, ``3 e_0 - 3 e_1 + e_2``, ``4 e_0 - 6 e_1 + 4 e_2 - e_3``, fewer
    where there are fewer. e is x_0 itself for ``variable=denoised``, ``x_0 - x / alpha = -k eps`` for
    ``epsilon``, as in FSampler, which loses to fewer steps with multistep solvers (docs/guidance-measured.md);
    with ``sigma_aware`` the polynomial is one in k = sigma / alpha and not in the number of the step. The first
    ``protect_first`` and the last ``protect_last`` steps are never skipped. ``indices`` names the steps to skip
    instead (the first two never are; two real steps must lie before the first skip and between two runs of
    skips). All stages of a skipped step use the same e, which is first order.
    """
    order, interval = parse_pattern(pattern, _OWNER)
    if indices:
        skipped = explicit_steps(grid.steps, indices)
    else:
        skipped = patterned_steps(grid.steps, order, interval, protect_first, protect_last)
    return inner.solve(_Skipping(trace, inner, grid, skipped, order, variable, sigma_aware), x, grid)


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
        weights = continuation([s.ratio for s, _ in self.history], node.ratio, self.sigma_aware)
        return self.inner.keep(combination(*zip(weights, (value for _, value in self.history))))
