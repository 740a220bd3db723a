"""Langevin dynamics at fixed noise levels: alone along a ladder of levels, and as the corrector of a predictor.

A move at noise level sigma is ``x <- x - (e / sigma) eps + sqrt(2 e) z``, that is ``x + e score + sqrt(2 e) z``. Its
limit is a little wider than the level, also with the exact score: on Gaussian data the level's variance v becomes
``v / (1 - e / (2 v))``.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative, Range
from .ddpm import ddpm_step
from .registry import solver
from .steps import ddim
from .trace import Linear, Trace


@solver(
    "annealed_langevin",
    family="langevin",
    order=0,
    evaluations_per_step=lambda steps_each, **_: steps_each,
    stochastic=True,
    reference="Generative Modeling by Estimating Gradients of the Data Distribution, https://arxiv.org/abs/1907.05600",
)
def annealed_langevin(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    steps_each: Annotated[int, Range(1)] = 5,
    step_size: NonNegative = 0.2,
) -> Linear:
    """Annealed Langevin dynamics: ``steps_each`` moves at every level after the first, x / alpha kept between levels.

    A move has ``e = step_size sigma^2 / 2``: ``step_size`` is epsilon / sigma_L^2 of the paper, whose step at level i
    is ``epsilon sigma_i^2 / sigma_L^2`` (2e-5 / 0.01^2 = 0.2, and 100 moves a level). The step to sigma = 0 is the
    prediction (DDIM's); one from alpha = 0, where x / alpha does not exist, is DDIM's and a move less. Only the moves
    bring the noise down to the level, and that to a little above it: a process of its own, without an order.
    """
    for s, t in grid.intervals():
        moves = steps_each
        if s.alpha > 0.0 and t.sigma > 0.0:
            x = (t.alpha / s.alpha) * x
        else:
            x, m = trace.evaluate(x, s)
            x, moves = ddim(x, m, s, t), moves - 1
        if t.sigma > 0.0:
            for _ in range(moves):
                x = langevin_move(trace, x, t, 0.5 * step_size)
    return x


@solver(
    "predictor_corrector",
    family="langevin",
    order=lambda corrector_steps, **_: 0 if corrector_steps else 1,
    evaluations_per_step=lambda corrector_steps, **_: 1 + corrector_steps,
    stochastic=True,
    aliases={"ScoreSdeVeScheduler": "predictor_corrector"},
    reference="Score-Based Generative Modeling through Stochastic Differential Equations, https://arxiv.org/abs/2011.13456",
)
def predictor_corrector(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion",
    corrector_steps: Annotated[int, Range(0)] = 1,
    snr: NonNegative = 0.16,
) -> Linear:
    """Predictor-corrector sampling: a DDPM step to t, then ``corrector_steps`` Langevin moves there.

    ``predictor=reverse_diffusion`` is ``ddpm:variance=large``, ``ancestral`` is ``variance=small``: the paper's for
    variance exploding models; for others with DDPM's mean in place of an Euler step. A move has
    ``e = 2 (snr sigma)^2``. The original has ``e = 2 a (snr |z| / |score|)^2`` with mean norms of the batch, which
    depends on the data, and a = 1 - beta of the training step for VP. Here z and eps have the norm of unit-variance
    noise, and a = 1. Nothing corrects at sigma = 0. There is no order: the moves do not shrink with the step.
    ``corrector_steps=0`` is ``ddpm``.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        x = ddpm_step(trace, x, m, s, t, "large" if predictor == "reverse_diffusion" else "small")
        if t.sigma > 0.0:
            for _ in range(corrector_steps):
                x = langevin_move(trace, x, t, 2.0 * snr**2)
    return x


def langevin_move(trace: Trace, x: Linear, n: Node, rate: float) -> Linear:
    """One Langevin move at a node with ``e = rate sigma^2``."""
    x, m = trace.evaluate(x, n)
    return x - (rate * n.sigma) * m.epsilon + (math.sqrt(2.0 * rate) * n.sigma) * trace.noise(n, n)
