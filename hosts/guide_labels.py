"""Class labels as a condition: where a network embeds them itself, the embedding is what a method changes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding

from .guide_run import ACTIVE


def label_hooks(modules: list[Any]) -> list[Any]:
    """Hooks on all label embeddings of networks, active in guided runs only; ValueError where there are none."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, LabelEmbedding)]
    if not parts:
        names = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"guidance 'cads' finds no condition in {names}: no text and no label embedding")
    return [part.register_forward_hook(_embedded) for part in parts]


def _embedded(part: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    run = ACTIVE.get()
    return None if run is None or run.labels is None else run.labelled(output)
