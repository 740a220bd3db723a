"""How fewstep repeats a golden case: the grid, the solver and the options that its ``meta`` stands for.

Nothing here names a case; everything is read from a case's arrays and parameters, so other folders of the same form
(FEWSTEP_GOLDEN) run through the same code. A case of a method that fewstep does not have yet gives None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import golden_files
import numpy as np
import torch
from golden_files import Case
from golden_quirks import fsampler

import fewstep as fs
from fewstep.samplers import Solver, Stepper
from fewstep.samplers.dpm_singlestep import groups
from fewstep.schedules import EDM, VP, Flow, Node, NoiseSchedule, TimeGrid, VPContinuous, make_grid


@dataclass(frozen=True)
class Run:
    """A golden case in fewstep's words.

    ``denoise`` adds the closing evaluation of denoise_to_zero, ``unused`` counts evaluations that the reference
    multiplies by zero, ``also`` are other runs that the case has a result for.
    """

    solver: str | Solver
    grid: TimeGrid
    options: dict[str, Any] = field(default_factory=dict)
    prediction: Any = "denoised"
    expected: str = "x_final"
    denoise: bool = False
    unused: int = 0
    also: tuple[Run, ...] = ()
    noise_by_step: bool = False
    noise_offset: int = 0
    draws: tuple[
        float, ...
    ] = ()  # sigma / alpha where each of the reference's draws begins, where some are not used


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
        "hb": _hb,
        "nt": _hb,
        "hbg": _hbg,
        "dc": _dc,
        "restart": _restart,
        "fs": _fs,
        "cps": _cps,
        "sa": _sa,
        "ersde": _ersde,
    }
    return families.get(case.family, lambda case: None)(case)


def not_repeated() -> dict[str, list[str]]:
    """Reason -> cases that are no run of a program; a case without a reason is an error."""
    reasons = {
        "schedules": "noise levels, not runs: tests/schedules",
        "dc_cpr_sd21": "ratios of the published polynomial: tests/samplers/test_transforms.py",
        "fs_": "scalars that depend on data; the same patterns at run time are guidance: tests/guidance",
    }
    missing: dict[str, list[str]] = {}
    golden = golden_files.load()
    for name in golden.names():
        if find(golden.case(name)) is None:
            (reason,) = [why for prefix, why in reasons.items() if name.startswith(prefix)]
            missing.setdefault(reason, []).append(name)
    return missing


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
    assert program.nfe + run.denoise + run.unused == case.meta["nfe"]
    return x


class _Recorded:
    """The reference's own normals, in the order of use; churn consumes one a step, used or not."""

    def __init__(self, case: Case, run: Run) -> None:
        self.noise, self.nodes, self.by_step, self.used = case["noise"], list(run.grid), run.noise_by_step, 0
        self.noise = self.noise[run.noise_offset :]
        self.draws = run.draws

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        i = self.nodes.index(start) if self.by_step else self.used
        while self.draws and abs(self.draws[i] / start.ratio - 1.0) > 1e-9:
            i += 1
        self.used = i + 1
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
    if meta["corrector_last_step"]:  # no released code corrects the last step; not offered
        return None
    options = {
        "order": meta["order"],
        "variant": {"vary_coeff": "vary"}.get(meta["variant"], meta["variant"]),
        "form": {"data_prediction": "denoised", "noise_prediction": "epsilon"}[meta["algorithm"]],
        "lower_order_final": meta["lower_order_final"],
    }
    return Run("unipc", _skip_grid(meta), options, "epsilon", denoise=meta["denoise_to_zero"])


def _deis(case: Case) -> Run | None:
    if case.meta["method"] == "rho_rk":
        options = {"tableau": case.meta["rk_method"], "frame": "edm"}
        return Run("rk", TimeGrid.from_times(_vp(case.meta), case["ts"]), options, "epsilon")
    grid = TimeGrid.from_times(_vp(case.meta), case["ts"])
    if case.meta["method"] == "ipndm":
        return Run("ipndm", grid, {"order": case.meta["ab_order"] + 1}, "epsilon")
    variable = {"t_ab": "t", "rho_ab": "rho"}.get(case.meta["method"])
    if variable is None:
        return None
    options = {"order": case.meta["ab_order"] + 1, "variable": variable}
    published = Run("deis", grid, options | {"riemann": 10000}, "epsilon")
    return Run("deis", grid, options, "epsilon", "x_final_exact", also=(published,))


def _multistep(case: Case) -> Run | None:
    """iPNDM and DEIS as diff-sampler and ComfyUI have them."""
    kwargs, grid = case.meta["kwargs"], TimeGrid.from_levels(EDM(), case["sigmas"])
    name = case.meta["fn"].removeprefix("sample_").removesuffix("_sampler")
    options = {"order": kwargs.get("max_order", 3 if name == "deis" else 4)}
    if name != "deis":
        weights = "published" if name == "ipndm_v" else "uniform"
        return Run("ipndm" + "+afs" * kwargs.get("afs", False), grid, options | {"weights": weights})
    if kwargs.get("deis_mode", "tab") == "tab":
        options |= {"variable": "vp", "riemann": 10000, "both_ends": True}
    else:
        options["variable"] = "rho"
    return Run("deis", grid, options)


def _ghvb(case: Case) -> Run:
    """Times of the momentum repository; the last one lies below the first index and means its alpha."""
    return Run("ghvb", _nodes(case), {"order": case.meta["order_arg"]}, "epsilon")


def _hb(case: Case) -> Run:
    """Momentum on Adams-Bashforth or on DPM-Solver++(2M), as in the momentum repository's schedulers."""
    meta = case.meta
    options: dict[str, Any] = {}
    if meta["kind"] == "dpmpp2m_hb":
        solver, start = "dpmpp_2m", "higher"
        options["lower_order_final"] = meta["n"] < 15
    else:
        solver, start = f"ipndm:order={meta['int_order']}", "every"
    nesterov = str(meta["kind"] == "nt").lower()
    spec = f"{solver}+heavy_ball:beta={meta['beta']!r},nesterov={nesterov},start={start}"
    return Run(spec, _nodes(case), options, "epsilon")


def _hbg(case: Case) -> Run:
    """The momentum repository's samplers for guided diffusion."""
    meta = case.meta
    if meta["method"] == "mdpm2":
        spec = f"dpmpp_2m+heavy_ball:beta={meta['beta']!r},start=first"
        return Run(spec, _skip_grid(meta), {"lower_order_final": meta["n"] < 10}, "epsilon")
    if meta["method"] == "phvb4":
        return Run("ghvb", _skip_grid(meta), {"order": 3 + meta["beta"]}, "epsilon")
    return Run("ipndm", _skip_grid(meta), {}, "epsilon")


def _dc(case: Case) -> Run | None:
    meta = case.meta
    if "x_final" not in case:
        return None
    ratios = "/".join(repr(float(r)) for r in case["dc_ratios"])
    options = {"order": meta["order"], "variant": meta["variant"]}
    spec = f"unipc+dc:ratios={ratios},order={meta['dc_order']}"
    return Run(spec, _skip_grid({"skip_type": "time_uniform", **meta}), options, "epsilon")


def _restart(case: Case) -> Run:
    """Heun on Karras levels; one normal a main step, a step of a restart and a jump, used or not."""
    meta = case.meta
    grid = make_grid(
        EDM(),
        meta["n"],
        f"karras:rho={meta['rho']},sigma_max={meta['sigma_max']},sigma_min={meta['sigma_min']}",
    )
    rows = list(meta["restart_info"].values())
    columns = {"steps": [n - 1 for n, *_ in rows], "repeats": [k for _, k, *_ in rows]}
    columns |= {"t_min": [a for *_, a, _ in rows], "t_max": [b for *_, b in rows]}
    noise = f"s_min={meta['S_min']},s_max={meta['S_max']},s_noise={meta['S_noise']}"
    listed = ",".join(f"{key}={'/'.join(map(repr, values))}" for key, values in columns.items())
    spec = f"heun:churn={meta['S_churn']},{noise}"
    if rows:
        spec += f"+restart:{listed},gamma={meta['restart_gamma']},{noise}"
    # a normal for every step of the main run, every jump and every step on the way down, whether it is used or not
    ratios = [node.ratio for node in grid][:-1]
    draws: list[float] = []
    for i, ratio in enumerate(ratios):
        for points, repeats, low, high in rows:
            if min(range(len(ratios)), key=lambda j: abs(ratios[j] - low)) == i:
                rho = meta["rho"]
                down = np.linspace(high ** (1 / rho), ratio ** (1 / rho), points) ** rho
                draws += [low, *down[:-1]] * repeats
        draws.append(ratio)
    return Run(spec, grid, draws=tuple(draws))


def _fs(case: Case) -> Run | None:
    """FSampler; what depends on data (learning, gates, gradient estimation) is not a linear program."""
    meta, given = case.meta, case.meta["kwargs"]
    mode, skip = given.get("skip_mode", "none"), ""
    if "adaptive_mode" in given or "skip_indices" in given or mode == "adaptive":
        return None
    if mode != "none":
        variable = "denoised" if given.get("extrapolate_denoised") else "epsilon"
        skip = f"+skip:{mode},variable={variable},sigma_aware={str(given.get('sigma_aware', False)).lower()}"
        skip += f",protect_first={given['protect_first_steps']},protect_last={given['protect_last_steps']}"
    name = meta["sampler"]
    solver = name + skip if name in ("euler", "ddim") else fsampler(name, skip)
    return Run(solver, TimeGrid.from_levels(EDM(), case["sigmas"]))


def _nodes(case: Case) -> TimeGrid:
    """A grid whose (alpha, sigma) are stored in the case."""
    return TimeGrid(case["ts"], case["alpha"], case["sigma"], VPContinuous())


_CHURN = {"s_churn": "churn", "s_tmin": "s_min", "s_tmax": "s_max"}


def _kd(case: Case) -> Run | None:
    if case.meta["fn"] == "sample_dpm_fast":
        meta = case.meta
        levels = np.geomspace(meta["sigma_max"], meta["sigma_min"], meta["n"] + 1)
        return Run("dpm_fast", TimeGrid.from_levels(EDM(), levels))
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
    options: dict[str, Any] = {_CHURN.get(key) or key: value for key, value in kwargs.items()}
    if solver == "deis":
        options["variable"] = "rho"
    return Run(solver, TimeGrid.from_levels(EDM(), case["sigmas"]), options, noise_by_step="churn" in options)


def _cf(case: Case) -> Run | None:
    if case.meta["fn"] in ("sample_ipndm", "sample_ipndm_v", "sample_deis"):
        return _multistep(case)
    if case.meta["fn"] == "sample_gradient_estimation":
        options = {"gamma": case.meta["kwargs"].get("ge_gamma", 2.0)}
        return Run("gradient_estimation", TimeGrid.from_levels(EDM(), case["sigmas"]), options)
    if case.meta["fn"].removeprefix("sample_") in (
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "res_multistep_ancestral",
        "seeds_2",
        "seeds_3",
    ):
        return Run(
            case.meta["fn"].removeprefix("sample_"), _comfy_grid(case), dict(case.meta["kwargs"]), _kind(case)
        )
    if case.meta["fn"] == "sample_heunpp2":
        grid = TimeGrid.from_levels(Flow() if "shift" in case.meta else EDM(), case["sigmas"])
        options = {_CHURN.get(key) or key: value for key, value in case.meta["kwargs"].items()}
        return Run("heunpp2", grid, options, _kind(case), noise_by_step="churn" in options)
    if case.meta["fn"] in ("sample_lcm", "sample_ddpm", "sample_res_multistep"):
        return Run(case.meta["fn"].removeprefix("sample_"), _comfy_grid(case), {}, _kind(case))
    if case.meta["fn"] == "sample_sa_solver":
        return _cf_sa(case)
    if case.meta["fn"] == "sample_er_sde":
        options = {"order": case.meta["kwargs"].get("max_stage", 3), "riemann": 200}
        return Run("er_sde", _comfy_grid(case), options, _kind(case))
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


def _sa(case: Case) -> Run:
    """tau is on between two times and off in the last step; one normal a step, used or not, after one that is not."""
    meta, schedule = case.meta, _vp(case.meta)
    skip_type = {"time": "time_uniform"}.get(meta["skip_type"], meta["skip_type"])
    grid = _skip_grid({**meta, "skip_type": skip_type})
    low, high, tau = meta["tau"]
    options = {
        "predictor_order": meta["predictor_order"],
        "corrector_order": meta["corrector_order"],
        "tau": tau,
        "s_min": max(float(schedule.level(low)), grid[-1].ratio) * (1 + 1e-9),
        "s_max": float(schedule.level(high)) * (1 + 1e-9),
        "pece": meta["pc_mode"] == "PECE",
        "simple_order_2": True,
        "lower_order_final": meta["lower_order_final"],
    }
    return Run("sa_solver", grid, options, "epsilon", noise_by_step=True, noise_offset=1)


def _df_sa(case: Case) -> Run:
    """diffusers looks at the time a step starts from, on where 200 <= t <= 800; the relaxed rule of order 2."""
    config = case.meta["config"]
    schedule = VP.scaled_linear(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    options = {
        "predictor_order": config["predictor_order"],
        "corrector_order": config["corrector_order"],
        "s_min": float(schedule.level(199.5)),
        "s_max": float(schedule.level(800.5)),
        "tau_at": "start",
        "simple_order_2": True,
        "lower_order_final": config.get("lower_order_final", True),
    }
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}[case.meta["prediction"]]
    grid = TimeGrid.from_levels(VPContinuous(), case["sigmas"])
    return Run("sa_solver", grid, options, prediction, noise_by_step=True)


def _cf_sa(case: Case) -> Run | None:
    """ComfyUI's default interval, 20 to 80 per cent of the way, by the stand-in for its model that the case states."""
    if "sigma_max" not in case.meta:
        return None
    low, high = (case.meta["sigma_max"] ** (1 - p) * case.meta["sigma_min"] ** p for p in (0.8, 0.2))
    kwargs = dict(case.meta["kwargs"])
    options = {"s_min": low, "s_max": high, "pece": kwargs.pop("use_pece", False)} | kwargs
    return Run("sa_solver", _comfy_grid(case), options, _kind(case))


def _ersde(case: Case) -> Run:
    """The original's functions have numbers; its integrals are left Riemann sums of 100 points."""
    name = ("ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5")[case.meta["noise_fn"] - 1]
    options = {"order": int(case.meta["fn"][3]), "noise_scale": name, "riemann": 100}
    schedule = EDM() if case.meta["fn"].startswith("ve") else _vp(case.meta)
    return Run("er_sde", TimeGrid.from_levels(schedule, case["sigmas"] / case["alphas"]), options)


def _cps(case: Case) -> Run:
    return Run("cps", TimeGrid.from_levels(Flow(), case["sigmas"]), {"eta": case.meta["eta"]}, "flow")


def _zju(case: Case) -> Run | None:
    if case.meta["fn"] == "dpm_2_sampler":
        options = {"r": case.meta["kwargs"].get("r", 0.5)}
        return Run("dpm_2", TimeGrid.from_levels(EDM(), case["sigmas"]), options)
    if case.meta["fn"] in ("ipndm_sampler", "ipndm_v_sampler", "deis_sampler"):
        return _multistep(case)
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
    if meta["cls"] in ("DDPMScheduler", "LCMScheduler", "TCDScheduler"):
        return _df_by_index(case)
    if meta["cls"] == "SASolverScheduler":
        return _df_sa(case)
    if meta["cls"] == "IPNDMScheduler":
        return _df_ipndm(case)
    if meta["cls"] == "PNDMScheduler" and not config.get("set_alpha_to_one", False):
        return _df_pndm(case)
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
            if algorithm == "sde-dpmsolver++" and order == 3:
                options = {"variant": "diffusers", "lower_order_final": lower}
                return Run("dpmpp_3m_sde", grid, options, prediction)
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


def _df_ipndm(case: Case) -> Run:
    """diffusers starts without signal and multiplies the first prediction by alpha = 0: an analytical first step."""
    alpha, sigma = np.append(case["eval_alpha"], 1.0), np.append(case["eval_sigma"], 0.0)
    grid = TimeGrid(np.append(case["timesteps"], 0.0), alpha, sigma, VPContinuous())
    return Run("ipndm+afs", grid, {"euler_at_final": False}, "v", unused=1)


def _df_pndm(case: Case) -> Run | None:
    meta, config = case.meta, case.meta["config"]
    schedule = VP.scaled_linear(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    stride = config["num_train_timesteps"] // meta["n"]
    if config["skip_prk_steps"]:
        times, start = np.unique(case["timesteps"])[::-1], "multistep"
    elif stride % 2:  # has no middle index; the state and the network are then at two different ones
        return None
    else:
        times, start = case["timesteps"][0] - stride * np.arange(meta["n"]), "prk"
    grid = TimeGrid.from_times(schedule, np.append(times, 0))
    return Run("plms", grid, {"start": start}, "epsilon")


def _df_by_index(case: Case) -> Run:
    """Classes that step from one training index to the next; TCD ends at index 0, the others without noise."""
    meta, config = case.meta, case.meta["config"]
    schedule = VP.scaled_linear(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    grid = TimeGrid.from_times(schedule, case["timesteps"], final_zero=True)
    match meta["cls"]:
        case "DDPMScheduler":
            variance = config["variance_type"].removeprefix("fixed_")
            options = {"variance": variance, "final_noise": bool(case["timesteps"][-1] > 0)}
            return Run("ddpm", grid, options, meta["prediction"])
        case "LCMScheduler":
            return Run("lcm", grid, {"timestep_scaling": 10.0}, meta["prediction"])
    grid = TimeGrid.from_times(schedule, np.append(case["timesteps"], 0))
    return Run("tcd", grid, {"gamma": meta["step_kwargs"]["eta"]}, meta["prediction"])


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
