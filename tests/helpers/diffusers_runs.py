"""What tests of the diffusers scheduler share: a scheduler, a network of no training, and a pipeline's loop."""

from __future__ import annotations

import importlib
from typing import Any

import torch

import fewstep as fs

diffusers: Any = importlib.import_module("diffusers")  # loaded lazily, which type checkers cannot see
FewStepScheduler: Any = fs.FewStepScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SOLVERS = ("ddim", "dpmpp_2m", "unipc:order=3", "deis", "heun", "euler_ancestral")
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Smooth in both arguments."""
    return torch.sin(1.3 * x) + 0.1 * t.float() / 1000


def run(scheduler: Any, x: torch.Tensor = X, start: int = 0, **arguments: Any) -> torch.Tensor:
    """What a pipeline does, after set_timesteps."""
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **arguments)[0]
    return x


def make(solver: str = "unipc", steps: int | None = 8, **options: Any) -> Any:
    """A scheduler of Stable Diffusion, ready to run unless ``steps`` is None."""
    scheduler = FewStepScheduler(**{**SD, "timestep_spacing": "trailing", **options}, solver=solver)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler
