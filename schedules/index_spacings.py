"""Spacings that count in the training index of the noise schedule, 0 (clean) to T - 1 (noise)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .beta_distribution import beta_quantile
from .noise import VP, Array, Flow, NoiseSchedule
from .spacing import spacing


def at_index(noise_schedule: NoiseSchedule, index: ArrayLike) -> Array:
    """Levels at fractional training indices."""
    i, levels = np.asarray(index, dtype=np.float64), noise_schedule.train_levels
    if isinstance(noise_schedule, Flow):  # linear in the unshifted sigma, not in the logarithm
        return noise_schedule.shifted((i + 1.0) / len(levels))
    if isinstance(noise_schedule, VP):
        return noise_schedule.level(i)
    return np.exp(np.interp(i, np.arange(len(levels)), np.log(levels)))


def _rounded(noise_schedule: NoiseSchedule, index: Array) -> Array:
    """VP networks were trained at integers; the others were not."""
    return np.round(index) if isinstance(noise_schedule, VP) else index


@spacing("linspace")
def linspace(noise_schedule: NoiseSchedule, steps: int) -> Array:
    """Uniform in the index from T - 1, the last index 0 left out: ``linspace(T - 1, 0, steps + 1)[:-1]``."""
    top = len(noise_schedule.train_levels) - 1.0
    return at_index(noise_schedule, _rounded(noise_schedule, np.linspace(top, 0.0, steps + 1)[:-1]))


@spacing("normal")
def normal(noise_schedule: NoiseSchedule, steps: int) -> Array:
    """Uniform in the index from T - 1 down to 0, both included (ComfyUI; Euler's linspace in diffusers)."""
    first, last = _ends(noise_schedule)
    return at_index(noise_schedule, np.linspace(first, last, steps))


@spacing("sgm_uniform")
def sgm_uniform(noise_schedule: NoiseSchedule, steps: int) -> Array:
    """As ``normal`` with one more step, the last left out: the end is not visited twice (ComfyUI)."""
    first, last = _ends(noise_schedule)
    return at_index(noise_schedule, np.linspace(first, last, steps + 1)[:-1])


def _ends(noise_schedule: NoiseSchedule) -> tuple[float, float]:
    """First and last index of ``normal``. On flow models the last one is T times a level that is shifted already, so
    that it is shifted twice: kept, because these names mean what ComfyUI computes.
    """
    n = len(noise_schedule.train_levels)
    return n - 1.0, n * noise_schedule.level_min - 1.0 if noise_schedule.frame == "flow" else 0.0


@spacing("leading", aliases={"ddim_uniform": "leading:offset=1"})
def leading(noise_schedule: NoiseSchedule, steps: int, *, offset: int = 1) -> Array:
    """Multiples of ``T // steps`` plus an offset: does not start at the noisiest index.

    ComfyUI's ``ddim_uniform`` is this, and visits one level more than asked for where T is no multiple of the steps.
    """
    n = len(noise_schedule.train_levels)
    return at_index(noise_schedule, np.arange(steps)[::-1] * float(n // steps) + offset)


@spacing("trailing")
def trailing(noise_schedule: NoiseSchedule, steps: int) -> Array:
    """``T, T - T/steps, ...`` minus one: uniform, ends one stride above clean. On flow models sigma = 1 - i/steps."""
    n = len(noise_schedule.train_levels)
    return at_index(noise_schedule, _rounded(noise_schedule, n - np.arange(steps) * n / steps) - 1.0)


@spacing("simple")
def simple(noise_schedule: NoiseSchedule, steps: int) -> Array:
    """Every ``T / steps``-th training level from the noisiest, indices truncated (ComfyUI)."""
    levels = noise_schedule.train_levels
    index = (np.arange(steps) * len(levels) / steps).astype(int)
    return levels[::-1][index]


@spacing(
    "beta",
    aliases={"beta57": "beta:a=0.5,b=0.7", "BetaSamplingScheduler": "beta"},
    reference="https://arxiv.org/abs/2407.12173",
)
def beta(noise_schedule: NoiseSchedule, steps: int, *, a: float = 0.6, b: float = 0.6) -> Array:
    """Quantiles of a Beta(a, b) distribution over the index, rounded: dense at both ends (ComfyUI)."""
    top = len(noise_schedule.train_levels) - 1
    index = np.array([beta_quantile(1 - i / steps, a, b) for i in range(steps)]) * top
    # Rounding can name an index twice; a level is visited once, so such a grid has fewer steps in ComfyUI. Here the
    # later of two equal indices moves down by one.
    index = np.rint(index)
    for i in range(1, steps):
        index[i] = min(index[i], index[i - 1] - 1)
    return noise_schedule.train_levels[np.maximum(index, 0).astype(int)]
