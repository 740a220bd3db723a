"""Spacings: which noise levels ``n`` steps visit. Each is a function ``(noise_schedule, steps, *, options) -> levels``.

A spacing returns the ``steps`` levels at which the network is evaluated, decreasing; a final 0 (no noise) is
appended by :func:`make_grid`. With ``sigma_min`` / ``sigma_max`` left at ``none`` the trained range is used.

Named as in the field; "index" is the training index of the noise schedule, 0 (clean) to T - 1 (noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import align_your_steps
from .grid import TimeGrid
from .noise import VP, Array, Flow, NoiseSchedule, Trigonometric
from .spec import Option, bind, options_of, render, split, suggestion


@dataclass(frozen=True)
class Spacing:
    """A registered spacing: its name, the function, one line about it, other names, source."""

    name: str
    function: Callable[..., Array]
    summary: str
    aliases: tuple[str, ...] = ()
    reference: str = ""

    @property
    def options(self) -> dict[str, Option]:
        """Keyword options of the function."""
        return options_of(self.function)


_SPACINGS: dict[str, Spacing] = {}
DEFAULT = "arctan"
"""What is used where nothing is said; docs/design.md has the measurements."""


def spacing(name: str, *, aliases: tuple[str, ...] = (), reference: str = "") -> Callable[..., Any]:
    """Register a spacing under ``name``."""

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _SPACINGS[name] = Spacing(name, function, summary, aliases, reference)
        return function

    return register


def schedules() -> Mapping[str, Spacing]:
    """All named spacings."""
    return MappingProxyType(_SPACINGS)


def schedule(spec: str) -> tuple[Spacing, dict[str, Any]]:
    """The spacing and options that ``"name:key=value,..."`` means; ValueError with the nearest name."""
    name, given = split(spec)
    aliases = {alias: s.name for s in _SPACINGS.values() for alias in s.aliases}
    found = _SPACINGS.get(aliases.get(name, name))
    if found is None:
        allowed = [*_SPACINGS, *aliases]
        raise ValueError(f"no schedule {name!r}; allowed: {', '.join(_SPACINGS)}{suggestion(name, allowed)}")
    return found, bind(found.options, given, f"schedule {found.name!r}")


def make_grid(
    noise_schedule: NoiseSchedule, steps: int, schedule_spec: str = DEFAULT, *, final_zero: bool = True
) -> TimeGrid:
    """A grid of ``steps`` intervals on a noise schedule, by a named spacing.

    With ``final_zero`` (default) the network is evaluated at the spacing's ``steps`` levels and the last step goes
    to no noise; without, the spacing's ``steps + 1`` levels are the nodes and the result keeps the last level's noise.

    Raises ValueError for fewer than one step, an unknown spacing or option, and levels that are not decreasing.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    key = (noise_schedule.key, int(steps), schedule_spec, final_zero)
    grid = _GRIDS.get(key)
    if grid is None:
        found, options = schedule(schedule_spec)
        levels = found.function(noise_schedule, int(steps) + (not final_zero), **options)
        try:
            grid = TimeGrid.from_levels(noise_schedule, np.append(levels, 0.0) if final_zero else levels)
        except ValueError as error:
            raise ValueError(
                f"schedule {render(found.name, options)!r} with {steps} steps: {error}"
            ) from None
        while len(_GRIDS) >= 256:
            _GRIDS.pop(next(iter(_GRIDS)), None)
        _GRIDS[key] = grid
    return grid


_GRIDS: dict[tuple, TimeGrid] = {}
"""Grids are immutable; a host asks for the same ones again and again."""


def at_index(noise_schedule: NoiseSchedule, index: ArrayLike) -> Array:
    """Levels at fractional training indices."""
    i, levels = np.asarray(index, dtype=np.float64), noise_schedule.train_levels
    if isinstance(noise_schedule, Flow):  # linear in the unshifted sigma, not in the logarithm
        return noise_schedule.shifted((i + 1.0) / len(levels))
    if isinstance(noise_schedule, VP):
        return noise_schedule.level(i)
    if isinstance(noise_schedule, Trigonometric):
        return noise_schedule.level((i + 1.0) * (0.5 * math.pi / len(levels)))
    return np.exp(np.interp(i, np.arange(len(levels)), np.log(levels)))


def _rounded(noise_schedule: NoiseSchedule, index: Array) -> Array:
    """VP networks were trained at integers; the others were not."""
    return np.round(index) if isinstance(noise_schedule, VP) else index


def _range(
    noise_schedule: NoiseSchedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    low = noise_schedule.level_min if sigma_min is None else sigma_min
    high = noise_schedule.level_max if sigma_max is None else sigma_max
    if math.isinf(high):  # no signal at all at the start: the noisiest level that has some
        high = float(noise_schedule.train_levels[-2])
    if not 0 < low < high:
        raise ValueError(f"0 < sigma_min < sigma_max is needed, got {low:g} and {high:g}")
    return low, high


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


@spacing("leading")
def leading(noise_schedule: NoiseSchedule, steps: int, *, offset: int = 1) -> Array:
    """Multiples of ``T // steps`` plus an offset: does not start at the noisiest index."""
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


@spacing("karras", reference="https://arxiv.org/abs/2206.00364")
def karras(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Uniform in ``level^(1/rho)`` between sigma_max and sigma_min (EDM)."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho:g}")
    u = np.linspace(0.0, 1.0, steps)
    return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho


@spacing("exponential")
def exponential(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Uniform in the logarithm of the level between sigma_max and sigma_min."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


@spacing("kl_optimal", reference="https://arxiv.org/abs/2404.14507")
def kl_optimal(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Uniform in arctan(level), the optimum for Gaussian data of unit variance (ComfyUI)."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    return np.tan(np.linspace(math.atan(high), math.atan(low), steps))


@spacing("arctan", reference="https://arxiv.org/abs/2404.14507")
def arctan(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    scale: float = 0.7,
    sigma_min: float = 0.0,
    sigma_max: float | None = None,
) -> Array:
    """Uniform in arctan(sigma / (scale alpha)) from sigma_max, the end sigma_min left out: the default.

    ``sigma / alpha = scale tan((1 - i / steps) arctan(sigma_max / scale) + (i / steps) arctan(sigma_min / scale))``.
    The optimum for Gaussian data of standard deviation ``scale`` and Euler's method; as nothing is evaluated between
    the cleanest trained level and 0, no call is spent where nothing happens.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale:g}")
    high = math.inf if sigma_max is None else sigma_max
    if sigma_max is None:
        level = noise_schedule.level_max
        high = level if noise_schedule.frame != "flow" else (level / (1 - level) if level < 1 else math.inf)
    angle = np.linspace(math.atan(high / scale), math.atan(sigma_min / scale), steps + 1)[:-1]
    ratio = scale * np.tan(angle)
    if math.isinf(high):
        ratio[0] = math.inf
    return noise_schedule.level_at_ratio(ratio)


@spacing("log_snr", aliases=("lu_lambdas", "logsnr"), reference="https://arxiv.org/abs/2206.00927")
def log_snr(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Uniform in lambda = log(alpha / sigma), the variable of DPM-Solver; for VP and EDM the same as exponential."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    if noise_schedule.frame == "flow":
        low, high = low / (1 - low), (high if high < 1 else float(noise_schedule.train_levels[-2]))
        high = high / (1 - high)
    return noise_schedule.level_at_ratio(np.exp(np.linspace(math.log(high), math.log(low), steps)))


@spacing("beta", reference="https://arxiv.org/abs/2407.12173")
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


@spacing("ays", aliases=("align_your_steps",), reference="https://arxiv.org/abs/2404.14507")
def ays(noise_schedule: NoiseSchedule, steps: int, *, model: align_your_steps.Model = "sd15") -> Array:
    """Align Your Steps: published optimised levels for a model family, resampled log-linearly."""
    return align_your_steps.levels(model, steps)


@lru_cache(maxsize=4096)
def beta_quantile(p: float, a: float, b: float) -> float:
    """Inverse of the regularised incomplete beta function, to 1e-14: bisection, so it needs no derivative."""
    if p <= 0.0 or p >= 1.0:
        return min(max(p, 0.0), 1.0)
    low, high = 0.0, 1.0
    while high - low > 1e-15:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _beta_cdf(middle, a, b) < p else (low, middle)
    return 0.5 * (low + high)


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction (Lentz's algorithm)."""
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_cdf(1.0 - x, b, a)
    front = (
        math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
        / a
    )
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + numerator * d)
            c = 1.0 + numerator / c
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return front * fraction
