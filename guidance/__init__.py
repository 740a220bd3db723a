"""What is predicted: networks and the guidance that wraps them."""

from .adaptive import AdaptiveGuidance
from .apg import APG
from .cads import CADS
from .cfg import CFG
from .cfgpp import CFGPlusPlus
from .classifier import ClassifierGuidance, GradientFreeClassifierGuidance
from .composition import Guidance, Session, parse
from .energy import EnergyGuidance, RewardGuidance, contrastive_energy_loss
from .extrapolate import Extrapolate
from .frequency import FDG
from .guided import GuidedDenoiser
from .inverse import DPS, MCG, MMPS, STSL, TMPD, PiGDM
from .linear_adaptive import LinearAG, LinearCoefficients, Recorder, fit_linear
from .method import Method, method, methods, options_of, summary_of
from .minority import SelfGuidedMinority
from .negative import MAMBO, MaHiRo, PerpNeg
from .pcg import PCG
from .predictor import Denoiser, Predictor
from .rescale import CFGNorm, Renorm, Rescale
from .run import Call, Record, Run
from .tcfg import TCFG
from .weak import PAG, SEG, SLG, STG, AutoGuidance, smooth_queries
from .zero_star import CFGZeroStar

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
    "Call",
    "ClassifierGuidance",
    "Denoiser",
    "EnergyGuidance",
    "Extrapolate",
    "GradientFreeClassifierGuidance",
    "Guidance",
    "GuidedDenoiser",
    "LinearAG",
    "LinearCoefficients",
    "MaHiRo",
    "Method",
    "PerpNeg",
    "PiGDM",
    "Predictor",
    "Record",
    "Recorder",
    "Renorm",
    "Rescale",
    "RewardGuidance",
    "Run",
    "SelfGuidedMinority",
    "Session",
    "contrastive_energy_loss",
    "fit_linear",
    "method",
    "methods",
    "options_of",
    "parse",
    "smooth_queries",
    "summary_of",
]
