r"""The integrals behind exponential integrators, in float64, with series where the closed forms cancel.

With lambda the half log-SNR and ``h`` a step in it, the exact step from s to t is

* data form       ``x_t = (sigma_t / sigma_s) x_s + alpha_t int_0^h e^{-(h - u)} x_0(u) du``
* epsilon form    ``x_t = (alpha_t / alpha_s) x_s - sigma_t int_0^h e^{h - u} eps(u) du``

so that a method is a choice of weights for these two integrals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np

from ..schedules import Node

Form = Literal["denoised", "epsilon"]


def moments(h: float, n: int, form: Form) -> list[float]:
    r"""``M_j = int_0^h e^{-(h-u)} u^j / j! du`` for j < n (``e^{h-u}`` in epsilon form).

    ``M_0 = 1 - e^{-h}``, ``M_j = h^j / j! - M_{j-1}`` (signs reversed in epsilon form); below h = 1 that subtraction
    loses digits and the Taylor series ``sum_i (-+)^i h^{j+1+i} / (j+1+i)!`` is used.
    """
    sign = -1.0 if form == "denoised" else 1.0
    if h == math.inf:
        if form == "epsilon" or n > 1:
            raise ValueError("an infinite step in lambda has a first-order limit in data form only")
        return [1.0]
    if abs(h) < 1.0:
        result = []
        for j in range(n):
            term = h ** (j + 1) / math.factorial(j + 1)
            total, i = 0.0, j + 1
            while total + term != total:
                total += term
                i += 1
                term *= sign * h / i
            result.append(total)
        return result
    result = [sign * math.expm1(sign * h)]
    for j in range(1, n):
        result.append(-sign * (h**j / math.factorial(j) - result[-1]))
    return result


def exponential_weights(h: float, offsets: Sequence[float], form: Form) -> list[float]:
    """Weights of predictions at ``lambda_s + offset`` that are exact for polynomials of degree len(offsets) - 1.

    The exponential Adams rule on any nodes: solves ``sum_j w_j (offset_j)^q / q! = M_q`` with lengths in units of h.
    A node infinitely far away carries no information and gets weight 0. Shapes: ``offsets`` (p,) -> (p,).
    """
    near = [i for i, o in enumerate(offsets) if math.isfinite(o)]
    if h == math.inf:
        near = near[:1]
    weights = [0.0] * len(offsets)
    p = len(near)
    target = [m / h**q for q, m in enumerate(moments(h, p, form))] if math.isfinite(h) else [1.0]
    scaled = np.array([offsets[i] / h for i in near]) if math.isfinite(h) else np.zeros(1)
    matrix = np.array([scaled**q / math.factorial(q) for q in range(p)])
    for i, w in zip(near, np.linalg.solve(matrix, np.array(target)), strict=True):
        weights[i] = float(w)
    return weights


def lagrange(nodes: Sequence[float], x: np.ndarray) -> list[np.ndarray]:
    """The Lagrange basis polynomials of ``nodes`` at ``x``; infinitely far nodes drop out (their basis is 0)."""
    basis = []
    for j, a in enumerate(nodes):
        value = np.zeros_like(x) if math.isinf(a) else np.ones_like(x)
        for k, b in enumerate(nodes):
            if k != j and math.isfinite(a) and math.isfinite(b):
                value = value * (x - b) / (a - b)
        basis.append(value)
    return basis


@cache
def _gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(n)


@cache
def _gauss_laguerre(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.laguerre.laggauss(n)


def integrate_ratio(s: Node, t: Node, integrand: Callable[[np.ndarray], list[np.ndarray]]) -> list[float]:
    r"""``int f(rho) d rho`` for rho = sigma / alpha from s to t, for every function in a list.

    Taken in ``u = -log rho``, where the integrands of DEIS are smooth: Gauss-Legendre with 96 points, which leaves
    1e-13 for the longest steps in use, and Gauss-Laguerre where t has no noise (rho = 0, u = infinity).
    ``integrand`` receives rho, an array, and gives a list of arrays.
    """
    if t.sigma == 0.0:
        u, w = _gauss_laguerre(40)
        weights = -w * s.ratio
        rho = s.ratio * np.exp(-u)
    else:
        x, w = _gauss_legendre(96)
        half = 0.5 * math.log(t.ratio / s.ratio)
        rho = s.ratio * np.exp(half * (x + 1.0))
        weights = half * w * rho
    return [float(weights @ values) for values in integrand(rho)]
