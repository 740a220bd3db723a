"""Guidance, and steps without the network, in diffusers pipelines; loaded with diffusers when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import GuidanceNotApplied, guide

__all__ = ["GuidanceNotApplied", "guide"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import attach
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "diffusers":
            raise
        raise ImportError(
            f"{name} needs diffusers: pip install 'fewstep[diffusers]'", name="diffusers"
        ) from error
    return getattr(attach, name)
