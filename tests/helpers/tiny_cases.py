"""What a tiny pipeline is: how to build it, and how to call it. The cases are in ``tiny_pipelines``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

diffusers: Any = importlib.import_module(
    "diffusers"
)  # its classes are loaded lazily, which type checkers cannot see


IMAGE = 32

LATENT = 16


@dataclass(frozen=True)
class Case:
    """A pipeline and how to call it; ``callbacks``: whether it takes ``callback_on_step_end``."""

    name: str
    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    fast: bool = False
    flow: bool = False
    callbacks: bool = True
    image_to_image: bool = False
    output: str = "images"

    def pipeline(self) -> Any:
        """The pipeline; built once, so assign a scheduler before each use. Its native scheduler is ``pipe.native``."""
        return _pipeline(self.name)

    def native(self) -> Any:
        """A fresh scheduler of the class and config that the family ships with."""
        pipe = self.pipeline()
        return type(pipe.native).from_config(pipe.native.config)

    def call(self, pipe: Any, steps: int | None = 2, seed: int = 0, **changes: Any) -> torch.Tensor:
        """Run the pipeline from a seed; returns latents, or the image where the family has none."""
        arguments = {**self.arguments(), "generator": torch.Generator().manual_seed(seed), **changes}
        if steps is not None:
            arguments["num_inference_steps"] = steps
        with torch.no_grad():
            return torch.as_tensor(getattr(pipe(**arguments), self.output))


CASES: dict[str, Case] = {}
"""Filled by ``tiny_pipelines``."""


def randn(*shape: int, seed: int = 7) -> torch.Tensor:
    """Fixed normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _pipeline(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            pipe = CASES[name].build()
        except AttributeError as error:
            if "module diffusers has no attribute" not in str(error):
                raise
            pytest.skip(f"this version of diffusers has no {str(error).split()[-1]}")
    pipe.set_progress_bar_config(disable=True)
    pipe.native = pipe.scheduler
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe
