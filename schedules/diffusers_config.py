"""Read a diffusers scheduler config: its noise schedule, what its network predicts, what a timestep is.

A config is recognised by its class name where it has one and by its keys otherwise, so that one built in memory
works too; a flow config is never read as an epsilon one. A key that is absent or None means diffusers' default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .grid import Node
from .noise import EDM, VP, Array, Flow, NoiseSchedule, Table, Trigonometric
from .parametrization import Prediction, conversion
from .spec import suggestion

Config = Mapping[str, Any]
Clock = Literal["index", "sigma", "log", "250log", "atan", "angle"]
"""What pipelines call a timestep: the training index, sigma times the number of training steps, a quarter of
log(sigma) or 250 log(sigma), 2/pi atan(sigma) or atan(sigma)."""

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "denoised",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace")
_SHIFTS = ("exponential", "linear")
_TOKENS = "a model of discrete tokens: there is nothing to integrate"
_CALLS = "a pipeline that calls other methods of its scheduler than step"
# Class name prefixes and keys of what no solver can step.
_REFUSED = (
    ("DDPMWuerstchen", "scaler", "Wuerstchen's cascade, whose time is a share of its own noise schedule"),
    ("VQDiffusion", "num_vec_classes", _TOKENS),
    ("Amused", "masking_schedule", _TOKENS),
    ("BlockRefinement", "block_length", _TOKENS),
    ("DiscreteDDIM", "corrector_steps", _TOKENS),
    ("EntropyBound", "entropy_bound", _TOKENS),
    ("ScoreSde", "sampling_eps", f"{_CALLS} (step_pred, step_correct)"),
    ("KarrasVe", "s_churn", f"{_CALLS} (add_noise_to_input, step_correct)"),
    ("RFD4Proteina", "schedule_mode", f"{_CALLS}, with frames of proteins"),
    ("MiniMaxH3", "", f"{_CALLS}, with the steps of several stages"),
    ("Helios", "stages", "a pyramid whose latents grow between its stages; each has a schedule of its own"),
    (
        "Piflow",
        "n_grid",
        "a network that predicts a policy for a whole step, which only its own class follows",
    ),
    (
        "FlowMapEuler",
        "",
        "a flow map: the network predicts the mean velocity of a step, which only its own class uses",
    ),
    ("RePaint", "", "an inpainting method rather than a model; use the config of the model's own scheduler"),
    ("DDIMInverse", "", "an inversion, which runs towards noise"),
    ("DPMSolverMultistepInverse", "", "an inversion, which runs towards noise"),
)


def get(config: Config, key: str, default: Any) -> Any:
    """The value of a key, its default where it is absent or None."""
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
        or ("beta_schedule" not in config and ("shift" in config or {"eta", "s_noise"} <= config.keys()))
    )


def is_trigonometric(config: Config) -> bool:
    """Whether a config belongs to a model on a trigonometric flow (Sana Sprint; Dance Diffusion, class IPNDM)."""
    keys = {key for key in config if not key.startswith("_")}
    dance = str(config.get("_class_name", "")) == "IPNDMScheduler" or keys == {
        "num_train_timesteps",
        "trained_betas",
    }
    return config.get("prediction_type") == "trigflow" or (dance and config.get("trained_betas") is None)


def is_edm(config: Config) -> bool:
    """Whether a config belongs to an EDM-preconditioned model."""
    return config.get("sigma_data") is not None and not is_flow(config) and not is_trigonometric(config)


def consistency_solver(config: Config) -> str | None:
    """The solver that a consistency model was made for, None for other models."""
    name = str(config.get("_class_name", ""))
    if name.startswith("TCD"):
        return "tcd"
    if config.get("original_inference_steps") is not None:
        return f"lcm:timestep_scaling={float(get(config, 'timestep_scaling', 10.0)):g}"
    angle = config.get("prediction_type") == "trigflow" and config.get("sigma_data") is not None
    return "lcm" if angle or "scale_factors" in config or "clip_denoised" in config else None


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

    ``prediction`` is what the network predicts; for EDM models (``sigma_data`` set) that holds after preconditioning,
    which :meth:`denoised` includes; at the level ``boundary`` it gives the state itself. ``inverted`` marks models
    whose time and velocity run backwards (Mochi). ``train_steps`` is the number of training steps, ``clock`` what a
    timestep is, ``noise_scale`` the standard deviation of the noise in the state.
    """

    noise_schedule: NoiseSchedule
    prediction: Prediction
    clock: Clock = "index"
    train_steps: int = 1000
    sigma_data: float | None = None
    output_sign: float = 1.0
    inverted: bool = False
    boundary: float = 0.0
    noise_scale: float = 1.0

    def timesteps(self, levels: ArrayLike) -> Array:
        """What a pipeline is told at noise levels (sigma / alpha; sigma for flow)."""
        k = np.asarray(levels, dtype=np.float64)
        if self.clock == "index":
            return self.noise_schedule.time(k)
        if self.clock == "sigma":
            return (1.0 - k if self.inverted else k) * self.train_steps
        match self.clock:
            case "log" | "250log":
                return (0.25 if self.clock == "log" else 250.0) * np.log(k)
            case _:
                return np.arctan(k) * (1.0 if self.clock == "angle" else 2.0 / math.pi)

    def levels(self, timesteps: ArrayLike) -> Array:
        """Noise levels at timesteps: the inverse of :meth:`timesteps`."""
        t = np.asarray(timesteps, dtype=np.float64)
        if self.clock == "index":
            return self.noise_schedule.level(t)
        if self.clock == "sigma":
            k = t / self.train_steps
            return 1.0 - k if self.inverted else k
        match self.clock:
            case "log" | "250log":
                return np.exp(t / (0.25 if self.clock == "log" else 250.0))
            case _:
                return Trigonometric().level(t if self.clock == "angle" else 0.5 * math.pi * t)

    def input_scale(self, level: float) -> float:
        """What the state is multiplied by before the network sees it; 1 but for EDM models."""
        return 1.0 if self.sigma_data is None else 1.0 / math.hypot(level, self.sigma_data)

    def denoised(self, node: Node) -> tuple[float, float]:
        """``(c_x, c_m)`` such that ``x_0 = c_x x + c_m output`` with the network's raw output."""
        if self.sigma_data is None:
            c_x, c_m = conversion(self.prediction, "denoised", node)
            return c_x, c_m * self.output_sign
        width, above = self.sigma_data, node.sigma - self.boundary
        c_out = self.output_sign * above * width / math.hypot(node.sigma, width)
        return width**2 / (above**2 + width**2), c_out


def source_of(config: Config, *, mu: float | None = None) -> Source:
    """Noise schedule, prediction and timestep convention of a diffusers scheduler config.

    Raises ValueError for models that no solver here can step, with the reason, and for unknown key values.
    """
    _refuse(config)
    n = int(get(config, "num_train_timesteps", 1000))
    if is_flow(config):
        if float(get(config, "sigma_max", 0.0)) > 1.0 and not config.get("use_flow_sigmas"):
            # Cosmos 2 drives a flow class with EDM levels; its "velocity" (x - x_0) / sigma is the noise of that frame.
            noise = EDM(float(get(config, "sigma_min", 0.002)), float(config["sigma_max"]))
            return Source(noise, "epsilon", "sigma", n)
        inverted = bool(config.get("invert_sigmas"))
        return Source(
            Flow(shift_of(config, mu), n), "flow", "sigma", n, None, -1.0 if inverted else 1.0, inverted
        )
    if is_trigonometric(config):
        width = get(config, "sigma_data", None)
        clock: Clock = "atan" if width is None else "angle"
        return Source(Trigonometric(n), "v", clock, n, noise_scale=1.0 if width is None else float(width))
    name = str(get(config, "prediction_type", "epsilon"))
    if name not in _PREDICTIONS:
        raise ValueError(
            f"prediction_type {name!r} is not supported; allowed: {', '.join(_PREDICTIONS)}"
            f"{suggestion(name, _PREDICTIONS)}"
        )
    low, high = get(config, "sigma_min", None), get(config, "sigma_max", None)
    if is_edm(config):
        if name not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"an EDM model predicts 'epsilon' or 'v_prediction', got prediction_type {name!r}"
            )
        noise = EDM(float(low or 0.002), float(high or 80.0))
        # Cosine DPM-Solver (Stable Audio) shares the preconditioning and has another clock.
        width = float(config["sigma_data"])
        if config.get("clip_denoised") is not None:  # a consistency model
            return Source(noise, "denoised", "250log", n, width, boundary=noise.sigma_min)
        sign = -1.0 if name == "v_prediction" else 1.0
        return Source(noise, "denoised", "atan" if _is_cosine(config) else "log", n, width, sign)
    if config.get("timestep_type") == "continuous" and name == "v_prediction":  # Stable Video Diffusion
        levels = np.geomspace(float(low or 0.002), float(high or 700.0), n)
        table = Table(tuple((0.25 * np.log(levels)).tolist()), tuple(levels.tolist()), "vp")
        return Source(table, "v", "log", n)
    return Source(discrete(config, n), _PREDICTIONS[name], "index", n)


def _refuse(config: Config) -> None:
    name = str(config.get("_class_name", ""))
    for prefix, key, reason in _REFUSED:
        if name.startswith(prefix) or (key and key in config):
            raise ValueError(
                f"the config {'of ' + name if name else 'with ' + repr(key)} belongs to {reason}"
            )


def _is_cosine(config: Config) -> bool:
    named = "Cosine" in str(config.get("_class_name", ""))
    return named or ("solver_order" in config and "algorithm_type" not in config)


def shift_of(config: Config, mu: float | None = None) -> float:
    """The static or dynamic shift of a flow config; ``flow_shift`` (DPM-Solver++, UniPC) goes before ``shift``."""
    if config.get("use_dynamic_shifting") and mu is not None:
        kind = get(config, "time_shift_type", "exponential")
        if kind not in _SHIFTS:
            hint = suggestion(str(kind), _SHIFTS)
            raise ValueError(f"time_shift_type must be one of {', '.join(_SHIFTS)}, got {kind!r}{hint}")
        return math.exp(mu) if kind == "exponential" else float(mu)
    return float(get(config, "flow_shift", get(config, "shift", 1.0)))


def discrete(config: Config, n: int) -> VP:
    """The discrete noise schedule of a config with ``n`` training steps."""
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if config.get("trained_betas") is not None:
        plain = VP.trained(config["trained_betas"])
    else:
        name = get(config, "beta_schedule", "linear")
        start, end = float(get(config, "beta_start", 1e-4)), float(get(config, "beta_end", 0.02))
        makers: dict[str, Callable[[], VP]] = {
            "linear": lambda: VP.linear(start, end, n),
            "scaled_linear": lambda: VP.scaled_linear(start, end, n),
            "squaredcos_cap_v2": lambda: VP.cosine(n),
            "sigmoid": lambda: VP.trained(start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, n)))),
            "exp": lambda: VP.trained(np.full(n, min(-math.expm1(-12.0 / n), 0.999))),
            "laplace": lambda: VP.trained(_laplace(n)),
        }
        if name not in makers:
            raise ValueError(
                f"beta_schedule {name!r} is not supported; allowed: {', '.join(_BETA_SCHEDULES)}"
                f"{suggestion(str(name), _BETA_SCHEDULES)}"
            )
        plain = makers[name]()
    scale = get(config, "snr_shift_scale", None)
    if scale is not None:  # CogVideoX: the signal-to-noise ratio divided by a constant
        product = plain.alphas_cumprod / (scale + (1.0 - scale) * plain.alphas_cumprod)
        plain = VP.trained(1.0 - product / np.concatenate([[1.0], product[:-1]]))
    return VP(plain.betas, True) if zero_snr else plain


def _laplace(n: int) -> Array:
    """Betas of ``alpha^4 = snr / (1 + snr)`` with log-SNR quantiles of a Laplace distribution, as in diffusers."""
    t = np.arange(n + 1) / n
    log_snr = -0.5 * np.copysign(1.0, 0.5 - t) * np.log(1.0 - 2.0 * np.abs(0.5 - t) + 1e-6)
    product = np.sqrt(1.0 / (1.0 + np.exp(-log_snr)))
    return np.minimum(1.0 - product[1:] / product[:-1], 0.999)
