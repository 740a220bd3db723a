"""Exponential integrators of the reverse SDE: DPM-Solver++ SDE, multistep and two-stage, and its ancestral relatives.

With ``h = lambda_t - lambda_s`` and ``k = 1 + eta`` the stochastic family of which eta = 0 is the ODE and eta = 1 the
usual reverse SDE is

* state   ``x_t = (sigma_t / sigma_s) e^{-eta h} x + alpha_t k I + sigma_t sqrt(1 - e^{-2 eta h}) z``
* integral ``I = int_0^h e^{-k (h - u)} x_0(u) du``
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative, Share
from .coefficients import exponential_weights, moments
from .dpm_solver import PAPER, SolverType, integral
from .registry import solver
from .steps import ancestral_low, ddim, renoise, step_length
from .trace import Linear, Trace, combination

Variant = Literal["k_diffusion", "diffusers", "exact"]
History = list[tuple[Node, Linear]]
KDIFFUSION = "k-diffusion, https://github.com/crowsonkb/k-diffusion"


def _order(eta: float, **_: object) -> int:
    """Strong order 1 with noise; without it the order of the ODE method."""
    return 1 if eta > 0 else 2


def _is_stochastic(eta: float, **_: object) -> bool:
    return eta > 0


@solver(
    "dpmpp_2m_sde",
    family="sde",
    order=_order,
    weak_order=2,
    stochastic=_is_stochastic,
    reference=PAPER,
    aliases={
        "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
        "dpmpp_2m_sde_heun": "dpmpp_2m_sde:solver_type=heun",
        "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde:solver_type=heun",
        "CosineDPMSolverMultistepScheduler": "dpmpp_2m_sde",
        "CogVideoXDPMScheduler": "dpmpp_2m_sde",
    },
)
def dpmpp_2m_sde(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    eta: NonNegative = 1.0,
    s_noise: NonNegative = 1.0,
    solver_type: SolverType = "midpoint",
) -> Linear:
    """SDE-DPM-Solver++(2M).

    With ``h' = (1 + eta) h`` in P_1 and P_2 and ``D1 = (m_0 - m_1) h / h_prev``: the integral is ``P_1 (m_0 + D1 / 2)``
    for ``solver_type=midpoint``, ``P_1 m_0 + P_2 D1`` for ``heun``. ``s_noise`` scales the noise; ``eta = 0`` is
    ``dpmpp_2m``.
    """
    return _multistep(
        trace,
        x,
        grid,
        2,
        eta,
        s_noise,
        lambda history, t, h: integral(history, t, h, "denoised", solver_type),
    )


@solver(
    "dpmpp_3m_sde",
    family="sde",
    order=lambda variant, **options: 0 if variant == "diffusers" else _order(**options),
    weak_order=lambda variant, **_: 1 if variant == "diffusers" else 2,
    stochastic=_is_stochastic,
    reference=KDIFFUSION,
    aliases={"dpmpp_3m_sde_gpu": "dpmpp_3m_sde"},
)
def dpmpp_3m_sde(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    eta: NonNegative = 1.0,
    s_noise: NonNegative = 1.0,
    variant: Variant = "k_diffusion",
    lower_order_final: bool = False,
) -> Linear:
    """SDE-DPM-Solver++(3M): as ``dpmpp_2m_sde`` with a third-order term; ``eta`` and ``s_noise`` as there.

    ``variant=k_diffusion`` is what is in use: ``P_1 m_0 + P_2 D1' + P_3 D2`` of length (1 + eta) h with the differences
    of ``dpmpp_3m``, half weight of D2 included, after a second-order step with ``heun``'s weights. ``exact`` gives D2
    its whole weight, 2 P_3: the integral of the polynomial through all three predictions. ``diffusers`` reproduces a
    wrong sign there, P_3 - 1 in place of P_3, and has ``midpoint``'s weights in second-order steps. It does not
    converge: where alpha dx_0/dx > 1 errors grow from step to step, however small the steps are.
    ``lower_order_final`` ends with orders 2 and 1.
    """
    rule = {"k_diffusion": _half, "diffusers": _wrong_sign, "exact": _exact}[variant]
    return _multistep(trace, x, grid, 3, eta, s_noise, rule, lower_order_final)


def _half(history: History, t: Node, h: float) -> Linear:
    return integral(history, t, h, "denoised", "heun")


def _exact(history: History, t: Node, h: float) -> Linear:
    s, step = history[0][0], step_length(history[0][0], t)
    if not math.isfinite(step):
        return integral(history, t, h, "denoised", "heun")
    weights = exponential_weights(h, [h / step * step_length(s, n) for n, _ in history], "denoised")
    return combination(*zip(weights, (v for _, v in history)))


def _wrong_sign(history: History, t: Node, h: float) -> Linear:
    result = integral(history, t, h, "denoised", "midpoint")
    if len(history) < 3:
        return result
    # D2 = h^2 times the second divided difference
    lam, step = [n.lam for n, _ in history], step_length(history[0][0], t)
    for j, (n, v) in enumerate(history):
        a, b = (n.lam - other for k, other in enumerate(lam) if k != j)
        result = result - step / a * (step / b) * v
    return result


def decay(eta: float, h: float) -> float:
    """``e^{-eta h}``, also where h is infinite."""
    return math.exp(-eta * h) if eta > 0.0 else 1.0


def _multistep(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    order: int,
    eta: float,
    s_noise: float,
    rule: Callable[[History, Node, float], Linear],
    lower_order_final: bool = False,
) -> Linear:
    history: History = []
    for i, (s, t) in enumerate(grid.intervals()):
        x, m = trace.evaluate(x, s)
        history = [(s, m.denoised), *history][:order]
        if t.sigma == 0.0:
            return ddim(x, m, s, t)
        h = step_length(s, t)
        last = grid.steps - i if lower_order_final else order
        drift = rule(history[:last], t, (1.0 + eta) * h)
        x = (t.sigma / s.sigma * decay(eta, h)) * x + t.alpha * drift
        if eta > 0.0:
            x = x + (s_noise * t.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))) * trace.noise(s, t)
    return x


@solver(
    "dpmpp_sde",
    family="sde",
    order=_order,
    evaluations_per_step=2,
    stochastic=_is_stochastic,
    reference=PAPER,
    aliases={"dpmpp_sde_gpu": "dpmpp_sde", "DPMSolverSDEScheduler": "dpmpp_sde"},
)
def dpmpp_sde(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    eta: NonNegative = 1.0,
    s_noise: NonNegative = 1.0,
    r: Share = 0.5,
) -> Linear:
    """DPM-Solver++ SDE with two stages, as k-diffusion has it.

    An ancestral DDIM step to ``lambda_s + r h`` (option ``r``), then one over the whole interval with
    ``(1 - 1/(2r)) x_0(s) + 1/(2r) x_0(m)``; each adds its own noise, scaled by ``s_noise``, to the level ``eta`` asks
    for.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if t.sigma == 0.0 or s.alpha == 0.0:
            low = ancestral_low(s, t, eta)
            x = renoise(trace, ddim(x, m, s, low), low, t, (s, t), s_noise)
            continue
        middle = grid.between(s, t, r)
        low = ancestral_low(s, middle, eta)
        u = renoise(trace, ddim(x, m, s, low), low, middle, (s, middle), s_noise)
        _, m_r = trace.evaluate(u, middle)
        low = ancestral_low(s, t, eta)
        weight = low.alpha * moments(step_length(s, low), 1, "denoised")[0] if low.sigma > 0.0 else low.alpha
        x = ddim(x, m, s, low) + weight / (2 * r) * (m_r.denoised - m.denoised)
        x = renoise(trace, x, low, t, (s, t), s_noise)
    return x


@solver(
    "dpmpp_2s_ancestral",
    family="sde",
    order=_order,
    weak_order=2,
    evaluations_per_step=2,
    stochastic=_is_stochastic,
    reference=KDIFFUSION,
)
def dpmpp_2s_ancestral(
    trace: Trace, x: Linear, grid: TimeGrid, *, eta: NonNegative = 1.0, s_noise: NonNegative = 1.0
) -> Linear:
    """Two-stage DPM-Solver++ down to less noise, then fresh noise: ancestral sampling with ``eta`` and ``s_noise``.

    With ``k_d`` of ``euler_ancestral``: DDIM to the middle of [s, d] in lambda, then DDIM from s to d with the
    prediction made there.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        low = ancestral_low(s, t, eta)
        if low.sigma > 0.0 and s.alpha > 0.0:
            middle = grid.between(s, low, 0.5)
            _, m = trace.evaluate(ddim(x, m, s, middle), middle)
        x = renoise(trace, ddim(x, m, s, low), low, t, (s, t), s_noise)
    return x


@solver(
    "res_multistep_ancestral",
    family="sde",
    order=_order,
    stochastic=_is_stochastic,
    reference="ComfyUI, https://github.com/comfyanonymous/ComfyUI",
)
def res_multistep_ancestral(
    trace: Trace, x: Linear, grid: TimeGrid, *, eta: NonNegative = 1.0, s_noise: NonNegative = 1.0
) -> Linear:
    """Two-step exponential method down to less noise, then fresh noise: ``eta`` and ``s_noise`` of ``euler_ancestral``.

    ``x_d = base + alpha_d (P_1 m_0 + P_2 D1)`` from s to d, ``D1 = (m_0 - m_1) (lambda_d - lambda_s) / g``. The
    distance g of the two predictions is taken as ComfyUI takes it, to where the previous step went before its noise,
    which is more than what lies between them. ``eta = 0`` is ``dpmpp_2m:solver_type=heun``.
    """
    previous: tuple[Linear, float] | None = None
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        low = ancestral_low(s, t, eta)
        h, value = step_length(s, low), m.denoised
        y = ddim(x, m, s, low)
        if previous and low.sigma > 0.0:
            before, gap = previous
            y = y + (low.alpha * moments(h, 2, "denoised")[1] / gap) * (value - before)
        previous = value, h
        x = renoise(trace, y, low, t, (s, t), s_noise)
    return x
