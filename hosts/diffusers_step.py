"""``step`` of the scheduler: from the network's output at one evaluation to the state of the next."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..samplers import Solver, Stepper
from ..schedules import conversion
from ..schedules.spec import suggestion
from .diffusers_compile import compiled_step
from .diffusers_noise import affine
from .diffusers_plan import Plan
from .diffusers_run import Draws, FewStepSchedulerOutput, PerThread, Result, Run, resolved

# What pipelines pass to the step of a certain class: the next timestep of the schedule, and how DDIM clips.
_KNOWN = {"prev_timestep", "use_clipped_model_output"}


class Stepping(PerThread):
    """Steps through the plan of a run."""

    _handle: int
    _warned: set[str]
    _values: Any
    _clips: Any

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None
    ) -> None:
        raise NotImplementedError

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
        per_token_timesteps: torch.Tensor | None = None,
        **other: Any,
    ) -> FewStepSchedulerOutput | tuple:
        """Go to the next evaluation (or, after the last, to the result).

        Args:
            model_output: the network's output for ``sample`` at ``timestep``, of the sample's shape.
            timestep: one of ``timesteps``; looked at in the first step only, and only if no begin index was set. With
                one timestep for each sample every sample has its own run, and the timesteps are read in every step.
            sample: the current state. If it is not what the step before returned, the new one is used; what a solver
                remembers of earlier steps stays.
            eta: if positive, replaces the option of that name of the solver (``ddim``, ``euler_ancestral``), for
                ``tcd`` its ``gamma``.
            generator: source of the noise of stochastic solvers, one or one a sample.
            variance_noise: the noise of this step, N(0, I), instead of a draw.
            return_dict: return an object instead of a tuple.
            pred_original_sample: the prediction of x_0 instead of what ``model_output`` says.
            per_token_timesteps: shape (B, S) for samples of shape (B, S, C), as LTX-Video and Sana-WM send it, together
                with the negative of the velocity. Tokens whose timestep is below ``timestep`` stay as they are.

        Returns:
            ``(prev_sample, pred_original_sample)``, shape of ``sample``, dtype the promotion of both inputs. Where the
            last step ends without noise, both are the result.
        """
        if torch.compiler.is_compiling():
            if generator is not None or variance_noise is not None or pred_original_sample is not None or eta:
                raise ValueError("a compiled step takes model_output, timestep, sample and return_dict")
            previous, denoised = compiled_step(self._handle, model_output, timestep, sample)
            return FewStepSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)
        if other:
            self._ignored(other)
        if isinstance(timestep, torch.Tensor) and timestep.numel() > 1:
            if any(timestep.stride()):
                return self._step_rows(
                    model_output, timestep, sample, eta, generator, variance_noise, return_dict
                )
            timestep = timestep[0]  # one timestep, expanded
        run = self._run
        index = run.step_index
        if index is None:
            run, index = self._begin(run, timestep, eta)
        plan, stepper = run.plan, run.stepper
        assert plan is not None and stepper is not None
        if index >= plan.calls:
            raise ValueError(
                f"the run of {plan.calls} evaluations is over; call set_timesteps() to start another"
            )
        if model_output.shape != sample.shape:
            model_output = mean_of(model_output, sample)
        if per_token_timesteps is not None:
            model_output = -model_output
        fed, denoised = model_output, partial(x_0_of, plan, index, sample, model_output)
        if not plan.feeds_output or pred_original_sample is not None:
            fed, denoised = self._fed(plan, index, sample, model_output, pred_original_sample)
        if run.plain:
            stepper.x = sample
            previous = stepper.step(fed)
        else:
            previous = self._advance(run, fed, sample, generator, variance_noise, model_output.dtype)
        run.step_index = index + 1
        dtype = sample.dtype
        if model_output.dtype is not dtype:
            dtype = torch.promote_types(dtype, model_output.dtype)
        if previous.dtype is not dtype:
            exact, previous = previous, previous.to(dtype)
            run.rounded = (previous, exact) if run.keeps_float32 else None
        if per_token_timesteps is not None:
            previous = torch.where((per_token_timesteps < timestep).unsqueeze(-1), sample, previous)
        if index == plan.clean:
            denoised = previous
        if return_dict:
            return FewStepSchedulerOutput(previous, resolved(denoised))
        result = Result((previous, None))
        result.denoised = denoised
        return result

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
                row.copied = True  # the host has parts of one tensor
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
        if run.step_index is None or run.plan is None or run.step_index >= run.plan.calls:
            return False
        tolerance = 1e-6 * (1.0 + abs(timestep)) + 0.5 * self._values["integer_timesteps"]
        return abs(run.plan.timesteps[run.step_index] - timestep) <= tolerance

    def _train_steps(self, run: Run) -> Run:
        self.set_timesteps(timesteps=run.timesteps)
        self._run.begin_index = run.begin_index
        return self._run

    def _begin(self, run: Run, timestep: Any, eta: float) -> tuple[Run, int]:
        """Start the run at the first timestep that is seen; the plan may have been edited."""
        if run.plan is None:  # as published so far: every training step
            run = self._train_steps(run)
        plan = run.plan
        assert plan is not None
        sigmas = run.sigmas.tolist()
        if sigmas != plan.published[1].tolist():
            plan = run.plan = plan.edited(sigmas)
        index = self._first_index(timestep)
        start = plan.start(index, with_eta(plan.solver, eta) if eta else {})
        if start.lead:
            self._warn(
                "stage",
                f"solver {plan.solver.spec!r} was started at evaluation {index}, between the stages of a step; it "
                f"begins at {index + start.lead}, after first-order steps",
            )
        run.draws = Draws(plan.source.noise_scale) if start.program.stochastic else None
        run.keeps_float32 = self._values["keep_float32"]
        run.plain = run.draws is None and not run.keeps_float32 and not plan.looks_back
        # The registers are filled when the first prediction comes.
        run.stepper = Stepper(start.program, torch.empty(0), run.draws, check=False)
        run.step_index = index
        return run, index

    def _advance(
        self,
        run: Run,
        fed: torch.Tensor,
        sample: torch.Tensor,
        generator: Any,
        variance_noise: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A step of a run that draws noise, keeps fp32 states or looks at what the host has made of its state."""
        plan, stepper = run.plan, run.stepper
        assert plan is not None and stepper is not None
        if run.keeps_float32 and sample.dtype in (torch.float16, torch.bfloat16):
            # Solvers that keep states keep them in fp32 too.
            rounded = run.rounded
            sample = rounded[1] if rounded and run.handed_back(sample, rounded[0]) else sample.float()
        if plan.source.sigma_data is not None:
            # Cosmos evaluates x_0 with a trial step, of a batch that guidance has doubled, and takes it back.
            run.before = stepper.fork()
            if stepper.evaluations and sample.shape != stepper.x.shape:
                return sample
        if plan.keeps_states and stepper.evaluations and not run.handed_back(sample, stepper.x):
            self._warn(
                "edit",
                f"the latents were replaced between two steps; solver {plan.solver.spec!r} goes on from an earlier "
                "state too, which it cannot change. 'dpmpp_2m', 'deis' or 'euler' use the new latents throughout",
            )
        run.copied = False
        stepper.x = sample
        if run.draws is None:
            return stepper.step(fed)
        with run.draws.from_(generator, variance_noise, dtype):
            return stepper.step(fed)

    def _fed(
        self, plan: Plan, index: int, sample: torch.Tensor, output: torch.Tensor, given: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """What the program is fed where that is not the output itself, and x_0 or a function that computes it."""
        denoised = plan.prediction == "denoised"
        if given is not None:
            if denoised:
                return given, given
            c_x, c_m = conversion("denoised", plan.prediction, plan.nodes[index])
            return affine(c_x, sample, c_m, given), given
        if denoised:
            clean = x_0_of(plan, index, sample, output)
            clean = clipped(clean, self._values) if self._clips else clean
            return clean, clean
        return -output, partial(x_0_of, plan, index, sample, output)

    def _ignored(self, other: Mapping[str, Any]) -> None:
        """Arguments of other schedulers' ``step`` that pipelines pass literally."""
        unknown = [k for k in other if k not in _KNOWN]
        if unknown:
            allowed = [*inspect.signature(self.step).parameters][:-1]
            names = ", ".join(map(repr, unknown))
            hint = suggestion(unknown[0], allowed)
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


def x_0_of(plan: Plan, index: int, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """x_0 that the network's output means at an evaluation."""
    c_x, c_m = plan.denoised[index]
    return affine(c_x, sample, c_m, output)


def with_eta(solver: Solver, eta: float) -> dict[str, float]:
    """The option of a solver that the ``eta`` of a pipeline's call sets; ValueError if it has none."""
    options = solver.declaration.options
    for name in ("eta", "gamma"):  # TCD calls it gamma
        if name in options and (name == "eta" or solver.name == "tcd"):
            return {name: float(eta)}
    raise ValueError(
        f"solver {solver.spec!r} has no eta; use one that has, such as 'ddim' or 'euler_ancestral'"
    )


def clipped(x_0: torch.Tensor, values: Mapping[str, Any]) -> torch.Tensor:
    """x_0 within a config's ``clip_sample_range``, or by its dynamic threshold."""
    if not values["thresholding"]:
        bound = values["clip_sample_range"]
        return x_0.clamp(-bound, bound)
    # Clip to a quantile of |x_0| and rescale to 1 (Saharia et al., Imagen, https://arxiv.org/abs/2205.11487).
    wide = x_0.float().flatten(1)
    bound = torch.quantile(wide.abs(), values["dynamic_thresholding_ratio"], dim=1, keepdim=True)
    bound = bound.clamp(1.0, values["sample_max_value"])
    return (wide.clamp(-bound, bound) / bound).reshape(x_0.shape).to(x_0.dtype)


def mean_of(output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The mean of networks that predict a variance too; no solver here uses the variance."""
    halves = output.ndim == sample.ndim > 1 and output.shape[1] == 2 * sample.shape[1]
    if halves and output.shape[0] == sample.shape[0] and output.shape[2:] == sample.shape[2:]:
        return output[:, : sample.shape[1]]
    raise ValueError(
        f"model_output has shape {tuple(output.shape)}, the sample {tuple(sample.shape)}; they must be equal"
    )
