"""Pieces that several families share: the first-order step, the frames of the Runge-Kutta and ancestral methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from ..schedules import Node, TimeGrid
from .coefficients import Form, moments
from .trace import Evaluation, Linear, Trace

FrameName = Literal["auto", "edm", "flow"]


def propagate(x: Linear, s: Node, t: Node, form: Form) -> Linear:
    """The linear part of a step: ``(sigma_t / sigma_s) x`` in data form, ``(alpha_t / alpha_s) x`` in epsilon form."""
    return (t.sigma / s.sigma if form == "denoised" else t.alpha / s.alpha) * x


def scale(t: Node, form: Form) -> float:
    """The factor of the integral: ``alpha_t`` in data form, ``-sigma_t`` in epsilon form."""
    return t.alpha if form == "denoised" else -t.sigma


def step_length(s: Node, t: Node) -> float:
    """``h = lambda_t - lambda_s``, infinite where s has no signal or t no noise."""
    return t.lam - s.lam


def ddim(x: Linear, m: Evaluation, s: Node, t: Node, form: Form = "denoised") -> Linear:
    """First-order exponential step, DDIM: both forms are the same step, exact where the prediction is constant.

    ``x_t = (sigma_t / sigma_s) x + (alpha_t - alpha_s sigma_t / sigma_s) x_0``
    ``    = (alpha_t / alpha_s) x - (alpha_t sigma_s / alpha_s - sigma_t) eps``
    """
    if form == "denoised" or s.alpha == 0.0:
        return (
            propagate(x, s, t, "denoised")
            + t.alpha * moments(step_length(s, t), 1, "denoised")[0] * m.denoised
        )
    if t.sigma == 0.0:
        return (t.alpha / s.alpha) * x - (t.alpha * s.ratio) * m.epsilon
    return propagate(x, s, t, form) - t.sigma * moments(step_length(s, t), 1, form)[0] * m.epsilon


class Frame(NamedTuple):
    """A coordinate c and a scaling z = x / scale in which the ODE reads ``dz/dc = derivative``."""

    coordinate: Callable[[Node], float]
    scale: Callable[[Node], float]
    derivative: Callable[[Evaluation], Linear]


FRAMES = {
    # x / alpha against sigma / alpha: the derivative is the noise (Karras et al.)
    "edm": Frame(lambda n: n.ratio, lambda n: n.alpha, lambda m: m.epsilon),
    # x / (alpha + sigma) against sigma / (alpha + sigma): the derivative is the velocity (rectified flow)
    "flow": Frame(lambda n: n.sigma / (n.alpha + n.sigma), lambda n: n.alpha + n.sigma, lambda m: m.velocity),
}


def frame_name(name: FrameName, grid: TimeGrid) -> Literal["edm", "flow"]:
    """``auto``: the flow frame on flow models, where the EDM frame is singular at the start; else the EDM frame."""
    if name != "auto":
        return name
    return "flow" if grid.noise_schedule.frame == "flow" else "edm"


def renoise(
    trace: Trace, x: Linear, low: Node, t: Node, key: tuple[Node, Node], s_noise: float = 1.0
) -> Linear:
    """Carry ``x`` at a cleaner node ``low`` to ``t`` by adding noise.

    ``(a_t / a_l) x + s_noise sqrt(s_t^2 - (a_t / a_l)^2 s_l^2) z``, a and s for alpha and sigma; ``key`` is the
    interval the noise belongs to.
    """
    ratio = t.alpha / low.alpha
    variance = t.sigma**2 - (ratio * low.sigma) ** 2
    if variance <= 0.0:
        return ratio * x
    return ratio * x + (s_noise * math.sqrt(variance)) * trace.noise(*key)


def ancestral_low(s: Node, t: Node, eta: float) -> Node:
    """Where an ancestral step from s goes before noise brings it up to t: ``k_d^2 = k_t^2 - k_u^2``,
    ``k_u = min(k_t, eta k_t sqrt(1 - (k_t / k_s)^2))``, k = sigma / alpha.
    """
    share = min(1.0, eta**2 * (1.0 - (t.ratio / s.ratio) ** 2))
    return Node(t.t, t.alpha, t.sigma * math.sqrt(1.0 - share))


def churn(
    trace: Trace,
    x: Linear,
    s: Node,
    grid: TimeGrid,
    amount: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> tuple[Linear, Node]:
    """EDM's stochasticity: raise sigma / alpha by ``1 + min(amount / steps, sqrt(2) - 1)`` within [s_min, s_max]."""
    gamma = (
        min(amount / (grid.whole or grid.steps), math.sqrt(2.0) - 1.0) if s_min <= s.ratio <= s_max else 0.0
    )
    if gamma == 0.0 or s.alpha == 0.0:  # nothing is noisier than no signal
        return x, s
    high = grid.at_ratio(s.ratio * (1.0 + gamma))
    return renoise(trace, x, s, high, (s, high), s_noise), high
