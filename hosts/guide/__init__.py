"""Guidance, and steps without the network, in diffusers pipelines; loaded with diffusers when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lazy import loaded

if TYPE_CHECKING:
    from .attach import GuidanceNotApplied, guide

__all__ = ["GuidanceNotApplied", "guide"]


def __getattr__(name: str) -> Any:
    return loaded(f"{__name__}.attach", __name__, __all__, name)
