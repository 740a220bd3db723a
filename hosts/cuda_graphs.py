"""The whole sampling loop as one CUDA graph: captured once, then replayed with one launch.

All coefficients and times are constants of the capture, the start state is copied to where the graph reads it. What the
network reads besides (weights, embeddings in a closure) is read at the address that it had: change it in place, or ask
for another denoiser. Graphs belong to their denoiser and are freed with it; the last few are kept.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..guidance import Denoiser, Guidance
from ..samplers import NoiseSource, PhiloxNoise, Program, Stepper

KEPT = 4
"""Graphs kept for a denoiser; each holds the memory of one run."""

Loop = Callable[[torch.Tensor, Callable[[], None]], "tuple[torch.Tensor, Stepper]"]
_GRAPHS: weakref.WeakKeyDictionary[Denoiser, OrderedDict[Hashable, Captured]] = weakref.WeakKeyDictionary()


def check(x: torch.Tensor, program: Program, methods: Guidance | None, noise: NoiseSource | None) -> None:
    """ValueError, with the reason, for a loop that cannot be captured."""
    if noise is not None and not isinstance(noise, PhiloxNoise):
        raise ValueError(
            f"cuda_graph=True cannot capture the noise of solver {program.solver!r}, which is drawn on the CPU; "
            "use noise='philox' or a deterministic solver"
        )
    for m in () if methods is None else methods.methods:
        if m.reads_values:
            raise ValueError(
                f"cuda_graph=True cannot capture guidance {m.name!r}, which decides by the data what runs next"
            )
        if m.needs_noise:
            raise ValueError(
                f"cuda_graph=True cannot capture guidance {m.name!r}, which draws noise on the CPU"
            )
        if m.needs_autograd or m.needs_gradients:
            raise ValueError(f"cuda_graph=True cannot capture guidance {m.name!r}, which takes gradients")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("cuda_graph=True records no gradients, but x requires one")
    if not x.is_cuda:
        raise ValueError(f"cuda_graph=True needs a CUDA device; x is on {x.device.type!r}")


class Captured:
    """One loop for one shape: the graph, where it reads and writes, and how many evaluations a replay is."""

    def __init__(self, denoiser: Denoiser, x: torch.Tensor, loop: Loop) -> None:
        self.x = torch.empty_like(x).copy_(x)
        before = denoiser.nfe
        # Once outside of the capture, on a stream of its own: what compiles, allocates or is chosen at first use.
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side), torch.no_grad():
            loop(self.x, _nothing)
        torch.cuda.current_stream(x.device).wait_stream(side)
        self.nfe, denoiser.nfe = denoiser.nfe - before, before
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.result, self.stepper = loop(self.x, _nothing)
        denoiser.nfe = before

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.x.copy_(x)
        self.graph.replay()
        result = self.result.clone()
        self.stepper.look_back()
        return result


def replay(denoiser: Denoiser, key: tuple[Any, ...], x: torch.Tensor, loop: Loop) -> torch.Tensor:
    """The result of the loop for x, by a graph; ``key`` is all that the loop depends on besides the denoiser and x."""
    graphs = _GRAPHS.setdefault(denoiser, OrderedDict())
    networks = (denoiser.fn, denoiser.unconditional, *denoiser.branches.values(), denoiser.condition)
    name = (*map(_identity, (*key, *networks)), tuple(x.shape), x.stride(), x.dtype, x.device)
    captured = graphs.get(name)
    if captured is None:
        captured = graphs[name] = Captured(denoiser, x, loop)
        while len(graphs) > KEPT:
            graphs.popitem(last=False)
    graphs.move_to_end(name)
    result = captured(x)
    denoiser.nfe += captured.nfe
    return result


def _identity(value: Any) -> Hashable:
    """Equal for what gives the same loop: frozen data by value, networks and tensors as the objects they are."""
    if isinstance(value, PhiloxNoise):
        return value.seeds
    try:
        return hash(value), value
    except TypeError:
        return id(value)


def _nothing() -> None: ...
