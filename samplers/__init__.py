"""How to step: programs, the trace that records them, the registry, and one solver family a file."""

from . import (  # noqa: F401  registers the families
    deis,
    dpm_singlestep,
    dpm_solver,
    euler,
    flow_sde,
    heavy_ball,
    heun,
    linear_multistep,
    sde,
    unipc,
)
from .executor import NumericalError, Stepper
from .noise import BrownianNoise, NoiseSource, WhiteNoise
from .program import Combine, Evaluate, Noise, Program
from .registry import Declaration, Solver, compile, parse, solver, solvers, steps_for
from .trace import Evaluation, Linear, Trace, combination

__all__ = [
    "BrownianNoise",
    "Combine",
    "Declaration",
    "Evaluate",
    "Evaluation",
    "Linear",
    "Noise",
    "NoiseSource",
    "NumericalError",
    "Program",
    "Solver",
    "Stepper",
    "Trace",
    "WhiteNoise",
    "combination",
    "compile",
    "parse",
    "solver",
    "solvers",
    "steps_for",
]
