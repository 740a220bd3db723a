"""``guide()``: methods of guidance, and steps without the network, in pipelines of diffusers that stay as they are."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..guidance import Extrapolate, Guidance, Method, Record
from ..guidance import parse as parse_guidance
from .guide_check import GuidanceNotApplied, check_pipeline
from .guide_classes import HANDLE, restore, swap, swapped
from .guide_labels import label_hooks
from .guide_layouts import CONTROLS, DENOISERS, Layout, layout_of
from .guide_noise import SampleNoise
from .guide_run import ACTIVE, GuidedRun, with_scale
from .guide_weak import block_call, chosen_blocks

Spec = str | float | Method | Guidance | None


def guide(
    pipe: Any, guidance: Spec = None, *, skip: str | Extrapolate | None = None, audio: Spec = None
) -> Handle:
    """Put guidance, and steps without the network, into a pipeline of diffusers, which stays as it is.

    ::

        handle = fs.guide(pipe, fs.APG(10.0) + fs.CADS(), skip="h2/s3")
        image = pipe("a photo of a cat", guidance_scale=7.5).images[0]
        print(handle.nfe, handle.trace())
        handle.remove()

    The pipeline must make its unconditional prediction: pass a ``guidance_scale`` (``true_cfg_scale`` and a negative
    prompt for FLUX, Qwen-Image and HunyuanVideo) above 1. Its value applies where ``guidance`` gives no scale of its
    own, and is not used otherwise. The network runs only for the rows that the guidance asks for, and a ControlNet with
    it.

    Args:
        pipe: a pipeline, standard or modular. A modular one gets a guider in the place of its own.
        guidance: methods, their text (``"apg:10+cads"``) or a scale; None is the pipeline's own guidance.
        skip: steps in which no network runs and predictions are continued, :class:`fewstep.Extrapolate` or its text.
        audio: guidance of the audio of LTX 2, the same as of the video if None.

    Returns:
        The handle, also a context manager: ``nfe`` and ``trace()`` of the last call, ``remove()``.

    Raises:
        ValueError: for pipelines that cannot be guided or are guided already, and for methods that contradict each
            other; when the pipeline is called, before its first evaluation, for methods that it cannot have.
        GuidanceNotApplied: in a call, where the pipeline does not use the guided prediction.
    """
    chosen = _with_skip(guidance, skip)
    if _has_guider(pipe):
        from .guider import hand_over  # type: ignore[import-not-found]

        return hand_over(pipe, chosen)
    return Handle(pipe, chosen, None if audio is None else _with_skip(audio, skip))


class Handle:
    """A guided pipeline; leaving it as a context, or :meth:`remove`, gives the pipeline its own guidance back."""

    def __init__(self, pipe: Any, guidance: Guidance | None, audio: Guidance | None) -> None:
        if not callable(pipe) or not hasattr(pipe, "scheduler"):
            raise TypeError(f"guide() takes a pipeline of diffusers, got {type(pipe).__name__}")
        if swapped(pipe):
            raise ValueError(
                f"this {type(pipe).__name__} is guided already; call remove() of its handle first, and combine methods "
                "with +"
            )
        self.pipe, self.guidance, self.audio = pipe, guidance, audio
        self.layout: Layout = layout_of(pipe)
        self._signature = inspect.signature(pipe.__call__)
        self._threads = threading.local()
        self._latest: GuidedRun | None = None
        self._lock = threading.Lock()
        self._swapped: dict[int, Any] = {}
        self._hooks: list[Any] = []
        self._attach(
            pipe, {"__call__": _pipeline_call, "prepare_latents": _latents, "prepare_audio_latents": _audio}
        )
        pipe.__dict__[HANDLE] = self
        try:
            self._attach_parts()
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

    # -- attaching -------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Give the pipeline and its parts their classes back; nothing of the guidance stays."""
        for obj in self._swapped.values():
            restore(obj)
        for hook in self._hooks:
            hook.remove()
        self._swapped, self._hooks = {}, []
        self.pipe.__dict__.pop(HANDLE, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: object) -> Handle:
        return self

    def _attach(self, obj: Any, methods: dict[str, Callable[..., Any]]) -> None:
        if id(obj) not in self._swapped:
            swap(obj, methods)
            self._swapped[id(obj)] = obj

    def _attach_parts(self) -> None:
        """The pipeline's present networks and scheduler; parts that were replaced since are let go."""
        pipe, found = self.pipe, []
        for name in DENOISERS:
            module = getattr(pipe, name, None)
            if isinstance(module, torch.nn.Module):
                found.append((module, _NETWORK))
        if not found:
            raise ValueError(
                f"{type(pipe).__name__} has no network named {', '.join(DENOISERS)}; guidance does not know what to guide"
            )
        modules = [module for module, _ in found]
        for name in CONTROLS:
            module = getattr(pipe, name, None)
            if isinstance(module, torch.nn.Module):
                found.append((module, _CONTROL))
        found.append((pipe.scheduler, _SCHEDULER))
        for m in self.guidance.methods if self.guidance else ():
            if m.name in ("slg", "stg") and m.weak is None:  # type: ignore[attr-defined]
                found += [(b, _BLOCK) for module in modules for b in chosen_blocks(module, m.layers)]  # type: ignore[attr-defined]
        kept = {id(pipe), *(id(part) for part, _ in found)}
        for key in [key for key in self._swapped if key not in kept]:
            restore(self._swapped.pop(key))
        for part, methods in found:
            self._attach(part, methods)
        if not self._hooks and not self.layout.condition and self.guidance and self.guidance.has("cads"):
            self._hooks = label_hooks(modules)

    # -- a call ----------------------------------------------------------------------------------------------------

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the pipeline."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        own = self.layout.own_scale(arguments)
        streams = []
        for guidance in (self.guidance, *(self.audio or self.guidance for _ in self.layout.streams)):
            if guidance is None:
                guidance = self.layout.own_guidance(arguments)
            elif guidance.methods and all(isinstance(m, Extrapolate) for m in guidance.methods):
                guidance = guidance + self.layout.own_guidance(arguments)
            streams.append(with_scale(guidance, own))
            check_pipeline(self.pipe, self.layout, streams[-1], arguments)
        with self._lock:
            self._attach_parts()
        noise = SampleNoise.of(arguments.get("generator"))
        run = self._threads.run = self._latest = GuidedRun(self.pipe, self.layout, streams, arguments, noise)
        token = ACTIVE.set(run)
        try:
            result = original(*args, **kwargs)
        finally:
            ACTIVE.reset(token)
        run.close()
        return result


def _with_skip(guidance: Spec, skip: str | Extrapolate | None) -> Guidance | None:
    chosen = None if guidance is None else parse_guidance(guidance)
    if skip is None:
        return chosen
    if isinstance(skip, str):
        (skip,) = parse_guidance("extrapolate:" + skip.removeprefix("extrapolate:")).methods  # type: ignore[assignment]
    if not isinstance(skip, Extrapolate):
        raise TypeError(f"skip is fs.Extrapolate(...) or its text such as 'h2/s3', got {type(skip).__name__}")
    return Guidance((skip,)) if chosen is None else chosen + skip


def _has_guider(pipe: Any) -> bool:
    """Whether a pipeline, modular or not, has a guider component that decides its guidance."""
    return getattr(pipe, "guider", None) is not None


# -- what the methods of the parts are replaced by: a thread that is in no guided run of theirs sees no difference -----


def _running(part: str, obj: Any) -> GuidedRun | None:
    run = ACTIVE.get()
    if run is None or run.inside or not run.owns(part, obj):
        return None
    return run


def _pipeline_call(pipe: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    handle = pipe.__dict__.get(HANDLE)
    return original(*args, **kwargs) if handle is None else handle.call(original, args, kwargs)


def _latents(pipe: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _shaped(pipe, 0, original(*args, **kwargs))


def _audio(pipe: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _shaped(pipe, 1, original(*args, **kwargs))


def _shaped(pipe: Any, i: int, made: Any) -> Any:
    run = ACTIVE.get()
    first = made[0] if isinstance(made, (tuple, list)) else made
    if run is not None and run.pipe is pipe and isinstance(first, torch.Tensor) and i < len(run.latents):
        run.latents[i] = first.shape
    return made


def _network(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = _running("network", module)
    return original(*args, **kwargs) if run is None else run.network(module, original, args, kwargs)


def _control(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = _running("control", module)
    return original(*args, **kwargs) if run is None else run.control(module, original, args, kwargs)


def _context(module: Any, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    run = _running("network", module)
    made = original(name, *args, **kwargs)
    return made if run is None else run.within(name, made)


def _set_timesteps(scheduler: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    made = original(*args, **kwargs)
    run = _running("scheduler", scheduler)
    if run is not None:
        run.new_timesteps()
    return made


def _scale(scheduler: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = _running("scheduler", scheduler)
    if run is not None:
        run.scaled(args[1] if len(args) > 1 else kwargs.get("timestep"))
    return original(*args, **kwargs)


def _step(scheduler: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = _running("scheduler", scheduler)
    return original(*args, **kwargs) if run is None else run.stepped(original, args, kwargs)


_NETWORK: Mapping[str, Any] = {"__call__": _network, "cache_context": _context}
_CONTROL: Mapping[str, Any] = {"__call__": _control}
_SCHEDULER: Mapping[str, Any] = {"set_timesteps": _set_timesteps, "scale_model_input": _scale, "step": _step}
_BLOCK: Mapping[str, Any] = {"__call__": block_call}

__all__ = ["GuidanceNotApplied", "Handle", "guide"]
