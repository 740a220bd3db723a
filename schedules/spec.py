"""The text form of a choice, the same everywhere: ``name:key=value,key=value``.

Options are the keyword-only parameters of the function that is chosen; their annotations and defaults are the
grammar, so there is nothing to declare twice. Lists are written with slashes: ``disable_corrector=0/1/2``.
"""

from __future__ import annotations

import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(str(name).lower(), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Range:
    """The values a numeric option may have, for ``Annotated[float, Range(...)]``; ``above`` leaves the low end out."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"{'>' if self.above else '>='} {self.low:g}"
        return low if self.high == math.inf else f"{low} and <= {self.high:g}"


NonNegative = Annotated[float, Range(0.0)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Share = Annotated[float, Range(0.0, 1.0, above=True)]


@dataclass(frozen=True)
class Option:
    """One keyword option: its name, type and default."""

    name: str
    annotation: Any
    default: Any

    @property
    def description(self) -> str:
        """The type in words, for messages and listings."""
        return _describe(self.annotation)

    def convert(self, value: Any, owner: str) -> Any:
        """``value`` (text or Python) as this option's type; ValueError naming owner, value and what is allowed."""
        try:
            return _convert(self.annotation, value)
        except (TypeError, ValueError):
            choices = _choices(self.annotation)
            hint = suggestion(value, choices) if isinstance(value, str) else ""
            raise ValueError(
                f"option {self.name!r} of {owner} must be {self.description}, got {value!r}{hint}"
            ) from None


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a function as options."""
    hints = get_type_hints(function, include_extras=True)
    return {
        p.name: Option(p.name, hints[p.name], p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def split(text: str, first: str = "") -> tuple[str, dict[str, str]]:
    """``"name:a=1,b=2"`` as ``("name", {"a": "1", "b": "2"})``; a first value without a key belongs to ``first``."""
    name, _, rest = text.strip().partition(":")
    options: dict[str, str] = {}
    for i, item in enumerate(filter(None, (part.strip() for part in rest.split(",")))):
        if i == 0 and first and "=" not in item:
            item = f"{first}={item}"
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(f"{item!r} in {text!r} is not of the form key=value")
        options[key.strip()] = value.strip()
    return name.strip(), options


def bind(options: Mapping[str, Option], given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Check and convert the given options; only those that differ from the default are kept."""
    bound = {}
    for key, value in given.items():
        if key not in options:
            allowed = ", ".join(options) or "none"
            raise ValueError(f"{owner} has no option {key!r}; allowed: {allowed}{suggestion(key, options)}")
        converted = options[key].convert(value, owner)
        if converted != options[key].default:
            bound[key] = converted
    return bound


def render(name: str, options: Mapping[str, Any]) -> str:
    """The canonical text of a choice; ``split`` and ``bind`` give it back."""
    return name + (":" if options else "") + ",".join(f"{k}={_text(v)}" for k, v in options.items())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(a) for a in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [c for a in get_args(annotation) for c in _choices(a)]
    return []


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_describe(args[0])} {args[1]}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        return {int: "integers", float: "numbers"}.get(args[0], "words") + " separated by '/'"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(
        annotation, str(annotation)
    )


def _convert(annotation: Any, value: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in args and (value is None or value == "none"):
            return None
        for a in args:
            if a is not type(None):
                try:
                    return _convert(a, value)
                except (TypeError, ValueError):
                    continue
        raise ValueError
    if origin is Annotated:
        number = _convert(args[0], value)
        if number not in args[1]:
            raise ValueError
        return number
    if origin is Literal:
        for a in args:
            if value == a or str(value).lower() == str(a).lower():
                return a
        raise ValueError
    if origin is tuple:
        items = filter(None, value.split("/")) if isinstance(value, str) else value
        return tuple(
            _convert(args[0], item) for item in ([items] if isinstance(items, (int, float)) else items)
        )
    if annotation is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise ValueError
        return words[str(value).lower()]
    if annotation in (int, float):
        number = annotation(value)
        if isinstance(value, bool) or number != (
            value if not isinstance(value, str) else number
        ):  # 2.5 for an int, nan
            raise ValueError
        return number
    return str(value)
