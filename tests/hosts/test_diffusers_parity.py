"""The same numbers as diffusers' own classes: method by method on their grids, and the grids themselves."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import fewstep

FewStepScheduler: Any = fewstep.FewStepScheduler
diffusers: Any = importlib.import_module("diffusers")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(1.3 * x) + 0.1 * t.float() / 1000


def run(scheduler: Any, x: torch.Tensor = X, start: int = 0, **arguments: Any) -> torch.Tensor:
    """What a pipeline does, after set_timesteps."""
    parameters = inspect.signature(scheduler.step).parameters
    if "generator" in parameters:
        arguments["generator"] = torch.Generator().manual_seed(3)
    if "use_clipped_model_output" in parameters:  # else DDIM's noise and clean sample do not belong together
        arguments["use_clipped_model_output"] = True
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # diffusers' flow classes have none
    for t in scheduler.timesteps[start:]:
        output = network(scale(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **arguments)[0]
    return x


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.std()).item()


# class, its options, our solver
METHODS = [
    ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "ddim"),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": True}, "ddim"),
    (
        "DDIMScheduler",
        {"timestep_spacing": "trailing", "thresholding": True, "sample_max_value": 1.5},
        "ddim",
    ),
    (
        "DDIMScheduler",
        {"timestep_spacing": "trailing", "clip_sample": False, "prediction_type": "sample"},
        "ddim",
    ),
    ("DPMSolverMultistepScheduler", {}, "dpmpp_2m:lower_order_final=true"),
    (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
        "dpmpp_2m:lower_order_final=true",
    ),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, "dpmpp_2m:lower_order_final=true"),
    (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "solver_type": "heun", "lower_order_final": False},
        "dpmpp_2m:solver_type=heun",
    ),
    ("UniPCMultistepScheduler", {}, "unipc:order=2"),
    ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc:order=3"),
    # Without noise at the end their bh1 is nan.
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        "unipc:order=3,variant=bh1",
    ),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "euler"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, "euler"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler"),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}, "euler"),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, "euler_ancestral"),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler_ancestral"),
    ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}, "heun"),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun"),
]


@pytest.mark.parametrize(("name", "options", "solver"), METHODS)
def test_discrete_models(name: str, options: dict[str, Any], solver: str) -> None:
    native = getattr(diffusers, name)(**SD, **options)
    ours = FewStepScheduler.from_config(native.config, solver=solver)
    for steps in (5, 20):  # divisors of 1000: elsewhere DDIM does not step along its own schedule
        native.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert ours.timesteps.tolist() == pytest.approx(native.timesteps.tolist(), rel=1e-4, abs=1e-3)
        start = X * native.init_noise_sigma
        if "Euler" in name or "Heun" in name:  # their state is x / alpha
            start = start / torch.hypot(torch.tensor(1.0), native.sigmas[0])
            ratio = ours.sigmas[0] / native.sigmas[0]
            assert ratio.item() == pytest.approx(1.0, rel=1e-4)
        assert distance(run(ours, start), run(native, X * native.init_noise_sigma)) < 5e-5


@pytest.mark.parametrize(
    "kind", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]
)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_re_spaced_levels(name: str, kind: str) -> None:
    cls = getattr(diffusers, name)
    if kind not in inspect.signature(cls.__init__).parameters:
        pytest.skip(f"{name} has no {kind}")
    if kind == "use_beta_sigmas":
        pytest.importorskip("scipy")
    native = cls(**SD, **{kind: True})
    ours = FewStepScheduler.from_config(native.config)
    for steps in (2, 10):
        native.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert ours.sigmas.tolist() == pytest.approx(native.sigmas.tolist(), rel=1e-4)


FLOWS = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
    {"shift": 2.0, "use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"invert_sigmas": True},
]


@pytest.mark.parametrize("options", FLOWS, ids=str)
def test_flow_models(options: dict[str, Any]) -> None:
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy")
    native = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    ours = FewStepScheduler.from_config(native.config, solver="euler")
    mu = {"mu": 1.2} if options.get("use_dynamic_shifting") else {}
    for arguments in ({"num_inference_steps": 7}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}, {"sigmas": [0.9, 0.3]}):
        native.set_timesteps(**arguments, **mu)
        ours.set_timesteps(**arguments, **mu)
        assert ours.sigmas.tolist() == pytest.approx(native.sigmas.tolist(), rel=1e-5, abs=1e-6)
        assert ours.timesteps.tolist() == pytest.approx(native.timesteps.tolist(), rel=1e-5, abs=1e-3)
        assert distance(run(ours), run(native)) < 1e-5


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_multistep_on_flow_models(name: str) -> None:
    native = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    solver = "unipc" if "UniPC" in name else "dpmpp_2m:lower_order_final=true"
    ours = FewStepScheduler.from_config(native.config, solver=solver)
    native.set_timesteps(8)
    # On their own sigmas, which start below 1 to keep a logarithm finite, and without a shift of ours on top.
    ours.register_to_config(flow_shift=1.0)
    ours.set_timesteps(sigmas=native.sigmas)
    native.timesteps = ours.timesteps  # theirs are cut to integers
    native.set_begin_index(0)
    assert distance(run(ours), run(native)) < 3e-4  # their fp32 logarithm of a small alpha


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"]
)
def test_edm_models(name: str, prediction: str) -> None:
    if "Cosine" in name:
        pytest.importorskip("torchsde")
    native = getattr(diffusers, name)(prediction_type=prediction)
    ours = FewStepScheduler.from_config(
        native.config, solver="euler" if "Euler" in name else "dpmpp_2m:lower_order_final=true"
    )
    native.set_timesteps(6)
    ours.set_timesteps(6)
    assert ours.sigmas.tolist() == pytest.approx(native.sigmas.tolist(), rel=1e-4)
    assert ours.timesteps.tolist() == pytest.approx(native.timesteps.tolist(), rel=1e-4, abs=1e-5)
    start = X * native.init_noise_sigma
    assert distance(run(ours, start), run(native, start)) < 3e-5
    assert ours.init_noise_sigma == pytest.approx(native.config.sigma_max, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"sigma_min": 0.01, "sigma_max": 200.0}])
def test_karras_levels_of_a_flow_model_in_unipc(options: dict[str, Any]) -> None:
    """Cosmos 2.5: the levels are those of a diffusion model."""
    if "sigma_min" not in inspect.signature(diffusers.UniPCMultistepScheduler.__init__).parameters:
        pytest.skip("before diffusers 0.36 UniPC had other levels")
    native = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, **options
    )
    ours = FewStepScheduler.from_config(native.config)
    native.set_timesteps(5)
    ours.set_timesteps(5)
    assert ours.sigmas.tolist() == pytest.approx(
        native.sigmas.tolist(), rel=2e-4
    )  # their training levels are float32
    assert ours.timesteps.long().tolist() == native.timesteps.tolist()


def test_stable_video_diffusion() -> None:
    """v prediction with a quarter of log(sigma) as the time and levels up to 700."""
    native = diffusers.EulerDiscreteScheduler(
        **SD,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    ours = FewStepScheduler.from_config(native.config, solver="euler")
    native.set_timesteps(8)
    ours.set_timesteps(8)
    assert ours.sigmas.tolist() == pytest.approx(native.sigmas.tolist(), rel=1e-4)
    assert ours.timesteps.tolist() == pytest.approx(native.timesteps.tolist(), rel=1e-4)
    start = X * native.init_noise_sigma
    assert distance(run(ours, start / (1 + native.sigmas[0] ** 2).sqrt()), run(native, start)) < 5e-5


def test_cogvideox() -> None:
    """A shifted signal-to-noise ratio that ends at zero; its class says that it clips and does not."""
    native = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    ours = FewStepScheduler.from_config(native.config, solver="ddim")
    assert torch.allclose(ours.alphas_cumprod, native.alphas_cumprod.float(), atol=1e-6)
    native.set_timesteps(5)
    ours.set_timesteps(5)
    start = 5 * X
    assert distance(run(ours, start), run(native, start)) < 1e-5


def test_zero_terminal_snr_is_exact() -> None:
    """The first step starts from pure noise, alpha = 0; DDIM takes the same step."""
    options = {
        **SD,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    native = diffusers.DDIMScheduler(**options, clip_sample=False)
    native.set_timesteps(10)
    ours = FewStepScheduler.from_config(native.config, solver="ddim")
    ours.set_timesteps(10)
    assert ours.sigmas[0] == float("inf")
    assert distance(run(ours), run(native)) < 1e-5
    for solver in ("unipc:order=3", "dpmpp_2m", "heun", "deis", "euler_ancestral"):
        ours = FewStepScheduler.from_config(native.config, solver=solver)
        ours.set_timesteps(40)
        assert torch.isfinite(run(ours)).all()
        assert ours.add_noise(X, X * 2, torch.tensor([999])).equal(X * 2)


def test_zero_terminal_snr_needs_more_than_epsilon() -> None:
    options = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for clip in (False, True):
        ours = FewStepScheduler.from_config(diffusers.DDIMScheduler(**options, clip_sample=clip).config)
        with pytest.raises(ValueError, match="epsilon prediction says nothing"):
            ours.set_timesteps(10)


def test_image_to_image_starts_with_a_clean_history() -> None:
    """From the middle on a multistep method equals a run that begins there."""
    for solver in ("dpmpp_2m", "unipc:order=3", "deis", "euler_ancestral", "heun"):
        ours = FewStepScheduler(**SD, solver=solver, timestep_spacing="trailing")
        ours.set_timesteps(10)
        begin = 8 if solver == "heun" else 4
        ours.set_begin_index(begin)
        part = run(ours, start=begin)
        times = ours.timesteps[begin:].tolist()
        ours.set_timesteps(timesteps=times if solver != "heun" else times[::2])
        assert torch.equal(part, run(ours))


def test_churn_starts_at_the_raised_level() -> None:
    """Noise on a noisy state is the state at a higher level: a pipeline starts there, at the first step or later."""
    ours = FewStepScheduler(**SD, solver="euler:churn=5,s_max=3", timestep_spacing="trailing")
    ours.set_timesteps(10)
    assert ours.timesteps[:3].tolist() == [999, 899, 799]
    assert ours.timesteps[5] > 499  # raised by churn
    for begin in (2, 6):
        ours.set_timesteps(10)
        ours.set_begin_index(begin)
        level = ours.add_noise(torch.zeros_like(X), torch.ones_like(X), torch.tensor([0]))
        expected = ours.sigmas[begin] / (1 + ours.sigmas[begin] ** 2).sqrt()
        assert torch.allclose(level, expected)
        assert torch.isfinite(run(ours, start=begin)).all()
        assert ours.step_index == 10
    edm = FewStepScheduler(sigma_data=0.5, solver="euler:churn=4")
    edm.set_timesteps(10)
    assert edm.init_noise_sigma == edm.sigmas[0] == pytest.approx(80 * 1.4)
