"""Noise schedules: how much signal and how much noise a time means.

A noisy sample is ``x_t = alpha x_0 + sigma eps`` with ``eps ~ N(0, I)``. Three numbers describe a time:

* ``t``, what the network is given: the (fractional) training index for a discrete VP model, sigma for EDM,
  sigma in [0, 1] for flow models;
* the *level*, what schedulers call sigma: ``sigma / alpha`` for VP and EDM, ``sigma`` itself for flow models;
* ``(alpha, sigma)``, the coefficients of the state.

Everything is float64 numpy on the host. ``sigma = 0`` (level 0) and ``alpha = 0`` (level infinity for VP, 1 for
flow) are ordinary values, not approximated by a small number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Frame = Literal["vp", "edm", "flow"]


def _array(value: ArrayLike) -> Array:
    return np.asarray(value, dtype=np.float64)


@dataclass(frozen=True)
class NoiseSchedule:
    """Map between times, noise levels and ``(alpha, sigma)``; subclasses give ``level`` and ``time``.

    ``frame`` is ``"vp"`` (alpha^2 + sigma^2 = 1), ``"edm"`` (alpha = 1) or ``"flow"`` (alpha + sigma = 1). All methods
    take and return float64 arrays of any shape.
    """

    @property
    def frame(self) -> Frame:
        """How the state is scaled."""
        return "vp"

    def level(self, t: ArrayLike) -> Array:
        """Noise level at time ``t``."""
        raise NotImplementedError

    def time(self, level: ArrayLike) -> Array:
        """Time at a noise level; levels outside the trained range give the nearest trained time."""
        raise NotImplementedError

    @cached_property
    def train_levels(self) -> Array:
        """The levels of the training indices, ascending; what index-based spacings count in. Shape (n,)."""
        raise NotImplementedError

    def alpha_sigma_at(self, level: ArrayLike) -> tuple[Array, Array]:
        """``(alpha, sigma)`` at a noise level."""
        k = _array(level)
        if self.frame == "edm":
            return np.ones_like(k), k
        if self.frame == "flow":
            return 1.0 - k, k
        alpha = 1.0 / np.hypot(1.0, k)
        with np.errstate(invalid="ignore"):  # k alpha is inf * 0 where there is no signal; sigma is 1 there
            return alpha, np.where(np.isinf(k), 1.0, k * alpha)

    def alpha_sigma(self, t: ArrayLike) -> tuple[Array, Array]:
        """``(alpha, sigma)`` at time ``t``."""
        return self.alpha_sigma_at(self.level(t))

    def level_at_ratio(self, ratio: ArrayLike) -> Array:
        """Noise level at ``ratio = sigma / alpha``; the two differ for flow models only."""
        k = _array(ratio)
        if self.frame != "flow":
            return k
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(k), 1.0, k / (1.0 + k))

    @property
    def level_max(self) -> float:
        """The noisiest trained level: where sampling starts."""
        return float(self.train_levels[-1])

    @property
    def level_min(self) -> float:
        """The cleanest trained level: the last that a network has seen."""
        return float(self.train_levels[0])

    @cached_property
    def key(self) -> tuple:
        """Identity by value, for caches."""
        return (type(self).__qualname__, self.frame, self.train_levels.tobytes())


class _Indexed(NoiseSchedule):
    """Shared by the schedules given as a table of levels at indices 0 .. n-1 (log level linear in between)."""

    def _interpolate(self, index: ArrayLike) -> Array:
        levels, i = self.train_levels, np.clip(_array(index), 0.0, len(self.train_levels) - 1.0)
        if np.isfinite(levels[-1]):
            return np.exp(np.interp(i, np.arange(len(levels)), np.log(levels)))
        # Zero terminal signal: log level has no slope in the last interval, alpha / sigma goes to 0 linearly there.
        last = len(levels) - 1.0
        below = np.exp(np.interp(np.minimum(i, last - 1), np.arange(len(levels) - 1), np.log(levels[:-1])))
        with np.errstate(divide="ignore"):
            return np.where(i > last - 1, levels[-2] / (last - np.maximum(i, last - 1)), below)

    def _invert(self, level: ArrayLike) -> Array:
        levels, k = self.train_levels, _array(level)
        with np.errstate(divide="ignore"):
            log_k = np.log(k)
        if np.isfinite(levels[-1]):
            return np.interp(log_k, np.log(levels), np.arange(len(levels), dtype=np.float64))
        below = np.interp(log_k, np.log(levels[:-1]), np.arange(len(levels) - 1, dtype=np.float64))
        return np.where(k > levels[-2], len(levels) - 1.0 - levels[-2] / np.maximum(k, levels[-2]), below)


@dataclass(frozen=True)
class VP(_Indexed):
    r"""Discrete variance preserving schedule, ``alpha^2 = prod_i (1 - beta_i)``; t is the training index.

    Use the constructors :meth:`linear`, :meth:`scaled_linear`, :meth:`cosine` and :meth:`trained`. Between indices
    log(sigma / alpha) is interpolated linearly.

    With ``zero_terminal_snr`` sqrt(alpha^2) is shifted and scaled so that the last index has no signal at all
    (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", https://arxiv.org/abs/2305.08891).
    """

    betas: tuple[float, ...]
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        b = _array(self.betas)
        if b.ndim != 1 or len(b) < 2 or not np.all((b >= 0) & (b <= 1)) or not np.all(b[:-1] < 1):
            raise ValueError(f"betas must be at least 2 numbers in [0, 1), got {b if b.size < 6 else b[:3]}")

    @classmethod
    def linear(
        cls,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        n: int = 1000,
        *,
        zero_terminal_snr: bool = False,
    ) -> VP:
        """Betas linear in the index (DDPM)."""
        return cls(tuple(np.linspace(beta_start, beta_end, n).tolist()), zero_terminal_snr)

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 8.5e-4,
        beta_end: float = 0.012,
        n: int = 1000,
        *,
        zero_terminal_snr: bool = False,
    ) -> VP:
        """sqrt(beta) linear in the index (latent diffusion, Stable Diffusion)."""
        return cls(tuple((np.linspace(beta_start**0.5, beta_end**0.5, n) ** 2).tolist()), zero_terminal_snr)

    @classmethod
    def cosine(cls, n: int = 1000, max_beta: float = 0.999, *, zero_terminal_snr: bool = False) -> VP:
        """``beta_i = min(1 - f((i+1)/n) / f(i/n), max_beta)``, ``f(u) = cos^2((u + .008) / 1.008 pi / 2)``."""
        f = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls(tuple(np.minimum(1 - f[1:] / f[:-1], max_beta).tolist()), zero_terminal_snr)

    @classmethod
    def trained(cls, betas: ArrayLike, *, zero_terminal_snr: bool = False) -> VP:
        """Betas as given, shape (n,)."""
        return cls(tuple(_array(betas).tolist()), zero_terminal_snr)

    @cached_property
    def alphas_cumprod(self) -> Array:
        """alpha^2 at every training index, shape (n,)."""
        acp = _array(np.cumprod(1.0 - _array(self.betas)))
        if not self.zero_terminal_snr:
            return acp
        root = np.sqrt(acp)
        return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2

    @cached_property
    def train_levels(self) -> Array:
        acp = self.alphas_cumprod
        with np.errstate(divide="ignore"):
            return np.sqrt((1.0 - acp) / acp)

    def level(self, t: ArrayLike) -> Array:
        return self._interpolate(t)

    def time(self, level: ArrayLike) -> Array:
        return self._invert(level)


@dataclass(frozen=True)
class VPContinuous(NoiseSchedule):
    """Continuous linear VP SDE, ``log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2``, t in [t_min, 1].

    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
    https://arxiv.org/abs/2011.13456. ``train_levels`` are taken at 1000 uniform times.
    """

    beta0: float = 0.1
    beta1: float = 20.0
    t_min: float = 1e-3

    @cached_property
    def train_levels(self) -> Array:
        return self.level(np.linspace(self.t_min, 1.0, 1000))

    def level(self, t: ArrayLike) -> Array:
        t = _array(t)
        return np.sqrt(np.expm1(0.5 * t**2 * (self.beta1 - self.beta0) + t * self.beta0))

    def time(self, level: ArrayLike) -> Array:
        k = _array(level)
        # 2 (b1 - b0) log(1 + k^2); logaddexp keeps it finite for large k
        with np.errstate(divide="ignore"):
            c = 2.0 * (self.beta1 - self.beta0) * np.logaddexp(0.0, 2.0 * np.log(k))
        return c / (np.sqrt(self.beta0**2 + c) + self.beta0) / (self.beta1 - self.beta0)


@dataclass(frozen=True)
class Trigonometric(NoiseSchedule):
    """Trigonometric flow: alpha = cos t, sigma = sin t, t in (0, pi / 2]; the network predicts v.

    Lu and Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
    https://arxiv.org/abs/2410.11081. The state is x_t / sigma_data in their words. ``train_levels`` are those of ``n``
    uniform angles; the last has no signal.
    """

    n: int = 1000

    @cached_property
    def train_levels(self) -> Array:
        return self.level(np.arange(1, self.n + 1) * (0.5 * math.pi / self.n))

    def level(self, t: ArrayLike) -> Array:
        t = _array(t)
        return np.where(t < 0.5 * math.pi - 1e-15, np.tan(t), np.inf)

    def time(self, level: ArrayLike) -> Array:
        return np.arctan(_array(level))


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """Variance exploding schedule of EDM: alpha = 1, t = sigma.

    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
    https://arxiv.org/abs/2206.00364. ``train_levels`` are 1000 levels uniform in log sigma.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"0 < sigma_min < sigma_max is needed, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def frame(self) -> Frame:
        return "edm"

    @cached_property
    def train_levels(self) -> Array:
        return _array(np.geomspace(self.sigma_min, self.sigma_max, 1000))

    def level(self, t: ArrayLike) -> Array:
        return _array(t)

    def time(self, level: ArrayLike) -> Array:
        return _array(level)


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Rectified flow: alpha = 1 - t, sigma = t; the network predicts the velocity eps - x_0.

    ``shift`` moves the training indices towards noise, ``sigma = shift u / (1 + (shift - 1) u)`` with u = i / n,
    i = 1 .. n; it changes index-based spacings, not the meaning of t.
    """

    shift: float = 1.0
    n: int = 1000

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    @classmethod
    def dynamic(
        cls,
        tokens: int,
        *,
        base_tokens: int = 256,
        max_tokens: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> Flow:
        """Shift ``exp(mu)`` with mu linear in the number of image tokens (FLUX)."""
        mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
        return cls(math.exp(mu))

    def shifted(self, sigma: ArrayLike) -> Array:
        """``shift u / (1 + (shift - 1) u)``."""
        u = _array(sigma)
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)

    @property
    def frame(self) -> Frame:
        return "flow"

    @cached_property
    def train_levels(self) -> Array:
        return self.shifted(np.arange(1, self.n + 1) / self.n)

    def level(self, t: ArrayLike) -> Array:
        return _array(t)

    def time(self, level: ArrayLike) -> Array:
        return _array(level)


@dataclass(frozen=True)
class Table(_Indexed):
    """Levels at given times, log level linear in between; both ascending, shape (n,).

    ``state`` is the frame of the state: ``"vp"``, ``"edm"`` or ``"flow"``.
    """

    times: tuple[float, ...]
    levels: tuple[float, ...]
    state: Frame = "vp"

    def __post_init__(self) -> None:
        t, k = _array(self.times), _array(self.levels)
        if t.shape != k.shape or t.ndim != 1 or len(t) < 2:
            raise ValueError(
                f"times and levels must be two lists of the same length >= 2, got {t.shape} and {k.shape}"
            )
        if np.any(np.diff(t) <= 0) or np.any(np.diff(k) <= 0) or k[0] <= 0:
            raise ValueError("times and levels must be strictly ascending and levels positive")
        if self.state not in ("vp", "edm", "flow"):
            raise ValueError(f"state must be 'vp', 'edm' or 'flow', got {self.state!r}")

    @property
    def frame(self) -> Frame:
        return self.state

    @cached_property
    def train_levels(self) -> Array:
        return _array(self.levels)

    def level(self, t: ArrayLike) -> Array:
        return self._interpolate(
            np.interp(_array(t), self.times, np.arange(len(self.times), dtype=np.float64))
        )

    def time(self, level: ArrayLike) -> Array:
        return np.interp(self._invert(level), np.arange(len(self.times), dtype=np.float64), self.times)

    @cached_property
    def key(self) -> tuple:
        return (*super().key, self.times)
