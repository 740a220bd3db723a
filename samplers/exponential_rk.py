"""Explicit exponential Runge-Kutta methods with stages between the nodes: RES for the ODE, SEEDS for the reverse SDE.

With ``h = lambda_t - lambda_s``, ``k = 1 + eta`` and P_1, P_2 as in DPM-Solver, the state at ``lambda_s + c h``, a
stage or (c = 1) the result, is

``x_c = (sigma_c / sigma_s) e^{-eta c h} x + alpha_c (P_1(k c h) m_0 + sum_j w_j (m_j - m_0)) + sigma_c N_c``

with one path of noise through all of them, ``N_b = e^{-eta (b - a) h} N_a + sqrt(1 - e^{-2 eta (b - a) h}) z_ab``.
In epsilon form, for eta = 0, the factors are ``alpha_c / alpha_s`` and ``-sigma_c``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative, Share
from .coefficients import Form, moments
from .registry import solver
from .sde import decay
from .steps import ddim, propagate, scale, step_length
from .trace import Evaluation, Linear, Trace, combination

RES = "Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling, https://arxiv.org/abs/2308.02157"
SEEDS = "SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models, https://arxiv.org/abs/2305.14267"

Weights = Callable[[float], Sequence[Sequence[float]]]
"""Length of a step -> the weights of ``m_1 - m_0``, ``m_2 - m_0``, ... in every stage but the first, and the result."""


@solver(
    "res_2s",
    family="exponential_rk",
    order=2,
    evaluations_per_step=2,
    reference=RES,
    aliases={"exp_heun_2_x0": "res_2s:c2=1"},
)
def res_2s(trace: Trace, x: Linear, grid: TimeGrid, *, c2: Share = 0.5, form: Form = "denoised") -> Linear:
    """Two-stage exponential Runge-Kutta method, second order in the stiff sense.

    DDIM to the stage at ``c2``, then ``w = P_2(h) / c2``. ``form`` is the prediction that is integrated; to sigma = 0
    and from alpha = 0 the step is DDIM's. It is ``dpmpp_2s:solver_type=heun`` with stages of its own, not the grid's.
    """
    return _integrate(trace, x, grid, [c2], lambda h: [[], [_p(h, 2, form) / c2]], form)


@solver("res_3s", family="exponential_rk", order=3, evaluations_per_step=3, reference=RES)
def res_3s(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    c2: Share = 0.5,
    c3: Share = 1.0,
    form: Form = "denoised",
) -> Linear:
    """Three-stage exponential Runge-Kutta method, third order for every ``c2`` and ``c3``.

    With ``g = (3 c3^2 - 2 c3) / (c2 (2 - 3 c2))``: DDIM to the stage at c2, the one at c3 with
    ``w = g P_2(c2 h) + (c3 / c2) P_2(c3 h)``, the result with ``w = (g, 1) P_2(h) / (g c2 + c3)``. It is the family
    of Hochbruck and Ostermann that meets the stiff order conditions up to the third, the last of them in the limit
    h = 0. c3 = 2/3 goes with every c2 (g = 0), any other c3 with a c2 that is neither 2/3 nor c3. ``form`` and the
    ends as in ``res_2s``.
    """
    g = _gamma(c2, c3)

    def weights(h: float) -> list[list[float]]:
        last = _p(h, 2, form) / (g * c2 + c3)
        return [[], [g * _p(c2 * h, 2, form) + c3 / c2 * _p(c3 * h, 2, form)], [g * last, last]]

    return _integrate(trace, x, grid, [c2, c3], weights, form)


def _gamma(c2: float, c3: float) -> float:
    if math.isclose(c3, 2 / 3):
        return 0.0
    if math.isclose(c2, 2 / 3) or math.isclose(c2, c3):
        raise ValueError(
            f"option 'c2' of solver 'res_3s' must be neither 2/3 nor c3 unless c3 = 2/3, got c2={c2:g}, c3={c3:g}"
        )
    return (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))


@solver(
    "seeds_2",
    family="exponential_rk",
    order=lambda eta, **_: 1 if eta > 0 else 2,
    weak_order=2,
    evaluations_per_step=2,
    stochastic=lambda eta, **_: eta > 0,
    reference=SEEDS,
    aliases={"exp_heun_2_x0_sde": "seeds_2:r=1.0,solver_type=phi_2"},
)
def seeds_2(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    r: Share = 0.5,
    eta: NonNegative = 1.0,
    s_noise: NonNegative = 1.0,
    solver_type: Literal["phi_1", "phi_2"] = "phi_1",
) -> Linear:
    """SEEDS-2: two stages on one path of noise, strong order one and weak order two.

    First order to the stage at ``r``, then ``w = P_1(k h) / (2 r)`` for ``solver_type=phi_1``, ``P_2(k h) / r`` for
    ``phi_2``. ``s_noise`` scales the noise. ``eta = 0`` with ``phi_2`` is ``res_2s:c2=r``, with ``phi_1`` the midpoint
    rule of ``dpmpp_2s``.
    """

    def weights(h: float) -> list[list[float]]:
        return [[], [_p(h, 1, "denoised") / (2 * r) if solver_type == "phi_1" else _p(h, 2, "denoised") / r]]

    return _integrate(trace, x, grid, [r], weights, "denoised", eta, s_noise)


@solver(
    "seeds_3",
    family="exponential_rk",
    order=lambda eta, r_2, **_: 1 if eta > 0 else 3 if math.isclose(r_2, 2 / 3) else 2,
    weak_order=lambda eta, r_2, **_: 3 if eta == 0 and math.isclose(r_2, 2 / 3) else 2,
    evaluations_per_step=3,
    stochastic=lambda eta, **_: eta > 0,
    reference=SEEDS,
)
def seeds_3(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    r_1: Share = 1 / 3,
    r_2: Share = 2 / 3,
    eta: NonNegative = 1.0,
    s_noise: NonNegative = 1.0,
) -> Linear:
    """SEEDS-3: three stages on one path of noise, strong order one and weak order two.

    First order to the stage at ``r_1``, the one at ``r_2`` with ``w = (r_2 / r_1) P_2(k r_2 h)``, the result with
    ``w = (0, P_2(k h) / r_2)``. ``s_noise`` scales the noise. ``eta = 0`` is DPM-Solver++'s third-order singlestep and
    ``res_3s:c2=r_1`` for r_2 = 2/3, of second order otherwise.
    """
    if not r_1 < r_2:
        raise ValueError(f"option 'r_1' of solver 'seeds_3' must be less than r_2 = {r_2:g}, got {r_1:g}")

    def weights(h: float) -> list[list[float]]:
        return [[], [r_2 / r_1 * _p(r_2 * h, 2, "denoised")], [0.0, _p(h, 2, "denoised") / r_2]]

    return _integrate(trace, x, grid, [r_1, r_2], weights, "denoised", eta, s_noise)


def _p(h: float, k: int, form: Form) -> float:
    """P_k of length ``h``."""
    return moments(h, k, form)[k - 1] / h ** (k - 1)


def _integrate(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    stages: Sequence[float],
    weights: Weights,
    form: Form,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Linear:
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        nodes, rows = [], [[]]
        if t.sigma > 0.0 and s.alpha > 0.0:  # else nothing lies between in lambda
            nodes = [grid.between(s, t, c) if c < 1.0 else t for c in stages]
            rows = weights((1.0 + eta) * step_length(s, t))
        slopes: list[Linear] = []
        noise, last = Linear({}), s
        for n, row in zip([*nodes, t], rows):
            u = _first_order(x, m, s, n, form, eta) + scale(n, form) * combination(*zip(row, slopes))
            if eta > 0.0 and n.sigma > 0.0:
                noise, last = _extend(trace, noise, last, n, eta), n
                u = u + (s_noise * n.sigma) * noise
            if len(slopes) == len(nodes):
                x = u
            else:
                slopes.append(getattr(trace.evaluate(u, n)[1], form) - getattr(m, form))
    return x


def _first_order(x: Linear, m: Evaluation, s: Node, t: Node, form: Form, eta: float) -> Linear:
    if eta == 0.0:
        return ddim(x, m, s, t, form)
    h = step_length(s, t)
    weight = t.alpha * moments((1.0 + eta) * h, 1, form)[0]
    return decay(eta, h) * propagate(x, s, t, form) + weight * m.denoised


def _extend(trace: Trace, noise: Linear, s: Node, t: Node, eta: float) -> Linear:
    """The noise accumulated up to s, carried on to t, with the variance that belongs there."""
    h = step_length(s, t)
    if h == 0.0:
        return noise
    return decay(eta, h) * noise + math.sqrt(-math.expm1(-2.0 * eta * h)) * trace.noise(s, t)
