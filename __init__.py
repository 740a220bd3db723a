"""fewstep: diffusion and flow models, sampled well in few network evaluations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import guidance, hosts, samplers, schedules, tuning
    from .guidance import (
        APG,
        CADS,
        CFG,
        DPS,
        FDG,
        MAMBO,
        MCG,
        MMPS,
        PAG,
        PCG,
        SEG,
        SLG,
        STG,
        STSL,
        TCFG,
        TMPD,
        AdaptiveGuidance,
        AutoGuidance,
        CFGNorm,
        CFGPlusPlus,
        CFGZeroStar,
        ClassifierGuidance,
        Denoiser,
        EnergyGuidance,
        Extrapolate,
        GradientFreeClassifierGuidance,
        LinearAG,
        MaHiRo,
        PerpNeg,
        PiGDM,
        Renorm,
        Rescale,
        RewardGuidance,
        SelfGuidedMinority,
    )
    from .hosts.diffusers import FewStepScheduler
    from .hosts.guide import GuidanceNotApplied, guide
    from .hosts.library import sample, sample_adaptive
    from .samplers import NumericalError, Program, Solver, Stepper, compile, solvers
    from .samplers import parse as solver

if __package__:  # pytest imports this file as a bare module where the checkout's name is not an identifier
    from .hosts import diffusers as _diffusers  # noqa: F401  saved pipelines name this module; diffusers is not loaded

__version__ = "0.1.0"

__all__ = [
    "APG",
    "CADS",
    "CFG",
    "DPS",
    "FDG",
    "MAMBO",
    "MCG",
    "MMPS",
    "PAG",
    "PCG",
    "SEG",
    "SLG",
    "STG",
    "STSL",
    "TCFG",
    "TMPD",
    "AdaptiveGuidance",
    "AutoGuidance",
    "CFGNorm",
    "CFGPlusPlus",
    "CFGZeroStar",
    "ClassifierGuidance",
    "Denoiser",
    "EnergyGuidance",
    "Extrapolate",
    "FewStepScheduler",
    "GradientFreeClassifierGuidance",
    "GuidanceNotApplied",
    "LinearAG",
    "MaHiRo",
    "NumericalError",
    "PerpNeg",
    "PiGDM",
    "Program",
    "Renorm",
    "Rescale",
    "RewardGuidance",
    "SelfGuidedMinority",
    "Solver",
    "Stepper",
    "compile",
    "guidance",
    "guide",
    "hosts",
    "sample",
    "sample_adaptive",
    "samplers",
    "schedules",
    "solver",
    "solvers",
    "tuning",
]


_PACKAGES = ("guidance", "hosts", "samplers", "schedules", "tuning")
_HOMES = {
    "FewStepScheduler": "hosts.diffusers",
    "GuidanceNotApplied": "hosts.guide",
    "guide": "hosts.guide",
    "sample": "hosts.library",
    "sample_adaptive": "hosts.library",
    **dict.fromkeys(("NumericalError", "Program", "Solver", "Stepper", "compile", "solvers"), "samplers"),
}
"""Where a name is defined; every other one is in guidance."""


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used, so that ``import fewstep`` costs next to nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name == "solver":
        value = import_module(".samplers", __name__).parse
    else:
        value = getattr(import_module(f".{_HOMES.get(name, 'guidance')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
