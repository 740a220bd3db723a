"""What a scheduler of a pipeline says about a run: the nodes of its evaluations, and what kind of solver it is.

Where a network is given the state at unit variance the frame is that of the network's input: a scheduler that keeps
``x_0 + k eps`` divides by ``sqrt(1 + k^2)``, one of an EDM model by ``sqrt(k^2 + sigma_data^2)``, and in that frame an
EDM network is a v network of the data divided by ``sigma_data``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...guidance import Run
from ...schedules import EDM, Flow, Node, NoiseSchedule
from ...schedules.diffusers_config import Source, source_of
from ...schedules.parametrization import Prediction

_EXPLODING = ("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
"""Classes that keep ``x_0 + k eps``, by the start of their names."""
_ONE_STEP = ("DDIM", "CogVideoXDDIM", "EulerDiscrete", "FlowMatchEuler")
_ONE_STEP_NOISY = ("DDPM", "EulerAncestral", "LCM", "TCD", "FlowMatchLCM")
_NOISY = (*_ONE_STEP_NOISY, "KDPM2Ancestral", "DPMSolverSDE", "SASolver", "CogVideoXDPM")


@dataclass(frozen=True)
class Clock:
    """Nodes of the evaluations of a run and of its end, in the frame of the network's input.

    ``input_scale`` is what the scheduler's state is multiplied by there, for each node and the end.
    """

    run: Run
    nodes: tuple[Node, ...]
    input_scale: tuple[float, ...]
    timesteps: tuple[float, ...]
    sign: float
    source: Source


def clock_of(scheduler: Any, begin: int, count: int, flow: bool, arguments: Mapping[str, Any]) -> Clock:
    """The clock of ``count`` evaluations from number ``begin`` on; ValueError for schedulers without one.

    ``flow`` marks flow networks under levels of a diffusion model.
    """
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    source = source_of(config)
    levels = _levels(scheduler, source)[begin : begin + count + 1]
    times = np.asarray(_floats(scheduler.timesteps))[begin : begin + count]
    schedule, prediction, sign = _model(source, flow)
    nodes, scales = [], []
    for k in levels.tolist():
        node, scale = _node(source, schedule, k, flow, _exploding(scheduler))
        nodes.append(node)
        scales.append(scale)
    run = Run(
        schedule,
        prediction,
        nodes=tuple(nodes[:-1]),
        end=nodes[-1],
        **_solver(scheduler, arguments, float(config.get("eta") or arguments.get("eta") or 0.0)),
    )
    return Clock(run, tuple(nodes), tuple(scales), tuple(times.tolist()), sign, source)


def begin_index(scheduler: Any, timestep: Any) -> int:
    """The first evaluation of the run that begins: what the scheduler was told, or the place of the first timestep."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    if timestep is None:
        return 0
    distance = np.abs(np.asarray(_floats(scheduler.timesteps)) - float(timestep))
    return int(np.flatnonzero(distance == distance.min())[-1])  # of equal ones a step begins at the last


def _floats(values: Any) -> list[float]:
    return [float(v) for v in (values.tolist() if hasattr(values, "tolist") else values)]


def _levels(scheduler: Any, source: Source) -> np.ndarray:
    """Noise levels of all evaluations and of the end, as the source counts them."""
    times = np.asarray(_floats(scheduler.timesteps))
    sigmas = getattr(scheduler, "sigmas", None)
    name = type(scheduler).__name__
    if sigmas is not None and len(sigmas) == len(times) + 1 and not name.startswith("KDPM2"):
        levels = np.asarray(_floats(sigmas))
        return 1.0 - levels if source.inverted else levels
    levels = source.levels(times)
    end = 0.0
    final = getattr(scheduler, "final_alpha_cumprod", None)
    if final is not None and 0.0 < float(final) < 1.0:
        end = math.sqrt((1.0 - float(final)) / float(final))
    return np.append(levels, min(end, float(levels[-1])))


def _exploding(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith(_EXPLODING)


def _model(source: Source, flow: bool) -> tuple[NoiseSchedule, Prediction, float]:
    """Noise schedule, prediction and sign of the network in the frame of its input."""
    if flow:
        return Flow(1.0), "flow", 1.0
    if source.sigma_data is not None:
        return source.noise_schedule, "v", -source.output_sign
    return source.noise_schedule, source.prediction, source.output_sign


def _node(
    source: Source, schedule: NoiseSchedule, k: float, flow: bool, exploding: bool
) -> tuple[Node, float]:
    """The node at a level, and what the scheduler's state is multiplied by in its frame."""
    if flow:
        sigma = k / (1.0 + k)
        return Node(sigma, 1.0 - sigma, sigma), 1.0 - sigma
    if source.sigma_data is not None:
        total = math.hypot(k, source.sigma_data)
        return Node(float(schedule.time(k)), source.sigma_data / total, k / total), 1.0 / total
    if isinstance(schedule, EDM):
        return Node(k, 1.0, k), 1.0
    alpha, sigma = (float(v) for v in schedule.alpha_sigma_at(k))
    return Node(float(schedule.time(k)), alpha, sigma), alpha if exploding else 1.0


def _solver(scheduler: Any, arguments: Mapping[str, Any], eta: float) -> dict[str, Any]:
    """What :class:`Run` says about the solver."""
    plan = getattr(getattr(scheduler, "_run", None), "plan", None)
    if plan is not None:  # our own scheduler
        solver, program = plan.solver, plan.program
        alone = solver.evaluations_per_step == 1 and not solver.startup_evaluations
        plain = alone and solver.order == 1 and not program.stochastic and not program.history
        return {
            "stages": solver.evaluations_per_step,
            "startup": solver.startup_evaluations,
            "history": program.history,
            "deterministic": not program.stochastic,
            "first_order": plain and not eta,
            "solver": solver.spec,
        }
    name, config = type(scheduler).__name__, scheduler.config
    noisy = name.startswith(_NOISY) or bool(eta) or bool(config.get("stochastic_sampling"))
    one_step = name.startswith((*_ONE_STEP, *_ONE_STEP_NOISY))
    second = (
        name.startswith("DPMSolverMultistep")
        and config.get("algorithm_type") == "dpmsolver++"
        and config.get("solver_order") == 2
        and config.get("solver_type") == "midpoint"
    )
    return {
        "stages": int(getattr(scheduler, "order", 1)),
        "history": 0 if one_step else 1,
        "deterministic": not noisy,
        "first_order": name.startswith(_ONE_STEP) and not noisy,
        "solver": "dpmpp_2m" if second else name,
    }
