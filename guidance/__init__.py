"""What is predicted: networks and the guidance that wraps them."""

from .adaptive import AdaptiveGuidance
from .apg import APG
from .cads import CADS
from .cfg import CFG
from .composition import Guidance, Session, parse
from .guided import GuidedDenoiser
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
    "Guidance",
    "GuidedDenoiser",
    "Method",
    "Predictor",
    "Record",
    "Renorm",
    "Rescale",
    "Run",
    "Session",
    "method",
    "methods",
    "options_of",
    "parse",
]
