"""Models of other kinds: consistency models, trigonometric flows, and what no solver can step."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import fewstep as fs

diffusers: Any = importlib.import_module("diffusers")
FewStepScheduler: Any = fs.FewStepScheduler
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(1.3 * x) + 0.1 * t.float() / 1000


def run(scheduler: Any, x: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """As pipelines do; those of a trigonometric flow leave off the last timestep."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(3)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    calls = len(scheduler.timesteps) - (scheduler.config.get("prediction_type") == "trigflow")
    for t in scheduler.timesteps[:calls]:
        x = scheduler.step(network(scale(x, t), t), t, x, return_dict=False, **arguments)[0]
    return x


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.std()).item()


# -- the solver that a model was made for, unless told otherwise ---------------------------------------------------


CONSISTENCY: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("LCMScheduler", {}, "lcm:timestep_scaling=10", {}),
    (
        "LCMScheduler",
        {"prediction_type": "v_prediction", "original_inference_steps": 100},
        "lcm:timestep_scaling=10",
        {},
    ),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, "lcm", {}),
    ("CMStochasticIterativeScheduler", {}, "lcm", {}),
    ("SCMScheduler", {}, "lcm", {"intermediate_timesteps": None}),
    ("SCMScheduler", {"sigma_data": 1.0}, "lcm", {"intermediate_timesteps": None, "max_timesteps": 1.4}),
]


@pytest.mark.parametrize(("name", "options", "solver", "arguments"), CONSISTENCY)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_models(
    name: str, options: dict[str, Any], solver: str, arguments: dict[str, Any], steps: int
) -> None:
    if name == "SCMScheduler" and steps == 2:
        arguments = arguments | {"intermediate_timesteps": 1.3}
    native = getattr(diffusers, name)(**options)
    ours = FewStepScheduler.from_config(native.config)
    assert ours.config.solver == solver
    for scheduler in (native, ours):
        scheduler.set_timesteps(steps, **arguments)
    assert ours.timesteps.tolist() == pytest.approx(native.timesteps.tolist(), rel=1e-5, abs=1e-4)
    start = X * getattr(native, "init_noise_sigma", 1.0)
    assert ours.init_noise_sigma == getattr(native, "init_noise_sigma", 1.0)
    # Its noise has the variance sigma^2 - sigma_min^2, ours sigma^2.
    bound = 2e-4 if name == "CMStochasticIterativeScheduler" else 3e-5
    assert distance(run(ours, start), run(native, start)) < bound
    back = type(native).from_config(ours.config)
    assert all(back.config[k] == v for k, v in native.config.items() if not k.startswith("_"))


def test_tcd(tmp_path: Path) -> None:
    """Its config does not differ from LCM's, so the solver is known from a file only; eta is its gamma."""
    native = diffusers.TCDScheduler()
    native.save_pretrained(tmp_path)
    ours = FewStepScheduler.from_pretrained(tmp_path)
    assert ours.config.solver == "tcd"
    for gamma in (0.3, 0.8):
        for scheduler in (native, ours):
            scheduler.set_timesteps(4)
        assert distance(run(ours, X, eta=gamma), run(native, X, eta=gamma)) < 1e-5


def test_the_distilled_timesteps() -> None:
    native = diffusers.LCMScheduler()
    ours = FewStepScheduler.from_config(native.config, solver="unipc")
    for arguments in ({"strength": 0.5}, {"original_inference_steps": 100}):
        for scheduler in (native, ours):
            scheduler.set_timesteps(4, **arguments)
        assert ours.timesteps.tolist() == native.timesteps.tolist()
    with pytest.raises(ValueError, match="distilled for 50 timesteps.*can take 50 steps"):
        ours.set_timesteps(51)
    with pytest.raises(ValueError, match="strength must lie in"):
        ours.set_timesteps(4, strength=0.0)
    named = FewStepScheduler.from_config(native.config, schedule="trailing")
    named.set_timesteps(4, strength=0.5)
    assert named.timesteps.tolist() == [499, 374, 249, 124]


def test_places_on_the_training_schedule_of_a_consistency_model() -> None:
    native = diffusers.CMStochasticIterativeScheduler()
    ours = FewStepScheduler.from_config(native.config)
    for scheduler in (native, ours):
        scheduler.set_timesteps(timesteps=[22, 0])
    assert ours.sigmas[:-1].tolist() == pytest.approx(native.sigmas[:-1].tolist(), rel=1e-5)
    assert run(ours, 80 * X).abs().max() <= 1.0  # clip_denoised


# -- trigonometric flow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc:order=3", "heun", "euler_ancestral", "deis"])
def test_other_solvers_on_a_trigonometric_flow(solver: str) -> None:
    """Exact where the data is one point; with any other the error falls from 8 to 32 steps."""
    ours = FewStepScheduler.from_config(diffusers.SCMScheduler().config, solver=solver)
    truth = 0.5 * X.flip(0)
    for steps in (1, 2, 5):
        ours.set_timesteps(steps)
        x, noise = 0.5 * X, 0.5 * X
        assert ours.timesteps[-1] == 0.0
        for t in ours.timesteps[:-1]:
            v = (torch.cos(t) * x - truth) / torch.sin(t)
            x, x_0 = ours.step(v, t, x, return_dict=False)
            assert torch.allclose(x_0, truth, atol=1e-5)
        assert torch.allclose(x, truth, atol=1e-5)
        assert torch.allclose(
            ours.add_noise(truth, noise / 0.5, torch.tensor([math.pi / 2])), noise, atol=1e-6
        )


def test_a_schedule_replaces_the_angles_that_sana_sprint_always_sends() -> None:
    ours = FewStepScheduler.from_config(diffusers.SCMScheduler().config, schedule="karras:sigma_max=80")
    ours.set_timesteps(2, max_timesteps=1.57080, intermediate_timesteps=1.3)
    assert ours.timesteps[0].item() == pytest.approx(math.atan(80.0))
    assert ours.timesteps[1] != 1.3
    ours.set_timesteps(2, max_timesteps=1.4, intermediate_timesteps=1.3)  # these are somebody's choice
    assert ours.timesteps.tolist() == pytest.approx([1.4, 1.3, 0.0])
    ours.set_timesteps(timesteps=[1.5, 1.0, 0.5, 0.0], max_timesteps=None, intermediate_timesteps=None)
    assert ours.timesteps.tolist() == pytest.approx([1.5, 1.0, 0.5, 0.0])
    for arguments, message in (
        ({"num_inference_steps": 3, "intermediate_timesteps": 1.3}, "middle of 2 steps"),
        ({"timesteps": [1.5]}, "angle of the end"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.set_timesteps(**arguments)


def test_dance_diffusion() -> None:
    """IPNDM's class counts in sines; the same flow with one unit of noise and another name for its time."""
    native = diffusers.IPNDMScheduler()
    ours = FewStepScheduler.from_config(native.config, solver="ddim")
    for scheduler in (native, ours):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(1)  # without any signal their first step loses the prediction
    assert ours.timesteps.tolist() == pytest.approx(native.timesteps.tolist(), abs=1e-6)
    t = native.timesteps[1]
    expected = native.step(network(X, t), t, X).prev_sample  # later steps are multistep
    assert distance(ours.step(network(X, t), t, X).prev_sample, expected) < 1e-5


# -- what cannot be stepped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDPMWuerstchenScheduler", "scaler": 1.0, "s": 0.008},
        {"_class_name": "DDIMInverseScheduler"},
        {"_class_name": "ScoreSdeVeScheduler"},
        {"_class_name": "FlowMapEulerDiscreteScheduler", "shift": 1.0},
        {"num_vec_classes": 128, "num_train_timesteps": 100},
        {"shift": 5.0, "n_grid": 10},
        {"stages": 3, "use_flow_sigmas": True},
    ],
)
def test_models_that_cannot_be_stepped_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="belongs to"):
        FewStepScheduler.from_config(config)


def test_every_class_of_diffusers_is_taken_or_refused() -> None:
    """None is read as something else: what is taken visits the timesteps of its class."""
    stages = ("Heun", "KDPM2", "PNDM")  # two evaluations a step
    only_by_name = ("Inverse", "RePaint", "FlowMap", "MiniMax")
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or any(part in name for part in (*stages, *only_by_name)):
            continue
        try:
            native = getattr(diffusers, name)()
        except (TypeError, ImportError):  # an argument or a package is missing
            continue
        try:
            ours = FewStepScheduler.from_config(native.config, solver="ddim")
        except ValueError as error:
            assert "belongs to" in str(error)
            continue
        more = {"intermediate_timesteps": None} if name == "SCMScheduler" else {}
        native.set_timesteps(4, **more)
        ours.set_timesteps(4)
        expected = pytest.approx(native.timesteps.tolist(), rel=1e-4, abs=1e-3)
        assert ours.timesteps[: len(native.timesteps)].tolist() == expected, name
