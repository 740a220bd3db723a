"""Every solver that has the name of a diffusers class gives its numbers: the class in its own loop, and the solver of
the library on the levels and timesteps that the class has chosen, with the same noise.

What a pipeline does around a solver is in test_diffusers_parity.py. This is about the methods alone: fp32, one part in
a hundred thousand.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import names_table
import numpy as np
import pytest
import torch
from names_table import options_of

pytest.importorskip("diffusers")

import fewstep as fs
from fewstep.samplers import Solver, Stepper
from fewstep.schedules import EDM, VP, Flow, Node, NoiseSchedule, TimeGrid

diffusers: Any = importlib.import_module("diffusers")
schedulers: Any = importlib.import_module("diffusers.schedulers")
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2
Network = Callable[[torch.Tensor, Any], torch.Tensor]


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Smooth, bounded, another one at every time."""
    mixed = torch.einsum("oc,bc...->bo...", MIX, x)
    return torch.tanh(mixed + 0.3) + 0.2 * torch.sin(torch.as_tensor(t, dtype=torch.float32) / 150)


class Draws:
    """The normals of a generator in the order in which a class draws them.

    The solver takes every ``every``-th of them or, ``by_step``, that of the step it is in; none in the last step with
    ``last`` false.
    """

    def __init__(
        self, grid: TimeGrid, every: int = 1, by_step: bool = False, last: bool = True, scale: float = 1.0
    ) -> None:
        self.generator, self.nodes = generator(), list(grid)
        self.every, self.by_step, self.last, self.scale, self.used = every, by_step, last, scale, 0
        self.drawn: list[torch.Tensor] = []

    def __call__(self, like: torch.Tensor, start: Node, stop: Node) -> torch.Tensor:
        i = self.nodes.index(start) if self.by_step else self.every * self.used
        while len(self.drawn) <= i:
            self.drawn.append(torch.randn(like.shape, generator=self.generator))
        self.used += 1
        return (self.scale if self.last or stop != self.nodes[-1] else 0.0) * self.drawn[i]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def theirs(scheduler: Any, x: torch.Tensor, model: Network = network, **arguments: Any) -> torch.Tensor:
    """The loop of a pipeline."""
    given = inspect.signature(scheduler.step).parameters
    if "generator" in given:
        arguments["generator"] = generator()
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        output = model(scale(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **arguments)[0]
    return x


def ours(
    spec: str | Solver,
    grid: TimeGrid,
    x: torch.Tensor,
    prediction: Any,
    model: Callable[[torch.Tensor, Node], torch.Tensor] = lambda x, node: network(x, node.t),
    **draws: Any,
) -> torch.Tensor:
    program = fs.compile(spec, grid, prediction=prediction)
    stepper = Stepper(program, x, Draws(grid, **draws) if program.stochastic else None)
    while not stepper.done:
        stepper.step(model(stepper.x, stepper.node))
    return stepper.x


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.isfinite(b).all()
    assert ((a - b).norm() / b.norm()).item() < TOLERANCE


# -- discrete models: classes with a list of sigmas --------------------------------------------------------------------

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "denoised", "flow_prediction": "flow"}
DPM, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
# Class, options, what they mean; no spec where the name of the class says it.
SIGMAS: list[tuple[str, dict[str, Any], str]] = [
    ("EulerDiscreteScheduler", {}, ""),
    ("EulerDiscreteScheduler", V | KARRAS, ""),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "trailing"}, ""),
    ("EulerAncestralDiscreteScheduler", {}, ""),
    ("EulerAncestralDiscreteScheduler", V | {"timestep_spacing": "leading", "steps_offset": 1}, ""),
    ("HeunDiscreteScheduler", {}, ""),
    ("HeunDiscreteScheduler", V | KARRAS, ""),
    ("KDPM2DiscreteScheduler", {}, ""),
    ("KDPM2DiscreteScheduler", V | KARRAS, ""),
    ("KDPM2AncestralDiscreteScheduler", {}, ""),
    ("KDPM2AncestralDiscreteScheduler", V | KARRAS, ""),
    ("LMSDiscreteScheduler", {}, ""),
    ("LMSDiscreteScheduler", V | KARRAS, ""),
    ("DPMSolverSDEScheduler", {}, ""),
    ("DPMSolverSDEScheduler", V | KARRAS, ""),
    (DPM, {}, ""),
    (DPM, V | KARRAS, ""),
    (DPM, {"prediction_type": "sample", "use_lu_lambdas": True}, ""),
    (DPM, {"algorithm_type": "sde-dpmsolver++"} | V | KARRAS, "dpmpp_2m_sde"),
    (SINGLE, {}, ""),
    (SINGLE, V | KARRAS, ""),
    (UNIPC, {}, ""),
    (UNIPC, V | KARRAS, ""),
    (DEIS, {}, ""),
    # Re-spaced levels end where training does, and so does the run: its last step has no length.
    (DEIS, V | KARRAS | {"lower_order_final": False}, "deis:order=2,variable=log_rho"),
    *options_of(DPM, SINGLE, UNIPC, DEIS),
]


def vp(scheduler: Any) -> VP:
    return VP.trained(betas(scheduler.alphas_cumprod))


def betas(product: torch.Tensor) -> np.ndarray:
    acp = product.double().numpy()
    return 1 - acp / np.append(1.0, acp[:-1])


def times_of(scheduler: Any) -> np.ndarray:
    """The timestep at which every step starts."""
    return scheduler.timesteps[:: getattr(scheduler, "order", 1)].double().numpy()


def levels_of(scheduler: Any) -> np.ndarray:
    """sigmas, without the repetitions of the two-stage classes."""
    return np.unique(scheduler.sigmas.double().numpy())[::-1]


def grid_of(schedule: NoiseSchedule, times: np.ndarray, levels: np.ndarray) -> TimeGrid:
    return TimeGrid(np.append(times, 0.0)[: len(levels)], *schedule.alpha_sigma_at(levels), schedule)


@pytest.mark.parametrize(("name", "options", "spec"), SIGMAS, ids=lambda v: str(v) or "default")
def test_discrete_models(
    name: str, options: dict[str, Any], spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = class_of(name, monkeypatch)
    for steps in (7, 20):
        scheduler = cls(**SD, **options)
        scheduler.set_timesteps(steps)
        grid = grid_of(vp(scheduler), times_of(scheduler), levels_of(scheduler))
        start = X * float(scheduler.init_noise_sigma)
        alpha = 1.0 if abs(float(scheduler.init_noise_sigma) - 1) < 1e-6 else grid[0].alpha
        prediction = PREDICTIONS[options.get("prediction_type", "epsilon")]
        # What the classes without noise to scale keep is x, what the others keep is x / alpha.
        solver = fs.solver(spec or name)
        if steps >= 15 and name in (DPM, DEIS) and not options.get("euler_at_final"):
            # These lower the last orders in short runs only.
            solver = solver.with_options(**dict.fromkeys({"lower_order_final"} & set(solver.options), False))
        assert_same(ours(solver, grid, alpha * start, prediction), theirs(scheduler, start))


def class_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class; those that need torchsde draw from a generator in place of a Brownian tree."""
    modules = {
        "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
        "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
    }
    if name not in modules:
        return getattr(schedulers, name)
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    for dependent in modules.values():
        monkeypatch.delitem(sys.modules, f"diffusers.schedulers.{dependent}", raising=False)
    sde = importlib.import_module(f"diffusers.schedulers.{modules['DPMSolverSDEScheduler']}")
    module = importlib.import_module(f"diffusers.schedulers.{modules[name]}")

    class White:
        def __init__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self.shape, self.generator = x.shape, generator()

        def __call__(self, *interval: Any) -> torch.Tensor:
            return torch.randn(self.shape, generator=self.generator)

    for part in (sde, module):
        monkeypatch.setattr(part, "BrownianTreeNoiseSampler", White)
    return getattr(module, name)


def test_sa_solver() -> None:
    """Noise where 200 <= t <= 800 at the start of a step, which are levels of one's own schedule; or everywhere."""
    cases: list[tuple[dict[str, Any], bool]] = [({}, False), (V, False), ({"tau_func": lambda t: 1}, True)]
    for options, everywhere in cases:
        scheduler = schedulers.SASolverScheduler(**SD, **options)
        scheduler.set_timesteps(7)
        schedule = vp(scheduler)
        grid = grid_of(schedule, times_of(scheduler), levels_of(scheduler))
        interval = [float(schedule.level(t)) for t in (199.5, 800.5)]
        spec = "SASolverScheduler" + ("" if everywhere else ":s_min={},s_max={}".format(*interval))
        prediction = PREDICTIONS[options.get("prediction_type", "epsilon")]
        assert_same(ours(spec, grid, X, prediction, by_step=True), theirs(scheduler, X))
    orders = {"predictor_order": 3, "corrector_order": 3}
    scheduler = schedulers.SASolverScheduler(**SD, **orders, tau_func=lambda t: 0)
    scheduler.set_timesteps(9)
    grid = grid_of(vp(scheduler), times_of(scheduler), levels_of(scheduler))
    spec = "SASolverScheduler:predictor_order=3,corrector_order=3,tau=0"
    assert_same(ours(spec, grid, X, "epsilon"), theirs(scheduler, X))


# -- discrete models: classes that count training indices --------------------------------------------------------------

UNCLIPPED = {"clip_sample": False}
# Class, options, what step is given, what they mean, and which of the draws are used.
INDICES: list[tuple[str, dict[str, Any], dict[str, Any], str, int]] = [
    ("DDIMScheduler", UNCLIPPED, {}, "", 1),
    ("DDIMScheduler", UNCLIPPED, {"eta": 0.7}, "ddim:eta=0.7", 1),
    ("DDIMScheduler", UNCLIPPED | V, {"eta": 1.0}, "ddim:eta=1", 1),
    ("DDIMParallelScheduler", UNCLIPPED, {"eta": 0.7}, "ddim:eta=0.7", 1),
    ("CogVideoXDDIMScheduler", V, {}, "", 1),
    ("CogVideoXDPMScheduler", V, {}, "", 2),
    ("DDPMScheduler", UNCLIPPED, {}, "", 1),
    ("DDPMScheduler", UNCLIPPED | V, {}, "", 1),
    *((name, UNCLIPPED | options, {}, spec, 1) for name, options, spec in options_of("DDPMScheduler")),
    ("DDPMParallelScheduler", UNCLIPPED, {}, "", 1),
    ("LCMScheduler", {}, {}, "", 1),
    ("LCMScheduler", V, {}, "", 1),
    ("TCDScheduler", {"steps_offset": 0}, {}, "", 1),
    ("TCDScheduler", V, {"eta": 0.8}, "tcd:gamma=0.8", 1),
]


@pytest.mark.parametrize(
    ("name", "options", "arguments", "spec", "every"), INDICES, ids=lambda v: str(v) or "default"
)
def test_classes_by_index(
    name: str, options: dict[str, Any], arguments: dict[str, Any], spec: str, every: int
) -> None:
    """On a number of steps that divides that of training; other numbers are below, under what differs."""
    scheduler = getattr(schedulers, name)(**({} if "Cog" in name else SD), **options)
    scheduler.set_timesteps(4 if name in ("LCMScheduler", "TCDScheduler") else 10)
    to_index = name == "TCDScheduler"  # it ends at the first one, the others without noise
    times = np.append(times_of(scheduler), [0.0] * to_index)
    grid = TimeGrid.from_times(vp(scheduler), times, final_zero=not to_index)
    prediction = PREDICTIONS[options.get("prediction_type", "epsilon")]
    run = theirs_cogvideox if name == "CogVideoXDPMScheduler" else theirs
    assert_same(ours(spec or name, grid, X, prediction, every=every), run(scheduler, X, **arguments))


def theirs_cogvideox(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    old, before, draws = None, None, generator()
    for t in scheduler.timesteps:
        x, old = scheduler.step(network(x, t), old, t, before, x, generator=draws)[:2]
        before = t
    return x


def test_pndm() -> None:
    """Ends at the first training index. A v prediction is another method there: see docs/names.md."""
    for options, spec in (({}, "PNDMScheduler"), ({"skip_prk_steps": True}, "pndm")):
        scheduler = schedulers.PNDMScheduler(**SD, steps_offset=1, **options)
        scheduler.set_timesteps(10)
        times = float(scheduler.timesteps[0]) - 100 * np.arange(10)
        grid = TimeGrid.from_times(vp(scheduler), np.append(times, 0.0))
        assert_same(ours(spec, grid, X, "epsilon"), theirs(scheduler, X))


def test_ipndm() -> None:
    """Its own schedule starts without signal, and its first evaluation is multiplied by alpha = 0."""
    scheduler = schedulers.IPNDMScheduler()
    scheduler.set_timesteps(8)
    alpha, sigma = (v.double().numpy() for v in (scheduler.alphas, scheduler.betas))
    grid = TimeGrid(np.append(scheduler.timesteps.double(), 0.0), alpha, sigma, VP.linear())
    assert_same(ours("IPNDMScheduler", grid, X, "v"), theirs(scheduler, X))


def test_unclip() -> None:
    """Its 1 - alphas_cumprod has three figures at index 0; here it gets all of them."""
    for kind in ("epsilon", "sample"):
        scheduler = schedulers.UnCLIPScheduler(clip_sample=False, prediction_type=kind)
        scheduler.set_timesteps(8)
        scheduler.betas = scheduler.betas.double()
        scheduler.alphas, scheduler.alphas_cumprod = 1 - scheduler.betas, (1 - scheduler.betas).cumprod(0)
        times = [*scheduler.timesteps, None]
        x, draws = X, generator()
        for t, after in zip(times, times[1:]):
            x = scheduler.step(network(x, t), t, x, prev_timestep=after, generator=draws).prev_sample
        grid = TimeGrid.from_times(vp(scheduler), times_of(scheduler), final_zero=True)
        assert_same(ours("UnCLIPScheduler", grid, X, PREDICTIONS[kind]), x)


def test_wuerstchen() -> None:
    """Its last level is not quite clean, and gets no noise all the same."""
    scheduler = schedulers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(8)
    x, draws = X, generator()
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(network(x, t), t.expand(len(x)), x, draws).prev_sample
    times = scheduler.timesteps.double()
    product = scheduler._alpha_cumprod(scheduler.timesteps, "cpu").double().numpy()
    grid = TimeGrid(times.numpy(), product**0.5, (1 - product) ** 0.5, VP.cosine())
    assert_same(ours("DDPMWuerstchenScheduler", grid, X, "epsilon", last=False), x)


# -- flow models -------------------------------------------------------------------------------------------------------

FLOWS: list[tuple[str, dict[str, Any], str]] = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, ""),
    *options_of("FlowMatchEulerDiscreteScheduler"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, ""),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, ""),
    ("FlowMapEulerDiscreteScheduler", {"shift": 3.0}, ""),
    ("LTXEulerAncestralRFScheduler", {}, ""),
    ("LTXEulerAncestralRFScheduler", {"eta": 0.5, "s_noise": 0.9}, "euler_ancestral:eta=0.5,s_noise=0.9"),
    ("HeliosScheduler", {"stages": 1, "shift": 3.0}, ""),
    *((name, {"stages": 1} | options, spec) for name, options, spec in options_of("HeliosScheduler")),
    *(
        (
            name,
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0} | more,
            spec,
        )
        for name, more, spec in (
            (DPM, {}, ""),
            (DPM, {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
            (DPM, {"solver_order": 3}, "dpmpp_3m:lower_order_final=true"),
            (SINGLE, {}, ""),
            (UNIPC, {}, ""),
            (UNIPC, {"solver_order": 3}, "unipc:order=3"),
            (DEIS, {"lower_order_final": False}, "deis:order=2,variable=log_rho"),
        )
    ),
]


@pytest.mark.parametrize(("name", "options", "spec"), FLOWS, ids=lambda v: str(v) or "default")
def test_flow_models(name: str, options: dict[str, Any], spec: str) -> None:
    scheduler = getattr(schedulers, name)(**options)
    given: dict[str, Any] = {"num_inference_steps": 6}
    if "LTX" in name:
        given = {"sigmas": [1.0, 0.9, 0.75, 0.5, 0.3, 0.0]}
    if "Helios" in name:  # from 1 its corrector takes a limit of its own, 2e-5 from ours
        given["sigmas"] = np.linspace(0.999, 0.2, 6, dtype=np.float32)
    scheduler.set_timesteps(**given)
    scheduler.sigmas = scheduler.sigmas.double()  # DEIS's coefficients, made in fp32, are 5e-5 off
    grid = grid_of(Flow(), times_of(scheduler), levels_of(scheduler))
    assert_same(ours(spec or name, grid, X, "flow"), theirs(scheduler, X))


def test_minimax() -> None:
    """Time and velocity run backwards."""
    scheduler = schedulers.MiniMaxH3Scheduler()
    scheduler.set_timesteps(7)
    grid = grid_of(Flow(), times_of(scheduler), levels_of(scheduler))
    result = theirs(scheduler, X, lambda x, t: -network(x, t))
    assert_same(ours("MiniMaxH3Scheduler", grid, X, "flow"), result)


def test_helios_dmd() -> None:
    """Its noise is given, one tensor for all steps."""
    scheduler = schedulers.HeliosDMDScheduler(stages=1, shift=3.0)
    times, levels = torch.tensor([1000, 750, 500, 250]), torch.tensor([1.0, 0.75, 0.5, 0.25])
    noise, x = torch.randn(X[:, :, None].shape, generator=generator()), X[:, :, None]
    for i, t in enumerate(times):
        given = {
            "dmd_noisy_tensor": noise,
            "dmd_sigmas": levels,
            "dmd_timesteps": times,
            "all_timesteps": times,
        }
        x = scheduler.step(network(x, t), t, x, cur_sampling_step=i, **given).prev_sample
    grid = grid_of(Flow(), times.double().numpy(), np.append(levels.double(), 0.0))
    program = fs.compile("HeliosDMDScheduler", grid, prediction="flow")
    stepper = Stepper(program, X[:, :, None], lambda like, start, stop: noise)
    while not stepper.done:
        stepper.step(network(stepper.x, stepper.node.t))
    assert_same(stepper.x, x)


# -- models with preconditioning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "options", "spec"),
    [
        ("EDMEulerScheduler", {}, ""),
        ("EDMDPMSolverMultistepScheduler", {}, ""),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_3m:lower_order_final=true"),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("CosineDPMSolverMultistepScheduler", {}, ""),
        ("CosineDPMSolverMultistepScheduler", {"solver_type": "heun"}, "dpmpp_2m_sde:solver_type=heun"),
    ],
    ids=lambda v: str(v) or "default",
)
def test_edm_models(
    name: str, options: dict[str, Any], spec: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = class_of(name, monkeypatch)(prediction_type=prediction, **options)
    scheduler.set_timesteps(7)
    grid = grid_of(EDM(), times_of(scheduler), levels_of(scheduler))
    data = scheduler.config.sigma_data

    def denoised(x: torch.Tensor, node: Node) -> torch.Tensor:
        total = node.sigma**2 + data**2
        c_out = (1 if prediction == "epsilon" else -1) * node.sigma * data / math.sqrt(total)
        return data**2 / total * x + c_out * network(x / math.sqrt(total), node.t)

    start = X * float(scheduler.init_noise_sigma)
    assert_same(ours(spec or name, grid, start, "denoised", denoised), theirs(scheduler, start))


def test_karras_ve() -> None:
    """Its pipeline calls three methods a step: churn, Euler, and Heun's correction but at the end."""
    scheduler = schedulers.KarrasVeScheduler()
    scheduler.set_timesteps(8)
    levels, x, draws = scheduler.schedule, 100 * X, generator()
    for t in scheduler.timesteps:
        level, after = levels[t], levels[t - 1] if t > 0 else 0.0
        high, raised = scheduler.add_noise_to_input(x, level, draws)
        x, slope = scheduler.step(network(high, raised), raised, after, high, return_dict=False)
        if t > 0:
            output = network(x, after)
            x = scheduler.step_correct(output, raised, after, high, x, slope, return_dict=False)[0]
    levels = np.append(levels.double().numpy()[::-1], 0.0)
    grid = TimeGrid.from_levels(EDM(), levels)
    # Their network gives minus the noise.
    run = ours("KarrasVeScheduler", grid, 100 * X, "epsilon", lambda x, n: -network(x, n.t), by_step=True)
    assert_same(run, x)


def test_sde_ve() -> None:
    """The predictor; the corrector's step depends on the norms of the data there and does not here."""
    scheduler = schedulers.ScoreSdeVeScheduler(sigma_max=50.0)
    scheduler.set_timesteps(8)
    scheduler.set_sigmas(8)
    levels = np.append(scheduler.discrete_sigmas.double().numpy()[::-1], 0.0)
    grid = TimeGrid.from_levels(EDM(), levels)
    x, mean, draws = 50 * X, X, generator()
    for t, level in zip(scheduler.timesteps, levels):
        score = -network(x, level) / level
        x, mean = scheduler.step_pred(score, t, x, draws, return_dict=False)
    assert_same(ours("ScoreSdeVeScheduler:corrector_steps=0", grid, 50 * X, "epsilon"), mean)


# -- consistency models ------------------------------------------------------------------------------------------------


def test_consistency_models() -> None:
    """A level below the one that the network is told: the noise of the cleanest is thought to remain."""
    scheduler = schedulers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(timesteps=[39, 28, 17, 5])
    low, data = scheduler.config.sigma_min, scheduler.config.sigma_data
    told = scheduler.sigmas.double().numpy()
    levels = np.append(told[0], np.sqrt(np.maximum(told[1:] ** 2 - low**2, 0.0)))
    levels[-1] = 0.0  # sigma_min, in single precision
    grid = grid_of(EDM(), times_of(scheduler), levels)

    def denoised(x: torch.Tensor, node: Node) -> torch.Tensor:
        level = math.exp(node.t / 250)
        total = math.hypot(level, data)
        output = network(x / total, node.t)
        return (level - low) * data / total * output + data**2 / ((level - low) ** 2 + data**2) * x

    start = X * scheduler.init_noise_sigma
    run = ours("CMStochasticIterativeScheduler", grid, start, "denoised", denoised)
    assert_same(run, theirs(scheduler, start))


def test_consistency_decoder() -> None:
    scheduler = schedulers.ConsistencyDecoderScheduler()
    scheduler.set_timesteps(2)
    schedule = VP.trained(betas(scheduler.sqrt_alphas_cumprod**2))
    grid = TimeGrid.from_times(schedule, times_of(scheduler), final_zero=True)

    def denoised(x: torch.Tensor, node: Node) -> torch.Tensor:
        t = round(node.t)
        return scheduler.c_out[t] * network(scheduler.c_in[t] * x, t) + scheduler.c_skip[t] * x

    start = X * scheduler.init_noise_sigma
    assert_same(
        ours("ConsistencyDecoderScheduler", grid, start, "denoised", denoised), theirs(scheduler, start)
    )


def test_scm() -> None:
    """A trigonometric flow: alpha = cos t, sigma = sin t, and data and noise of standard deviation sigma_data."""
    scheduler = schedulers.SCMScheduler()
    scheduler.set_timesteps(num_inference_steps=2)
    times = scheduler.timesteps.double().numpy()
    grid = TimeGrid(times, np.cos(times), np.sin(times), VP.linear())
    scale, x, draws = scheduler.config.sigma_data, scheduler.config.sigma_data * X, generator()
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(network(x, t), t, x, draws, return_dict=False)[0]
    assert_same(ours("SCMScheduler", grid, scale * X, "v", scale=scale), x)


# -- what differs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ddim_steps_by_a_stride(spacing: str) -> None:
    """Not to its next timestep; where the two differ, options of ours name what it does."""
    for name, options in (("DDIMScheduler", {"set_alpha_to_one": False}), ("CogVideoXDDIMScheduler", {})):
        scheduler = getattr(schedulers, name)(timestep_spacing=spacing, **UNCLIPPED, **options)
        scheduler.set_timesteps(7)
        last = str("set_alpha_to_one" in options).lower()
        spec = f"{name}:stride=142,final_index={last}"
        grid = TimeGrid.from_times(vp(scheduler), times_of(scheduler), final_zero=True)
        assert_same(ours(spec, grid, X, "epsilon"), theirs(scheduler, X))


def test_timesteps_are_rounded_after_levels() -> None:
    """Of Karras levels the network is told whole numbers: the grid has both, and they do not agree."""
    scheduler = schedulers.DPMSolverMultistepScheduler(**SD, **KARRAS)
    scheduler.set_timesteps(7)
    exact = TimeGrid.from_levels(vp(scheduler), levels_of(scheduler))
    assert np.all(times_of(scheduler) % 1 == 0)
    assert 0.01 < np.abs(exact.t[:-1] - times_of(scheduler)).max() < 0.51


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_class_is_in_the_table() -> None:
    """tests/samplers/test_names.py looks at what the table says of them."""
    exported = {
        name for module in (diffusers, schedulers) for name in dir(module) if name.endswith("Scheduler")
    }
    assert exported == set(names_table.DIFFUSERS)


def test_every_class_with_a_solver_is_compared() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for name, note in names_table.DIFFUSERS.items():
        if names_table.has_spec(note):
            assert f'"{name}' in source, name
