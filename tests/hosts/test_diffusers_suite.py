"""diffusers' own scheduler tests, run against FewStepScheduler in the role of each class that has a counterpart here.

They are not in diffusers' package: ``FEWSTEP_DIFFUSERS_TESTS`` names a checkout. A role takes the arguments of the
class that it stands for, so it is a subclass that reads them with that class and chooses the solver they mean.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

CHECKOUT = os.environ.get("FEWSTEP_DIFFUSERS_TESTS")
if not CHECKOUT:
    pytest.skip("FEWSTEP_DIFFUSERS_TESTS names no checkout of diffusers", allow_module_level=True)

import fewstep as fs  # noqa: E402

diffusers: Any = pytest.importorskip("diffusers")
FewStepScheduler: Any = fs.FewStepScheduler
Config = Mapping[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore")


def _dpm(config: Config) -> str:
    order, kind = config["solver_order"], config["algorithm_type"]
    form = "denoised" if kind.endswith("++") else "epsilon"
    final = config["lower_order_final"] and "true" or "false"
    if kind.startswith("sde"):
        return f"dpmpp_{order}m_sde:solver_type={config['solver_type']}" if order == 2 else "dpmpp_2m_sde"
    if order == 1:
        return "ddim"
    return f"dpmpp_{order}m:form={form},solver_type={config['solver_type']},lower_order_final={final}"


def _single(config: Config) -> str:
    order, kind = config["solver_order"], config["algorithm_type"]
    form = "denoised" if kind.endswith("++") else "epsilon"
    if kind.startswith("sde"):
        return "dpmpp_2m_sde"
    if order == 1:
        return "ddim"
    more = ",inner=midpoint" if order == 3 else ""
    return f"dpmpp_{order}s:form={form},solver_type={config['solver_type']}{more}"


def _unipc(config: Config) -> str:
    form = "denoised" if config["predict_x0"] else "epsilon"
    off = "/".join(map(str, config["disable_corrector"]))
    final = config["lower_order_final"] and "true" or "false"
    spec = f"unipc:order={config['solver_order']},variant={config['solver_type']},form={form}"
    return f"{spec},lower_order_final={final}" + (f",disable_corrector={off}" if off else "")


def _sa(config: Config) -> str:
    """Noise from t = 200 to 800, in terms of levels."""
    low, high = fs.schedules.from_diffusers(config).level([199.5, 800.5])
    orders = f"predictor_order={config['predictor_order']},corrector_order={config['corrector_order']}"
    final = config["lower_order_final"] and "true" or "false"
    return f"SASolverScheduler:{orders},lower_order_final={final},s_min={low},s_max={high}"


# Class -> its test module, the solver that a config means, and whether the class keeps x / alpha.
ROLES: dict[str, tuple[str, Callable[[Config], str], bool]] = {
    "DDIMScheduler": ("ddim", lambda c: "ddim", False),
    "DDPMScheduler": ("ddpm", lambda c: "ddpm", False),
    "EulerDiscreteScheduler": ("euler", lambda c: "euler", True),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", lambda c: "euler_ancestral", True),
    "HeunDiscreteScheduler": ("heun", lambda c: "heun", True),
    "LMSDiscreteScheduler": ("lms", lambda c: "lms", True),
    "PNDMScheduler": (
        "pndm",
        lambda c: "plms" if c["skip_prk_steps"] else "plms:start=prk",
        False,
    ),
    "DPMSolverMultistepScheduler": ("dpm_multi", _dpm, False),
    "DPMSolverSinglestepScheduler": ("dpm_single", _single, False),
    "UniPCMultistepScheduler": ("unipc", _unipc, False),
    "DEISMultistepScheduler": (
        "deis",
        lambda c: f"deis:order={c['solver_order']},variable=log_rho,lower_order_final=true",
        False,
    ),
    "SASolverScheduler": ("sasolver", _sa, False),
    "IPNDMScheduler": ("ipndm", lambda c: "ipndm", False),
    "KDPM2DiscreteScheduler": ("kdpm2_discrete", lambda c: "dpm_2", True),
    "KDPM2AncestralDiscreteScheduler": ("kdpm2_ancestral", lambda c: "dpm_2_ancestral", True),
}


def role(name: str, solver: Callable[[Config], str], scaled: bool) -> Any:
    native = getattr(diffusers, name)

    class Role(FewStepScheduler):
        _deprecated_kwargs = native._deprecated_kwargs
        # Those whose requirements are installed.
        _compatibles = [n for n in native._compatibles if not hasattr(getattr(diffusers, n), "_backends")]

        order = native.order

        def __init__(self, **options: Any) -> None:
            if "solver" in options:
                super().__init__(**options)
                return
            source = native(**options)
            more: dict[str, Any] = {}
            if not source.config.get("set_alpha_to_one", True):
                more["final_sigmas_type"] = "sigma_min"
            more["integer_timesteps"] = name == "SASolverScheduler"
            made = FewStepScheduler.from_config(source.config, solver=solver(source.config), **more)
            self.__setstate__(made.__getstate__())

        @staticmethod
        def _get_init_keys(input_class: type) -> set[str]:
            return {"self", *FewStepScheduler._parameters()}

        @classmethod
        def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            if "solver" not in config:
                kwargs.setdefault("solver", solver(native.from_config(config).config))
            return super().from_config(config, return_unused_kwargs, **kwargs)

    class Scaled(Role):
        """Shows and takes x / alpha."""

        def _alpha(self, index: int) -> float:
            return float((1.0 + self.sigmas[index].double() ** 2) ** -0.5)

        @property
        def init_noise_sigma(self) -> Any:
            made = native.from_config(self.config)
            made.set_timesteps(self.num_inference_steps or 10)
            return made.init_noise_sigma

        def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
            index = self._first_index(timestep) if self.step_index is None else self.step_index
            return self._alpha(index) * sample

        @functools.wraps(FewStepScheduler.step)
        def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            index = self._first_index(timestep) if self.step_index is None else self.step_index
            out = super().step(model_output, timestep, self._alpha(index) * sample, *args, **kwargs)
            previous = out[0] / self._alpha(index + 1)
            if kwargs.get("return_dict", True):
                return type(out)(previous, out[1])
            return previous, out[1]

        def add_noise(self, original: Any, noise: Any, timesteps: Any) -> torch.Tensor:
            noised = super().add_noise(original, noise, timesteps)
            return noised / self._alpha(self._first_index(timesteps[0]))

    class Pndm(Role):
        """Has a method for each of its two ways to step, and the timesteps of each."""

        ets: Any = ()

        def step_prk(self, *args: Any, **kwargs: Any) -> Any:
            if self.step_index is None:
                self.set_begin_index(0)
            return self.step(*args, **kwargs)

        def step_plms(self, *args: Any, **kwargs: Any) -> Any:
            if self.step_index is None:
                if not (self.ets or self.config.skip_prk_steps):
                    raise ValueError("the Runge-Kutta steps come first")
                self.set_begin_index(len(self.prk_timesteps))
            return self.step(*args, **kwargs)

        @property
        def prk_timesteps(self) -> Any:
            return self.timesteps[: 0 if self.config.skip_prk_steps else 12].numpy()

        @property
        def plms_timesteps(self) -> Any:
            return self.timesteps[len(self.prk_timesteps) :].numpy()

    class Drawing(Role):
        """Draws in every step, in those without noise too."""

        @functools.wraps(FewStepScheduler.step)
        def step(self, model_output: Any, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
            noise = torch.randn(model_output.shape, generator=generator, dtype=model_output.dtype)
            return super().step(model_output, *args, variance_noise=noise, **kwargs)

    if name in ("PNDMScheduler", "SASolverScheduler"):
        Role = Pndm if name == "PNDMScheduler" else Drawing
    Role.__name__ = Role.__qualname__ = Scaled.__name__ = Scaled.__qualname__ = name
    return Scaled if scaled else Role


def upstream(module: str) -> Any:
    """A test module of the checkout, as part of a package of another name than ours."""
    if "_upstream_tests" not in sys.modules:
        package = types.ModuleType("_upstream_tests")
        package.__path__ = [str(Path(CHECKOUT or "") / "tests")]
        sys.modules["_upstream_tests"] = package
    return importlib.import_module(f"_upstream_tests.schedulers.{module}")


FILLED = "what another class fills in by itself counts here, like what its user wrote"
REFUSED = "runs what has no meaning and is refused here"
ROUNDING = "a sum over values of a thousand or more that fp32 does not determine to the digits asked for"
MIDDLE = "starts in the middle with the order of the whole run, which its history does not support"
INPUT = (
    "gives the network's scaled input to step as the state; Heun there ignores it, here it goes on from it"
)
HEUN = (
    "custom_timesteps",
    "full_loop_device",
    "full_loop_device_karras_sigmas",
    "full_loop_no_noise",
    "full_loop_with_noise",
)
NO_SIGNAL = (
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "UniPCMultistepScheduler1D",
)
# (class, test) -> why it does not pass. Every other test passes.
DIFFERENT: dict[tuple[str, str], str] = {
    ("*", "test_compatibles"): FILLED,
    ("DDIMSchedulerTest", "test_betas"): REFUSED,  # betas up to 2
    ("DDPMSchedulerTest", "test_betas"): REFUSED,
    ("DDPMSchedulerTest", "test_timesteps"): REFUSED,  # one training step
    # An epsilon prediction where there is no signal.
    **{(f"{name}Test", "test_rescale_betas_zero_snr"): REFUSED for name in NO_SIGNAL},
    (
        "DDPMSchedulerTest",
        "test_custom_timesteps_passing_both_num_inference_steps_and_timesteps",
    ): "wants an error for a number of steps that agrees with the timesteps; flow pipelines send both",
    ("DDPMSchedulerTest", "test_full_loop_with_noise"): ROUNDING,
    ("EulerDiscreteSchedulerTest", "test_full_loop_with_noise"): ROUNDING,
    ("EulerAncestralDiscreteSchedulerTest", "test_full_loop_with_noise"): ROUNDING,
    ("KDPM2DiscreteSchedulerTest", "test_full_loop_with_noise"): ROUNDING,
    ("KDPM2AncestralDiscreteSchedulerTest", "test_full_loop_with_noise"): ROUNDING,
    ("KDPM2AncestralDiscreteSchedulerTest", "test_full_loop_no_noise"): ROUNDING,
    ("LMSDiscreteSchedulerTest", "test_full_loop_device_karras_sigmas"): ROUNDING,
    ("SASolverSchedulerTest", "test_full_loop_device_karras_sigmas"): ROUNDING,
    ("LMSDiscreteSchedulerTest", "test_full_loop_with_noise"): MIDDLE,
    ("DPMSolverSinglestepSchedulerTest", "test_full_loop_with_noise"): MIDDLE,
    ("DPMSolverSinglestepSchedulerTest", "test_full_uneven_loop"): MIDDLE,
    (
        "PNDMSchedulerTest",
        "test_full_loop_with_v_prediction",
    ): "extrapolates predictions of v there, whose weights belong to the slope",
    (
        "IPNDMSchedulerTest",
        "test_full_loop_no_noise",
    ): "its first step divides by the alpha where there is no signal, which is rounding",
    (
        "UniPCMultistepScheduler1DTest",
        "test_flow_and_karras_sigmas_values",
    ): "flow timesteps cut to integers; here they are those of the sigmas",
    **{("HeunDiscreteSchedulerTest", f"test_{name}"): INPUT for name in HEUN},
}


def cases() -> dict[str, type]:
    """The test classes of the checkout with our class in place of theirs; by identity they make exceptions for some."""
    found = {}
    for name, (module, solver, scaled) in ROLES.items():
        ours, tests, common = (
            role(name, solver, scaled),
            upstream(f"test_scheduler_{module}"),
            upstream("test_schedulers"),
        )
        for test in (tests, common):
            if hasattr(test, name):
                setattr(test, name, ours)
        for cls in vars(tests).values():
            own = isinstance(cls, type) and cls.__module__ == tests.__name__
            if own and issubclass(cls, common.SchedulerCommonTest):
                known = {
                    # Which class test_compatibles comes to last depends on the order of a set.
                    test: pytest.mark.xfail(reason=why, strict=owner != "*")(
                        types.FunctionType(f.__code__, f.__globals__, test)
                    )
                    for (owner, test), why in DIFFERENT.items()
                    if owner in (cls.__name__, "*") and (f := getattr(cls, test, None))
                }
                found[cls.__name__] = type(cls.__name__, (cls,), {"scheduler_classes": (ours,), **known})
    return found


globals().update(cases())
