"""Spacings that count in the noise level (sigma / alpha; sigma for flow models) or a function of it.

With ``sigma_min`` / ``sigma_max`` left at ``none`` the trained range is used.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from .beta_distribution import beta_quantile
from .noise import Array, NoiseSchedule
from .spacing import spacing
from .spec import Range, Share

Above = Annotated[float, Range(0.0, above=True)]


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


def _ratio_range(
    noise_schedule: NoiseSchedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """As :func:`_range`, as sigma / alpha; infinite where a flow begins without signal."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    if noise_schedule.frame != "flow":
        return low, high
    return low / (1.0 - low), high / (1.0 - high) if high < 1.0 else math.inf


@spacing(
    "karras",
    aliases={"use_karras_sigmas": "karras", "KarrasScheduler": "karras"},
    reference="https://arxiv.org/abs/2206.00364",
)
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


@spacing(
    "exponential", aliases={"use_exponential_sigmas": "exponential", "ExponentialScheduler": "exponential"}
)
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


@spacing("polyexponential", aliases={"PolyexponentialScheduler": "polyexponential"})
def polyexponential(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    rho: Above = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Log level ``log sigma_min + u^rho log(sigma_max / sigma_min)``, u from 1 to 0: ``exponential`` at rho = 1."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    return low * (high / low) ** (np.linspace(1.0, 0.0, steps) ** rho)


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
    the cleanest trained level and 0, no call is spent where nothing happens. With so many steps that the last would be
    below that level, it is that level.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale:g}")
    high = math.inf if sigma_max is None else sigma_max
    if sigma_max is None:
        level = noise_schedule.level_max
        high = level if noise_schedule.frame != "flow" else (level / (1 - level) if level < 1 else math.inf)
    first, end = math.atan(high / scale), math.atan(sigma_min / scale)
    alpha, sigma = noise_schedule.alpha_sigma_at(noise_schedule.level_min)
    last = first + (end - first) * (steps - 1) / steps
    cleanest = math.atan2(float(sigma), scale * float(alpha))
    ratio = scale * np.tan(np.linspace(first, max(last, cleanest), steps))
    if math.isinf(high):
        ratio[0] = math.inf
    return noise_schedule.level_at_ratio(ratio)


@spacing(
    "log_snr",
    aliases={"lu_lambdas": "log_snr", "logsnr": "log_snr", "use_lu_lambdas": "log_snr"},
    reference="https://arxiv.org/abs/2206.00927",
)
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


@spacing("laplace", aliases={"LaplaceScheduler": "laplace"}, reference="https://arxiv.org/abs/2407.03297")
def laplace(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    mu: float = 0.0,
    beta: Above = 0.5,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Quantiles of a Laplace distribution of log(sigma / alpha), centre ``mu`` and scale ``beta``, kept in the range.

    ``log(sigma / alpha) = mu - beta sign(1/2 - u) log(1 - 2 |1/2 - u| + 1e-5)``, u from 0 to 1; dense around e^mu. The
    1e-5 is as published and keeps the tails finite. ComfyUI's node stops at the last of these levels, with its noise.
    """
    low, high = _ratio_range(noise_schedule, sigma_min, sigma_max)
    u = np.linspace(0.0, 1.0, steps)
    ratio = np.exp(mu - beta * np.sign(0.5 - u) * np.log(1.0 - 2.0 * np.abs(0.5 - u) + 1e-5))
    ratio = np.clip(ratio, low, high)
    ratio[0] = high
    return noise_schedule.level_at_ratio(ratio)


@spacing("vp", aliases={"VPScheduler": "vp"}, reference="https://arxiv.org/abs/2011.13456")
def vp(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    beta_d: Above = 19.9,
    beta_min: Above = 0.1,
    eps_s: Share = 1e-3,
) -> Array:
    """Uniform in the time t of the continuous VP SDE, from 1 to eps_s.

    ``sigma / alpha = sqrt(e^(beta_d t^2 / 2 + beta_min t) - 1)``. The levels are those of that SDE (up to 152 at the
    defaults) whatever the model was trained on.
    """
    t = np.linspace(1.0, eps_s, steps)
    return noise_schedule.level_at_ratio(np.sqrt(np.expm1(beta_d * t**2 / 2.0 + beta_min * t)))


@spacing(
    "beta_sigmas", aliases={"use_beta_sigmas": "beta_sigmas"}, reference="https://arxiv.org/abs/2407.12173"
)
def beta_sigmas(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    a: Above = 0.6,
    b: Above = 0.6,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Quantiles of a Beta(a, b) distribution over the level itself, both ends included (diffusers)."""
    low, high = _range(noise_schedule, sigma_min, sigma_max)
    quantiles = [beta_quantile(1.0 - u, a, b) for u in np.linspace(0.0, 1.0, steps)]
    return low + np.array(quantiles) * (high - low)


@spacing("linear_quadratic", reference="https://github.com/genmoai/mochi")
def linear_quadratic(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    threshold: Share = 0.025,
    linear_steps: int | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Linear in the level for half of the steps, down by ``threshold`` of it only, then quadratic to 0 (Mochi).

    With L linear of n steps ``level_i = sigma_max (1 - threshold i / L - q max(i - L, 0)^2)`` and q such that the last
    is 0; L is n // 2 if not given.
    """
    _, high = _range(noise_schedule, None, sigma_max)
    if steps == 1:
        return np.array([high])
    linear = steps // 2 if linear_steps is None else linear_steps
    if not 1 <= linear < steps:
        raise ValueError(f"linear_steps must be from 1 to steps - 1 = {steps - 1}, got {linear}")
    if threshold * steps > linear:
        raise ValueError(
            f"threshold {threshold:g} is too much for {linear} of {steps} steps; at most {linear / steps:g}"
        )
    i, left = np.arange(steps), steps - linear
    quadratic = (1.0 - threshold * steps / linear) / left**2
    return high * (1.0 - threshold * i / linear - quadratic * np.maximum(i - linear, 0) ** 2)


@spacing("bong_tangent", reference="https://github.com/ClownsharkBatwing/RES4LYF")
def bong_tangent(
    noise_schedule: NoiseSchedule,
    steps: int,
    *,
    middle: Share = 0.5,
    pivot: Share = 0.6,
    slope: Above = 0.2,
) -> Array:
    """Two arctangents in sigma / (alpha + sigma): from its start to ``middle`` of it, then to 0 (RES4LYF).

    Of n + 2 points the first ``p = int(pivot (n + 2))`` go down to the middle as ``atan(s (p - i))`` and the others on
    to 0 as ``-atan(s i)``, with ``s = 40 slope / (n + 2)``; each curve is scaled to its ends. Made for flow models,
    where it gives RES4LYF's numbers; elsewhere it is applied to what would be the flow's sigma.
    """
    points = steps + 2
    p, s = int(pivot * points), 40.0 * slope / points
    high = noise_schedule.level_max
    top = high if noise_schedule.frame == "flow" else (1.0 if math.isinf(high) else high / (1.0 + high))
    first, second = np.arctan(s * (p - np.arange(p))), -np.arctan(s * np.arange(points - p))
    if len(second) < 2:
        raise ValueError(f"pivot {pivot:g} leaves no steps after the middle of {steps}")
    upper = middle + (1.0 - middle) * (first - first[-1]) / np.ptp(first) if p > 1 else first[:0]
    lower = middle * (second - second[-1]) / np.ptp(second)
    sigma = top * np.concatenate([upper[:-1], lower])[:steps]
    if p < 2:
        sigma[0] = top
    with np.errstate(divide="ignore"):
        return noise_schedule.level_at_ratio(sigma / (1.0 - sigma))
