"""fewstep: diffusion and flow models, sampled well in few network evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __package__:  # pytest imports this file as a bare module where the checkout's name is not an identifier
    from . import guidance, schedules
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
    from .hosts import diffusers as _diffusers  # noqa: F401  saved pipelines name this module; diffusers is not loaded
    from .hosts.library import sample, sample_adaptive
    from .samplers import NumericalError, Program, Solver, Stepper, compile, solvers
    from .samplers import parse as solver

if TYPE_CHECKING:
    from .hosts.diffusers import FewStepScheduler
    from .hosts.guide import guide

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
    "sample",
    "sample_adaptive",
    "schedules",
    "solver",
    "solvers",
]


def __getattr__(name: str) -> Any:
    if name == "FewStepScheduler":
        from .hosts.diffusers import FewStepScheduler

        return FewStepScheduler
    if name == "guide":
        from .hosts.guide import guide

        return guide
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
