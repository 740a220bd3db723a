"""``FewStepScheduler``: every solver and schedule inside any diffusers pipeline, by assigning one object."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from ..samplers import Solver
from ..schedules.diffusers_config import Source, source_of
from ..tuning import Recipe
from .diffusers_compile import handle_of
from .diffusers_config import canonical, reject_unknown, settings_of, spelled_out
from .diffusers_grid import Request, Settings
from .diffusers_noise import Forward, from_numpy, numbers
from .diffusers_plan import make_plan
from .diffusers_run import FewStepSchedulerOutput, Run
from .diffusers_step import Stepping

__all__ = ["FewStepScheduler", "FewStepSchedulerOutput"]

# What loaders of pipelines pass to every component.
_LOADER = {
    "torch_dtype",
    "dtype",
    "variant",
    "device_map",
    "low_cpu_mem_usage",
    "use_safetensors",
    "trust_remote_code",
}


class FewStepScheduler(Stepping, Forward, SchedulerMixin, ConfigMixin):
    """Every fewstep solver and schedule as a scheduler for diffusers pipelines.

    ::

        pipe.scheduler = FewStepScheduler.from_config(pipe.scheduler.config, solver="unipc:order=3", schedule="karras")

    Args:
        solver: what steps, e.g. ``"dpmpp_2m"``, ``"heun"``; see :func:`fewstep.solvers`.
        schedule: where the network is evaluated, e.g. ``"karras:rho=7"``, ``"ays:model=sdxl"``; see
            :func:`fewstep.schedules.schedules`. None: what the model's config means (``timestep_spacing``,
            ``use_karras_sigmas``, the shift of flow models, ...). A named schedule replaces the default sigmas that
            flow pipelines always send, ``1 - i/n``; any other sigmas are used as given.
        integer_timesteps: round timesteps of discrete models, for networks that accept integers only. Sigmas are not
            rounded with them.
        count_evaluations: let ``num_inference_steps`` be the number of network evaluations instead of steps, for
            solvers that have more or fewer (``heun``, ``+restart``, ``+skip``): equal numbers cost the same then, and
            a pipeline's progress bar, which counts evaluations up to that number, is exact.
        recipe: file written by ``fewstep tune``, or its content: replaces ``solver``, ``schedule`` and the sigmas that
            a pipeline sends; ``num_inference_steps`` must be the recipe's. A run that begins in the middle of the
            levels (image to image) steps through the rest of them with DPM-Solver++(2M).
        keep_float32: of 16-bit latents keep the fp32 state from step to step and go on from it, as long as the
            pipeline hands back what it was given. One more fp32 tensor of memory.

    All other arguments are diffusers' own with diffusers' defaults; :meth:`from_config` copies them from the
    scheduler that is replaced. Keys that mean nothing here are kept, so that the original class can be restored from
    this config; a keyword argument that is not known is an error.

    The state is ``alpha x_0 + sigma eps`` with alpha^2 + sigma^2 = 1 for discrete models (``init_noise_sigma`` is 1 and
    ``scale_model_input`` the identity for every solver), alpha + sigma = 1 for flow models, alpha = 1 for EDM models.
    ``order`` is 1 always: ``timesteps`` has one entry for each network evaluation.

    Raises ValueError for unknown names and options, and for models that cannot be stepped this way.
    """

    # Pipelines save the module of the class; this one is in sys.modules as soon as fewstep is imported.
    __module__ = f"{__package__}.diffusers"

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CosineDPMSolverMultistepScheduler",
        "SASolverScheduler",
        "IPNDMScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ]
    order = 1
    ignore_for_config = ["unknown"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        timestep_type: str = "discrete",
        final_sigmas_type: str = "zero",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_schedule: str = "karras",
        rho: float = 7.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        solver: str | Solver = "unipc",
        schedule: str | None = None,
        integer_timesteps: bool = False,
        count_evaluations: bool = False,
        recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
        keep_float32: bool = False,
        **unknown: Any,
    ) -> None:
        reject_unknown(unknown, self._parameters(), type(self).__name__)
        self.register_to_config(**canonical(solver, schedule, trained_betas, recipe))
        source = self._source()
        self._warned: set[str] = set()
        self._threads = threading.local()
        self._handle = handle_of(self)
        # Before set_timesteps the schedule is the training one, as in diffusers.
        index = np.arange(source.train_steps)[::-1]
        levels = source.noise_schedule.train_levels[::-1]
        times = (
            index.astype(np.int64) if source.clock == "index" else source.timesteps(levels).astype(np.float32)
        )
        self._latest = Run(from_numpy(times.copy()), from_numpy(np.append(levels, 0.0).astype(np.float32)))

    # -- configuration ---------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that ``config`` (``pipe.scheduler.config``) belongs to.

        Keyword arguments replace values of the config: ``solver``, ``schedule`` or any other of this class.

        Raises ValueError for unknown keyword arguments and values, TypeError if ``config`` is not a mapping.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"from_config takes a config such as pipe.scheduler.config, got {type(config).__name__}; "
                "from_pretrained takes a folder or a repository"
            )
        given = {k: v for k, v in kwargs.items() if k not in _LOADER and not k.startswith("_")}
        reject_unknown(given, cls._parameters(), f"{cls.__name__}.from_config")
        made: Any = super().from_config(spelled_out(config, given), return_unused_kwargs, **given)
        scheduler = made[0] if return_unused_kwargs else made
        # What the source class filled in, a third class may fill in its own way, as diffusers has it.
        unset = set(config.get("_use_default_values", ())) - given.keys()
        if unset:
            unset |= set(scheduler.config.get("_use_default_values", ()))
            scheduler.register_to_config(_use_default_values=sorted(unset))
        return made

    @classmethod
    def _parameters(cls) -> dict[str, Any]:
        found = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}

    @property
    def _values(self) -> dict[str, Any]:
        """The config as it is now: hosts register new values and write to its attributes while it is in use."""
        return vars(self._internal_dict)

    def _settings(self) -> Settings:
        return settings_of(self._values)

    def _source(self, mu: float | None = None) -> Source:
        return source_of(dict(self._settings()), mu=mu)

    def set_shift(self, shift: float) -> None:
        """Set the static shift of a flow model; takes effect with the next ``set_timesteps``."""
        self.register_to_config(shift=shift, flow_shift=None)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the start state: 1, of EDM models the first level."""
        run = self._run
        source = self._source() if run.plan is None else run.plan.source
        return float(run.sigmas[0]) if source.noise_schedule.frame == "edm" else 1.0

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # -- a run -----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        mu: float | None = None,
        *,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Decide where the network is evaluated, and forget the run before.

        Args:
            num_inference_steps: number of steps; a solver with several evaluations a step has more timesteps.
            device: where ``timesteps`` shall lie; ``sigmas`` stay on the CPU.
            timesteps: the timesteps instead, decreasing. On flow models they are not shifted: sigma = t / 1000.
            sigmas: the noise levels instead, decreasing, with or without a 0 at the end. On flow models they are
                shifted as the config says. With both, sigmas drive the solver and timesteps go to the network.
            mu: the parameter of a dynamic shift.
            max_timesteps, intermediate_timesteps: first angle and, of two steps, second one of a trigonometric flow;
                custom ``timesteps`` there have the angle of the end too.
            original_inference_steps, strength: of LCM and TCD, the number of timesteps that the network was distilled
                at, and how much of them an image-to-image run uses.

        Raises ValueError for steps < 1, levels that do not decrease, lists of different lengths, a prediction that
        says nothing at the first level (epsilon at zero terminal SNR) and solvers that a pipeline cannot host.
        """
        values = self._values
        recipe = values.get("recipe")
        request = Request(
            self._settings(),
            values["solver"],
            values["schedule"],
            self._denoises(),
            values["integer_timesteps"],
            values["count_evaluations"],
            None if recipe is None else json.dumps(recipe, sort_keys=True),
            num_inference_steps,
            None if mu is None else float(mu),
            numbers(sigmas),
            numbers(timesteps),
            max_timesteps,
            intermediate_timesteps,
            original_inference_steps,
            strength,
        )
        plan = make_plan(request)
        # A host may write to sigmas outside of the mode that it called us in.
        with torch.inference_mode(False):
            times, levels = (from_numpy(array.copy()) for array in plan.published)
            count = plan.calls if values["count_evaluations"] else plan.grid.steps
            run = Run(times.to(device), levels, plan, count)
        self._threads.run = self._latest = run

    def _denoises(self) -> bool:
        """Whether the program is fed x_0: models with preconditioning, and clipping of x_0."""
        return self._clips or (
            self._values["sigma_data"] is not None and self._source().sigma_data is not None
        )

    @property
    def _clips(self) -> bool:
        values = self._values
        # CogVideoX's classes have clip_sample, true by default, and do not clip: latents are not bounded.
        clips = values["clip_sample"] and values["snr_shift_scale"] is None
        return bool(values["thresholding"] or clips)

    def scale_model_input(
        self, sample: torch.Tensor, timestep: Any = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        """The state as the network wants it: unchanged, for EDM models ``x / sqrt(sigma^2 + sigma_data^2)``."""
        run = self._run
        if run.plan is None or run.plan.source.sigma_data is None:
            return sample
        if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
            rows = zip(sample.split(1), timestep.reshape(-1).tolist())
            indices = ((x, self.index_for_timestep(t)) for x, t in rows)
            return torch.cat([x * run.plan.source.input_scale(float(run.plan.sigmas[i])) for x, i in indices])
        index = run.step_index
        if index is None:
            index = self._first_index(timestep)
        return sample * run.plan.source.input_scale(float(run.plan.sigmas[index]))
