"""A guided pipeline: which parts of it have other methods, and what a call of it does."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...guidance import CFG, SLG, STG, Extrapolate, Guidance, Record
from .check import check_pipeline
from .classes import HANDLE, Methods, restore, swap, swapped
from .layouts import CONTROLS, DENOISERS, layout_of
from .parts import BLOCK, CONTROL, NETWORK, PIPELINE, SCHEDULER, label_hooks
from .run import ACTIVE, GuidedRun
from .weak import chosen_blocks


class Handle:
    """A guided pipeline; leaving it as a context, or :meth:`remove`, gives the pipeline its own guidance back.

    Only calls ``pipe(...)`` are guided: other pipelines with the same parts, and other threads, see no difference.
    """

    def __init__(self, pipe: Any, guidance: Guidance | None, audio: Guidance | None) -> None:
        if not callable(pipe) or not hasattr(pipe, "scheduler"):
            raise TypeError(f"guide() takes a pipeline of diffusers, got {type(pipe).__name__}")
        if swapped(pipe):
            raise ValueError(
                f"this {type(pipe).__name__} is guided already; call remove() of its handle first, and combine methods "
                "with +"
            )
        self.pipe: Any = pipe
        self.guidance, self.audio = guidance, audio
        self.layout = layout_of(pipe)
        self._signature = inspect.signature(pipe.__call__)
        self._threads = threading.local()
        self._latest: GuidedRun | None = None
        self._lock = threading.Lock()
        self._swapped: dict[int, Any] = {}
        self._hooks: list[Any] = []
        self._networks()
        pipe.__dict__[HANDLE] = self
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    # -- results ---------------------------------------------------------------------------------------------------

    @property
    def nfe(self) -> int:
        """Evaluations of the network in the last call (of this thread, if it made one), in those of one sample."""
        run = self._run
        return 0 if run is None else run.nfe

    def trace(self) -> list[Record]:
        """What every evaluation of the last call did: step, time, scale, rows run by branch, skipped, cosine."""
        run = self._run
        return [] if run is None else run.trace()

    @property
    def _run(self) -> GuidedRun | None:
        return getattr(self._threads, "run", None) or self._latest

    # -- parts -----------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Give the pipeline and its parts their classes back; nothing of the guidance stays."""
        for part in self._swapped.values():
            restore(part)
        for hook in self._hooks:
            hook.remove()
        self._swapped, self._hooks = {}, []
        self.pipe.__dict__.pop(HANDLE, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _networks(self) -> list[Any]:
        modules = [
            m for name in DENOISERS if isinstance(m := getattr(self.pipe, name, None), torch.nn.Module)
        ]
        if not modules:
            raise ValueError(
                f"{type(self.pipe).__name__} has no network that guidance knows (one of {', '.join(DENOISERS)})"
            )
        return modules

    def _parts(self) -> Iterator[tuple[Any, Methods]]:
        """The pipeline and the parts that it has now, with what replaces their methods."""
        yield self.pipe, PIPELINE
        yield self.pipe.scheduler, SCHEDULER
        modules = self._networks()
        for module in modules:
            yield module, NETWORK
        for name in CONTROLS:
            if isinstance(part := getattr(self.pipe, name, None), torch.nn.Module):
                yield part, CONTROL
        for m in self.guidance.methods if self.guidance else ():
            if isinstance(m, (SLG, STG)) and m.weak is None:
                for module in modules:
                    yield from ((block, BLOCK) for block in chosen_blocks(module, m.layers))

    def _attach(self) -> None:
        """Give the present parts other methods; those that the pipeline had before are let go."""
        with self._lock:
            found = {id(part): (part, methods) for part, methods in self._parts()}
            for key in self._swapped.keys() - found.keys():
                restore(self._swapped.pop(key))
            for key in found.keys() - self._swapped.keys():
                swap(*found[key])
                self._swapped[key] = found[key][0]
            if not self._hooks and not self.layout.condition and self.guidance and self.guidance.has("cads"):
                self._hooks = label_hooks(self._networks())

    # -- a call ----------------------------------------------------------------------------------------------------

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        guidance = [self._effective(self.guidance, bound.arguments)]
        guidance += [
            self._effective(self.audio or self.guidance, bound.arguments) for _ in self.layout.streams
        ]
        for chosen in guidance:
            check_pipeline(self.pipe, self.layout, chosen, bound.arguments)
        self._attach()
        run = GuidedRun(self.pipe, self.layout, guidance, bound.arguments, self._attach)
        self._threads.run = self._latest = run
        token = ACTIVE.set(run)
        try:
            result = original(*args, **kwargs)
            run.close()
            return result
        finally:
            ACTIVE.reset(token)
            run.release()

    def _effective(self, guidance: Guidance | None, arguments: Mapping[str, Any]) -> Guidance:
        """The composition for a call: where it has no guidance, or no scale, the pipeline's own applies."""
        if guidance is None:
            return self.layout.own_guidance(arguments)
        if all(isinstance(m, Extrapolate) for m in guidance.methods):
            return guidance + self.layout.own_guidance(arguments)
        own = self.layout.own_scale(arguments)
        if own == 1.0 or guidance.guides or any(m.weight is not None for m in guidance.methods):
            return guidance
        if guidance.has("cfg"):
            scaled = (replace(m, scale=own) if isinstance(m, CFG) else m for m in guidance.methods)
            return Guidance(tuple(scaled))
        return guidance + CFG(own)
