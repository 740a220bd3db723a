"""A recipe as the sampler function that k-diffusion and ComfyUI call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..samplers import Stepper, compile
from ..schedules import EDM, Node, TimeGrid
from ..tuning import Recipe, load
from ..tuning.table import init_noise_sigma

SamplerFunction = Callable[..., torch.Tensor]


def recipe_sampler(recipe: str | Path | Recipe) -> SamplerFunction:
    """``sample(model, x, sigmas, extra_args=None, callback=None, disable=None)`` that runs a recipe.

    ``model(x, sigma, **extra_args)`` returns the denoised prediction, with sigma of shape (B,); states are ``x_0 +
    sigma eps``, of flow models ``(1 - sigma) x_0 + sigma eps``. The levels are the recipe's own; ``sigmas`` must start
    and end where they do (to 1 % at the start). x is ``sigmas[0]`` times unit noise, as in all these samplers; it is
    brought to the size that the recipe starts from, which on VP models is ``sqrt(1 + sigma_0^2)``.

    Raises ValueError for a recipe that cannot be read and for other ends.
    """
    chosen = load(recipe)
    flow = chosen.frame == "flow"

    def sample(
        model: Callable[..., torch.Tensor],
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        first, last = float(sigmas[0]), float(sigmas[-1])
        if abs(first / chosen.levels[0] - 1.0) > 0.01 or last != chosen.levels[-1]:
            raise ValueError(
                f"this recipe goes from sigma = {chosen.levels[0]:g} to {chosen.levels[-1]:g}, the sigmas given from "
                f"{first:g} to {last:g}; it cannot start or end elsewhere"
            )
        nodes = [Node(k, 1.0 - k, k) if flow else Node(k, 1.0, k) for k in chosen.levels]
        program = compile(chosen.solver, _grid(nodes))
        stepper = Stepper(program, x * (init_noise_sigma(chosen.frame, nodes[0]) / first))
        while not stepper.done:
            node, state, i = stepper.node, stepper.x, stepper.evaluations
            sigma = state.new_full((len(state),), node.sigma)
            denoised = model(state, sigma, **(extra_args or {}))
            if callback is not None:
                callback({"x": state, "i": i, "sigma": sigma[0], "sigma_hat": sigma[0], "denoised": denoised})
            stepper.step(denoised)
        return stepper.x

    return sample


def _grid(nodes: list[Node]) -> TimeGrid:
    t, alpha, sigma = np.array(nodes).T
    return TimeGrid(t, alpha, sigma, EDM())
