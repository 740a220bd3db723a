"""One call of a guided pipeline: its sessions of guidance, and what happens where the scheduler is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from ...guidance import Call, Guidance, Record, Session
from ...guidance.run import CONDITIONAL, UNCONDITIONAL
from .check import GuidanceNotApplied, Verdict, check_run
from .clock import Clock, begin_index, clock_of
from .layouts import IMAGE, Layout, image_term
from .networks import Networks
from .noise import SampleNoise
from .weak import DISTURBED

ACTIVE: ContextVar[GuidedRun | None] = ContextVar("fewstep_guided_run", default=None)
"""The run that the present thread is in."""


@dataclass
class Step:
    """One evaluation of the pipeline, from its first network call to the scheduler's step. Lists: an entry a stream.

    ``roles`` are the branches that the pipeline has asked for, ``held`` the outputs that it already has, ``result``
    the guided predictions, ``conditional`` the conditional ones if they ran. ``extended`` says that the pipeline adds
    to the guided prediction.
    """

    calls: list[Call]
    predictions: list[dict[str, torch.Tensor]]
    roles: list[str] = field(default_factory=list)
    held: list[list[torch.Tensor]] = field(default_factory=list)
    result: list[torch.Tensor] | None = None
    conditional: list[torch.Tensor] | None = None
    extended: bool = False

    def add(self, predictions: list[dict[str, torch.Tensor]]) -> None:
        """Branches have run."""
        for known, new in zip(self.predictions, predictions):
            known.update(new)

    @property
    def wanted(self) -> dict[str, torch.Tensor | None]:
        """Branches that run, and for which rows of the batch (None: all); they are shared by the streams."""
        wanted: dict[str, torch.Tensor | None] = {}
        for call in self.calls:
            for name, rows in call.branches.items():
                wanted[name] = rows if name not in wanted or wanted[name] is rows else None
        return wanted


class GuidedRun:
    """Guidance in one call of a pipeline.

    ``guidance`` holds one composition for each stream (the audio of LTX 2 is a second one); they share the network's
    evaluations, so it runs for a branch if one of them asks for it. ``refresh`` is called where the pipeline has
    another scheduler than before.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        guidance: list[Guidance],
        arguments: Mapping[str, Any],
        refresh: Callable[[], None],
    ) -> None:
        self.pipe, self.layout, self.guidance, self.arguments = pipe, layout, guidance, arguments
        self.noise = SampleNoise.of(arguments.get("generator"))
        self.networks = Networks(layout, self.noise, layout.own_scale(arguments) != 1.0)
        self.sessions: list[Session] = []
        self.step: Step | None = None
        self.controls: dict[int, Any] = {}
        self._finished: list[Session] = []
        self._kept: tuple[int, list[Record]] = (0, [])
        self._refresh, self._scheduler = refresh, pipe.scheduler
        self._first_timestep: Any = None
        self._module: Any = None
        self._verdict = Verdict(type(pipe).__name__)

    # -- results ---------------------------------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Evaluations of the network so far, in those of one sample."""
        return self._kept[0] + sum(s.nfe for s in (*self._finished, *self.sessions[:1]))

    def trace(self) -> list[Record]:
        """What every evaluation did."""
        records = [record for s in (*self._finished, *self.sessions[:1]) for record in s.trace]
        return [*self._kept[1], *records]

    def close(self) -> None:
        """The pipeline is done; GuidanceNotApplied if it has not used what it was given."""
        if not self._finished and not self.sessions:
            raise GuidanceNotApplied(
                f"{type(self.pipe).__name__} has run without a call of its guided networks: there was nothing to guide"
            )
        self._verdict.settle()

    def release(self) -> None:
        """Keep the results, and let the tensors go."""
        self._kept = self.nfe, self.trace()
        self.sessions, self._finished, self.step = [], [], None
        self.networks, self.controls, self.arguments = Networks(self.layout, self.noise, False), {}, {}

    # -- where the scheduler is called -------------------------------------------------------------------------------

    def timesteps_set(self) -> None:
        """The scheduler begins anew."""
        if any(s.index for s in self.sessions):
            self._finished += self.sessions[:1]
        self.sessions, self.step, self._first_timestep = [], None, None

    def scaling(self, timestep: Any) -> None:
        """The scheduler scales a state for the network."""
        if not self.sessions and self._first_timestep is None:
            self._first_timestep = timestep

    def stepping(
        self, scheduler_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The scheduler makes a step: only with the guided prediction."""
        step, self.step = self.step, None
        self.networks.opened = False
        if step is None:  # not a step of the denoising loop
            return scheduler_step(*args, **kwargs)
        if step.result is None:
            self.missing()
        assert step.result is not None
        session, clock = self.sessions[0], self.networks.clock
        g, call = step.result[0], step.calls[0]
        if self.layout.flow:  # the scheduler is given (x - x_0) / k of its own state
            expected = torch.add(call.x.detach().to(g.dtype), g, alpha=call.node.alpha)
        else:
            expected = g if clock.sign == 1.0 else -g
        if not step.extended:
            self._verdict.compare(args[0] if args else kwargs["model_output"], expected, session.plain)
        made = scheduler_step(*args, **kwargs)
        return self._moved(made, session, clock, call.x.shape) if session.moves else made

    def _moved(self, made: Any, session: Session, clock: Clock, shape: torch.Size) -> Any:
        """What the scheduler returned, its state changed by methods that act between steps."""
        state = made[0] if isinstance(made, tuple) else made.prev_sample
        scale, node = clock.input_scale[session.index], clock.nodes[session.index]
        rows = state[: self.networks.batch].reshape(shape)
        x = rows if scale == 1.0 else rows * scale
        moved = session.move(x, node, self.networks.evaluate)
        if moved is x:
            return made
        moved = torch.cat([moved / scale] * (len(state) // len(x))).reshape(state.shape).to(state.dtype)
        if isinstance(made, tuple):
            return (moved, *made[1:])
        made.prev_sample = moved
        return made

    def missing(self) -> NoReturn:
        """The pipeline makes no unconditional prediction."""
        raise GuidanceNotApplied(
            f"{type(self.pipe).__name__} makes no unconditional prediction in this step, which the guidance needs; "
            f"{self.layout.remedy()}, and leave out options that end its guidance early"
        )

    def unknown(self) -> NoReturn:
        """The pipeline calls its network in a way that is not known here."""
        raise GuidanceNotApplied(
            f"{type(self.pipe).__name__} calls its network once more in a step, for a branch that is not known here; "
            "turn off what it does besides classifier-free guidance"
        )

    # -- steps -------------------------------------------------------------------------------------------------------

    def open(self, states: list[torch.Tensor], module: Any) -> Step:
        """The step that is open; it begins with the first call of a network, which may be a ControlNet."""
        if self.pipe.scheduler is not self._scheduler:
            self._refresh()
            self._scheduler = self.pipe.scheduler
            self.timesteps_set()
        if self.step is None:
            if not self.sessions:
                self._start(module, states[0])
            self.networks.opened = True
            self.step = Step(
                [self._begin(*pair) for pair in zip(self.sessions, states)], [{} for _ in states]
            )
        return self.step

    def finish(self, step: Step) -> list[torch.Tensor]:
        """The guided predictions of a step whose branches have run."""
        step.result = []
        for session, call, predictions in zip(self.sessions, step.calls, step.predictions):
            with torch.enable_grad() if call.gradient else nullcontext():
                asked = {n: p for n, p in predictions.items() if n in call.branches or n == IMAGE}
                own = {n: _of_rows(p, call, n) for n, p in asked.items()}
                g = session.finish(call, own)
            if not self.layout.streams or session is self.sessions[0]:
                # another stream may have asked for more
                session.nfe += sum(map(len, predictions.values())) - sum(map(len, own.values()))
            if IMAGE in own and UNCONDITIONAL in own:
                rows, term = (
                    call.branches[UNCONDITIONAL],
                    image_term(self.pipe, own[UNCONDITIONAL], own[IMAGE]),
                )
                g = g + term if rows is None else g.index_add(0, rows, term.to(g.dtype))
            step.result.append(g)
        if all(CONDITIONAL in p for p in step.predictions):
            step.conditional = [p[CONDITIONAL].detach() for p in step.predictions]
        return step.result

    def _start(self, module: Any, state: torch.Tensor) -> None:
        """Sessions for the run that begins; ValueError if it cannot have this guidance."""
        scheduler = self.pipe.scheduler
        begin = begin_index(scheduler, self._first_timestep)
        count = len(scheduler.timesteps) - begin
        if self.arguments.get("denoising_end"):  # what the pipeline says then; threads may share it
            count = min(count, self.pipe.num_timesteps)
        clock = clock_of(scheduler, begin, count, self.layout.flow, self.arguments)
        alone = not self.layout.streams and not self.layout.flow and IMAGE not in self.layout.order
        run = replace(
            clock.run,
            branches=frozenset({CONDITIONAL, UNCONDITIONAL, *DISTURBED}),
            condition=True,
            gradients=not self.layout.streams,
            moves=alone and not self.controls,
            noise=self.noise,
            model=type(self.pipe).__name__,
        )
        check_run(self.pipe, self.guidance, run, module, state, self.layout.channels)
        self.sessions = [g.session(run) for g in self.guidance]
        self.networks.clock, self.networks.session = clock, self.sessions[0]

    def _begin(self, session: Session, x: torch.Tensor) -> Call:
        if session.index >= len(session.run.nodes):
            raise GuidanceNotApplied(
                f"{type(self.pipe).__name__} calls its network more often than its scheduler has timesteps"
            )
        call = session.begin(x, session.run.nodes[session.index], self.networks.evaluate)
        divides = self.layout.token_norm or bool(self.arguments.get("guidance_rescale"))
        if call.answer is not None and divides and session.guidance.has("cfg_zero"):
            # The pipeline divides by the norm of the prediction.
            call.answer = call.answer + (1e-5 if x.dtype == torch.float16 else 1e-12) * call.x
        return call

    def called(self, module: Any) -> None:
        """A network is called; where it is another one than before, running differences begin anew."""
        if self._module is not None and module is not self._module:
            for session in self.sessions:
                session.forget("apg")
        self._module = module


def _of_rows(prediction: torch.Tensor, call: Call, name: str) -> torch.Tensor:
    """The rows of a prediction that one stream has asked for."""
    rows = call.branches.get(name)
    return prediction if rows is None or len(rows) == len(prediction) else prediction[rows]
