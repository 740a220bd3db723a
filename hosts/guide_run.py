"""One call of a guided pipeline: what it does where the pipeline calls its network and its scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..guidance import CFG, Guidance, Record, Session
from ..guidance.run import CONDITIONAL, UNCONDITIONAL, Call, Run
from ..schedules import Node
from .guide_arguments import Arguments, Rows, Window, inner, window, with_inner
from .guide_check import GuidanceNotApplied, Verdict, check_run
from .guide_clock import Clock, begin_index, clock_of
from .guide_layouts import CONTROLS, DENOISERS, IMAGE, Layout, enabled, image_term
from .guide_noise import SampleNoise
from .guide_outputs import Template, tensors_of
from .guide_weak import DISTURBED, disturbed, weak_prediction

ACTIVE: ContextVar[GuidedRun | None] = ContextVar("fewstep_guided_run", default=None)
"""The run that the present thread is in."""

# Arguments by which pipelines ask for weak branches of their own.
_OWN_WEAK = ("skip_layers", "spatio_temporal_guidance_blocks", "isolate_modalities")


@dataclass
class NetworkCall:
    """A network and what the pipeline called it with; ``first`` is where the branch's rows begin, of ``count``."""

    module: Any
    function: Callable[..., Any]
    arguments: Arguments
    first: int = 0
    count: int = 0


@dataclass
class Step:
    """One evaluation of the pipeline, from its first network call to the scheduler's step; lists have an entry a stream.

    ``held`` are outputs that the pipeline already has, ``result`` the guided predictions, ``conditional`` the
    conditional ones if they ran.
    """

    calls: list[Call]
    predictions: list[dict[str, torch.Tensor]]
    roles: list[str] = field(default_factory=list)
    held: list[list[torch.Tensor]] = field(default_factory=list)
    result: list[torch.Tensor] | None = None
    conditional: list[torch.Tensor] | None = None


class GuidedRun:
    """Guidance in one call of a pipeline.

    ``guidance`` holds one composition for each stream (the audio of LTX 2 is a second one); they share the network's
    evaluations, so it runs for a branch if one of them asks for it.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        guidance: list[Guidance],
        arguments: Mapping[str, Any],
        noise: SampleNoise,
    ) -> None:
        self.pipe, self.layout, self.guidance, self.arguments = pipe, layout, guidance, arguments
        self.noise = noise
        self.latents: list[torch.Size | None] = [None] * (1 + len(layout.streams))
        self.sessions: list[Session] = []
        self.finished: list[Session] = []
        self.clock: Clock | None = None
        self.step_state: Step | None = None
        self.calls: dict[str, NetworkCall] = {}
        self.control_outputs: dict[int, Any] = {}
        self.template = Template()
        self.rest: list[torch.Tensor | None] = [None] * len(self.latents)
        self.context: str | None = None
        self.timestep: Any = None
        self.inside = False
        self.labels: slice | None = None
        self.verdict = Verdict(type(pipe).__name__)

    # -- results ---------------------------------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Evaluations of the network so far, in those of one sample."""
        return sum(s.nfe for s in (*self.finished, *self.sessions[:1]))

    def trace(self) -> list[Record]:
        """What every evaluation did."""
        return [record for s in (*self.finished, *self.sessions[:1]) for record in s.trace]

    def close(self) -> None:
        """The pipeline is done; GuidanceNotApplied if it has not used what it was given."""
        if not self.finished and not self.sessions:
            raise GuidanceNotApplied(
                f"{type(self.pipe).__name__} has run without calling one of its guided networks; guide the pipeline that "
                "samples, and call it as pipe(...)"
            )
        self.verdict.settle()

    def owns(self, part: str, obj: Any) -> bool:
        """Whether an object is a part of the pipeline of this run."""
        names = {"network": DENOISERS, "control": CONTROLS, "scheduler": ("scheduler",)}[part]
        return any(getattr(self.pipe, name, None) is obj for name in names)

    def labelled(self, embedding: torch.Tensor) -> torch.Tensor:
        """The embedding of class labels as the methods want it."""
        rows = self.labels
        assert rows is not None
        y = self.sessions[0].condition(embedding[rows])
        return torch.cat([embedding[: rows.start], y, embedding[rows.stop :]])

    # -- what the scheduler tells --------------------------------------------------------------------------------

    def new_timesteps(self) -> None:
        """The scheduler begins anew."""
        if any(s.index for s in self.sessions):
            self.finished += self.sessions[:1]
        self.sessions, self.clock, self.step_state, self.timestep = [], None, None, None

    def scaled(self, timestep: Any) -> None:
        """The scheduler scales a state for the network."""
        if not self.sessions and self.timestep is None:
            self.timestep = timestep

    def stepped(
        self, scheduler_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The scheduler makes a step."""
        step, self.step_state = self.step_state, None
        if step is None:  # not a step of the denoising loop
            return scheduler_step(*args, **kwargs)
        if step.result is None:
            self._missing()
        assert step.result is not None and self.clock is not None
        output = args[0] if args else kwargs["model_output"]
        call, session = step.calls[0], self.sessions[0]
        self.verdict.compare(output, self._expected(step.result[0], call), session.plain)
        made = scheduler_step(*args, **kwargs)
        return self._moved(made) if session.moves else made

    def _expected(self, g: torch.Tensor, call: Call) -> torch.Tensor:
        """What the scheduler is to be given."""
        assert self.clock is not None
        if self.layout.flow:
            return torch.add(call.x.detach().to(g.dtype), g, alpha=call.node.alpha)
        return g if self.clock.sign == 1.0 else -g

    def _missing(self) -> None:
        raise GuidanceNotApplied(
            f"{type(self.pipe).__name__} made no unconditional prediction in this step, which the guidance needs; "
            f"{self.layout.remedy()}, and leave out options that end its guidance early"
        )

    def _moved(self, made: Any) -> Any:
        """What the scheduler returned, with the state changed by methods that act between steps."""
        assert self.clock is not None
        session = self.sessions[0]
        index = session.index
        state = made[0] if isinstance(made, tuple) else made.prev_sample
        rows = state[: self.batch] if self.layout.doubled else state
        scale = self.clock.input_scale[index]
        x = rows if scale == 1.0 else rows * scale
        with torch.enable_grad() if torch.is_grad_enabled() else nullcontext():
            moved = session.move(x, self.clock.nodes[index], self._evaluate)
        if moved is x:
            return made
        moved = moved if scale == 1.0 else moved / scale
        moved = torch.cat([moved] * (state.shape[0] // moved.shape[0])).to(state.dtype)
        if isinstance(made, tuple):
            return (moved, *tuple(made)[1:])
        made.prev_sample = moved
        return made

    # -- the step that is open -----------------------------------------------------------------------------------

    def _start(self) -> None:
        """Sessions for the run that begins; ValueError if it cannot have this guidance."""
        scheduler, pipe = self.pipe.scheduler, self.pipe
        begin = begin_index(scheduler, self.timestep)
        count = len(scheduler.timesteps) - begin
        told = pipe.__dict__.get("_num_timesteps")
        if isinstance(told, int) and 0 < told < count:
            count = told
        self.clock = clock_of(scheduler, begin, count, self.layout.flow, self.arguments)
        run = replace(self.clock.run, **self._abilities())
        check_run(pipe, self.layout, self.guidance, run, self.calls)
        self.sessions = [g.session(run) for g in self.guidance]

    def _abilities(self) -> dict[str, Any]:
        branches = {CONDITIONAL, UNCONDITIONAL, *DISTURBED}
        alone = len(self.latents) == 1 and not self.layout.flow and not self.control_outputs
        return {
            "branches": frozenset(branches),
            "condition": True,
            "moves": alone and IMAGE not in self.layout.order,
            "gradients": alone,
            "noise": self.noise,
            "model": type(self.pipe).__name__,
        }

    def _open(self, states: list[torch.Tensor]) -> Step:
        """The step that is open; a new one begins with the first call of a network."""
        if self.step_state is None:
            if not self.sessions:
                self._start()
            assert self.clock is not None
            calls = []
            for session, x in zip(self.sessions, states):
                if session.index >= len(session.run.nodes):
                    raise GuidanceNotApplied(
                        f"{type(self.pipe).__name__} calls its network more often than its scheduler has timesteps"
                    )
                calls.append(session.begin(x, session.run.nodes[session.index], self._evaluate))
            self.step_state = Step(calls, [{} for _ in calls])
            if self.rewinds and all(c.answer is not None for c in calls):
                for c in calls:  # zeros that a pipeline divides by
                    c.answer = c.answer + (1e-12 if c.x.dtype != torch.float16 else 1e-5) * c.x
        return self.step_state

    @property
    def rewinds(self) -> bool:
        """Whether a prediction of zeros would be divided by its norm."""
        divides = self.layout.token_norm or bool(self.arguments.get("guidance_rescale"))
        return divides and self.guidance[0].has("cfg_zero")

    def _wanted(self, step: Step) -> dict[str, torch.Tensor | None]:
        """Branches that the network runs for, and rows of the batch."""
        wanted: dict[str, torch.Tensor | None] = {}
        for call in step.calls:
            for name, rows in call.branches.items():
                same = name not in wanted or wanted[name] is rows
                wanted[name] = rows if same else None
        if IMAGE in self.layout.order and UNCONDITIONAL in wanted:
            wanted[IMAGE] = wanted[UNCONDITIONAL]
        return wanted

    def _finish(self, step: Step) -> list[torch.Tensor]:
        """The guided predictions of the step."""
        step.result = []
        for session, call, predictions in zip(self.sessions, step.calls, step.predictions):
            with torch.enable_grad() if call.gradient else nullcontext():
                own = {
                    name: p
                    if call.branches.get(name) is None or len(p) == len(call.branches[name])
                    else p[call.branches[name]]
                    for name, p in predictions.items()
                    if call.answer is None and (name in call.branches or name == IMAGE)
                }
                g = session.finish(call, own)
                if IMAGE in own:
                    g = self._with_image(g, own, call)
            step.result.append(g)
        if all(CONDITIONAL in p for p in step.predictions):
            step.conditional = [p[CONDITIONAL].detach() for p in step.predictions]
        return step.result

    def _with_image(self, g: torch.Tensor, p: Mapping[str, torch.Tensor], call: Call) -> torch.Tensor:
        rows = call.branches[UNCONDITIONAL]
        if rows is None:
            return image_term(self.pipe, g, p[UNCONDITIONAL], p[IMAGE])
        return g.index_put((rows,), image_term(self.pipe, g[rows], p[UNCONDITIONAL], p[IMAGE]))

    # -- networks ------------------------------------------------------------------------------------------------

    @contextmanager
    def within(self, name: str, inner: Any) -> Iterator[None]:
        """The pipeline names the branch of the calls that follow."""
        before, self.context = self.context, name
        try:
            with inner:
                yield
        finally:
            self.context = before

    def network(self, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The pipeline calls its network."""
        call = NetworkCall(module, function, Arguments.bind(module, args, kwargs))
        states = [self._state(call.arguments, i) for i in range(len(self.latents))]
        if any(call.arguments.values.get(name) for name in _OWN_WEAK):
            return self._own_weak(call)
        count = states[0].shape[0]
        self.batch = batch = self._batch(states[0])
        ways = count // batch
        if count != batch * ways or ways not in (1, len(self.layout.order)):
            raise GuidanceNotApplied(
                f"{type(self.pipe).__name__} calls its network with {count} rows for {batch} samples, which is not a "
                f"form of guidance that is known here"
            )
        call.count = count
        if ways > 1:
            return self._batched(call, states, batch)
        return self._one_branch(call, states)

    def _batched(self, call: NetworkCall, states: list[torch.Tensor], batch: int) -> Any:
        order = self.layout.order
        for i, name in enumerate(order):
            self.calls[name] = replace(call, first=i * batch)
        first = slice(order.index(CONDITIONAL) * batch, (order.index(CONDITIONAL) + 1) * batch)
        step = self._open([self._narrow(x, i)[first] for i, x in enumerate(states)])
        if step.result is not None:
            self._unknown_call()
        wanted = self._wanted(step)
        names = [name for name in order if name in wanted]
        if names:
            rows, lengths = _selection(order, wanted, batch, states[0].device)
            outputs = self._evaluated(step.calls, call, rows, names, lengths, wanted)
            for predictions, output in zip(step.predictions, outputs):
                predictions.update(zip(names, output.split(lengths)))
            self._weak(step, wanted)
        g = self._finish(step)
        return self._output([torch.cat([self._full(x, i)] * len(order)) for i, x in enumerate(g)], call)

    def _one_branch(self, call: NetworkCall, states: list[torch.Tensor]) -> Any:
        states = [self._narrow(x, i) for i, x in enumerate(states)]
        step = self._open(states)
        role = self._role(step)
        if role in step.roles:
            self._unknown_call()
        step.roles.append(role)
        self.calls[role] = call
        wanted = self._wanted(step)
        if step.result is None and UNCONDITIONAL in wanted and enabled(self.pipe) is False:
            self._missing()
        if role in wanted and step.result is None:
            rows = wanted[role]
            outputs = self._evaluated(
                step.calls, call, rows, [role], [len(states[0]) if rows is None else len(rows)], wanted
            )
            for predictions, output in zip(step.predictions, outputs):
                predictions[role] = output
            if role == CONDITIONAL:
                self._weak(step, wanted)
        if step.result is None and all(
            name in step.predictions[0] for name in wanted if name in self.layout.order
        ):
            g = self._finish(step)
            for held in step.held:
                for tensor, x, i in zip(held, g, range(len(g))):
                    tensor.copy_(self._full(x, i))
            if self.layout.solved and step.held:
                return self._output([self._solved(x, i, step) for i, x in enumerate(g)], call)
        if step.result is not None:
            tensors = [self._full(x, i).clone() for i, x in enumerate(step.result)]
        else:  # to be filled when the other branch has come
            own = [p.get(role) for p in step.predictions]
            whole = all(p is not None and len(p) == len(x) for p, x in zip(own, states))
            tensors = [
                self._full(p.detach() if whole and p is not None else torch.zeros_like(x), i).clone()
                for i, (p, x) in enumerate(zip(own, states))
            ]
        step.held.append(tensors)
        return self._output(tensors, call)

    def _role(self, step: Step) -> str:
        if self.context in ("cond", "uncond"):
            return CONDITIONAL if self.context == "cond" else UNCONDITIONAL
        return CONDITIONAL if not step.roles else UNCONDITIONAL

    def _unknown_call(self) -> None:
        raise GuidanceNotApplied(
            f"{type(self.pipe).__name__} calls its network once more in a step, for a branch that is not known here; "
            "turn that off (a guidance of its own besides classifier-free guidance)"
        )

    def _own_weak(self, call: NetworkCall) -> Any:
        """A weak branch of the pipeline, which adds ``s (c - weak)`` of what it was given: as if g were c."""
        step = self.step_state
        if step is None or step.result is None:
            self._unknown_call()
        assert step is not None and step.result is not None
        result = step.result
        if step.conditional is not None:
            outputs = self._run(call, None)
            self.sessions[0].nfe += len(outputs[0])
            result = [g - (c - weak) for g, c, weak in zip(result, step.conditional, outputs)]
        return self._output([self._full(x, i) for i, x in enumerate(result)], call)

    def _solved(self, g: torch.Tensor, i: int, step: Step) -> torch.Tensor:
        """The unconditional output with which the pipeline's ``c + s (c - u)`` is g."""
        c = step.predictions[i][CONDITIONAL].detach().float()
        return self._full(c - (g.float() - c) / float(self.pipe.guidance_scale), i)

    def control(self, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The pipeline calls a ControlNet before its network: it runs for the rows that the network runs for."""
        call = NetworkCall(module, function, Arguments.bind(module, args, kwargs))
        key = id(module)
        self.control_outputs.setdefault(key, None)
        x = self._state(call.arguments, 0)
        batch = self._batch(x)
        ways = x.shape[0] // batch
        place = self.layout.order.index(CONDITIONAL) if ways > 1 else 0
        rows = slice(place * batch, (place + 1) * batch)
        step = self._open([self._narrow(x, 0)[rows]])
        wanted = self._wanted(step)
        if not wanted:
            known = self.control_outputs[key]
            if known is not None:
                return known
        if ways > 1 and set(wanted) & set(self.layout.order) == {CONDITIONAL}:
            output = call.arguments.rows(rows, x.shape[0]).call(function)
            output = _repeated(output, ways)
        else:
            output = call.arguments.call(function)
        self.control_outputs[key] = output
        return output

    # -- evaluations ---------------------------------------------------------------------------------------------

    def _evaluated(
        self,
        calls: list[Call],
        call: NetworkCall,
        rows: Rows | None,
        names: list[str],
        lengths: list[int],
        wanted: Mapping[str, torch.Tensor | None],
    ) -> list[torch.Tensor]:
        """The network's predictions for rows of a call, one tensor a stream."""
        arguments = call.arguments
        if rows is not None:
            arguments = arguments.rows(rows, call.count, self.layout.lists)
        gradient = calls[0].gradient
        if gradient:
            parts = [calls[0].x if wanted[n] is None else calls[0].x[wanted[n]] for n in names]
            arguments = self._with_state(arguments, torch.cat(parts), 0)
        if CONDITIONAL in names:
            start = sum(lengths[: names.index(CONDITIONAL)])
            self.labels = slice(start, start + lengths[names.index(CONDITIONAL)])
            arguments = self._conditioned(arguments, self.labels, sum(lengths))
        try:
            with torch.enable_grad() if gradient else nullcontext():
                return self._run(replace(call, arguments=arguments), self.labels)
        finally:
            self.labels = None

    def _run(self, call: NetworkCall, keep: slice | None) -> list[torch.Tensor]:
        """Call the network; its predictions, in the scheduler's convention. Keeps what else it returned for ``keep``."""
        inside, self.inside = self.inside, True
        try:
            output = call.arguments.call(call.function)
        finally:
            self.inside = inside
        self.template.learn(output)
        predictions = []
        for i, tensor in enumerate(tensors_of(output, len(self.latents))):
            where = self._window(tensor, i)
            if where is not None and keep is not None:
                self.rest[i] = tensor[keep].detach()
            part = inner(tensor, where)
            predictions.append(part if self.sign == 1.0 else -part)
        if _in_static_memory(call.module):
            predictions = [p.clone() for p in predictions]
        return predictions

    @property
    def sign(self) -> float:
        """What an output is multiplied by for a prediction, and back."""
        assert self.clock is not None
        return self.layout.sign * self.clock.sign

    def _weak(self, step: Step, wanted: Mapping[str, torch.Tensor | None]) -> None:
        """Predictions of branches that methods bring."""
        for name in wanted:
            if name not in self.layout.order:
                call = step.calls[0]
                step.predictions[0][name] = self._evaluate(name, call.x, call.node, wanted[name])

    def _evaluate(
        self, branch: Any, x: torch.Tensor, node: Node, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A prediction of a branch, or of another network, at any state and node."""
        session = self.sessions[0]
        if isinstance(branch, str) and branch in self.layout.order:
            source, network = self.calls[branch], None
        else:
            source = self.calls[CONDITIONAL]
            network = session.network(branch) if isinstance(branch, str) else branch
        arguments = source.arguments
        if source.count > x.shape[0]:
            arguments = arguments.rows(
                slice(source.first, source.first + x.shape[0]), source.count, self.layout.lists
            )
        size = x.shape[0]
        if rows is not None:
            arguments, x = arguments.rows(rows, size, self.layout.lists), x[rows]
        arguments = self._with_state(arguments, x, 0)
        arguments = self._at(arguments, node, session)
        own = not isinstance(branch, str) or branch != UNCONDITIONAL
        labels = slice(0, len(x)) if own else None
        if labels is not None:
            arguments = self._conditioned(arguments, labels, len(x))
        call = replace(source, arguments=arguments)
        self.labels = labels
        try:
            if network is not None:
                return self._outside(network, call, x, node)
            with disturbed(source.module, session.guidance, branch, x.shape):
                return self._run(call, None)[0]
        finally:
            self.labels = None

    def _outside(self, network: Any, call: NetworkCall, x: torch.Tensor, node: Node) -> torch.Tensor:
        """A network that a method brings."""
        inside, self.inside = self.inside, True
        try:
            output = weak_prediction(network, call.arguments, x, node)
        finally:
            self.inside = inside
        output = inner(output, self._window(output, 0))
        return output if self.sign == 1.0 else -output

    def _at(self, arguments: Arguments, node: Node, session: Session) -> Arguments:
        """The arguments at another time than that of the step that is or was last open."""
        assert self.clock is not None
        i = min(session.index, len(self.clock.timesteps) - 1) if self.step_state else session.index - 1
        if self.clock.nodes[i] == node:
            return arguments
        level = node.sigma if self.clock.run.noise_schedule.frame == "flow" else node.ratio
        now, then = self.clock.timesteps[i], float(self.clock.source.timesteps(level))
        j = i + 1
        if j < len(self.clock.timesteps) and self.clock.nodes[j] == node:
            then = self.clock.timesteps[j]
        name = arguments.name("time")
        value = torch.as_tensor(arguments.values[name])
        if not value.is_floating_point():
            return arguments.changed(**{name: torch.full_like(value, round(then))})
        if self.layout.clock == "1 - t":
            return arguments.changed(**{name: 1.0 - (1.0 - value) * (then / now)})
        return arguments.changed(**{name: value * (then / now)})

    def _conditioned(self, arguments: Arguments, rows: slice, count: int) -> Arguments:
        """The arguments with the condition of the conditional rows as the methods want it."""
        session = self.sessions[0]
        if not any(m.has("condition") for m in session.guidance.methods):
            return arguments
        changed = {}
        for name in self.layout.condition:
            value = arguments.values.get(name)
            if isinstance(value, (list, tuple)):
                entries = list(value)
                for i in range(rows.start, rows.stop):
                    with self.noise.only(i - rows.start):
                        entries[i] = session.condition(entries[i][None])[0]
                changed[name] = entries
            elif value is not None:
                y = session.condition(value[rows])
                changed[name] = (
                    y if len(y) == count else torch.cat([value[: rows.start], y, value[rows.stop :]])
                )
        return arguments.changed(**changed)

    # -- states and outputs --------------------------------------------------------------------------------------

    def _state(self, arguments: Arguments, i: int) -> torch.Tensor:
        """The state among the arguments of a call, with all its rows."""
        value = arguments.values[self._state_name(arguments, i)]
        return torch.stack(list(value)) if isinstance(value, (list, tuple)) else value

    def _state_name(self, arguments: Arguments, i: int) -> str:
        return arguments.name("state") if i == 0 else self.layout.streams[i - 1]

    def _with_state(self, arguments: Arguments, x: torch.Tensor, i: int) -> Arguments:
        name = self._state_name(arguments, i)
        value = arguments.values[name]
        if isinstance(value, (list, tuple)):
            return arguments.changed(**{name: list(x.to(value[0].dtype).unbind(0))})
        where = self._window(value, i)
        return arguments.changed(**{name: with_inner(value, where, x.to(value.dtype))})

    def _window(self, tensor: torch.Tensor, i: int) -> Window:
        latents = self.latents[i]
        if latents is None and self.step_state is not None:
            latents = self.step_state.calls[i].x.shape  # learned variances
        return window(tensor.shape, latents)

    def _narrow(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return inner(x, window(x.shape, self.latents[i]))

    def _batch(self, x: torch.Tensor) -> int:
        """How many samples there are."""
        if self.latents[0] is not None:
            return self.latents[0][0]
        half = x.shape[0] // 2
        if x.shape[0] % 2 or self.layout.own_scale(self.arguments) == 1.0:
            return x.shape[0]
        if self.layout.doubled or torch.equal(x[:half], x[half:]):
            return half
        return x.shape[0]

    def _full(self, g: torch.Tensor, i: int) -> torch.Tensor:
        """A prediction as an output of the network, with what else that holds."""
        out = g if self.sign == 1.0 else -g
        rest = self.rest[i]
        if rest is None:
            return self._padded(out)
        return with_inner(rest, self._window(rest, i), out)

    def _padded(self, out: torch.Tensor) -> torch.Tensor:
        """With room for a learned variance that has not been seen yet."""
        if self.template.output is not None or out.ndim < 4:
            return out
        module = next(iter(self.calls.values())).module
        config = getattr(module, "config", None)
        channels = getattr(config, "in_channels", None)
        if channels == out.shape[1] and getattr(config, "out_channels", None) == 2 * channels:
            return torch.cat([out, torch.zeros_like(out)], dim=1)
        return out

    def _output(self, tensors: list[torch.Tensor], call: NetworkCall) -> Any:
        return self.template.fill(tensors, call.arguments.values.get("return_dict", True))


def with_scale(guidance: Guidance, own: float) -> Guidance:
    """A composition that has a scale: its own, or else the pipeline's."""
    if own == 1.0 or any(m.weight is not None for m in guidance.methods):
        return guidance
    if guidance.has("cfg"):
        return Guidance(tuple(replace(m, scale=own) if isinstance(m, CFG) else m for m in guidance.methods))
    return guidance + CFG(own)


def _selection(
    order: tuple[str, ...], wanted: Mapping[str, torch.Tensor | None], batch: int, device: torch.device
) -> tuple[Rows | None, list[int]]:
    """The rows of a batched call that run (None: all), and how many for each branch."""
    chosen = [(i, wanted[name]) for i, name in enumerate(order) if name in wanted]
    lengths = [batch if rows is None else len(rows) for _, rows in chosen]
    if len(chosen) == len(order) and all(rows is None for _, rows in chosen):
        return None, lengths
    if len(chosen) == 1 and chosen[0][1] is None:
        return slice(chosen[0][0] * batch, (chosen[0][0] + 1) * batch), lengths
    everything = torch.arange(batch, device=device)
    return torch.cat([i * batch + (everything if r is None else r.to(device)) for i, r in chosen]), lengths


def _repeated(value: Any, times: int) -> Any:
    """Every tensor of an output as often along the batch as there are branches."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * times)
    if isinstance(value, dict):
        return type(value)(**{k: _repeated(v, times) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(v, times) for v in value)
    return value


def _in_static_memory(module: Any) -> bool:
    """Whether a module is compiled: its outputs may be overwritten by its next call."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


__all__ = ["ACTIVE", "GuidedRun", "NetworkCall", "Run", "Step", "with_scale"]
