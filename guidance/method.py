"""A method of guidance: its options, the hooks it may have, and the registry of all.

A method is a frozen dataclass under :func:`method`; its fields are its options, in Python and in text. What changes
during a run is in the state that :meth:`Method.begin` makes. Methods act in the order of their ``rank``, which follows
the phases below, whatever the order in which they were added:

==========  =====================  =================================================================================
rank        hook                   does
==========  =====================  =================================================================================
10 to 19    ``plan``               when: the scale w, which branches run and for which rows, or no evaluation at all
20          ``condition``          changes the condition of the conditional branch
..          ``branches``           sees the predictions as they come, and may supply one that was not run
40 to 49    ``unconditional``      replaces the unconditional prediction u
50 to 59    ``difference``         shapes d = c - u
60 to 69    ``combine``            the guided prediction, ``c + (w - 1) d`` unless one method replaces it
70 to 79    ``add``                adds to it
80 to 89    ``correct``            corrects it
90 to 99    ``observe``            sees the result
..          ``move``               changes the state between two steps
==========  =====================  =================================================================================
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from ..schedules.spec import Option, render
from .run import Call, Run

if TYPE_CHECKING:
    from .composition import Guidance, Session
    from .guided import GuidedDenoiser
    from .predictor import Denoiser

HOOKS = (
    "plan",
    "condition",
    "branches",
    "unconditional",
    "difference",
    "combine",
    "add",
    "correct",
    "observe",
    "move",
)


class Method:
    """Base of all methods: without hooks, without state.

    The class variables are what a method asks of a run; a run that cannot give it is refused before it starts.
    ``experimental`` marks constants that could not be compared with the publication, ``caution`` says what was measured
    against a method.
    """

    name: ClassVar[str] = ""
    rank: ClassVar[int] = 0
    reference: ClassVar[str] = ""
    experimental: ClassVar[bool] = False
    caution: ClassVar[str] = ""

    needs_scale: ClassVar[bool] = False  # a scale, its own or another method's
    needs_steps: ClassVar[bool] = False  # how many steps there are, and which one is the next
    needs_noise: ClassVar[bool] = False
    needs_condition: ClassVar[bool] = False
    needs_autograd: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False  # through the network
    needs_evaluate: ClassVar[bool] = False  # evaluations besides those of its branches
    needs_memoryless: ClassVar[bool] = False  # a solver that keeps nothing but the state
    reads_values: ClassVar[bool] = False  # of the device, to decide what runs next
    several: ClassVar[bool] = False  # whether a composition may hold it more than once

    @property
    def weight(self) -> float | None:
        """The scale w that it gives to the composition, if any."""
        return None

    @property
    def guides(self) -> bool:
        """Whether it asks for the unconditional prediction whatever w is."""
        return False

    @property
    def slots(self) -> frozenset[str]:
        """What it does that only one method of a composition may do."""
        return frozenset({"the combination"} if self.has("combine") else ())

    def has(self, hook: str) -> bool:
        """Whether it has a hook of its own."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def networks(self) -> Mapping[str, Any]:
        """Branches of its own: name -> network, or None where the host has to know it."""
        return {}

    def check(self, run: Run, guidance: Guidance) -> None:
        """ValueError for a run or company that it cannot work with."""

    def begin(self, run: Run) -> Any:
        """The state for one run."""
        return None

    def plan(self, call: Call, state: Any) -> None: ...

    def condition(self, y: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        return y

    def branches(self, predictions: dict[str, torch.Tensor], call: Call, state: Any) -> None: ...

    def unconditional(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        return u

    def difference(
        self, d: torch.Tensor, c: torch.Tensor, u: torch.Tensor, call: Call, state: Any
    ) -> torch.Tensor:
        return d

    def combine(
        self, c: torch.Tensor, u: torch.Tensor, d: torch.Tensor, call: Call, state: Any
    ) -> torch.Tensor | None:
        return None

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: Any,
    ) -> torch.Tensor:
        return g

    def correct(
        self, g: torch.Tensor, c: torch.Tensor, u: torch.Tensor | None, call: Call, state: Any
    ) -> torch.Tensor:
        return g

    def observe(
        self, g: torch.Tensor, predictions: Mapping[str, torch.Tensor], call: Call, state: Any
    ) -> None: ...

    def move(self, x: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        return x

    def fused(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: Any) -> torch.Tensor | None:
        """What all its hooks make of c and u where it is alone with CFG, in two kernels; None where they do not apply.

        Only asked for on devices that have kernels; c and u are the network's tensors, not widened.
        """
        return None

    # -- what users do with it -------------------------------------------------------------------------------------

    def __add__(self, other: Method | Guidance) -> Guidance:
        from .composition import Guidance

        return Guidance((self,)) + other

    @property
    def spec(self) -> str:
        """Canonical text; callables, which have none, are left out."""
        options = options_of(type(self))
        values = {k: getattr(self, k) for k, o in options.items() if getattr(self, k) != o.default}
        return render(self.name, values)

    def bind(self, denoiser: Denoiser, run: Run | None = None) -> GuidedDenoiser:
        """The predictor for one run of this method alone; see :meth:`Guidance.bind`."""
        from .composition import Guidance

        return Guidance((self,)).bind(denoiser, run)

    def session(self, run: Run) -> Session:
        """What a host drives; see :meth:`Guidance.session`."""
        from .composition import Guidance

        return Guidance((self,)).session(run)

    def __post_init__(self) -> None:
        for key, option in options_of(type(self)).items():
            value = getattr(self, key)
            if key == "scale":
                value = check_scale(value)
            object.__setattr__(self, key, option.convert(value, f"guidance {self.name!r}"))
        for key in _callables(type(self)):
            value = getattr(self, key)
            if value is not None and not callable(value):
                raise TypeError(
                    f"option {key!r} of guidance {self.name!r} must be callable, got {type(value).__name__}"
                )

    def __deepcopy__(self, memo: object) -> Method:
        return self  # frozen; a copy of a run shares the networks


def check_scale(value: Any) -> Any:
    """A guidance scale or None; ValueError for what is not a finite number >= 0. Text is left to its option."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"the guidance scale must be a finite number, got {value!r}")
    if value < 0:
        raise ValueError(f"the guidance scale must be >= 0 (1 means no guidance), got {value:g}")
    return value


_METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=Method)


def method(
    name: str, *, rank: int, reference: str, experimental: bool = False
) -> Callable[[type[_M]], type[_M]]:
    """Register a method. ``reference`` is title and link of the source."""

    def register(cls: type[_M]) -> type[_M]:
        cls.name, cls.rank, cls.reference, cls.experimental = name, rank, reference, experimental
        _METHODS[name] = cls
        return cls

    return register


def methods() -> Mapping[str, type[Method]]:
    """All registered methods by name."""
    return MappingProxyType(_METHODS)


def options_of(cls: type[Method]) -> dict[str, Option]:
    """The options that have a text form, the first of which may stand without its name."""
    if "_options" not in cls.__dict__:
        hints = get_type_hints(cls, include_extras=True)
        cls._options = {  # type: ignore[attr-defined]
            f.name: Option(f.name, hints[f.name], f.default)
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if _has_text(hints[f.name])
        }
    return cls.__dict__["_options"]


def summary_of(cls: type[Method]) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(cls) or "").splitlines()[0]


def _has_text(annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _has_text(args[0])
    if origin in (Union, types.UnionType):
        return all(a is type(None) or _has_text(a) for a in args)
    return origin is Literal or origin is tuple or annotation in (int, float, bool, str)


@cache
def _callables(cls: type[Method]) -> tuple[str, ...]:
    """Fields that hold a function or a network."""
    hints = get_type_hints(cls)
    return tuple(f.name for f in dataclasses.fields(cls) if _is_callable(hints[f.name]))  # type: ignore[arg-type]


def _is_callable(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return all(a is type(None) or _is_callable(a) for a in get_args(annotation))
    return get_origin(annotation) is collections.abc.Callable
