"""``FewStepScheduler``: every solver and schedule inside any diffusers pipeline, by assigning one object."""

from __future__ import annotations

import inspect
import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from ..samplers import Solver, Stepper
from ..schedules import conversion
from ..schedules.diffusers_config import Source, source_of
from ..schedules.spec import suggestion
from ..tuning import Recipe
from .diffusers_compile import compiled_step, handle_of
from .diffusers_config import canonical, reject_unknown, settings_of, spelled_out
from .diffusers_noise import Forward, affine, from_numpy, numbers
from .diffusers_plan import Plan, Settings, make_plan
from .diffusers_run import Draws, FewStepSchedulerOutput, PerThread, Result, Run, resolved

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


class FewStepScheduler(PerThread, Forward, SchedulerMixin, ConfigMixin):
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
        """The standard deviation of the start state: 1, of EDM models the first level, of a recipe its first sigma."""
        run = self._run
        source = self._source() if run.plan is None else run.plan.source
        if source.noise_schedule.frame == "edm":
            return float(run.sigmas[0])
        recipe = self.config["recipe"] is not None and run.plan is not None
        return float(run.plan.grid.sigma[0]) if recipe else 1.0

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
    ) -> None:
        """Decide where the network is evaluated, and forget the run before.

        Args:
            num_inference_steps: number of steps; a solver with several evaluations a step has more timesteps.
            device: where ``timesteps`` shall lie; ``sigmas`` stay on the CPU.
            timesteps: the timesteps instead, decreasing. On flow models they are not shifted: sigma = t / 1000.
            sigmas: the noise levels instead, decreasing, with or without a 0 at the end. On flow models they are
                shifted as the config says. With both, sigmas drive the solver and timesteps go to the network.
            mu: the parameter of a dynamic shift.

        Raises ValueError for steps < 1, levels that do not decrease, lists of different lengths, a prediction that
        says nothing at the first level (epsilon at zero terminal SNR) and solvers that a pipeline cannot host.
        """
        values = self._values
        plan = make_plan(
            self._settings(),
            values["solver"],
            values["schedule"],
            self._denoises(),
            num_inference_steps,
            None if mu is None else float(mu),
            numbers(sigmas),
            numbers(timesteps),
            None if values.get("recipe") is None else json.dumps(values["recipe"], sort_keys=True),
        )
        run = Run(*self._published(plan, device), plan, plan.grid.steps)
        self._threads.run = self._latest = run

    def _denoises(self) -> bool:
        """Whether the program is fed x_0: models with preconditioning, and clipping of x_0."""
        values = self._values
        if self._clips or values["thresholding"]:
            return True
        return values["sigma_data"] is not None and self._source().sigma_data is not None

    @property
    def _clips(self) -> bool:
        # CogVideoX's classes have the key, true by default, and do not clip: latents are not bounded.
        return bool(self._values["clip_sample"]) and self._values["snr_shift_scale"] is None

    def _published(self, plan: Plan, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        times = plan.timesteps
        whole = plan.source.clock == "index" and (
            self._values["integer_timesteps"] or not np.any(times % 1.0)
        )
        # A host may write to sigmas outside of the mode that it called us in.
        with torch.inference_mode(False):
            kind = np.rint(times).astype(np.int64) if whole else times.astype(np.float32)
            return from_numpy(kind).to(device), from_numpy(plan.sigmas.astype(np.float32))

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
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

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        pred_original_sample: torch.Tensor | None = None,
        **other: Any,
    ) -> FewStepSchedulerOutput | tuple:
        """Go to the next evaluation (or, after the last, to the result).

        Args:
            model_output: the network's output for ``sample`` at ``timestep``, of the sample's shape.
            timestep: one of ``timesteps``; looked at in the first step only, and only if no begin index was set. With
                one timestep for each sample every sample has its own run, and the timesteps are read in every step.
            sample: the current state. If it is not what the step before returned, the new one is used; what a solver
                remembers of earlier steps stays.
            eta: if positive, replaces the option of that name of the solver (``ddim``, ``euler_ancestral``).
            generator: source of the noise of stochastic solvers, one or one a sample.
            variance_noise: the noise of this step instead of a draw.
            return_dict: return an object instead of a tuple.
            pred_original_sample: the prediction of x_0 instead of what ``model_output`` says.

        Returns:
            ``(prev_sample, pred_original_sample)``, shape of ``sample``, dtype the promotion of both inputs.
        """
        if torch.compiler.is_compiling():
            if generator is not None or variance_noise is not None or pred_original_sample is not None or eta:
                raise ValueError("a compiled step takes model_output, timestep, sample and return_dict")
            return compiled_step(self._handle, model_output, timestep, sample, return_dict)
        if other:
            self._ignored(other)
        if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
            return self._step_rows(
                model_output, timestep, sample, eta, generator, variance_noise, return_dict
            )
        run = self._run
        plan = run.plan
        if plan is None:  # as published so far: every training step
            run = self._train_steps(run)
            plan = run.plan
            assert plan is not None
        if run.step_index is None:
            plan = self._begin(run, timestep, eta)
        index = run.step_index
        assert index is not None
        if index >= len(plan.timesteps):
            raise ValueError(
                f"the run of {len(plan.timesteps)} evaluations is over; call set_timesteps() to start another"
            )
        if model_output.shape != sample.shape:
            model_output = self._mean(model_output, sample)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        fed, denoised = self._prediction(plan, index, model_output, sample, pred_original_sample)
        previous = self._advance(run, plan, fed, sample, generator, variance_noise, model_output.dtype)
        run.step_index = index + 1
        if previous.dtype != dtype:
            exact, previous = previous, previous.to(dtype)
            run.rounded = (previous, exact) if self._values["keep_float32"] else None
        if return_dict:
            return FewStepSchedulerOutput(previous, resolved(denoised))
        return Result(previous, denoised)

    def _step_rows(
        self,
        model_output: torch.Tensor,
        timesteps: torch.Tensor,
        sample: torch.Tensor,
        eta: float,
        generator: Any,
        variance_noise: torch.Tensor | None,
        return_dict: bool,
    ) -> FewStepSchedulerOutput | tuple:
        """A step of every sample at its own timestep; one that does not follow its last begins anew."""
        run, count = self._run, sample.shape[0]
        if timesteps.numel() != count:
            raise ValueError(f"step() takes one timestep or one for each of {count}, got {timesteps.numel()}")
        if run.plan is None:
            run = self._train_steps(run)
        rows = run.rows
        if rows is None or len(rows) != count:
            rows = run.rows = [replace(run, step_index=None, stepper=None, rows=None) for _ in range(count)]
        results = []
        try:
            for i, t in enumerate(timesteps.reshape(-1).tolist()):
                self._threads.run = row = rows[i]
                if not self._follows(row, t):
                    row.step_index, row.stepper, row.begin_index = None, None, self.index_for_timestep(t)
                drawn = generator[i] if isinstance(generator, list) else generator
                given = None if variance_noise is None else variance_noise[i : i + 1]
                part = slice(i, i + 1)
                out = self.step(model_output[part], t, sample[part], eta, drawn, given, return_dict=False)
                results.append((out[0], out[1]))
        finally:
            self._threads.run = run
        previous, denoised = (torch.cat(parts) for parts in zip(*results))
        return FewStepSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)

    def _follows(self, run: Run, timestep: float) -> bool:
        """Whether a timestep is that of the next evaluation."""
        if run.step_index is None or run.plan is None or run.step_index >= len(run.plan.timesteps):
            return False
        tolerance = 1e-6 * (1.0 + abs(timestep)) + 0.5 * self._values["integer_timesteps"]
        return abs(run.plan.timesteps[run.step_index] - timestep) <= tolerance

    def _train_steps(self, run: Run) -> Run:
        self.set_timesteps(timesteps=run.timesteps)
        self._run.begin_index = run.begin_index
        return self._run

    def _begin(self, run: Run, timestep: Any, eta: float) -> Plan:
        """Start the run at the first timestep that is seen; the plan may have been edited."""
        plan = run.plan
        assert plan is not None
        sigmas = run.sigmas.tolist()
        if sigmas != plan.sigmas.astype(np.float32).tolist():
            plan = run.plan = plan.edited(sigmas)
        index = self._first_index(timestep)
        options = {}
        if eta:
            if "eta" not in plan.solver.declaration.options:
                raise ValueError(
                    f"solver {plan.solver.spec!r} has no eta; use one that has, such as 'ddim' or 'euler_ancestral'"
                )
            options["eta"] = float(eta)
        start = plan.start(index, options)
        run.step_index = index
        if start.lead:
            self._warn(
                "stage",
                f"solver {plan.solver.spec!r} was started at evaluation {index}, between the stages of a step; it "
                f"begins at {index + start.lead}, after first-order steps",
            )
        run.draws = Draws()
        # The registers are filled when the first prediction comes.
        run.stepper = Stepper(start.program, torch.empty(0), run.draws, check=False)
        return plan

    def _advance(
        self,
        run: Run,
        plan: Plan,
        fed: torch.Tensor,
        sample: torch.Tensor,
        generator: Any,
        variance_noise: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if self._values["keep_float32"] and sample.dtype in (torch.float16, torch.bfloat16):
            # Solvers that keep states keep them in fp32 too.
            returned = run.rounded is not None and sample is run.rounded[0]
            sample = run.rounded[1] if returned and run.rounded else sample.float()
        stepper, draws = run.stepper, run.draws
        assert stepper is not None and draws is not None
        if plan.source.sigma_data is not None:
            # Cosmos evaluates x_0 with a trial step, of a batch that guidance has doubled, and takes it back.
            run.before = stepper.fork()
            if stepper.evaluations and sample.shape != stepper.x.shape:
                return sample
        if stepper.evaluations and sample is not stepper.x and plan.keeps_states:
            if sample.data_ptr() != stepper.x.data_ptr():
                self._warn(
                    "edit",
                    f"the latents were replaced between two steps; solver {plan.solver.spec!r} goes on from an earlier "
                    "state too, which it cannot change. 'dpmpp_2m', 'deis' or 'euler' use the new latents throughout",
                )
        stepper.x = sample
        draws.generator, draws.given, draws.dtype = generator, variance_noise, dtype
        try:
            return stepper.step(fed)
        finally:
            draws.generator = draws.given = None  # generators can be neither copied nor pickled

    def _prediction(
        self, plan: Plan, index: int, output: torch.Tensor, sample: torch.Tensor, given: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """What the program is fed; x_0, or a function that computes it."""

        def denoised() -> torch.Tensor:
            c_x, c_m = plan.denoised[index]
            return affine(c_x, sample, c_m, output)

        if given is not None:
            if plan.prediction == "denoised":
                return given, given
            c_x, c_m = conversion("denoised", plan.prediction, plan.nodes[index])
            return affine(c_x, sample, c_m, given), given
        if plan.prediction == "denoised":
            x_0 = self._clipped(denoised())
            return x_0, x_0
        return (output if plan.source.output_sign == 1.0 else -output), denoised

    def _clipped(self, x_0: torch.Tensor) -> torch.Tensor:
        values = self._values
        if values["thresholding"]:
            # Dynamic thresholding: clip to a quantile of |x_0| and rescale to 1 (Saharia et al., Imagen,
            # https://arxiv.org/abs/2205.11487).
            wide = x_0.float().flatten(1)
            bound = torch.quantile(wide.abs(), values["dynamic_thresholding_ratio"], dim=1, keepdim=True)
            bound = bound.clamp(1.0, values["sample_max_value"])
            return (wide.clamp(-bound, bound) / bound).reshape(x_0.shape).to(x_0.dtype)
        bound = values["clip_sample_range"]
        return x_0.clamp(-bound, bound) if self._clips else x_0

    def _mean(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The mean of networks that predict a variance too; no solver here uses the variance."""
        halves = output.ndim == sample.ndim > 1 and output.shape[1] == 2 * sample.shape[1]
        if halves and output.shape[0] == sample.shape[0] and output.shape[2:] == sample.shape[2:]:
            return output[:, : sample.shape[1]]
        raise ValueError(
            f"model_output has shape {tuple(output.shape)}, the sample {tuple(sample.shape)}; they must be equal"
        )

    def _ignored(self, other: dict[str, Any]) -> None:
        """Arguments of other schedulers' ``step`` that pipelines pass literally."""
        unknown = {k: v for k, v in other.items() if k != "use_clipped_model_output"}
        if unknown:
            allowed = [*inspect.signature(self.step).parameters][:-1]
            hint = suggestion(next(iter(unknown)), allowed)
            names = ", ".join(map(repr, unknown))
            raise TypeError(f"step() has no argument {names}; allowed: {', '.join(allowed)}{hint}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=4)

    # -- positions -------------------------------------------------------------------------------------------------

    def _first_index(self, timestep: Any) -> int:
        """The evaluation that the first step is: what the pipeline said, or the place of the timestep."""
        run = self._run
        return self.index_for_timestep(timestep) if run.begin_index is None else run.begin_index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The evaluation that a timestep belongs to; of equal ones the first where a run can start.

        An element of ``timesteps`` is recognised by its place in memory, so that no value is read from the device.
        """
        run = self._run
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"step() takes one timestep for the whole batch, got {timestep.numel()}")
            own = run.timesteps
            if timestep.dtype == own.dtype and timestep.device == own.device:
                offset = timestep.data_ptr() - own.data_ptr()
                if own.data_ptr() and 0 <= offset < own.numel() * own.element_size() and own.is_contiguous():
                    return offset // own.element_size()
            timestep = timestep.item()
        times = run.timesteps.numpy(force=True) if run.plan is None else run.plan.timesteps
        distance = np.abs(times - float(timestep))
        if run.plan is not None and self._values["integer_timesteps"]:
            distance = np.minimum(distance, np.abs(np.rint(times) - float(timestep)))
        nearest = np.flatnonzero(distance <= distance.min() + 1e-6 * (1.0 + abs(float(timestep))))
        if run.plan is not None:
            spacing = np.abs(np.diff(times)).max() if len(times) > 1 else np.inf
            if distance.min() > spacing:
                self._warn(
                    "place", f"timestep {float(timestep):g} is not on the schedule; the nearest is used"
                )
            for i in nearest:
                if len(nearest) > 1 and run.plan.begins(int(i)):
                    return int(i)
        return int(nearest[0])
