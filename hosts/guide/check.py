"""Refusals, with the remedy; and the check that a pipeline really used the guided prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...guidance import Guidance, Run
from .arguments import is_compiled
from .layouts import Layout


class GuidanceNotApplied(RuntimeError):
    """A pipeline did not use the guided prediction; its result would not be the guided one."""


def check_pipeline(pipe: Any, layout: Layout, guidance: Guidance, arguments: Mapping[str, Any]) -> None:
    """ValueError, before any work, for a call of a pipeline that will make no unconditional prediction."""
    value = arguments.get(layout.scale)
    if guidance.guides and isinstance(value, (int, float)) and layout.own_scale(arguments) == 1.0:
        raise ValueError(
            f"guidance {guidance.spec!r} needs the unconditional prediction, and {type(pipe).__name__} makes none in "
            f"this call; {layout.remedy()}"
        )
    for m in guidance.methods:
        if m.needs_scale and not guidance.guides and all(n.weight is None for n in guidance.methods):
            raise ValueError(
                f"guidance {m.name!r} needs a scale: add fs.CFG(w), or let the pipeline's own apply: {layout.remedy()}"
            )


def check_run(
    pipe: Any, guidance: list[Guidance], run: Run, module: Any, state: torch.Tensor, channels: int
) -> None:
    """ValueError, before the first evaluation, for methods that a pipeline cannot have, with what helps there."""
    name, scheduler = type(pipe).__name__, type(pipe.scheduler).__name__
    cached = getattr(module, "is_cache_enabled", False)
    for m in (m for g in guidance for m in g.methods):
        if (m.needs_evaluate or m.has("move")) and not run.moves:
            raise ValueError(
                f"guidance {m.name!r} makes evaluations of its own between the steps, which {name} does not allow (a "
                "ControlNet, several states, or three branches); use fs.sample"
            )
        if m.needs_memoryless and (run.history or run.stages > 1 or run.startup):
            raise ValueError(
                f"guidance {m.name!r} changes the state between steps, and {scheduler} keeps more than the state; use "
                "DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, or FewStepScheduler with "
                "solver='ddim' or 'euler'"
            )
        if m.name == "cfgpp" and not run.first_order and run.solver != "dpmpp_2m":
            raise ValueError(
                f"guidance 'cfgpp' changes the step itself and is not defined for {scheduler}; use DDIMScheduler or "
                "EulerDiscreteScheduler without noise, DPMSolverMultistepScheduler of order 2, or FewStepScheduler "
                "with solver='ddim', 'euler' or 'dpmpp_2m'"
            )
        for branch, network in m.networks().items():
            if network is None and branch not in run.branches:
                raise ValueError(
                    f"guidance {m.name!r} needs a network of its own in a pipeline: give it as an option, a module "
                    "that is called like the pipeline's, or a function of (x, t)"
                )
            if network is None and is_compiled(module):
                raise ValueError(
                    f"guidance {m.name!r} disturbs layers of the network, which cannot be reached when it is compiled; "
                    "give it a network of its own, weak=module, or do not compile"
                )
        if m.name in ("cfg_norm", "mahiro") and (state.ndim == 3 or channels != 1):
            raise ValueError(
                f"guidance {m.name!r} works along channels in dimension 1, and the latents of {name} are "
                f"{tuple(state.shape)}; use fs.Renorm()"
            )
        if cached and (m.has("condition") or m.has("move") or m.needs_evaluate or m.networks()):
            raise ValueError(
                f"guidance {m.name!r} calls the network in other ways than the cache of features expects; call "
                "disable_cache() on the network first"
            )


class Verdict:
    """Whether what the scheduler was given is the guided prediction.

    The first step is compared at once; for the others the largest difference is kept where the tensors are, and looked
    at when the pipeline has ended, so that no step waits for the device.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.worst: torch.Tensor | None = None
        self.tolerance = 0.0

    def compare(self, given: torch.Tensor, guided: torch.Tensor, plain: bool) -> None:
        """Compare a model output with the guided prediction, without a learned variance that may follow it."""
        given = given[: guided.shape[0]]
        if given.numel() == guided.numel():
            guided = guided.reshape(given.shape)
        elif given.ndim == guided.ndim:
            common = tuple(slice(0, min(a, b)) for a, b in zip(given.shape, guided.shape))
            given, guided = given[common], guided[common]
        else:
            return
        given, wanted = given.detach().float(), guided.detach().float()
        error = (given - wanted).abs().amax()
        if plain:  # an affine rule is the same for a network of the other sign
            error = torch.minimum(error, (given + wanted).abs().amax())
        error = error / (wanted.abs().amax() + 1e-20)
        self.tolerance = 1e-3 if guided.dtype in (torch.float32, torch.float64) else 0.03
        if self.worst is not None:
            self.worst = torch.maximum(self.worst, error)
            return
        self.worst = error
        if not bool(error <= self.tolerance):
            self._raise(float(error))

    def settle(self) -> None:
        """Look at all steps."""
        if self.worst is not None and not bool(self.worst <= self.tolerance):
            self._raise(float(self.worst))

    def _raise(self, error: float) -> None:
        raise GuidanceNotApplied(
            f"{self.name} gave its scheduler something else than the guided prediction (off by {error:.2g} of it): "
            "it converts or copies predictions in a way that is not known here, or the prediction is not finite. "
            "Remove the guidance, or use a modular pipeline, whose guider can be replaced"
        )
