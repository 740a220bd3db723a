"""ER-SDE: exponential integrators in sigma / alpha of reverse SDEs that draw as much noise as a function says.

With rho = sigma / alpha, a noise scale phi(rho) and ``r = phi_t / phi_s``, its values at the ends, the exact step of
the extended reverse-time SDE, in the frame y = x / alpha, is

``y_t = r y_s + (1 - r) x_0(s) + int_{rho_t}^{rho_s} (phi_t / phi - 1) x_0' d rho + sqrt(rho_t^2 - r^2 rho_s^2) z``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative, Range
from .coefficients import integrate_ratio
from .registry import solver
from .steps import ddim
from .trace import Linear, Trace

NoiseScale = Literal["ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"]


def _order(order: int, noise_scale: NoiseScale, riemann: int, **_: object) -> int:
    """Strong order 1 with noise; without it 2 at most, as the first step is DDIM's."""
    return 1 if noise_scale != "ode" or riemann else min(order, 2)


@solver(
    "er_sde",
    family="er_sde",
    order=_order,
    weak_order=lambda order, riemann, **_: 1 if riemann else min(order, 2),
    stochastic=lambda noise_scale, **_: noise_scale != "ode",
    reference="Elucidating the Solution Space of Extended Reverse-Time SDE, https://arxiv.org/abs/2309.06169",
)
def er_sde(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    order: Literal[1, 2, 3] = 3,
    noise_scale: NoiseScale = "sde_5",
    s_noise: NonNegative = 1.0,
    riemann: Annotated[int, Range(0)] = 0,
) -> Linear:
    """ER-SDE-Solver-1, -2 and -3 (``order``): Taylor's formula in rho = sigma / alpha, derivatives from differences.

    ``y_t = r y_s + (1 - r) m_0 + C_1 D1 + C_2 D2 + sqrt(rho_t^2 - r^2 rho_s^2) z`` with y = x / alpha,
    ``C_j = int_{rho_t}^{rho_s} (phi_t / phi - 1) (rho - rho_s)^{j-1} d rho``,
    ``D1 = (m_0 - m_1) / (rho_0 - rho_1)``, ``D2 = 2 (D1 - D1_prev) / (rho_0 - rho_2)``. The step to sigma = 0 is
    DDIM's.

    ``noise_scale`` is phi, by the names of the original: ``ode`` rho, ``sde`` rho^2 (the usual reverse SDE), ``sde_1``
    rho (e^{-1/rho} + 10), ``sde_2`` rho^1.5, ``sde_3`` rho^2.5, ``sde_4`` rho^0.9 log10(1 + 100 rho^1.5), ``sde_5``
    rho (e^{rho^0.3} + 10). ``sde_4`` draws none above rho = 1000, where its phi / rho falls. ``s_noise`` scales z.
    ``riemann`` > 0 takes the integrals of 1 / phi from left Riemann sums of that many points, as do the original (100)
    and ComfyUI (200), which is first order; 0 takes them exactly. ``order=1,noise_scale=sde`` is ``ddim:eta=1``.
    """
    history: list[tuple[float, Linear]] = []
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if t.sigma == 0.0:
            return ddim(x, m, s, t)
        history = [(s.ratio, m.denoised), *history][:order]
        fall = min(0.0, float(_log_share(-t.lam, noise_scale) - _log_share(-s.lam, noise_scale)))
        share = math.exp(fall)  # of the noise in x that remains, r rho_s / rho_t
        x = (share * t.sigma / s.sigma) * x + t.alpha * (1.0 - share * t.ratio / s.ratio) * m.denoised
        if len(history) > 1:
            c_1, c_2 = _weights(s, t, noise_scale, riemann)
            d1 = _difference(*history[:2])
            x = x + t.alpha * c_1 * d1
            if len(history) > 2:
                d2 = 2.0 / (history[0][0] - history[2][0]) * (d1 - _difference(*history[1:]))
                x = x + t.alpha * c_2 * d2
        if fall < 0.0:
            x = x + (s_noise * t.sigma * math.sqrt(-math.expm1(2.0 * fall))) * trace.noise(s, t)
    return x


def _difference(newer: tuple[float, Linear], older: tuple[float, Linear]) -> Linear:
    return (newer[1] - older[1]) / (newer[0] - older[0])


def _log_share(u: Any, noise_scale: NoiseScale) -> Any:
    """``log(phi / rho)`` at ``u = log rho``, up to a constant; at an infinite u the limit."""
    u = np.minimum(u, 690.0)
    match noise_scale:
        case "ode":
            return 0.0 * u
        case "sde":
            return u
        case "sde_1":
            return np.log(np.exp(-np.exp(-u)) + 10.0)
        case "sde_2":
            return 0.5 * u
        case "sde_3":
            return 1.5 * u
        case "sde_4":
            return np.log(np.logaddexp(0.0, 1.5 * u + math.log(100.0))) - 0.1 * u
        case "sde_5":
            return np.logaddexp(np.exp(0.3 * u), math.log(10.0))


def _weights(s: Node, t: Node, noise_scale: NoiseScale, riemann: int) -> list[float]:
    """``C_1`` and ``C_2``."""

    def ratio(rho: np.ndarray) -> np.ndarray:
        """``phi_t / phi``."""
        shares = _log_share(-t.lam, noise_scale) - _log_share(np.log(rho), noise_scale)
        return t.ratio / rho * np.exp(shares)

    if not riemann:
        return integrate_ratio(s, t, lambda rho: [1.0 - ratio(rho), (1.0 - ratio(rho)) * (rho - s.ratio)])
    length = s.ratio - t.ratio
    points = t.ratio + length / riemann * np.arange(riemann)
    areas = length / riemann * ratio(points)
    return [float(areas.sum() - length), float(areas @ (points - s.ratio) + length**2 / 2)]
