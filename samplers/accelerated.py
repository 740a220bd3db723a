"""Accelerated DDIM and DDPM: each with the next term of the expansion that its proof of convergence is built on.

Li et al., "Accelerating Convergence of Score-Based Diffusion Models, Provably", https://arxiv.org/abs/2403.03852.
"""

from __future__ import annotations

import math

from ..schedules import Node, TimeGrid
from .ddpm import ddpm_step
from .registry import solver
from .steps import ddim
from .trace import Linear, Trace

PAPER = "Accelerating Convergence of Score-Based Diffusion Models, Provably, https://arxiv.org/abs/2403.03852"


def _power(n: Node) -> float:
    """alpha^2 + sigma^2: x over its root is the state of a VP model."""
    return n.alpha**2 + n.sigma**2


def _signal(n: Node) -> float:
    """A = alpha^2 / (alpha^2 + sigma^2), alpha_bar of a VP model."""
    return n.alpha**2 / _power(n)


@solver("accelerated_ddim", family="accelerated", order=2, reference=PAPER)
def accelerated_ddim(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    """Accelerated DDIM: DDIM plus the change of the noise prediction since the node before, r.

    ``x_t / alpha_t = x_s / alpha_s + (k_t - k_s) eps_s + w (eps_s - eps_r)``, k = sigma / alpha,
    ``w = (arctan k_t - arctan k_s - A_s (k_t - k_s)) / (A_s - A_r)``, A = alpha^2 / (alpha^2 + sigma^2). The published
    practical form for VP models, in which A is alpha_bar, for any schedule. It is DEIS (tAB1) with polynomials in A;
    the first step is DDIM's, and so is one from alpha = 0.
    """
    older: tuple[Node, Linear] | None = None
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        step = ddim(x, m, s, t, "epsilon")
        if (
            older is not None and (gap := _signal(s) - _signal(older[0])) > 0.0
        ):  # equal where there is no signal yet
            w = math.atan(t.ratio) - math.atan(s.ratio) - _signal(s) * (t.ratio - s.ratio)
            step = step + (t.alpha * w / gap) * (m.epsilon - older[1])
        older = s, m.epsilon
        x = step
    return x


@solver(
    "accelerated_ddpm",
    family="accelerated",
    order=1,
    weak_order=2,
    stochastic=True,
    reference=PAPER,
)
def accelerated_ddpm(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    """Accelerated DDPM: half of a step's noise is added before the network is evaluated, half after.

    ``u = x + n z``, ``x_t = (alpha_t / alpha_s) (u - (1 - a) (q / sigma_s) eps(u, s) + n z')`` with
    ``n^2 = q (1 - a) / 2``, ``a = A_s / A_t``, q = alpha_s^2 + sigma_s^2 and A = alpha^2 / q: the published rule for VP
    models, in which q = 1, for any schedule. The network is told s, though u is noisier. The paper's repository prints
    z' outside the bracket, where the method is of first order.

    On a point mass a step leaves the variance wrong by (1 - a)^3 / (2 a sigma^4) (VP): nothing where steps are short,
    but a few steps from a level of nearly pure noise add a great deal. Steps from alpha = 0 and to sigma = 0, where
    the rule has no meaning, are ``ddpm``'s.
    """
    for s, t in grid.intervals():
        if s.alpha == 0.0 or t.sigma == 0.0:
            x, m = trace.evaluate(x, s)
            x = ddpm_step(trace, x, m, s, t, "small")
            continue
        share, power = 1.0 - _signal(s) / _signal(t), _power(s)
        middle = grid.at_ratio(math.sqrt(2.0 / (s.ratio**-2 + t.ratio**-2)))  # both noises are as large there
        noise = math.sqrt(0.5 * share * power)
        u, m = trace.evaluate(x + noise * trace.noise(s, middle), s)
        x = u - (share * power / s.sigma) * m.epsilon + noise * trace.noise(middle, t)
        x = (t.alpha / s.alpha) * x
    return x
