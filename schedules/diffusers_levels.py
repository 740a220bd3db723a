"""Which noise levels diffusers' own scheduler of a config would visit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .beta_distribution import beta_quantile
from .diffusers_config import Config, Source, discrete, get
from .noise import Array, Flow, Trigonometric
from .spec import suggestion

_SPACINGS = ("linspace", "leading", "trailing")


def native_levels(
    config: Config,
    source: Source,
    steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
) -> Array:
    """The ``steps`` levels at which diffusers' own scheduler of a config evaluates the network, decreasing.

    ``sigmas`` are those that a flow pipeline sends; they are stretched and re-spaced as the class would, after the
    shift that ``source`` holds. ``strength`` is that of image to image with LCM. Two families count indices differently
    and are told apart by their keys: multistep classes (``solver_order``) divide [0, T - 1] into ``steps`` parts, the
    others into ``steps - 1``.
    """
    if source.clock == "sigma":
        if sigmas is None and config.get("use_flow_sigmas") and config.get("use_karras_sigmas"):
            # UniPC (Cosmos 2.5): levels of a diffusion model, sigma / alpha, as those of a flow
            ratio = _respaced(config, discrete(config, source.train_steps).train_levels[::-1], steps)
            return ratio / (1.0 + ratio)
        levels = _flow_levels(config, source, steps, sigmas)
    elif isinstance(source.noise_schedule, Trigonometric):
        u = np.linspace(1.0, 0.0, steps + 1)[:-1] * (0.5 * math.pi)
        # SCM's angles are uniform, those of IPNDM have sigma = sin^2.
        return source.noise_schedule.level(u if source.clock == "angle" else np.arcsin(np.sin(u) ** 2))
    elif source.clock == "250log":
        stride = max(source.train_steps // steps, 1)
        return consistency_levels(config, source, np.arange(steps) * stride)
    elif source.clock == "index":
        original = config.get("original_inference_steps")
        index = (
            _indices(config, source, steps)
            if original is None
            else _distilled(int(original), source, steps, strength)
        )
        levels = source.noise_schedule.level(index)
        if _re_spacing(config) and _is_multistep(config):
            levels = source.noise_schedule.train_levels[::-1]
    else:
        levels = source.noise_schedule.train_levels[::-1]
        if not _re_spacing(config):
            exponential = config.get("sigma_schedule") == "exponential"
            return _karras(
                levels[[0, -1]], steps, math.inf if exponential else float(get(config, "rho", 7.0))
            )
    return _respaced(config, levels, steps)


def consistency_levels(config: Config, source: Source, places: ArrayLike) -> Array:
    """Levels at places 0 .. T - 1 of a consistency model's training schedule, which is uniform in level^(1 / rho)."""
    u, power = np.asarray(places, dtype=np.float64) / (source.train_steps - 1), float(get(config, "rho", 7.0))
    high, low = (
        level ** (1.0 / power) for level in (source.noise_schedule.level_max, source.noise_schedule.level_min)
    )
    return (high + u * (low - high)) ** power


def final_level(config: Config, source: Source, levels: Array) -> float:
    """The level that the last step ends at: 0, or with ``final_sigmas_type="sigma_min"`` the cleanest trained one."""
    if get(config, "final_sigmas_type", "zero") != "sigma_min" or source.noise_schedule.frame == "flow":
        return 0.0
    if source.clock == "index":
        return min(source.noise_schedule.level_min, float(levels[-1]))
    return float(levels[-1])


def is_default_sigmas(sigmas: Sequence[float]) -> bool:
    """Whether levels are what flow pipelines send unasked: ``1 - i / n``, or uniform over the training steps."""
    s, n = np.asarray(sigmas, dtype=np.float64), len(sigmas)
    defaults = (1.0 - np.arange(n) / n, np.linspace(0.0, 1.0, n))
    uniform = np.linspace(1000, 1, n).astype(int) / 1000  # CogView 4
    return any(np.allclose(s, d, rtol=0.0, atol=1e-5) for d in defaults) or np.allclose(
        s, uniform, rtol=0.0, atol=1e-3
    )


def stretched(config: Config, levels: Array) -> Array:
    """``shift_terminal``: flow levels stretched so that the last is the given one (LTX-Video)."""
    end = config.get("shift_terminal")
    if not end or levels[-1] >= 1.0:
        return levels
    return 1.0 - (1.0 - levels) * ((1.0 - float(end)) / (1.0 - levels[-1]))


def _is_multistep(config: Config) -> bool:
    return "solver_order" in config or "predictor_order" in config


def _indices(config: Config, source: Source, steps: int) -> Array:
    n, offset = source.train_steps, int(get(config, "steps_offset", 0))
    kind, multistep = get(config, "timestep_spacing", "linspace"), _is_multistep(config)
    if kind == "linspace":
        index = np.linspace(0, n - 1, steps + 1)[:0:-1] if multistep else np.linspace(0, n - 1, steps)[::-1]
        if steps == 1:
            index = np.array([n - 1.0])
        # DDIM, DDPM and the multistep classes round; Euler and its relatives do not.
        exact = not multistep and "set_alpha_to_one" not in config and "variance_type" not in config
        return index if exact else _whole(index)
    if kind == "leading":
        ratio = float(n // (steps + 1 if multistep else steps))
        first = 1.0 if multistep else 0.0
        if ratio == 0.0:  # more steps than training indices
            ratio = n / (steps + first)
        index = np.arange(steps - 1.0 + first, first - 1.0, -1.0) * ratio
        return index + min(float(offset), n - 1.0 - index[0])
    if kind == "trailing":
        return _whole(n - np.arange(steps) * (n / steps)) - 1.0
    hint = suggestion(str(kind), _SPACINGS)
    raise ValueError(f"timestep_spacing must be one of {', '.join(_SPACINGS)}, got {kind!r}{hint}")


def _distilled(original: int, source: Source, steps: int, strength: float) -> Array:
    """Indices of LCM and TCD: evenly chosen from the ``original`` ones that the network was distilled at."""
    known = np.arange(int(original * strength), 0.0, -1.0) * (source.train_steps // original) - 1.0
    if len(known) < steps:
        raise ValueError(
            f"this model was distilled for {original} timesteps; at strength {strength:g} it can take {len(known)} "
            f"steps, not {steps}; a named schedule such as 'trailing' has more"
        )
    return known[np.floor(np.linspace(0, len(known), steps, endpoint=False)).astype(int)]


def _whole(index: ArrayLike) -> Array:
    """Rounded to training indices, unless that would visit one twice."""
    index = np.asarray(index, dtype=np.float64)
    whole = np.rint(index)
    return whole if np.all(np.diff(whole) < 0) else index


def _flow_levels(config: Config, source: Source, steps: int, sigmas: Sequence[float] | None) -> Array:
    noise, n = source.noise_schedule, source.train_steps
    if not isinstance(noise, Flow):  # EDM levels inside a flow class: only the re-spacing matters
        levels = noise.train_levels[::-1]
        return levels if _re_spacing(config) else _karras(levels[[0, -1]], steps, 7.0)
    if sigmas is not None:
        plain = np.asarray(sigmas, dtype=np.float64)
    elif config.get("use_flow_sigmas"):
        plain = np.linspace(1.0, 1.0 / n, steps + 1)[:-1]
    else:  # from the noisiest to the cleanest trained level, which are shifted once already
        low = 1.0 / n if config.get("use_dynamic_shifting") else float(noise.shifted(1.0 / n))
        plain = np.linspace(1.0, low, steps)
    return stretched(config, np.asarray(noise.shifted(plain)))


def _re_spacing(config: Config) -> str | None:
    kinds = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    chosen = [k for k in kinds if config.get(k)]
    if len(chosen) > 1:
        raise ValueError(f"at most one of {', '.join(kinds)} can be set, got {' and '.join(chosen)}")
    return chosen[0] if chosen else None


def _respaced(config: Config, levels: Array, steps: int) -> Array:
    kind = _re_spacing(config)
    if kind is None:
        return levels
    high, low = (float(get(config, k, v)) for k, v in (("sigma_max", levels[0]), ("sigma_min", levels[-1])))
    high = min(high, 4096.0)  # no signal at all has no logarithm; diffusers puts the same bound there
    if kind == "use_beta_sigmas":
        u = [beta_quantile(1.0 - x, 0.6, 0.6) for x in np.linspace(0.0, 1.0, steps)]
        return low + np.array(u) * (high - low)
    return _karras(np.array([high, low]), steps, 7.0 if kind == "use_karras_sigmas" else math.inf)


def _karras(levels: Array, steps: int, rho: float) -> Array:
    """Uniform in ``level^(1/rho)``; rho = infinity is uniform in the logarithm."""
    high, low, u = float(levels[0]), float(levels[-1]), np.linspace(0.0, 1.0, steps)
    if math.isinf(rho):
        return np.exp(math.log(high) + u * (math.log(low) - math.log(high)))
    return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
