"""How to step: programs, the trace that records them, the registry, and one solver family a file."""

from . import (  # noqa: F401  registers the families
    accelerated,
    afs,
    compensation,
    consistency,
    ddpm,
    deis,
    dpm_singlestep,
    dpm_solver,
    dual_fast,
    er_sde,
    euler,
    exponential_adams,
    exponential_rk,
    flow_sde,
    gradient_estimation,
    heavy_ball,
    heun,
    langevin,
    linear_multistep,
    restart,
    runge_kutta,
    sa_solver,
    sde,
    skip,
    unipc,
)
from .executor import NumericalError, Stepper
from .noise import BrownianNoise, NoiseSource, WhiteNoise
from .pfgm import PoissonNoise, pfgm_prior
from .philox import PhiloxNoise
from .program import Combine, Evaluate, Noise, Program
from .registry import Declaration, Solver, compile, parse, solver, solvers, steps_for, transform, transforms
from .teleport import Gaussian
from .trace import Evaluation, Linear, Trace, combination

__all__ = [
    "BrownianNoise",
    "Combine",
    "Declaration",
    "Evaluate",
    "Evaluation",
    "Gaussian",
    "Linear",
    "Noise",
    "NoiseSource",
    "NumericalError",
    "PhiloxNoise",
    "PoissonNoise",
    "Program",
    "Solver",
    "Stepper",
    "Trace",
    "WhiteNoise",
    "combination",
    "compile",
    "parse",
    "pfgm_prior",
    "solver",
    "solvers",
    "steps_for",
    "transform",
    "transforms",
]
