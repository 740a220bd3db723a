"""Refusals, with the remedy; and the check that a pipeline really used the guided prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..guidance import Guidance, Run
from .guide_layouts import Layout


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
    pipe: Any, layout: Layout, guidance: list[Guidance], run: Run, calls: Mapping[str, Any]
) -> None:
    """ValueError, before the first evaluation, for methods that a pipeline cannot have, with what helps there."""
    name = type(pipe).__name__
    for m in (m for g in guidance for m in g.methods):
        if (m.needs_evaluate or m.has("move")) and not run.moves:
            raise ValueError(
                f"guidance {m.name!r} makes evaluations of its own between the steps, which {name} does not allow (a "
                "ControlNet, several states, or three branches); use fs.sample"
            )
        if m.needs_memoryless and (run.history or run.stages > 1 or run.startup):
            raise ValueError(
                f"guidance {m.name!r} changes the state between steps, and {type(pipe.scheduler).__name__} keeps more "
                "than the state; use DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler or "
                "FewStepScheduler with solver='ddim' or 'euler'"
            )
        if m.name == "cfgpp" and not run.first_order and run.solver != "dpmpp_2m":
            raise ValueError(
                f"guidance 'cfgpp' changes the step itself and is not defined for {type(pipe.scheduler).__name__}; use "
                "DDIMScheduler or EulerDiscreteScheduler without noise, DPMSolverMultistepScheduler of order 2, or "
                "FewStepScheduler with solver='ddim' or 'dpmpp_2m'"
            )
        for branch, network in m.networks().items():
            if network is None and branch not in run.branches:
                raise ValueError(
                    f"guidance {m.name!r} needs a network of its own in a pipeline: give it as an option, a module that "
                    "is called like the pipeline's, or a function of (x, t)"
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
        """Compare a model output with the guided prediction; shapes that differ are compared where both are."""
        given = given[: guided.shape[0]]
        if given.shape[1:] != guided.shape[1:]:
            if given.ndim != guided.ndim:
                return
            common = tuple(slice(0, min(a, b)) for a, b in zip(given.shape, guided.shape))
            given, guided = given[common], guided[common]
        given, wanted = given.detach().float(), guided.detach().float()
        size = wanted.abs().amax() + 1e-20
        error = (given - wanted).abs().amax() / size
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
            f"{self.name} gave its scheduler something else than the guided prediction (off by {error:.2g} of it): it "
            "converts or copies predictions in a way that is not known here, or the prediction is not finite. Remove the "
            "guidance, or use a modular pipeline, whose guider can be replaced"
        )
