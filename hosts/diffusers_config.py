"""From another scheduler's config to ours, and from ours to what a plan depends on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers

from ..samplers import Solver, parse
from ..schedules import schedule
from ..schedules.diffusers_config import consistency_solver, is_flow, is_trigonometric, source_of
from ..schedules.spec import suggestion
from ..tuning import Recipe, load
from .diffusers_grid import Settings

# The keys of our own config that decide about a noise schedule, a prediction or a grid.
_READ = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "timestep_spacing",
    "steps_offset",
    "timestep_type",
    "final_sigmas_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "flow_shift",
    "shift",
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "time_shift_type",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "sigma_schedule",
    "rho",
)
# Keys of other schedulers, kept in our config unseen, that tell how their class counts timesteps or the model's family.
_HIDDEN = (
    "interpolation_type",
    "solver_order",
    "predictor_order",
    "set_alpha_to_one",
    "variance_type",
    "algorithm_type",
    "original_inference_steps",
    "clip_denoised",
)


def settings_of(values: Mapping[str, Any]) -> Settings:
    """The items of a config that a plan depends on, hashable."""
    pairs = [(k, values[k]) for k in _READ]
    pairs += [(k, values[k]) for k in _HIDDEN if k in values]
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs)


def reject_unknown(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """ValueError for the first name that is not known, with the nearest that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{owner} has no argument {name!r}; allowed: {', '.join(known)}{suggestion(name, known)}"
            )


def canonical(
    solver: str | Solver,
    schedule_spec: str | None,
    betas: Sequence[float] | None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
) -> dict[str, Any]:
    """The arguments that a config holds as text or plain numbers; ValueError for specs that mean nothing."""
    chosen = parse(solver)
    if schedule_spec is not None:
        if not isinstance(schedule_spec, str):
            raise ValueError(f"schedule must be a spec such as 'karras', or None, got {schedule_spec!r}")
        schedule(schedule_spec)
    return {
        "solver": solver if isinstance(solver, str) else chosen.spec,
        "trained_betas": None if betas is None else [float(b) for b in betas],
        "recipe": None if recipe is None else load(recipe).to_dict(),
    }


def spelled_out(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Another scheduler's config with every value written down, so that it means the same for our class.

    ``given`` are the values that a user changes. Raises ValueError for models that cannot be stepped.
    """
    # What the source class filled in is as binding as what its user wrote: DDIM's "leading" is not our default.
    full = {k: v for k, v in config.items() if k != "_use_default_values"}
    original = getattr(diffusers, str(config.get("_class_name")), None)
    if isinstance(original, type):
        for name, p in inspect.signature(original.__init__).parameters.items():
            if p.default is not p.empty:
                full.setdefault(name, p.default)
    if full.get("algorithm_type") == "deis" or "predictor_order" in full:
        full.setdefault("final_sigmas_type", "sigma_min")  # DEIS and SA-Solver have no such key and end there
    if is_trigonometric(full):
        full["prediction_type"] = "trigflow"
    if str(full.get("_class_name")).startswith("TCD"):
        full.setdefault("final_sigmas_type", "sigma_min")  # ends at the first training index
    if "clip_denoised" in full:
        full.setdefault("clip_sample", full["clip_denoised"])
    solver = consistency_solver(full)
    if solver is not None:
        full.setdefault("solver", solver)
    merged = full | dict(given)
    source_of(merged)
    if is_flow(merged):
        if given.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(f"this is a flow model; prediction_type cannot be {given['prediction_type']!r}")
        full["prediction_type"] = "flow_prediction"  # our own config has the keys of all: this one tells
        if "shift" in given and "flow_shift" not in given:
            full["flow_shift"] = None
    return full
