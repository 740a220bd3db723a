"""What is predicted: networks and the guidance that wraps them."""

from .adaptive import AdaptiveGuidance
from .apg import APG
from .cads import CADS
from .cfg import CFG
from .composition import Guidance, Session, parse
from .extrapolate import Extrapolate
from .guided import GuidedDenoiser
from .linear_adaptive import LinearAG, LinearCoefficients, Recorder, fit_linear
from .method import Method, method, methods, options_of
from .pcg import PCG
from .predictor import Denoiser, Predictor
from .rescale import CFGNorm, Renorm, Rescale
from .run import Call, Record, Run

__all__ = [
    "APG",
    "CADS",
    "CFG",
    "PCG",
    "AdaptiveGuidance",
    "CFGNorm",
    "Call",
    "Denoiser",
    "Extrapolate",
    "Guidance",
    "GuidedDenoiser",
    "LinearAG",
    "LinearCoefficients",
    "Method",
    "Predictor",
    "Record",
    "Recorder",
    "Renorm",
    "Rescale",
    "Run",
    "Session",
    "fit_linear",
    "method",
    "methods",
    "options_of",
    "parse",
]
