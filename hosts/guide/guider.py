"""Guidance as a guider: for the modular pipelines of diffusers, and others that own a ``guider`` component.

Such a pipeline asks its guider for the inputs of each network call, runs them, and has it combine the predictions: one
conditional call where the guidance asks for no more. It knows no steps without any call; in these the network answers
with what it said last, without running.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from diffusers.guiders import guider_utils
from diffusers.guiders.guider_utils import BaseGuidance

from ...guidance import Call, Extrapolate, Guidance, Method, Session
from ...guidance import parse as parse_guidance
from ...guidance.run import CONDITIONAL, UNCONDITIONAL, Run
from ...schedules import Flow, Node
from .clock import begin_index, clock_of
from .noise import SampleNoise

_EMBEDDINGS = ("prompt_embeds", "encoder_hidden_states", "cap_feats")
"""What a pipeline calls the condition that CADS changes."""
_HIDDEN = ("sample", "hidden_states", "x")
"""What a network calls its state."""


class FewStepGuider(BaseGuidance):
    """A diffusers guider that runs any composition of guidance methods.

    ``guidance`` is what :func:`fewstep.sample` takes: methods, their text or a scale. ``seed`` is for methods that
    draw noise; sample i uses seed + i. The scheduler of the pipeline tells the noise levels: :func:`fewstep.guide`
    gives it, or set ``guider.scheduler``. In a config the guidance stands as text, without callables.

    The network's input is taken as the state x_t in the frame that it has there (unit variance for VP models, whatever
    frame the scheduler keeps). A method that asks for the unconditional branch of some samples only is given it for
    all, as the batch is the pipeline's.

    Raises ValueError for methods that need more than a guider has: evaluations or moves of their own, further
    networks, gradients, and ``extrapolate:adaptive``, whose decision needs the state before the network has seen it.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    def __init__(
        self, guidance: str | float | Method | Guidance = "cfg:5", seed: int = 0, enabled: bool = True
    ) -> None:
        super().__init__()
        self._enabled = enabled  # diffusers 0.35 does not take it
        self.guidance = parse_guidance(guidance)
        _check(self.guidance)
        self.register_to_config(guidance=self.guidance.spec, seed=seed, enabled=enabled)
        self.noise = SampleNoise([seed], True)
        self.scheduler: Any = None
        self.nfe = 0
        self.session: Session | None = None
        self._node = Node(0.0, 1.0, 0.0)
        self._nodes: tuple[Node, ...] = ()
        self._plan: tuple[Session, Call] | None = None
        self._hidden: Any = None
        self._output: Any = None
        self._undo: list[Callable[[], object]] = []

    # -- what a pipeline asks --------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """The boundary of a step; one that is not after the last begins a run."""
        first = self.session is None or self._step is None or step <= self._step
        super().set_state(step, num_inference_steps, timestep)  # type: ignore[arg-type]
        self._release()
        self._plan, self._hidden = None, None
        if not self._enabled:
            return
        if first:
            self._begin_run(timestep)
        assert self.session is not None
        self._node = self._nodes[min(step, len(self._nodes) - 1)]
        # What is to run has to be said before the network shows the state: a copy is asked, which nothing else sees.
        probe = copy.deepcopy(self.session)
        self._plan = probe, probe.begin(torch.zeros((), device=timestep.device), self._node)

    @property
    def num_conditions(self) -> int:
        """Network calls of the present step, and between steps those of a guided one. A skipped step has one, which is
        answered without running.
        """
        return len(self._branches)

    @property
    def is_conditional(self) -> bool:
        """Whether the call that is prepared is the conditional one."""
        return self._count_prepared == 1

    def prepare_inputs(self, data: Any, input_fields: Any = None) -> list[Any]:
        """Inputs of the calls, the conditional one first; ``data`` maps names to (conditional, unconditional).

        diffusers 0.35 gave the block state here, and the names of its fields.
        """
        if not isinstance(data, dict):
            return self.prepare_inputs_from_block_state(data, input_fields or self._input_fields)
        self._require(value[1] for value in data.values() if isinstance(value, tuple))
        return self._conditioned([self._prepare_batch(data, *place) for place in self._places()])

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The same from a block state and the names of its fields."""
        names = [value[1] for value in input_fields.values() if isinstance(value, tuple)]
        self._require(getattr(data, name, None) for name in names)
        prepare: Any = getattr(self, "_prepare_batch_from_block_state", self._prepare_batch)
        return self._conditioned([prepare(input_fields, data, *place) for place in self._places()])

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Watch the call that follows, or answer it where the step is skipped."""
        super().prepare_models(denoiser)
        self._release()
        skipped = self._plan is not None and self._plan[1].answer is not None and self._output is not None
        if skipped:
            self._undo.append(_answering(denoiser, self._output))

        def before(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._hidden = next(
                (named[n] for n in _HIDDEN if n in named), arguments[0] if arguments else None
            )
            self.nfe += 0 if skipped else len(self._hidden)

        self._undo.append(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
        if self.guidance.has("extrapolate", "cfg_zero"):  # they answer for the network
            self._undo.append(denoiser.register_forward_hook(self._keep).remove)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """The call is over."""
        self._release()

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> Any:
        """The guided prediction."""
        guided = pred_cond
        if self._plan is not None:
            assert self.session is not None
            self._plan = None
            call = self.session.begin(_state(self._hidden, pred_cond), self._node)
            given = {CONDITIONAL: pred_cond, UNCONDITIONAL: pred_uncond}
            predictions = {name: _rows(given[name], rows) for name, rows in call.branches.items()}
            guided = self.session.finish(call, predictions).to(pred_cond.dtype)
        self._hidden = None
        output = getattr(guider_utils, "GuiderOutput", None)
        if output is None:  # diffusers 0.35
            return guided, {}
        return output(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # -- a run -----------------------------------------------------------------------------------------------------

    @property
    def _branches(self) -> list[str]:
        """Branches of the present step; the conditional one stands for a skipped step."""
        if not self._enabled:
            return [CONDITIONAL]
        wanted = self._plan[1].branches if self._plan is not None else {UNCONDITIONAL: None}
        guided = UNCONDITIONAL in wanted and self.guidance.guides
        return [CONDITIONAL, UNCONDITIONAL] if guided else [CONDITIONAL]

    def _places(self) -> list[tuple[int, str]]:
        """Place in a pair, and name, of each call."""
        return list(enumerate(self._input_predictions[: self.num_conditions]))

    def _require(self, unconditional: Iterable[Any]) -> None:
        """ValueError where there are no inputs for the unconditional call: it would repeat the conditional one."""
        if self.num_conditions > 1 and all(value is None for value in unconditional):
            raise ValueError(
                f"guidance {self.guidance.spec!r} needs the unconditional prediction, and this call of the pipeline "
                "has no inputs for it; pass a negative prompt or negative_prompt_embeds"
            )

    def _begin_run(self, timestep: torch.Tensor) -> None:
        scheduler = self.scheduler() if isinstance(self.scheduler, FunctionType) else self.scheduler
        if scheduler is None:
            raise ValueError(
                "FewStepGuider does not know the noise levels: put it in with fs.guide(pipe, ...), or set "
                "guider.scheduler to the pipeline's scheduler"
            )
        begin = begin_index(scheduler, timestep)
        run = clock_of(scheduler, begin, len(scheduler.timesteps) - begin, False, {}).run
        self._nodes = run.nodes
        self.session = self.guidance.session(_of_pipeline(run, self.noise))
        self.nfe, self._output = 0, None

    def _conditioned(self, batches: list[Any]) -> list[Any]:
        """The inputs, with the condition that the guidance makes of the conditional one's."""
        if self._plan is None or not any(m.has("condition") for m in self.guidance.methods):
            return batches
        session, mine = self._plan[0], batches[0]
        name = next((n for n in _EMBEDDINGS if getattr(mine, n, None) is not None), None)
        if name is None:
            raise ValueError(
                f"guidance {self.guidance.spec!r} changes the condition, and this pipeline gives its guider none of "
                f"{', '.join(_EMBEDDINGS)}"
            )
        y = getattr(mine, name)
        if isinstance(y, torch.Tensor):
            setattr(mine, name, session.condition(y))
            return batches
        changed = []  # a list: one embedding a sample, of its own length
        for row, one in enumerate(y):
            with self.noise.only(row):
                changed.append(session.condition(one[None])[0])
        setattr(mine, name, changed)
        return batches

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        self._output = output

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __deepcopy__(self, memo: object) -> FewStepGuider:
        copied = FewStepGuider(self.guidance, self.noise.seeds[0], self._enabled)
        copied.scheduler = self.scheduler
        return copied


def _check(guidance: Guidance) -> None:
    """ValueError for methods that no pipeline's guider can have; the rest is for the run to say."""
    for m in guidance.methods:
        if m.needs_evaluate or m.has("move") or m.networks():
            raise ValueError(
                f"guidance {m.name!r} makes evaluations of its own, which a pipeline with a guider does not allow; use "
                "fs.sample or a standard pipeline"
            )
        if isinstance(m, Extrapolate) and m.pattern == "adaptive":
            raise ValueError(
                "guidance 'extrapolate:adaptive' looks at the state before the network runs, which a guider does not "
                "see; use a fixed pattern such as h2/s3"
            )
    nodes = (Node(1.0, 0.0, 1.0), Node(0.0, 1.0, 0.0))
    any_run = Run(Flow(1.0), "flow", nodes[:1], nodes[1], first_order=True)
    guidance.session(_of_pipeline(any_run, SampleNoise([0], True)))


def _of_pipeline(run: Run, noise: SampleNoise) -> Run:
    """A run with what a guider can give to methods."""
    branches = frozenset({CONDITIONAL, UNCONDITIONAL})
    return replace(run, branches=branches, condition=True, gradients=False, moves=False, noise=noise)


def _answering(denoiser: torch.nn.Module, output: Any) -> Callable[[], None]:
    """Let the next call return what the last one did, without running; the pipeline's guider replaces it."""
    held = denoiser.__dict__
    had, before = "forward" in held, held.get("forward")
    held["forward"] = lambda *arguments, **named: output

    def undo() -> None:
        if had:
            held["forward"] = before
        else:
            del held["forward"]

    return undo


def _state(hidden: Any, like: torch.Tensor) -> torch.Tensor:
    """The state x_t in the shape of a prediction, from the network's input: further channels are conditions."""
    if hidden is None:  # a skipped step: nothing asks for it
        return torch.zeros_like(like)
    x = torch.stack(list(hidden)) if isinstance(hidden, (list, tuple)) else hidden
    if x.ndim == like.ndim + 1:
        x = x.squeeze(2)
    if x.ndim == like.ndim and x.shape[1] > like.shape[1]:
        x = x[:, : like.shape[1]]
    return x


def _rows(prediction: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    assert prediction is not None
    return prediction if rows is None else prediction[rows]
