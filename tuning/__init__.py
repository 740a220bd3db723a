"""How to sample one model best: fits levels and coefficients to its converged trajectories, and writes recipes."""

from .dc import fit_cascade, search_ratios
from .fit import error, ridge
from .recipe import Recipe, load, schedule_digest
from .refine import Family, gauss_newton
from .spectrum import from_spectrum, spectrum_error
from .table import Table, table_of
from .teacher import Source, Trajectories, solve
from .tune import Outcome, tune

__all__ = [
    "Family",
    "Outcome",
    "Recipe",
    "Source",
    "Table",
    "Trajectories",
    "error",
    "fit_cascade",
    "from_spectrum",
    "gauss_newton",
    "load",
    "ridge",
    "search_ratios",
    "schedule_digest",
    "solve",
    "spectrum_error",
    "table_of",
    "tune",
]
