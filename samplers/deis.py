"""DEIS: exponential integrator in rho = sigma / alpha with polynomial extrapolation of the noise prediction.

Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", https://arxiv.org/abs/2204.13902.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike

from ..schedules import Node, TimeGrid, VPContinuous
from ..schedules.noise import Array
from ..schedules.spec import Range
from .coefficients import integrate_ratio, lagrange
from .registry import solver
from .steps import ddim
from .trace import Evaluation, Linear, Trace, combination

Variable = Literal["t", "vp", "rho", "log_rho"]


class _FittedVP(VPContinuous):
    """The linear VP process through ratio 0.002 at t = 0.001 and 80 at t = 1; its beta0 is slightly negative."""

    def __init__(self) -> None:
        low, high = math.log1p(0.002**2) / 1e-3, math.log1p(80.0**2)
        slope = 2.0 * (high - low) / (1.0 - 1e-3)
        super().__init__(high - slope / 2, high + slope / 2)

    def time(self, level: ArrayLike) -> Array:
        slope = self.beta1 - self.beta0
        return (np.sqrt(self.beta0**2 + 2.0 * slope * np.log1p(np.square(level))) - self.beta0) / slope


EDM_AS_VP = _FittedVP()


def _order(order: int, riemann: int, both_ends: bool, **_: object) -> int:
    """The first step is DDIM's, which caps a multistep method at two; a left sum has an error of order one."""
    return 1 if riemann and not both_ends else min(order, 2)


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
        "DEISMultistepScheduler": "deis:order=2,variable=log_rho,lower_order_final=true",
        "lms": "deis:order=4,variable=rho",
        "LMSDiscreteScheduler": "deis:order=4,variable=rho",
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
    euler_at_final: bool = False,
    riemann: Annotated[int, Range(0)] = 0,
    both_ends: bool = False,
) -> Linear:
    """DEIS Adams-Bashforth with exact integrals: tAB, rhoAB, or in log rho as diffusers has it.

    ``x_t / alpha_t = x_s / alpha_s + sum_j eps_j int_{rho_s}^{rho_t} L_j d rho``, L_j the Lagrange basis in the chosen
    variable through the ``order`` newest nodes (the paper's tAB-r uses r + 1 of them). ``variable=rho`` is the linear
    multistep method (LMS) of k-diffusion; ``vp`` is the time that diff-sampler and ComfyUI use for t on EDM models, of
    the linear VP process from ratio 0.002 to 80. Orders start at 1; with ``lower_order_final`` they end at 1 as well.
    Where t has no noise the integrals have finite limits and the order is kept, except in log rho and with
    ``euler_at_final``, where the step to sigma = 0 is DDIM's.

    ``riemann`` > 0 takes sums of that many points for the integrals, as the field's codes do with 10000: left Riemann
    sums in the variable as in DEIS's repository or, with ``both_ends``, over points that include the two ends as in
    diff-sampler and ComfyUI, whose first step is DDIM's. They miss the weights by some 1e-4, which of the first, long
    steps is 1e-2 of a sample. ``euler_at_final`` is implied.
    """
    if order < 1:
        raise ValueError(f"option 'order' of solver 'deis' must be at least 1, got {order}")
    if 0 < riemann < 3:
        raise ValueError(f"option 'riemann' of solver 'deis' must be 0 or at least 3, got {riemann}")
    history: list[tuple[Node, Evaluation]] = []
    for i, (s, t) in enumerate(grid.intervals()):
        x, m = trace.evaluate(x, s)
        history = [(s, m), *history][: order if not lower_order_final else min(order, grid.steps - i)]
        first = len(history) == 1 and (both_ends or not riemann)
        last = t.sigma == 0.0 and (euler_at_final or variable == "log_rho" or riemann > 0)
        if first or last or not math.isfinite(s.ratio):
            x = ddim(x, m, s, t, "epsilon")
            continue
        weights = _weights([n for n, _ in history], t, variable, grid, riemann, both_ends)
        x = t.alpha * (x / s.alpha + combination(*((w, e.epsilon) for w, (_, e) in zip(weights, history))))
    return x


def _weights(
    nodes: list[Node], t: Node, variable: Variable, grid: TimeGrid, riemann: int, both_ends: bool
) -> list[float]:
    schedule = EDM_AS_VP if variable == "vp" else grid.noise_schedule

    def coordinate(rho: np.ndarray) -> np.ndarray:
        if variable == "rho":
            return rho
        with np.errstate(divide="ignore"):
            return np.log(rho) if variable == "log_rho" else schedule.time(schedule.level_at_ratio(rho))

    def ratio(v: np.ndarray) -> np.ndarray:
        if variable == "rho":
            return v
        alpha, sigma = schedule.alpha_sigma(v) if variable != "log_rho" else (1.0, np.exp(v))
        return sigma / alpha

    ends = [*nodes, t]
    at = [n.t for n in ends] if variable == "t" else list(coordinate(np.array([n.ratio for n in ends])))
    end = at.pop()
    if not riemann:
        return integrate_ratio(nodes[0], t, lambda rho: lagrange(at, coordinate(rho)))
    v = np.linspace(at[0], end, riemann, endpoint=both_ends)
    rho = ratio(v)
    if isinstance(schedule, VPContinuous) and variable in ("t", "vp"):
        slope = (schedule.beta0 + (schedule.beta1 - schedule.beta0) * v) * (1.0 + rho**2) / (2.0 * rho)
    else:
        slope = np.gradient(rho, v, edge_order=2)
    return [float(slope @ basis) * (end - at[0]) / riemann for basis in lagrange(at, v)]
