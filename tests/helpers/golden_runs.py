"""How fewstep repeats a golden case: the grid, the solver and the options that its ``meta`` stands for.

Nothing here names a case; everything is read from a case's arrays and parameters, so other folders of the same form
(FEWSTEP_GOLDEN) run through the same code. A case of a method that fewstep does not have yet gives None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from golden_files import Case

import fewstep as fs
from fewstep.samplers import Stepper
from fewstep.samplers.dpm_singlestep import groups
from fewstep.schedules import EDM, VP, Flow, Node, NoiseSchedule, TimeGrid, VPContinuous


@dataclass(frozen=True)
class Run:
    """A golden case in fewstep's words; ``denoise`` adds the closing evaluation of denoise_to_zero."""

    solver: str
    grid: TimeGrid
    options: dict[str, Any] = field(default_factory=dict)
    prediction: Any = "denoised"
    expected: str = "x_final"
    denoise: bool = False
    noise_by_step: bool = False


class DpmSolverTimes(NoiseSchedule):
    """The discrete time map of DPM-Solver's repository: log alpha linear in t between (and beyond) t = (i + 1) / n."""

    def __init__(self, betas: np.ndarray) -> None:
        self.knots = np.arange(1, len(betas) + 1) / len(betas)
        self.log_alpha = 0.5 * np.cumsum(np.log1p(-betas))

    @cached_property
    def train_levels(self):
        return np.sqrt(np.expm1(-2 * self.log_alpha))

    def level(self, t):
        t = np.asarray(t)
        i = np.clip(np.searchsorted(self.knots, t) - 1, 0, len(self.knots) - 2)
        slope = (self.log_alpha[i + 1] - self.log_alpha[i]) / (self.knots[i + 1] - self.knots[i])
        return np.sqrt(np.expm1(-2 * (self.log_alpha[i] + slope * (t - self.knots[i]))))

    def time(self, level):
        return np.interp(np.log1p(np.square(level)) / 2, -self.log_alpha, self.knots)


def find(case: Case) -> Run | None:
    """The run that repeats a case, or None."""
    families = {
        "dpm": _dpm,
        "unipc": _unipc,
        "deis": _deis,
        "kd": _kd,
        "df": _df,
        "cf": _cf,
        "zju": _zju,
        "ghvb": _ghvb,
        "cps": _cps,
    }
    return families.get(case.family, lambda case: None)(case)


def repeat(case: Case) -> Run:
    """As ``find``, for a case that is known to have one."""
    run = find(case)
    assert run is not None
    return run


def execute(case: Case, run: Run) -> np.ndarray:
    """The final state of a run on the case's mixture, start state and noise; checks the number of evaluations too."""
    program = fs.compile(run.solver, run.grid, prediction=run.prediction, **run.options)
    stepper = Stepper(
        program, torch.from_numpy(case["x_init"]), _Recorded(case, run) if program.stochastic else None
    )
    model = getattr(case.mixture, run.prediction)
    while not stepper.done:
        node = stepper.node
        stepper.step(torch.from_numpy(model(stepper.x.numpy(), node.alpha, node.sigma)))
    x = stepper.x.numpy()
    if run.denoise:
        x = case.mixture.denoised(x, run.grid[-1].alpha, run.grid[-1].sigma)
    assert program.nfe + run.denoise == case.meta["nfe"]
    return x


class _Recorded:
    """The reference's own normals, in the order of use; churn consumes one a step, used or not."""

    def __init__(self, case: Case, run: Run) -> None:
        self.noise, self.nodes, self.by_step, self.used = case["noise"], list(run.grid), run.noise_by_step, 0

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        i = self.nodes.index(start) if self.by_step else self.used
        self.used += 1
        return torch.from_numpy(self.noise[i])


def _vp(meta: Any) -> NoiseSchedule:
    if meta["schedule"] == "vp_linear":
        return VPContinuous(meta.get("beta0", 0.1), meta.get("beta1", 20.0))
    return DpmSolverTimes(np.linspace(meta["disc_b0"] ** 0.5, meta["disc_b1"] ** 0.5, meta["n_train"]) ** 2)


def _skip_grid(meta: Any) -> TimeGrid:
    """n + 1 nodes by the rules of the DPM-Solver and UniPC repositories, which end at t_end with noise left."""
    schedule, n = _vp(meta), meta["n"]
    if meta["skip_type"] == "logSNR":
        ends = schedule.level(np.array([meta["t_start"], meta["t_end"]]))
        return TimeGrid.from_levels(schedule, np.geomspace(ends[0], ends[1], n + 1))
    power = {"time_uniform": 1, "time_quadratic": 2}[meta["skip_type"]]
    times = np.linspace(meta["t_start"] ** (1 / power), meta["t_end"] ** (1 / power), n + 1) ** power
    return TimeGrid.from_times(schedule, times)


def _singlestep_grid(meta: Any) -> TimeGrid:
    """Stages and steps as nodes: in lambda every step is as long as every other, however many stages it has."""
    meta = dict(meta)
    if meta["method"] == "singlestep_fixed":
        meta["n"] = meta["n"] // meta["order"] * meta["order"]
    elif meta["skip_type"] == "logSNR":
        sizes = groups(meta["n"], meta["order"], False)
        ends = np.log(_skip_grid({**meta, "n": len(sizes)}).level)
        levels = [np.exp(np.linspace(a, b, k + 1)[:-1]) for a, b, k in zip(ends, ends[1:], sizes)]
        return TimeGrid.from_levels(_vp(meta), np.append(np.concatenate(levels), np.exp(ends[-1])))
    return _skip_grid(meta)


def _dpm(case: Case) -> Run | None:
    meta = case.meta
    if meta["method"].startswith("singlestep") and meta["order"] in (2, 3):
        solver_type = {"dpmsolver": "midpoint", "taylor": "heun"}[meta["solver_type"]]
        form = "denoised" if meta["algorithm"] == "dpmsolver++" else "epsilon"
        options: dict[str, Any] = {"form": form, "solver_type": solver_type}
        if meta["order"] == 3:
            options["lower_order_final"] = meta["method"] != "singlestep_fixed"
        spec = f"dpmpp_{meta['order']}s"
        return Run(spec, _singlestep_grid(meta), options, "epsilon", denoise=meta["denoise_to_zero"])
    if meta["method"] != "multistep" or meta["order"] > 3:
        return None
    if meta["order"] == 1:
        return Run("ddim", _skip_grid(meta), {}, "epsilon", denoise=meta["denoise_to_zero"])
    options = {
        "form": "denoised" if meta["algorithm"] == "dpmsolver++" else "epsilon",
        "solver_type": {"dpmsolver": "midpoint", "taylor": "heun"}[meta["solver_type"]],
        "lower_order_final": meta["lower_order_final"] and meta["n"] < 10,
    }
    return Run(
        f"dpmpp_{meta['order']}m", _skip_grid(meta), options, "epsilon", denoise=meta["denoise_to_zero"]
    )


def _unipc(case: Case) -> Run | None:
    meta = case.meta
    if meta["corrector_last_step"]:  # costs an evaluation that nothing uses; not offered
        return None
    options = {
        "order": meta["order"],
        "variant": {"vary_coeff": "vary"}.get(meta["variant"], meta["variant"]),
        "form": {"data_prediction": "denoised", "noise_prediction": "epsilon"}[meta["algorithm"]],
        "lower_order_final": meta["lower_order_final"],
    }
    return Run("unipc", _skip_grid(meta), options, "epsilon", denoise=meta["denoise_to_zero"])


def _deis(case: Case) -> Run | None:
    variable = {"t_ab": "t", "rho_ab": "rho"}.get(case.meta["method"])
    if variable is None:
        return None
    options = {"order": case.meta["ab_order"] + 1, "variable": variable}
    return Run("deis", TimeGrid.from_times(_vp(case.meta), case["ts"]), options, "epsilon", "x_final_exact")


def _ghvb(case: Case) -> Run:
    """Times of the momentum repository; the last one lies below the first index and means its alpha."""
    return Run("ghvb", _nodes(case), {"order": case.meta["order_arg"]}, "epsilon")


def _nodes(case: Case) -> TimeGrid:
    """A grid whose (alpha, sigma) are stored in the case."""
    return TimeGrid(case["ts"], case["alpha"], case["sigma"], VPContinuous())


def _kd(case: Case) -> Run | None:
    kwargs = case.meta.get("kwargs", {})
    solver = {
        "sample_euler": "euler",
        "sample_heun": "heun",
        "sample_dpm_2": "dpm_2",
        "sample_dpm_2_ancestral": "dpm_2_ancestral",
        "sample_euler_ancestral": "euler_ancestral",
        "sample_dpmpp_2m": "dpmpp_2m",
        "sample_lms": "deis",
        "sample_dpmpp_2m_sde": "dpmpp_2m_sde",
        "sample_dpmpp_3m_sde": "dpmpp_3m_sde",
        "sample_dpmpp_sde": "dpmpp_sde",
        "sample_dpmpp_2s_ancestral": "dpmpp_2s_ancestral",
    }.get(case.meta["fn"])
    if solver is None:
        return None
    names = {"s_churn": "churn", "s_tmin": "s_min", "s_tmax": "s_max"}
    options: dict[str, Any] = {names.get(key) or key: value for key, value in kwargs.items()}
    if solver == "deis":
        options["variable"] = "rho"
    return Run(solver, TimeGrid.from_levels(EDM(), case["sigmas"]), options, noise_by_step="churn" in options)


def _cf(case: Case) -> Run | None:
    if case.meta["fn"] == "sample_ipndm":
        grid = TimeGrid.from_levels(EDM(), case["sigmas"])
        return Run("ipndm", grid, {"order": case.meta["kwargs"].get("max_order", 4)})
    if case.meta["fn"] in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        return Run(
            case.meta["fn"].removeprefix("sample_"), _comfy_grid(case), dict(case.meta["kwargs"]), _kind(case)
        )
    if case.meta["fn"] in ("sample_lcm", "sample_ddpm", "sample_res_multistep"):
        solver = {"sample_lcm": "cps:eta=1", "sample_ddpm": "ddim:eta=1"}.get(
            case.meta["fn"], "res_multistep"
        )
        return Run(solver, _comfy_grid(case), {}, _kind(case))
    if case.meta["fn"] != "sample_euler_ancestral_RF":
        return None
    return Run(
        "euler_ancestral", TimeGrid.from_levels(Flow(), case["sigmas"]), dict(case.meta["kwargs"]), "flow"
    )


def _comfy_grid(case: Case) -> TimeGrid:
    """Samplers that work in lambda start a flow at sigma = 1 - 1e-4 in ComfyUI."""
    levels = case["sigmas"].copy()
    if "shift" not in case.meta:
        return TimeGrid.from_levels(EDM(), levels)
    if case.meta["fn"] != "sample_euler_ancestral_RF" and levels[0] >= 1.0:
        levels[0] = 1.0 - 1e-4
    return TimeGrid.from_levels(Flow(), levels)


def _kind(case: Case) -> Any:
    return "flow" if "shift" in case.meta else "denoised"


def _cps(case: Case) -> Run:
    return Run("cps", TimeGrid.from_levels(Flow(), case["sigmas"]), {"eta": case.meta["eta"]}, "flow")


def _zju(case: Case) -> Run | None:
    if case.meta["fn"] == "dpm_2_sampler":
        options = {"r": case.meta["kwargs"].get("r", 0.5)}
        return Run("dpm_2", TimeGrid.from_levels(EDM(), case["sigmas"]), options)
    if case.meta["fn"] == "ipndm_sampler":
        kwargs = case.meta["kwargs"]
        options = {"order": kwargs.get("max_order", 4), "afs": kwargs.get("afs", False)}
        return Run("ipndm", TimeGrid.from_levels(EDM(), case["sigmas"]), options)
    if case.meta["fn"] != "unipc_sampler":
        return None
    kwargs = case.meta["kwargs"]
    form = "denoised" if kwargs["predict_x0"] else "epsilon"
    options = {"order": kwargs["max_order"], "variant": kwargs["variant"], "form": form}
    return Run("unipc", TimeGrid.from_levels(EDM(), case["sigmas"]), options)


def _df(case: Case) -> Run | None:
    meta, config = case.meta, case.meta["config"]
    if meta["cls"] == "DDIMScheduler":
        return _df_ddim(case)
    if (
        meta["cls"] == "PNDMScheduler"
        and config["skip_prk_steps"]
        and not config.get("set_alpha_to_one", False)
    ):
        schedule = VP.scaled_linear(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
        times = np.append(np.unique(case["timesteps"])[::-1], 0)
        return Run("plms", TimeGrid.from_times(schedule, times), {}, "epsilon")
    if meta["state_view"] not in ("sigma", "vp_sigma", "flow", "edm"):
        return None
    schedule = {"vp_sigma": VPContinuous(), "flow": Flow()}.get(meta["state_view"], EDM())
    prediction = {"flow": "flow", "epsilon": "epsilon", "v_prediction": "v"}[meta["prediction"]]
    # Two-stage classes repeat every inner level.
    grid = TimeGrid.from_levels(schedule, np.unique(case["sigmas"])[::-1])
    few = meta["n"] < 15
    lower = config.get("lower_order_final", True) and few
    order = config.get("solver_order", 2)
    match meta["cls"]:
        case "FlowMatchEulerDiscreteScheduler" if config.get("stochastic_sampling"):
            return Run("cps", grid, {"eta": 1.0}, prediction)
        case "EulerDiscreteScheduler" | "FlowMatchEulerDiscreteScheduler" | "EDMEulerScheduler":
            return Run("euler", grid, {}, prediction)
        case "EulerAncestralDiscreteScheduler":
            return Run("euler_ancestral", grid, {}, prediction)
        case "KDPM2DiscreteScheduler":
            return Run("dpm_2", grid, {}, prediction)
        case "HeunDiscreteScheduler" | "FlowMatchHeunDiscreteScheduler":
            return Run("heun", grid, {}, prediction)
        case "LMSDiscreteScheduler":
            return Run("deis", grid, {"order": 4, "variable": "rho"}, prediction)
        case "DEISMultistepScheduler":
            options = {"order": order, "variable": "log_rho", "lower_order_final": lower}
            return Run("deis", grid, options, prediction)
        case "UniPCMultistepScheduler":
            options = {
                "order": order,
                "variant": config.get("solver_type", "bh2"),
                "form": "denoised" if config.get("predict_x0", True) else "epsilon",
                "disable_corrector": tuple(config.get("disable_corrector", ())),
                "lower_order_final": config.get("lower_order_final", True),
            }
            return Run("unipc", grid, options, prediction)
        case "DPMSolverSinglestepScheduler" if order in (2, 3):
            options: dict[str, Any] = {
                "solver_type": config.get("solver_type", "midpoint"),
                "inner": "midpoint",
            }
            options["lower_order_final"] = config.get("lower_order_final", True)
            return Run(f"dpmpp_{order}s", grid, options if order == 3 else {}, prediction)
        case "DPMSolverMultistepScheduler" | "EDMDPMSolverMultistepScheduler":
            algorithm = config.get("algorithm_type", "dpmsolver++")
            if algorithm == "sde-dpmsolver++" and order == 2:
                options = {"solver_type": config.get("solver_type", "midpoint")}
                return Run("dpmpp_2m_sde", grid, options, prediction)
            if algorithm not in ("dpmsolver", "dpmsolver++") or order not in (2, 3):
                return None
            options = {
                "form": "denoised" if algorithm == "dpmsolver++" else "epsilon",
                "solver_type": config.get("solver_type", "midpoint"),
                "lower_order_final": lower or config.get("euler_at_final", False),
            }
            return Run(f"dpmpp_{order}m", grid, options, prediction)
    return None


def _df_ddim(case: Case) -> Run:
    """diffusers' DDIM steps by a constant stride of indices, not to the next entry of its own list."""
    meta, config = case.meta, case.meta["config"]
    schedule = VP.scaled_linear(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    options = {
        "eta": meta["step_kwargs"].get("eta", 0.0),
        "stride": config["num_train_timesteps"] // meta["n"],
        "final_index": not config.get("set_alpha_to_one", True),
    }
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}[meta["prediction"]]
    grid = TimeGrid.from_times(schedule, case["timesteps"], final_zero=True)
    return Run("ddim", grid, options, prediction)
