"""What is predicted: networks and the guidance that wraps them."""

from .cfg import CFG
from .composition import Guidance, Session, parse
from .guided import GuidedDenoiser
from .method import Method, method, methods
from .predictor import Denoiser, Predictor
from .run import Call, Record, Run

__all__ = ["CFG", "Call", "Denoiser", "Guidance", "GuidedDenoiser", "Method", "Predictor", "Record", "Run", "Session", "method", "methods", "parse"]
