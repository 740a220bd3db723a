"""What is predicted: networks and the guidance that wraps them."""

from .cfg import CFG, GuidedDenoiser
from .predictor import Denoiser, Predictor

__all__ = ["CFG", "Denoiser", "GuidedDenoiser", "Predictor"]
