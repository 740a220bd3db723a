"""What a solver declares about itself, the registry, and the text form of a choice.

A solver is a function ``(trace, x, grid, *, options) -> x`` under :func:`solver`; a transform, under :func:`transform`,
is one ``(inner, trace, x, grid, *, options) -> x`` that runs the solver ``inner`` its own way. Keyword-only parameters
are options. Importing :mod:`fewstep.samplers` registers the built-in ones; packages outside register theirs through
the entry-point group ``fewstep.solvers``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class TransformDeclaration:
    """A registered transform: what it is called, and how it changes what a solver declares.

    ``order_of``, ``weak_order_of``, ``stochastic_of`` and ``startup_of`` map the inner solver's value, and that solver,
    to the whole's.
    """

    name: str
    function: Callable[..., Linear]
    order_of: Callable[..., int]
    weak_order_of: Callable[..., int]
    stochastic_of: Callable[..., bool]
    startup_of: Callable[..., int]
    reference: str

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """Keyword options with their types and defaults."""
        return options_of(self.function)

    @property
    def documentation(self) -> str:
        """The whole docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.documentation.splitlines()[0]


_SOLVERS: dict[str, Declaration] = {}
_TRANSFORMS: dict[str, TransformDeclaration] = {}


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


def transform(
    name: str,
    *,
    reference: str,
    order: Callable[..., int] = lambda order, inner, **_: order,
    weak_order: Callable[..., int] | None = None,
    stochastic: Callable[..., bool] = lambda stochastic, inner, **_: stochastic,
    startup_evaluations: Callable[..., int] = lambda startup, inner, **_: startup,
) -> Callable[[Callable[..., Linear]], Callable[..., Linear]]:
    """Register a transform of solvers, written ``solver+name:options``.

    ``order``, ``weak_order`` (the same unless given), ``stochastic`` and ``startup_evaluations`` are functions of the
    inner solver's value, that solver and the options; by default the value stays. In a spec the first option may stand
    without its name: ``euler+skip:h2/s3``.
    """

    def register(function: Callable[..., Linear]) -> Callable[..., Linear]:
        _TRANSFORMS[name] = TransformDeclaration(
            name, function, order, weak_order or order, stochastic, startup_evaluations, reference
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


def transforms() -> Mapping[str, TransformDeclaration]:
    """All registered transforms by name."""
    _load_entry_points()
    return MappingProxyType(_TRANSFORMS)


@dataclass(frozen=True)
class Transform:
    """A registered transform with chosen options."""

    declaration: TransformDeclaration
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        """Canonical text, without the plus sign."""
        return render(self.declaration.name, self.options)

    @cached_property
    def all_options(self) -> dict[str, Any]:
        """Chosen options and the defaults of the others."""
        return {k: o.default for k, o in self.declaration.options.items()} | dict(self.options)


@dataclass(frozen=True)
class Solver:
    """A registered solver with chosen options and transforms; what ``"unipc:order=3+restart"`` means."""

    declaration: Declaration
    options: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()

    @property
    def name(self) -> str:
        """The registered name."""
        return self.declaration.name

    @cached_property
    def spec(self) -> str:
        """Canonical text; parsing it gives this solver back."""
        return "+".join([render(self.name, self.options), *(t.spec for t in self.transforms)])

    @cached_property
    def all_options(self) -> dict[str, Any]:
        """Chosen options and the defaults of the others."""
        return self.declaration.defaults | dict(self.options)

    @property
    def order(self) -> int:
        """Global order of convergence, start-up included."""
        return self._declared(self.declaration.order_of, "order_of")

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self._declared(self.declaration.stochastic_of, "stochastic_of")

    @property
    def weak_order(self) -> int:
        """Order of the distribution of a stochastic solver's results."""
        return self._declared(self.declaration.weak_order_of, "weak_order_of")

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of an inner step."""
        return self.declaration.evaluations_of(**self.all_options)

    @property
    def startup_evaluations(self) -> int:
        """Network evaluations that the first steps cost on top."""
        return self._declared(self.declaration.startup_of, "startup_of")

    def _declared(self, base: Callable[..., Any], rule: str) -> Any:
        if not self.transforms:
            return base(**self.all_options)
        *others, outer = self.transforms
        inner = replace(self, transforms=tuple(others))
        return getattr(outer.declaration, rule)(inner._declared(base, rule), inner, **outer.all_options)

    def solve(self, trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
        """Run on symbolic values: from ``x`` at the first node of ``grid`` to the last."""
        if not self.transforms:
            return self.declaration.function(trace, x, grid, **self.all_options)
        *others, outer = self.transforms
        inner = replace(self, transforms=tuple(others))
        return outer.declaration.function(inner, trace, x, grid, **outer.all_options)

    def with_options(self, **options: Any) -> Solver:
        """The same with some of the solver's own options changed; ValueError for unknown ones and wrong values."""
        bound = bind(self.declaration.options, options, f"solver {self.name!r}")
        kept = {k: v for k, v in self.options.items() if k not in options}
        return replace(self, options=MappingProxyType(kept | bound))

    def __str__(self) -> str:
        return self.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return parse, (self.spec,)


def parse(spec: str | Solver) -> Solver:
    """The solver that ``"name:key=value,...+transform:key=value,..."`` means.

    Raises ValueError naming what is allowed and the nearest name.
    """
    if isinstance(spec, Solver):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"a solver is a name such as 'unipc:order=3' or a Solver, got {type(spec).__name__}")
    base, *applied = re.split(r"\+(?=\s*[A-Za-z_])", spec)  # not the plus of 1e+3
    known = solvers()
    name, given = split(base)
    if name not in known:
        aliases = {alias: target for d in known.values() for alias, target in d.aliases.items()}
        if name not in aliases:
            hint = suggestion(name, [*known, *aliases])
            raise ValueError(f"no solver {name!r}; allowed: {', '.join(sorted(known))}{hint}")
        target, *implied = aliases[name].split("+")
        applied = implied + applied
        name, defaults = split(target)
        given = defaults | given
    declaration = known[name]
    options = MappingProxyType(bind(declaration.options, given, f"solver {name!r}"))
    return Solver(declaration, options, tuple(map(_parse_transform, applied)))


def _parse_transform(text: str) -> Transform:
    known = transforms()
    name = split(text.partition(":")[0])[0]
    if name not in known:
        raise ValueError(
            f"no transform {name!r}; allowed: {', '.join(sorted(known))}{suggestion(name, known)}"
        )
    options = known[name].options
    _, given = split(text, next(iter(options), ""))
    return Transform(known[name], MappingProxyType(bind(options, given, f"transform {name!r}")))


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
        chosen = chosen.with_options(**options)
    functions = (chosen.declaration.function, *(t.declaration.function for t in chosen.transforms))
    key = (functions, chosen.spec, grid.key, prediction)
    program = _CACHE.get(key)
    if program is None:
        trace = Trace(grid, prediction)
        program = trace.finish(chosen.solve(trace, trace.start, grid), chosen.spec)
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
    for steps in range(1, 2 * nfe + 2):  # skipping leaves out up to every other evaluation
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
