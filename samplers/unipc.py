"""UniPC: a unified predictor-corrector of any order that reuses the corrector's evaluation.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
https://arxiv.org/abs/2302.04867.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..schedules import Node, TimeGrid
from .coefficients import Form, moments
from .registry import solver
from .steps import ddim, propagate, scale, step_length
from .trace import Evaluation, Linear, Trace, combination

Variant = Literal["bh1", "bh2", "vary"]


def _order(order: int, corrector: bool, variant: Variant, lower_order_final: bool, **_: object) -> int:
    """Global order: the first step leaves 2 without correction and 3 with it, a first-order last step leaves 2."""
    if variant == "vary" and corrector and order > 1:
        return 1  # what the released coefficients of the corrector have
    return min(order + 1, 2 if lower_order_final else 3) if corrector else min(order, 2)


@solver(
    "unipc",
    family="unipc",
    order=_order,
    reference="UniPC: A Unified Predictor-Corrector Framework, https://arxiv.org/abs/2302.04867",
    aliases={
        "uni_pc": "unipc:order=3,variant=bh1",
        "uni_pc_bh2": "unipc:order=3,variant=bh2",
        "unip": "unipc:corrector=false",
        "UniPCMultistepScheduler": "unipc",
        "HeliosScheduler": "unipc",
    },
)
def unipc(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    order: int = 2,
    variant: Variant = "bh2",
    form: Form = "denoised",
    corrector: bool = True,
    disable_corrector: tuple[int, ...] = (),
    lower_order_final: bool = True,
) -> Linear:
    """UniPC-p: one evaluation a step, any order p >= 1.

    With nodes at ``r_k = (lambda_k - lambda_0) / h`` (negative for past ones, 1 for the new one), differences
    ``(m_k - m_0) / r_k`` and B(h) = h (``bh1``) or 1 - e^{-h} (``bh2``), data form,

    * predictor ``x_t = base + alpha_t (P_1 m_0 + B sum_k rho_k (m_k - m_0) / r_k)`` over p - 1 past nodes,
    * corrector the same with the new node added, its prediction taken at the predicted state and then kept.

    The rho solve ``sum_k rho_k r_k^{i-1} = i! P_{i+1} / B``; a single node has rho = 1/2. ``variant=vary`` replaces
    B(h) by coefficients that vary with the order of the difference; as released it is first order with a corrector.
    ``form`` is the prediction that is extrapolated. ``disable_corrector`` lists steps that are left
    uncorrected, counted from 0. Orders start at 1 and, with ``lower_order_final``, end at 1; the step to sigma = 0 is
    DDIM's. ``corrector=false`` is UniP.
    """
    if order < 1:
        raise ValueError(f"option 'order' of solver 'unipc' must be at least 1, got {order}")
    x, m = trace.evaluate(x, grid[0])
    history: list[tuple[Node, Evaluation]] = [(grid[0], m)]
    for i, t in enumerate(list(grid)[1:]):
        p = min(order, len(history), grid.steps - i if lower_order_final else order)
        predicted = unipc_step(x, history[:p], None, t, variant, form)
        if i == grid.steps - 1:
            return predicted
        predicted, m = trace.evaluate(predicted, t)
        correct = corrector and i not in disable_corrector
        x = trace.keep(unipc_step(x, history[:p], m, t, variant, form)) if correct else predicted
        history = [(t, m), *history][:order]
    return x


def unipc_step(
    x: Linear,
    history: list[tuple[Node, Evaluation]],
    new: Evaluation | None,
    t: Node,
    variant: Variant,
    form: Form,
) -> Linear:
    """Predictor (``new`` is None) or corrector step from the newest node of the history to ``t``."""
    s, m = history[0]
    h = step_length(s, t)
    first = ddim(x, m, s, t, form)
    # A node without signal is infinitely far in lambda: it tells nothing about the slope.
    past = [(n, e) for n, e in history[1:] if math.isfinite(n.lam)]
    r = [step_length(s, n) / h for n, _ in past] + ([1.0] if new else [])
    values = [getattr(e, form) for _, e in past] + ([getattr(new, form)] if new else [])
    if not r or not math.isfinite(h):
        if new is None or t.sigma == 0.0 or variant != "bh2" or form != "denoised":
            return first
        # The limit h = infinity of the corrector: the trapezoidal rule in e^lambda.
        return propagate(x, s, t, form) + (t.alpha / 2) * (m.denoised + new.denoised)
    weights = _vary(h, r, new is not None, form) if variant == "vary" else _bh(h, r, variant, form)
    origin = getattr(m, form)
    differences = combination(*((w / r_k, v - origin) for w, r_k, v in zip(weights, r, values)))
    return first + scale(t, form) * differences


def _bh(h: float, r: list[float], variant: Variant, form: Form) -> list[float]:
    """``B rho_k`` for every node."""
    p = len(r)
    sign = -1.0 if form == "denoised" else 1.0
    b = h if variant == "bh1" else sign * math.expm1(sign * h)
    if p == 1:
        return [b / 2]
    powers = np.array([np.power(r, i) for i in range(p)])
    # i! P_{i+1} with P in units of h: the moments of u^i against the exponential, divided by h^i
    target = [math.factorial(i) * q / h**i for i, q in enumerate(moments(h, p + 1, form)) if i > 0]
    return list(np.linalg.solve(powers, np.array(target)))


def _vary(h: float, r: list[float], corrector: bool, form: Form) -> list[float]:
    """Weights of the differences with variable coefficients: ``sum_k P_{k+1} (C^{-1})_k``, ``C_jk = r_j^k / (k+1)!``.

    The released corrector gives the new node one row of the inverse only, and with a single node the row of the
    predictor is missing altogether; both are reproduced.
    """
    p = len(r)
    matrix = np.array([[r_j**k / math.factorial(k + 1) for k in range(p)] for r_j in r])
    inverse = np.linalg.inv(matrix)
    phi = [q / h**i for i, q in enumerate(moments(h, p + 1, form))][1:]
    if not corrector:
        return list(np.array(phi) @ inverse)
    weights = np.array(phi[: p - 1]) @ inverse[: p - 1] if p > 1 else np.zeros(p)
    weights[-1] = phi[p - 1] * inverse[max(p - 2, 0), -1]
    return list(weights)
