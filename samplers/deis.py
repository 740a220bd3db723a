"""DEIS: exponential integrator in rho = sigma / alpha with polynomial extrapolation of the noise prediction.

Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", https://arxiv.org/abs/2204.13902.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..schedules import Node, TimeGrid
from .coefficients import integrate_ratio, lagrange
from .registry import solver
from .steps import ddim
from .trace import Evaluation, Linear, Trace, combination

Variable = Literal["t", "rho", "log_rho"]


def _order(order: int, **_: object) -> int:
    """The first step is DDIM's, which caps a multistep method at two."""
    return min(order, 2)


@solver(
    "deis",
    family="deis",
    order=_order,
    reference="Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902",
    aliases={
        "deis_tab1": "deis:order=2",
        "deis_tab2": "deis:order=3",
        "deis_tab3": "deis:order=4",
        "deis_rhoab1": "deis:order=2,variable=rho",
        "deis_rhoab2": "deis:order=3,variable=rho",
        "deis_rhoab3": "deis:order=4,variable=rho",
        "deis_multistep": "deis:order=2,variable=log_rho,lower_order_final=true",
        "lms": "deis:order=4,variable=rho",
    },
)
def deis(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    order: int = 3,
    variable: Variable = "t",
    lower_order_final: bool = False,
) -> Linear:
    """DEIS Adams-Bashforth with exact integrals: tAB, rhoAB, or in log rho as diffusers has it.

    ``x_t / alpha_t = x_s / alpha_s + sum_j eps_j int_{rho_s}^{rho_t} L_j d rho``, L_j the Lagrange basis in the chosen
    variable through the ``order`` newest nodes (the paper's tAB-r uses r + 1 of them). ``variable=rho`` is the linear
    multistep method (LMS) of k-diffusion. Orders start at 1; with ``lower_order_final`` they end at 1 as well. Where
    t has no noise the integrals have finite limits and the order is kept, except in log rho.
    """
    if order < 1:
        raise ValueError(f"option 'order' of solver 'deis' must be at least 1, got {order}")
    history: list[tuple[Node, Evaluation]] = []
    for i, (s, t) in enumerate(grid.intervals()):
        x, m = trace.evaluate(x, s)
        history = [(s, m), *history][: order if not lower_order_final else min(order, grid.steps - i)]
        if len(history) == 1 or not math.isfinite(s.ratio) or (t.sigma == 0.0 and variable == "log_rho"):
            x = ddim(x, m, s, t, "epsilon")
            continue
        weights = _weights([n for n, _ in history], t, variable, grid)
        x = t.alpha * (x / s.alpha + combination(*((w, e.epsilon) for w, (_, e) in zip(weights, history))))
    return x


def _weights(nodes: list[Node], t: Node, variable: Variable, grid: TimeGrid) -> list[float]:
    def coordinate(rho: np.ndarray) -> np.ndarray:
        if variable == "rho":
            return rho
        with np.errstate(divide="ignore"):
            return np.log(rho) if variable == "log_rho" else time(level(rho))

    time, level = grid.noise_schedule.time, grid.noise_schedule.level_at_ratio
    at = [n.t for n in nodes] if variable == "t" else list(coordinate(np.array([n.ratio for n in nodes])))
    return integrate_ratio(nodes[0], t, lambda rho: lagrange(at, coordinate(rho)))
