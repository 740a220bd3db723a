"""What stands in the place of methods of a pipeline and its parts: the originals, outside of its guided run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding

from . import placement
from .classes import HANDLE
from .layouts import CONTROLS, DENOISERS
from .run import ACTIVE, GuidedRun
from .weak import block_call

Original = Callable[..., Any]


def _run_of(names: tuple[str, ...], part: Any) -> GuidedRun | None:
    """The run that this thread is in, if an object is one of these parts of its pipeline."""
    run = ACTIVE.get()
    if run is None or run.networks.running:
        return None
    return run if any(getattr(run.pipe, name, None) is part for name in names) else None


def _pipeline(pipe: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    handle = pipe.__dict__.get(HANDLE)
    return original(*args, **kwargs) if handle is None else handle.call(original, args, kwargs)


def _latents(pipe: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    return _of_shape(pipe, 0, original(*args, **kwargs))


def _audio_latents(pipe: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    return _of_shape(pipe, 1, original(*args, **kwargs))


def _of_shape(pipe: Any, i: int, made: Any) -> Any:
    """The run learns what the states look like, without further channels or tokens that the network is given."""
    run = ACTIVE.get()
    first = made[0] if isinstance(made, (tuple, list)) else made
    if run is not None and run.pipe is pipe and isinstance(first, torch.Tensor):
        if i < len(run.networks.latents):
            run.networks.latents[i] = first.shape
    return made


def _network(module: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(DENOISERS, module)
    return (
        original(*args, **kwargs) if run is None else placement.network(run, module, original, args, kwargs)
    )


def _control(module: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(CONTROLS, module)
    return (
        original(*args, **kwargs) if run is None else placement.control(run, module, original, args, kwargs)
    )


def _context(module: Any, original: Original, name: str, *args: Any, **kwargs: Any) -> Any:
    run, made = _run_of(DENOISERS, module), original(name, *args, **kwargs)
    return made if run is None else run.networks.within(name, made)


def _set_timesteps(scheduler: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    run, made = _run_of(("scheduler",), scheduler), original(*args, **kwargs)
    if run is not None:
        run.timesteps_set()
    return made


def _scale_model_input(scheduler: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(("scheduler",), scheduler)
    if run is not None:
        run.scaling(args[1] if len(args) > 1 else kwargs.get("timestep"))
    return original(*args, **kwargs)


def _step(scheduler: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    run = _run_of(("scheduler",), scheduler)
    return original(*args, **kwargs) if run is None else run.stepping(original, args, kwargs)


PIPELINE = {"__call__": _pipeline, "prepare_latents": _latents, "prepare_audio_latents": _audio_latents}
NETWORK = {"__call__": _network, "cache_context": _context}
CONTROL = {"__call__": _control}
SCHEDULER = {"set_timesteps": _set_timesteps, "scale_model_input": _scale_model_input, "step": _step}
BLOCK = {"__call__": block_call}


def label_hooks(modules: list[Any]) -> list[Any]:
    """Hooks on all label embeddings of networks, active in guided runs only; ValueError where there are none."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, LabelEmbedding)]
    if not parts:
        names = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"guidance 'cads' finds no condition in {names}: no text and no label embedding")
    return [part.register_forward_hook(_embedded) for part in parts]


def _embedded(part: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    run = ACTIVE.get()
    return None if run is None else run.networks.embedded(output)
