"""Guidance, and steps without the network, in diffusers pipelines that stay as they are."""

from .attach import guide
from .check import GuidanceNotApplied

__all__ = ["GuidanceNotApplied", "guide"]
