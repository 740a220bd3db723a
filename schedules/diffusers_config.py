"""Read a diffusers scheduler config: which noise schedule it means and what its network predicts.

A config is recognised by its class name where it has one and by its keys otherwise, so that one built in memory
works too; a flow config is never read as an epsilon one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .noise import EDM, VP, Flow, NoiseSchedule
from .parametrization import Prediction
from .spec import suggestion

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "denoised",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a config belongs to a rectified-flow model."""
    return bool(
        str(config.get("_class_name", "")).startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
        or ("shift" in config and "beta_schedule" not in config)
    )


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether a config belongs to an EDM-preconditioned model."""
    return "sigma_data" in config and "beta_schedule" not in config


def prediction_of(config: Mapping[str, Any]) -> Prediction:
    """What the network of a config predicts, in fewstep's words."""
    if is_flow(config):
        return "flow"
    name = config.get("prediction_type", "epsilon")
    if name not in _PREDICTIONS:
        raise ValueError(
            f"prediction_type {name!r} is not supported; allowed: {', '.join(_PREDICTIONS)}"
            f"{suggestion(str(name), _PREDICTIONS)}"
        )
    return _PREDICTIONS[name]


def from_diffusers(config: Mapping[str, Any], *, mu: float | None = None) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler config (a mapping such as ``pipe.scheduler.config``).

    ``mu`` is what flow pipelines compute from the image size; with ``use_dynamic_shifting`` the shift is ``exp(mu)``
    (``time_shift_type="exponential"``) or ``mu`` (``"linear"``). Unset keys mean what diffusers' classes default to.

    Raises ValueError for beta schedules and predictions that are not supported, naming those that are.
    """
    prediction_of(config)
    if is_flow(config):
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        if config.get("use_dynamic_shifting") and mu is not None:
            shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else float(mu)
        return Flow(shift, int(config.get("num_train_timesteps", 1000)))
    if is_edm(config):
        return EDM(float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0)))
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if config.get("trained_betas") is not None:
        return VP.trained(config["trained_betas"], zero_terminal_snr=zero_snr)
    name = config.get("beta_schedule", "linear")
    n = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if name == "linear":
        return VP.linear(start, end, n, zero_terminal_snr=zero_snr)
    if name == "scaled_linear":
        return VP.scaled_linear(start, end, n, zero_terminal_snr=zero_snr)
    if name == "squaredcos_cap_v2":
        return VP.cosine(n, zero_terminal_snr=zero_snr)
    raise ValueError(
        f"beta_schedule {name!r} is not supported; allowed: {', '.join(_BETA_SCHEDULES)}"
        f"{suggestion(str(name), _BETA_SCHEDULES)}"
    )
