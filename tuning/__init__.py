"""How to sample one model best: fits levels and coefficients to its converged trajectories, and writes recipes."""

from .dc import fit_cascade, search_ratios
from .fit import error, ridge
from .recipe import Recipe, load, schedule_digest
from .refine import Family, gauss_newton
from .searches import SEARCHES, search
from .solver_search import search_solver
from .spectra import power_law, spectrum_of
from .spectrum import from_spectrum, spectrum_error
from .table import Table, table_of
from .teacher import Source, Trajectories, solve
from .tune import Outcome, tune

__all__ = [
    "SEARCHES",
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
    "power_law",
    "ridge",
    "search_ratios",
    "schedule_digest",
    "search",
    "search_solver",
    "solve",
    "spectrum_error",
    "spectrum_of",
    "table_of",
    "tune",
]
