"""Stochastic steps that restore exactly the level they should: coefficients-preserving sampling."""

from __future__ import annotations

import math

from ..schedules import Node, TimeGrid
from ..schedules.spec import Fraction
from .registry import solver
from .steps import ddim, renoise
from .trace import Linear, Trace


@solver(
    "cps",
    family="flow_sde",
    order=lambda eta, **_: 0 if eta > 0 else 1,
    stochastic=lambda eta, **_: eta > 0,
    aliases={"flow_match_euler_stochastic": "cps:eta=1"},
    reference="FlowCPS, https://github.com/IamCreateAI/FlowCPS",
)
def cps(trace: Trace, x: Linear, grid: TimeGrid, *, eta: Fraction = 0.7) -> Linear:
    """Coefficients-preserving sampling: replace a share of the noise that is left by fresh noise.

    ``x_t = alpha_t x_0 + sqrt(sigma_t^2 - sd^2) eps + sd z``, ``sd = sigma_t sin(eta pi / 2)``. ``eta = 0`` is DDIM,
    ``eta = 1`` keeps nothing but the prediction: the step of ``lcm`` and of flow models' stochastic sampling. The noise
    does not shrink with the step; more steps are another process, not a finer one, and there is no order.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        low = Node(t.t, t.alpha, t.sigma * math.sqrt(1.0 - math.sin(eta * math.pi / 2) ** 2))
        x = renoise(trace, ddim(x, m, s, low), low, t, (s, t))
    return x
