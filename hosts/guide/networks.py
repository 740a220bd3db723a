"""The networks of a guided run: what the pipeline called them with, and their predictions for other rows or states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...guidance import Call, Session
from ...guidance.run import CONDITIONAL
from ...schedules import Node
from .arguments import Arguments, Rows, Window, inner, is_compiled, window, with_inner
from .clock import Clock
from .layouts import Layout
from .noise import SampleNoise
from .outputs import Template, tensors_of
from .weak import counted_attention, disturbed, weak_prediction


@dataclass(frozen=True)
class NetworkCall:
    """A network and what the pipeline called it with; the rows of a branch begin at ``first``, of ``count``."""

    module: Any
    function: Callable[..., Any]
    arguments: Arguments
    first: int = 0
    count: int = 0


@dataclass(frozen=True)
class Selection:
    """Branches of a batched call that run, the number of rows of each, and which rows of the call these are.

    ``rows`` is None for all of them, ``own`` holds the rows of the batch for each branch, None for all.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    rows: Rows | None
    own: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(
        cls, order: Sequence[str], wanted: Mapping[str, torch.Tensor | None], batch: int, device: torch.device
    ) -> Selection:
        """What is wanted of a call whose rows are those of the branches in order."""
        chosen = [(i, name, wanted[name]) for i, name in enumerate(order) if name in wanted]
        own = tuple(rows for *_, rows in chosen)
        lengths = tuple(batch if rows is None else len(rows) for rows in own)
        rows: Rows | None
        if len(chosen) == len(order) and all(r is None for r in own):
            rows = None
        elif len(chosen) == 1 and own[0] is None:
            rows = slice(chosen[0][0] * batch, (chosen[0][0] + 1) * batch)
        else:
            each = torch.arange(batch, device=device)
            rows = torch.cat([i * batch + (each if r is None else r.to(device)) for i, _, r in chosen])
        return cls(tuple(name for _, name, _ in chosen), lengths, rows, own)

    def place(self, name: str) -> slice | None:
        """Where the rows of a branch are among those that run."""
        if name not in self.names:
            return None
        i = self.names.index(name)
        start = sum(self.lengths[:i])
        return slice(start, start + self.lengths[i])


class Networks:
    """See the module; one for each call of a pipeline.

    ``latents`` are the shapes of the pipeline's states, one a stream, as soon as they are known. ``labels`` are the
    rows whose class labels are conditions, while a network runs; ``opened`` says that an evaluation has begun and the
    scheduler's step not come. Predictions have the convention of the scheduler.
    """

    clock: Clock
    session: Session

    def __init__(self, layout: Layout, noise: SampleNoise, guides: bool) -> None:
        self.layout, self.noise, self.guides = layout, noise, guides
        self.latents: list[torch.Size | None] = [None] * (1 + len(layout.streams))
        self.calls: dict[str, NetworkCall] = {}
        self.context: str | None = None
        self.running = False
        self.opened = False
        self.labels: slice | None = None
        self._template = Template()
        self._rest: list[torch.Tensor | None] = [None] * len(self.latents)
        self._rows: dict[Any, int] = {}

    @property
    def sign(self) -> float:
        """What an output is multiplied by for a prediction, and back."""
        return self.layout.sign * self.clock.sign

    @contextmanager
    def within(self, name: str, manager: Any) -> Iterator[None]:
        """The pipeline names the branch of the calls that follow."""
        before, self.context = self.context, name
        try:
            with manager:
                yield
        finally:
            self.context = before

    # -- states ----------------------------------------------------------------------------------------------------

    def states(self, arguments: Arguments) -> list[torch.Tensor]:
        """The states in a call with all rows, one a stream, without what the network is given besides."""
        found = [self._state(arguments, i) for i in range(len(self.latents))]
        if self.latents[0] is None:
            self.latents[0] = torch.Size((self._samples(found[0]), *found[0].shape[1:]))
        return [inner(x, window(x.shape, latents)) for x, latents in zip(found, self.latents)]

    @property
    def batch(self) -> int:
        """Number of samples."""
        assert self.latents[0] is not None
        return self.latents[0][0]

    def _samples(self, x: torch.Tensor) -> int:
        """How many samples a pipeline has that does not say so."""
        half = len(x) // 2
        twice = self.guides and len(x) % 2 == 0 and (self.layout.doubled or torch.equal(x[:half], x[half:]))
        return half if twice else len(x)

    def _state(self, arguments: Arguments, i: int) -> torch.Tensor:
        value = arguments.values[self._state_name(arguments, i)]
        return torch.stack(list(value)) if isinstance(value, (list, tuple)) else value

    def _state_name(self, arguments: Arguments, i: int) -> str:
        return arguments.name("state") if i == 0 else self.layout.streams[i - 1]

    def _with_state(self, arguments: Arguments, x: torch.Tensor) -> Arguments:
        """The arguments with another state of the first stream."""
        name = self._state_name(arguments, 0)
        value = arguments.values[name]
        if isinstance(value, (list, tuple)):
            return arguments.changed(**{name: list(x.to(value[0].dtype).unbind(0))})
        return arguments.changed(**{name: with_inner(value, self._window(value, 0), x.to(value.dtype))})

    def _window(self, tensor: torch.Tensor, i: int) -> Window:
        return window(tensor.shape, self.latents[i])

    # -- evaluations -----------------------------------------------------------------------------------------------

    def predict(self, call: NetworkCall, selection: Selection, opened: Call) -> list[dict[str, torch.Tensor]]:
        """Predictions of the branches that are selected of a call, by name; one dictionary a stream."""
        arguments, labels = call.arguments, selection.place(CONDITIONAL)
        if selection.rows is not None:
            arguments = self.layout.rows(arguments, selection.rows, call.count)
        with self._labelled(labels), torch.enable_grad() if opened.gradient else nullcontext():
            if opened.gradient:
                parts = [opened.x if rows is None else opened.x[rows] for rows in selection.own]
                arguments = self._with_state(arguments, torch.cat(parts))
            if labels is not None:
                arguments = self._conditioned(arguments, labels, sum(selection.lengths))
            with counted_attention(call.module, self.session.guidance):
                outputs = self.run(replace(call, arguments=arguments), labels)
            return [dict(zip(selection.names, output.split(selection.lengths))) for output in outputs]

    def evaluate(
        self, branch: Any, x: torch.Tensor, node: Node, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The prediction of a branch, or of another network, at any state and node; what methods ask for."""
        own = isinstance(branch, str) and branch in self.layout.order
        call = self.calls[branch if own else CONDITIONAL]
        network = None if own else self.session.network(branch) if isinstance(branch, str) else branch
        arguments, samples = call.arguments, x.shape[0]
        if call.count > samples:
            arguments = self.layout.rows(arguments, slice(call.first, call.first + samples), call.count)
        if rows is not None:
            arguments, x = self.layout.rows(arguments, rows, samples), x[rows]
        arguments = self._at(self._with_state(arguments, x), node)
        labels = None if own and branch != CONDITIONAL else slice(0, len(x))
        with self._labelled(labels):
            if labels is not None:
                arguments = self._conditioned(arguments, labels, len(x))
            if network is not None:
                return self._other(network, arguments, x, node)
            with disturbed(call.module, self.session.guidance, branch, x.shape):
                return self.run(replace(call, arguments=arguments), None)[0]

    def run(self, call: NetworkCall, keep: slice | None) -> list[torch.Tensor]:
        """Call the network; predictions, one a stream. What else it returns is kept of the rows ``keep``."""
        with self._inside(), self._renewed_caches(call):
            output = call.arguments.call(call.function)
        self._template.learn(output)
        predictions = []
        for i, tensor in enumerate(tensors_of(output, len(self.latents))):
            where = self._window(tensor, i)
            if where is not None and keep is not None:
                self._rest[i] = tensor[keep].detach()
            part = inner(tensor, where)
            if is_compiled(call.module):  # the memory may be that of the next output
                part = part.clone()
            predictions.append(part if self.sign == 1.0 else -part)
        return predictions

    def _other(self, network: Any, arguments: Arguments, x: torch.Tensor, node: Node) -> torch.Tensor:
        with self._inside():
            output = weak_prediction(network, arguments, x, node)
        part = inner(output, self._window(output, 0))
        return part if self.sign == 1.0 else -part

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Calls of networks are ours."""
        before, self.running = self.running, True
        try:
            yield
        finally:
            self.running = before

    @contextmanager
    def _labelled(self, rows: slice | None) -> Iterator[None]:
        self.labels = rows
        try:
            yield
        finally:
            self.labels = None

    def _renewed_caches(self, call: NetworkCall) -> Any:
        """Caches of features hold the rows of the call before: with other rows they begin anew."""
        if not getattr(call.module, "is_cache_enabled", False):
            return nullcontext()
        key, rows = (id(call.module), self.context), len(self._state(call.arguments, 0))
        before, self._rows[key] = self._rows.get(key, rows), rows
        if before == rows:
            return nullcontext()
        call.module._reset_stateful_cache()
        return nullcontext() if self.context is None else call.module.cache_context(self.context)

    def _at(self, arguments: Arguments, node: Node) -> Arguments:
        """The arguments at a time: the one of the last evaluation, the next, or any other."""
        clock, nodes = self.clock, self.clock.nodes
        last = min(self._last, len(clock.timesteps) - 1)
        if nodes[last] == node:
            return arguments
        if last + 1 < len(clock.timesteps) and nodes[last + 1] == node:
            then = clock.timesteps[last + 1]
        else:
            level = node.sigma if clock.run.noise_schedule.frame == "flow" else node.ratio
            then = float(clock.source.timesteps(level))
        name = arguments.name("time")
        given = torch.as_tensor(arguments.values[name])
        if not given.is_floating_point():
            return arguments.changed(**{name: torch.full_like(given, round(then))})
        ratio = then / clock.timesteps[last]  # networks are told multiples of the timestep
        told = 1.0 - (1.0 - given) * ratio if self.layout.clock == "1 - t" else given * ratio
        return arguments.changed(**{name: told})

    @property
    def _last(self) -> int:
        """The evaluation that the arguments belong to: the one that is open, or else the one before."""
        return self.session.index if self.opened else self.session.index - 1

    # -- conditions ------------------------------------------------------------------------------------------------

    def _conditioned(self, arguments: Arguments, rows: slice, count: int) -> Arguments:
        """The arguments with the condition of some rows as the methods want it."""
        if not self.session.conditions:
            return arguments
        changed = {}
        for name in self.layout.condition:
            value = arguments.values.get(name)
            if isinstance(value, (list, tuple)):  # one tensor a row, of different lengths
                changed[name] = [*value]
                for i in range(rows.start, rows.stop):
                    with self.noise.only(i - rows.start):
                        changed[name][i] = self.session.condition(value[i][None])[0]
            elif value is not None:
                changed[name] = self._replaced(value, rows, count)
        return arguments.changed(**changed)

    def embedded(self, labels: torch.Tensor) -> torch.Tensor | None:
        """An embedding of class labels, made by the network, as the methods want it."""
        if self.labels is None or not self.running:
            return None
        return self._replaced(labels, self.labels, len(labels))

    def _replaced(self, value: torch.Tensor, rows: slice, count: int) -> torch.Tensor:
        y = self.session.condition(value[rows])
        return y if len(y) == count else torch.cat([value[: rows.start], y, value[rows.stop :]])

    # -- outputs ---------------------------------------------------------------------------------------------------

    def full(self, g: torch.Tensor, i: int) -> torch.Tensor:
        """A prediction as an output of the network, with what else that holds."""
        out, rest = g if self.sign == 1.0 else -g, self._rest[i]
        if rest is not None:
            return with_inner(rest, self._window(rest, i), out)
        return out if self._template.learned else self._padded(out)

    def _padded(self, out: torch.Tensor) -> torch.Tensor:
        """With room for a learned variance, before any has been seen."""
        call = next(iter(self.calls.values()))
        config = getattr(call.module, "config", None)
        channels = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
        if channels == (out.shape[1], 2 * out.shape[1]):
            return torch.cat([out, torch.zeros_like(out)], dim=1)
        return out

    def output(self, tensors: list[torch.Tensor], call: NetworkCall) -> Any:
        """Tensors in the form of the network's output."""
        return self._template.fill(tensors, call.arguments.values.get("return_dict", True))
