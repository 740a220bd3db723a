"""Read a diffusers scheduler config: its noise schedule, what its network predicts, which levels it would visit.

A config is recognised by its class name where it has one and by its keys otherwise, so that one built in memory
works too; a flow config is never read as an epsilon one. A key that is absent or None means diffusers' default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .beta_distribution import beta_quantile
from .grid import Node
from .noise import EDM, VP, Array, Flow, NoiseSchedule, Table
from .parametrization import Prediction, conversion
from .spec import suggestion

Config = Mapping[str, Any]
Clock = Literal["index", "sigma", "log", "atan"]
"""What pipelines call a timestep: the training index, sigma times the number of training steps, a quarter of
log(sigma), 2/pi atan(sigma)."""

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "denoised",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("linspace", "leading", "trailing")
_SHIFTS = ("exponential", "linear")
# Class name prefixes and keys of models that are not diffusion or flow models, or not in any frame known here.
_REFUSED = (
    ("SCM", "", "a consistency model on a trigonometric flow: only its own scheduler samples it"),
    ("CMStochasticIterative", "clip_denoised", "a consistency model: only its own scheduler samples it"),
    ("DDPMWuerstchen", "scaler", "Wuerstchen's own noise schedule, which is not supported"),
    ("VQDiffusion", "num_vec_classes", "a discrete diffusion model: there is nothing to integrate"),
    ("ScoreSde", "sampling_eps", "a score network with its own scaling, which is not supported"),
    ("RePaint", "", "an inpainting method rather than a model; use the config of the model's own scheduler"),
    ("DDIMInverse", "", "an inversion, which runs towards noise"),
    ("DPMSolverMultistepInverse", "", "an inversion, which runs towards noise"),
)


def _get(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


# -- what kind of model ----------------------------------------------------------------------------------------------


def is_flow(config: Config) -> bool:
    """Whether a config belongs to a rectified-flow model."""
    name = str(config.get("_class_name", ""))
    return bool(
        name.startswith("FlowMatch")
        or name.endswith("RFScheduler")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
        or ("shift" in config and "beta_schedule" not in config)
    )


def is_edm(config: Config) -> bool:
    """Whether a config belongs to an EDM-preconditioned model."""
    return config.get("sigma_data") is not None and not is_flow(config)


def prediction_of(config: Config) -> Prediction:
    """What the network of a config predicts, in fewstep's words; for EDM models after preconditioning."""
    return source_of(config).prediction


def from_diffusers(config: Config, *, mu: float | None = None) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler config (a mapping such as ``pipe.scheduler.config``).

    ``mu`` is what flow pipelines compute from the image size; with ``use_dynamic_shifting`` the shift is ``exp(mu)``
    (``time_shift_type="exponential"``) or ``mu`` (``"linear"``). Unset keys mean what diffusers' classes default to.

    Raises ValueError for models, beta schedules and predictions that are not supported, naming those that are.
    """
    return source_of(config, mu=mu).noise_schedule


@dataclass(frozen=True)
class Source:
    """What a diffusers config says about its model.

    ``prediction`` is what the network predicts; for EDM models (``sigma_data`` set) that holds after
    :meth:`precondition`. ``inverted`` marks models whose time and velocity run backwards (Mochi). ``train_steps`` is
    the number of training steps, ``clock`` what a timestep is.
    """

    noise_schedule: NoiseSchedule
    prediction: Prediction
    clock: Clock = "index"
    train_steps: int = 1000
    sigma_data: float | None = None
    output_sign: float = 1.0
    inverted: bool = False

    def timesteps(self, levels: ArrayLike) -> Array:
        """What a pipeline is told at noise levels (sigma / alpha; sigma for flow)."""
        k = np.asarray(levels, dtype=np.float64)
        if self.clock == "index":
            return self.noise_schedule.time(k)
        if self.clock == "sigma":
            return (1.0 - k if self.inverted else k) * self.train_steps
        return 0.25 * np.log(k) if self.clock == "log" else 2.0 / math.pi * np.arctan(k)

    def levels(self, timesteps: ArrayLike) -> Array:
        """Noise levels at timesteps: the inverse of :meth:`timesteps`."""
        t = np.asarray(timesteps, dtype=np.float64)
        if self.clock == "index":
            return self.noise_schedule.level(t)
        if self.clock == "sigma":
            k = t / self.train_steps
            return 1.0 - k if self.inverted else k
        return np.exp(4.0 * t) if self.clock == "log" else np.tan(0.5 * math.pi * t)

    def input_scale(self, level: float) -> float:
        """What the state is multiplied by before the network sees it; 1 but for EDM models."""
        return 1.0 if self.sigma_data is None else 1.0 / math.hypot(level, self.sigma_data)

    def denoised(self, node: Node) -> tuple[float, float]:
        """``(c_x, c_m)`` such that ``x_0 = c_x x + c_m output`` with the network's raw output."""
        if self.sigma_data is None:
            c_x, c_m = conversion(self.prediction, "denoised", node)
            return c_x, c_m * self.output_sign
        total = node.sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, self.output_sign * node.sigma * self.sigma_data / math.sqrt(total)


def source_of(config: Config, *, mu: float | None = None) -> Source:
    """Noise schedule, prediction and timestep convention of a diffusers scheduler config.

    Raises ValueError for models that no solver here can step, with the reason, and for unknown key values.
    """
    _refuse(config)
    n = int(_get(config, "num_train_timesteps", 1000))
    if is_flow(config):
        if float(_get(config, "sigma_max", 0.0)) > 1.0 and not config.get("use_flow_sigmas"):
            # Cosmos 2 drives a flow class with EDM levels; its "velocity" (x - x_0) / sigma is the noise of that frame.
            noise = EDM(float(_get(config, "sigma_min", 0.002)), float(config["sigma_max"]))
            return Source(noise, "epsilon", "sigma", n)
        inverted = bool(config.get("invert_sigmas"))
        return Source(
            Flow(shift_of(config, mu), n), "flow", "sigma", n, None, -1.0 if inverted else 1.0, inverted
        )
    name = str(_get(config, "prediction_type", "epsilon"))
    if name not in _PREDICTIONS:
        raise ValueError(
            f"prediction_type {name!r} is not supported; allowed: {', '.join(_PREDICTIONS)}"
            f"{suggestion(name, _PREDICTIONS)}"
        )
    low, high = _get(config, "sigma_min", None), _get(config, "sigma_max", None)
    if is_edm(config):
        if name not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"an EDM model predicts 'epsilon' or 'v_prediction', got prediction_type {name!r}"
            )
        noise = EDM(float(low or 0.002), float(high or 80.0))
        # Cosine DPM-Solver (Stable Audio) shares the preconditioning and has another clock.
        clock: Clock = "atan" if _is_cosine(config) else "log"
        sign = -1.0 if name == "v_prediction" else 1.0
        return Source(noise, "denoised", clock, n, float(config["sigma_data"]), sign)
    if config.get("timestep_type") == "continuous" and name == "v_prediction":  # Stable Video Diffusion
        levels = np.geomspace(float(low or 0.002), float(high or 700.0), n)
        table = Table(tuple((0.25 * np.log(levels)).tolist()), tuple(levels.tolist()), "vp")
        return Source(table, "v", "log", n)
    return Source(_vp(config, n), _PREDICTIONS[name], "index", n)


def _refuse(config: Config) -> None:
    name = str(config.get("_class_name", ""))
    for prefix, key, reason in _REFUSED:
        if name.startswith(prefix) or (key and key in config):
            raise ValueError(
                f"the config {'of ' + name if name else 'with ' + repr(key)} belongs to {reason}"
            )
    if config.get("prediction_type") == "trigflow":
        raise ValueError(f"a config with prediction_type 'trigflow' belongs to {_REFUSED[0][2]}")


def _is_cosine(config: Config) -> bool:
    named = "Cosine" in str(config.get("_class_name", ""))
    return named or ("solver_order" in config and "algorithm_type" not in config)


def shift_of(config: Config, mu: float | None = None) -> float:
    """The static or dynamic shift of a flow config; ``flow_shift`` (DPM-Solver++, UniPC) goes before ``shift``."""
    if config.get("use_dynamic_shifting") and mu is not None:
        kind = _get(config, "time_shift_type", "exponential")
        if kind not in _SHIFTS:
            hint = suggestion(str(kind), _SHIFTS)
            raise ValueError(f"time_shift_type must be one of {', '.join(_SHIFTS)}, got {kind!r}{hint}")
        return math.exp(mu) if kind == "exponential" else float(mu)
    return float(_get(config, "flow_shift", _get(config, "shift", 1.0)))


def _vp(config: Config, n: int) -> VP:
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if config.get("trained_betas") is not None:
        plain = VP.trained(config["trained_betas"])
    else:
        name = _get(config, "beta_schedule", "linear")
        start, end = float(_get(config, "beta_start", 1e-4)), float(_get(config, "beta_end", 0.02))
        makers: dict[str, Callable[[], VP]] = {
            "linear": lambda: VP.linear(start, end, n),
            "scaled_linear": lambda: VP.scaled_linear(start, end, n),
            "squaredcos_cap_v2": lambda: VP.cosine(n),
        }
        if name not in makers:
            raise ValueError(
                f"beta_schedule {name!r} is not supported; allowed: {', '.join(_BETA_SCHEDULES)}"
                f"{suggestion(str(name), _BETA_SCHEDULES)}"
            )
        plain = makers[name]()
    scale = _get(config, "snr_shift_scale", None)
    if scale is not None:  # CogVideoX: the signal-to-noise ratio divided by a constant
        product = plain.alphas_cumprod / (scale + (1.0 - scale) * plain.alphas_cumprod)
        plain = VP.trained(1.0 - product / np.concatenate([[1.0], product[:-1]]))
    return VP(plain.betas, True) if zero_snr else plain


# -- where it would evaluate -----------------------------------------------------------------------------------------


def native_levels(
    config: Config, source: Source, steps: int, *, sigmas: Sequence[float] | None = None
) -> Array:
    """The ``steps`` levels at which diffusers' own scheduler of a config evaluates the network, decreasing.

    ``sigmas`` are those that a flow pipeline sends; they are stretched and re-spaced as the class would, after the
    shift that ``source`` holds. Two families count indices differently and are told apart by their keys: multistep
    classes (``solver_order``) divide [0, T - 1] into ``steps`` parts, the others into ``steps - 1``.
    """
    if source.clock == "sigma":
        if sigmas is None and config.get("use_flow_sigmas") and config.get("use_karras_sigmas"):
            # UniPC (Cosmos 2.5): levels of a diffusion model, sigma / alpha, as those of a flow
            ratio = _respaced(config, _vp(config, source.train_steps).train_levels[::-1], steps)
            return ratio / (1.0 + ratio)
        levels = _flow_levels(config, source, steps, sigmas)
    elif source.clock == "index":
        levels = source.noise_schedule.level(_indices(config, source, steps))
        if _re_spacing(config) and _is_multistep(config):
            levels = source.noise_schedule.train_levels[::-1]
    else:
        levels = source.noise_schedule.train_levels[::-1]
        if not _re_spacing(config):
            exponential = config.get("sigma_schedule") == "exponential"
            return _karras(
                levels[[0, -1]], steps, math.inf if exponential else float(_get(config, "rho", 7.0))
            )
    return _respaced(config, levels, steps)


def final_level(config: Config, source: Source, levels: Array) -> float:
    """The level that the last step ends at: 0, or with ``final_sigmas_type="sigma_min"`` the cleanest trained one."""
    if _get(config, "final_sigmas_type", "zero") != "sigma_min" or source.noise_schedule.frame == "flow":
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
    n, offset = source.train_steps, int(_get(config, "steps_offset", 0))
    kind, multistep = _get(config, "timestep_spacing", "linspace"), _is_multistep(config)
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
    high, low = (float(_get(config, k, v)) for k, v in (("sigma_max", levels[0]), ("sigma_min", levels[-1])))
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
