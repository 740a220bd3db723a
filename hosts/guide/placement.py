"""What a pipeline is given where it calls its network: whatever affine formula it applies then gives the guided g.

With both branches in one call it gets ``[g, g]``. Of two calls the first returns a tensor that is filled with g when
the second comes, which returns g too: ``g + s (g - g) = g`` exactly, in every precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...guidance.run import CONDITIONAL, UNCONDITIONAL
from .arguments import Arguments
from .check import GuidanceNotApplied
from .layouts import IMAGE, OWN_WEAK, enabled
from .networks import NetworkCall, Selection
from .run import GuidedRun, Step


def network(run: GuidedRun, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The pipeline calls its network."""
    call = NetworkCall(module, function, Arguments.bind(module, args, kwargs))
    if any(call.arguments.values.get(name) for name in OWN_WEAK):
        return _own_weak(run, call)
    run.called(module)
    states = run.networks.states(call.arguments)
    count, batch, order = len(states[0]), run.networks.batch, run.layout.order
    if count not in (batch, batch * len(order)):
        raise GuidanceNotApplied(
            f"{type(run.pipe).__name__} calls its network with {count} rows for {batch} samples, which is not a form "
            "of guidance that is known here"
        )
    call = replace(call, count=count)
    return _one_branch(run, call, states) if count == batch else _batched(run, call, states)


def _batched(run: GuidedRun, call: NetworkCall, states: list[torch.Tensor]) -> Any:
    """Both branches in the rows of one call."""
    networks, order = run.networks, run.layout.order
    batch, first = networks.batch, order.index(CONDITIONAL) * networks.batch
    networks.calls |= {name: replace(call, first=i * batch) for i, name in enumerate(order)}
    step = run.open([x[first : first + batch] for x in states], call.module)
    if step.result is not None:
        run.unknown()
    wanted = step.wanted
    if IMAGE in order and UNCONDITIONAL in wanted:
        wanted[IMAGE] = wanted[UNCONDITIONAL]
    if wanted:
        selection = Selection.of(order, wanted, batch, states[0].device)
        step.add(networks.predict(call, selection, step.calls[0]))
        _further_branches(run, step)
    g = run.finish(step)
    return networks.output([torch.cat([networks.full(x, i)] * len(order)) for i, x in enumerate(g)], call)


def _one_branch(run: GuidedRun, call: NetworkCall, states: list[torch.Tensor]) -> Any:
    """One of two calls, or the only one of a pipeline whose guidance is off."""
    networks = run.networks
    step = run.open(states, call.module)
    role = _role(networks.context, step)
    if role in step.roles:
        run.unknown()
    step.roles.append(role)
    networks.calls[role] = call
    wanted = step.wanted
    if step.result is None and UNCONDITIONAL in wanted and enabled(run.pipe) is False:
        run.missing()
    if role in wanted:
        selection = Selection.of([role], {role: wanted[role]}, networks.batch, states[0].device)
        selection = replace(selection, rows=wanted[role])
        step.add(networks.predict(call, selection, step.calls[0]))
        if role == CONDITIONAL:
            _further_branches(run, step)
    if step.result is None and all(name in step.predictions[0] for name in wanted):
        g = run.finish(step)
        for held in step.held:
            for i, x in enumerate(g):
                held[i].copy_(networks.full(x, i))
        if run.layout.solved and step.held:
            return networks.output([_solved(run, step, x, i) for i, x in enumerate(g)], call)
    tensors = [networks.full(x, i).clone() for i, x in enumerate(_so_far(step, role, states))]
    step.held.append(tensors)
    return networks.output(tensors, call)


def _role(context: str | None, step: Step) -> str:
    if context in ("cond", "uncond"):
        return CONDITIONAL if context == "cond" else UNCONDITIONAL
    return UNCONDITIONAL if step.roles else CONDITIONAL


def _so_far(step: Step, role: str, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """The guided predictions; until they are there, the branch's own, in whose place they will be."""
    if step.result is not None:
        return step.result
    own = [p.get(role) for p in step.predictions]
    return [torch.zeros_like(x) if p is None or len(p) != len(x) else p.detach() for p, x in zip(own, states)]


def _solved(run: GuidedRun, step: Step, g: torch.Tensor, i: int) -> torch.Tensor:
    """The unconditional output with which the pipeline's ``c + s (c - u)`` is g."""
    c = step.predictions[i][CONDITIONAL].detach().float()
    return run.networks.full(c - (g.float() - c) / float(run.pipe.guidance_scale), i)


def _further_branches(run: GuidedRun, step: Step) -> None:
    """Predictions of the branches that methods bring."""
    call = step.calls[0]
    for name, rows in call.branches.items():
        if name not in run.layout.order:
            step.predictions[0][name] = run.networks.evaluate(name, call.x, call.node, rows)


def _own_weak(run: GuidedRun, call: NetworkCall) -> Any:
    """A weak branch of the pipeline's own, of which it adds ``s (c - weak)`` with c what it was given: g."""
    step, networks = run.step, run.networks
    if step is None or step.result is None:
        run.unknown()
    step.extended, weak = True, step.result
    if step.conditional is not None:
        outputs = networks.run(call, None)
        run.sessions[0].nfe += len(outputs[0])
        weak = [g - (c - w) for g, c, w in zip(step.result, step.conditional, outputs)]
    return networks.output([networks.full(x, i) for i, x in enumerate(weak)], call)


def control(run: GuidedRun, module: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The pipeline calls a ControlNet before its network: it runs for the rows that the network will run for."""
    arguments = Arguments.bind(module, args, kwargs)
    known = run.controls.setdefault(id(module), None)
    (x, *_), batch = run.networks.states(arguments), run.networks.batch
    both = len(x) > batch
    first = run.layout.order.index(CONDITIONAL) * batch if both else 0
    rows = slice(first, first + batch)
    wanted = run.open([x[rows]], module).wanted
    if not wanted and known is not None:
        return known
    if both and UNCONDITIONAL not in wanted:
        output = _repeated(arguments.rows(rows, len(x)).call(function), len(x) // batch)
    else:
        output = arguments.call(function)
    run.controls[id(module)] = output
    return output


def _repeated(value: Any, times: int) -> Any:
    """Every tensor of an output as often along the batch as there are branches."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * times)
    if isinstance(value, dict):
        return type(value)(**{k: _repeated(v, times) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(v, times) for v in value)
    return value
