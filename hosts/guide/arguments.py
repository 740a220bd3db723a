"""The arguments of a call of a network: by name, for some of its rows, with another state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .classes import original_class

Rows = slice | torch.Tensor

# Tensors without a batch dimension, whose first dimension may equal the batch size by accident.
SHARED = frozenset(
    "image_rotary_emb txt_ids img_ids rope_interpolation_scale timestep_cond ip_adapter_masks".split()
)
_STATE = ("sample", "hidden_states", "x")
_TIME = ("timestep", "timesteps", "t", "r")


@dataclass(frozen=True)
class Arguments:
    """One call: values by name, of which the first ``positional`` were given without it."""

    values: dict[str, Any]
    positional: int
    names: tuple[str, ...]

    @classmethod
    def bind(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """What a module was called with; TypeError for positional arguments beyond its signature."""
        names = parameters_of(original_class(unwrapped(module)))
        if len(args) > len(names):
            raise TypeError(
                f"{type(module).__name__} takes {len(names)} positional arguments, got {len(args)}"
            )
        return cls({**dict(zip(names, args)), **kwargs}, len(args), names)

    def name(self, kind: str, candidates: tuple[str, ...] = ()) -> str:
        """The name of the argument that holds the ``state`` or the ``time``."""
        known = candidates or (_STATE if kind == "state" else _TIME)
        for name in (*known, self.names[0] if kind == "state" and self.names else ""):
            if self.values.get(name) is not None:
                return name
        raise TypeError(f"cannot find the {kind} among the network's arguments {', '.join(self.values)}")

    def changed(self, **values: Any) -> Arguments:
        """With other values."""
        return replace(self, values={**self.values, **values})

    def rows(
        self, rows: Rows, count: int, lists: Collection[str] = (), second: Collection[str] = ()
    ) -> Arguments:
        """For some of ``count`` rows.

        Arguments named in ``lists`` are lists with one entry a row, those in ``second`` have the rows in their second
        dimension.
        """

        def chosen(name: str, value: Any) -> Any:
            if name in SHARED or value is None:
                return value
            if name in lists:
                return _entries(value, rows)
            return value[:, rows] if name in second else _take(value, rows, count)

        return replace(self, values={k: chosen(k, v) for k, v in self.values.items()})

    def call(self, function: Callable[..., Any]) -> Any:
        """Call a function with them, as they were given."""
        first = self.names[: self.positional]
        return function(
            *(self.values[n] for n in first), **{k: v for k, v in self.values.items() if k not in first}
        )


def unwrapped(module: Any) -> Any:
    """The module inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: Any) -> bool:
    """Whether a module is compiled, in either way."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """The names of what a class of modules can be called with, in order."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _entries(values: Iterable[Any], rows: Rows) -> list[Any]:
    values = list(values)
    return values[rows] if isinstance(rows, slice) else [values[i] for i in rows.tolist()]


def _take(value: Any, rows: Rows, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != count:
            return value
        return value[rows.to(value.device) if isinstance(rows, torch.Tensor) else rows]
    if isinstance(value, dict):
        return {k: v if k in SHARED else _take(v, rows, count) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_take(v, rows, count) for v in value)
    return value


# -- a part of a tensor that has the shape of the latents -------------------------------------------------------------

Window = tuple[slice, ...] | None


def window(shape: torch.Size, latents: torch.Size | None) -> Window:
    """Where in each row of a tensor the latents are: further channels or tokens follow them. None: all of it."""
    if latents is None or len(latents) != len(shape) or shape[1:] == latents[1:]:
        return None
    if any(a < b for a, b in zip(shape[1:], latents[1:])):
        return None
    return (slice(None), *(slice(0, n) for n in latents[1:]))


def inner(value: torch.Tensor, where: Window) -> torch.Tensor:
    """The part at a window."""
    return value if where is None else value[where]


def with_inner(value: torch.Tensor, where: Window, part: torch.Tensor) -> torch.Tensor:
    """The tensor with another part at a window."""
    if where is None:
        return part
    changed = value.to(torch.promote_types(value.dtype, part.dtype), copy=True)
    changed[where] = part
    return changed
