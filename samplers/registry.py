"""What a solver declares about itself, the registry, and the text form of a choice.

A solver is a function ``(trace, x, grid, *, options) -> x`` under :func:`solver`. Its keyword-only parameters are its
options. Importing :mod:`fewstep.samplers` registers the built-in families; packages outside register theirs through
the entry-point group ``fewstep.solvers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from ..schedules import TimeGrid
from ..schedules.parametrization import Prediction
from ..schedules.spec import Option, bind, options_of, render, split, suggestion
from .program import Program
from .trace import Linear, Trace

ENTRY_POINTS = "fewstep.solvers"


@dataclass(frozen=True)
class Declaration:
    """A registered solver.

    ``order`` is the global order of convergence in the step length, start-up included, for the default options;
    :attr:`Solver.order` gives it for chosen ones; of a stochastic solver it is the strong order, on one Brownian path,
    and ``weak_order_of`` that of the distribution. ``evaluations_of`` is the cost of an inner step, ``startup_of`` what
    the first steps cost on top.
    """

    name: str
    function: Callable[..., Linear]
    family: str
    order_of: Callable[..., int]
    weak_order_of: Callable[..., int]
    evaluations_of: Callable[..., int]
    startup_of: Callable[..., int]
    stochastic_of: Callable[..., bool]
    aliases: Mapping[str, str]
    reference: str

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """Keyword options with their types and defaults."""
        return options_of(self.function)

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of every option."""
        return {k: o.default for k, o in self.options.items()}

    @property
    def order(self) -> int:
        """Order of convergence for the default options."""
        return self.order_of(**self.defaults)

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of an inner step with the default options."""
        return self.evaluations_of(**self.defaults)

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn with the default options."""
        return self.stochastic_of(**self.defaults)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").splitlines()[0]

    @property
    def documentation(self) -> str:
        """The whole docstring."""
        return inspect.getdoc(self.function) or ""


_SOLVERS: dict[str, Declaration] = {}


def solver(
    name: str,
    *,
    family: str,
    order: int | Callable[..., int],
    reference: str,
    weak_order: int | Callable[..., int] | None = None,
    evaluations_per_step: int | Callable[..., int] = 1,
    startup_evaluations: int | Callable[..., int] = 0,
    stochastic: bool | Callable[..., bool] = False,
    aliases: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Linear]], Callable[..., Linear]]:
    """Register a solver.

    Whatever depends on the options may be a function of them. ``weak_order`` is that of a stochastic method's
    distribution, ``order`` (its strong order) if it is not given. ``aliases`` maps other names of the field to the
    spec that they mean. ``reference`` is title and link of the source.
    """

    def register(function: Callable[..., Linear]) -> Callable[..., Linear]:
        _SOLVERS[name] = Declaration(
            name,
            function,
            family,
            _constant(order),
            _constant(order if weak_order is None else weak_order),
            _constant(evaluations_per_step),
            _constant(startup_evaluations),
            _constant(stochastic),
            MappingProxyType(dict(aliases or {})),
            reference,
        )
        return function

    return register


def _constant(value: Any) -> Callable[..., Any]:
    """A function of the options, for a declaration that does not depend on them."""
    return value if callable(value) else lambda **_: value


@lru_cache(maxsize=1)
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def solvers() -> Mapping[str, Declaration]:
    """All registered solvers by name."""
    _load_entry_points()
    return MappingProxyType(_SOLVERS)


@dataclass(frozen=True)
class Solver:
    """A registered solver with chosen options; what a spec such as ``"unipc:order=3"`` means."""

    declaration: Declaration
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The registered name."""
        return self.declaration.name

    @cached_property
    def spec(self) -> str:
        """Canonical text; parsing it gives this solver back."""
        return render(self.name, self.options)

    @cached_property
    def all_options(self) -> dict[str, Any]:
        """Chosen options and the defaults of the others."""
        return self.declaration.defaults | dict(self.options)

    @property
    def order(self) -> int:
        """Global order of convergence, start-up included."""
        return self.declaration.order_of(**self.all_options)

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self.declaration.stochastic_of(**self.all_options)

    @property
    def weak_order(self) -> int:
        """Order of the distribution of a stochastic solver's results."""
        return self.declaration.weak_order_of(**self.all_options)

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of an inner step."""
        return self.declaration.evaluations_of(**self.all_options)

    @property
    def startup_evaluations(self) -> int:
        """Network evaluations that the first steps cost on top."""
        return self.declaration.startup_of(**self.all_options)

    def __str__(self) -> str:
        return self.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return parse, (self.spec,)


def parse(spec: str | Solver) -> Solver:
    """The solver that ``"name:key=value,..."`` means; ValueError naming what is allowed and the nearest name."""
    if isinstance(spec, Solver):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"a solver is a name such as 'unipc:order=3' or a Solver, got {type(spec).__name__}")
    if "+" in spec:
        raise ValueError(
            f"{spec!r}: no transform {spec.partition('+')[2]!r}; this version has solvers only, no transforms"
        )
    known = solvers()
    name, given = split(spec)
    if name not in known:
        aliases = {alias: target for d in known.values() for alias, target in d.aliases.items()}
        if name not in aliases:
            hint = suggestion(name, [*known, *aliases])
            raise ValueError(f"no solver {name!r}; allowed: {', '.join(sorted(known))}{hint}")
        name, implied = split(aliases[name])
        given = implied | given
    declaration = known[name]
    return Solver(declaration, MappingProxyType(bind(declaration.options, given, f"solver {name!r}")))


def compile(
    solver: str | Solver, grid: TimeGrid, *, prediction: Prediction = "denoised", **options: Any
) -> Program:
    """Trace a solver on a grid into a :class:`Program`; cached by solver, options, grid and prediction.

    ``solver`` is a spec or a Solver, ``options`` are added to it. ``prediction`` is what ``Evaluate`` will be given
    (``"epsilon"``, ``"denoised"``, ``"v"``, ``"flow"``).

    Raises ValueError for unknown names and values that the solver cannot use on this grid.
    """
    chosen = parse(solver)
    if options:
        merged = dict(chosen.options) | bind(chosen.declaration.options, options, f"solver {chosen.name!r}")
        chosen = Solver(chosen.declaration, MappingProxyType(merged))
    key = (chosen.declaration.function, chosen.spec, grid.key, prediction)
    program = _CACHE.get(key)
    if program is None:
        trace = Trace(grid, prediction)
        program = trace.finish(
            chosen.declaration.function(trace, trace.start, grid, **chosen.all_options), chosen.spec
        )
        while len(_CACHE) >= _CACHE_SIZE:
            _CACHE.pop(next(iter(_CACHE)), None)
        _CACHE[key] = program
    return program


_CACHE_SIZE = 256
_CACHE: dict[tuple, Program] = {}


def steps_for(solver: str | Solver, nfe: int, make_grid: Callable[[int], TimeGrid]) -> int:
    """The number of steps for which a solver spends exactly ``nfe`` evaluations on ``make_grid(steps)``.

    Raises ValueError naming the nearest budgets that it can meet.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"the number of evaluations must be an integer >= 1, got {nfe!r}")
    chosen = parse(solver)
    costs: dict[int, int] = {}
    failure: ValueError | None = None
    for steps in range(1, nfe + 2):
        try:
            costs[steps] = compile(chosen, make_grid(steps)).nfe
        except ValueError as error:  # a spacing or a method may need more steps than this
            failure = error
            continue
        if costs[steps] == nfe:
            return steps
        if costs[steps] > nfe:
            break
    if failure and not costs:
        raise failure
    below = max((c for c in costs.values() if c < nfe), default=None)
    above = min((c for c in costs.values() if c > nfe), default=None)
    nearest = " and ".join(str(c) for c in (below, above) if c is not None) or "none"
    raise ValueError(
        f"solver {chosen.spec!r} cannot spend exactly {nfe} evaluations; nearest budgets: {nearest}"
    )
