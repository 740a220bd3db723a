"""What there is to choose from: the rows of ``fewstep list``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..guidance import methods, options_of, summary_of
from ..samplers import solvers as solver_registry
from ..samplers import transforms as transform_registry
from ..schedules import schedules as schedule_registry
from .metrics import METRICS

Rows = list[dict[str, Any]]


def solvers() -> Rows:
    """Registered solvers; ``order`` and ``stochastic`` are those of the default options."""
    return [
        {
            "name": d.name,
            "family": d.family,
            "order": d.order,
            "evaluations_per_step": d.evaluations_per_step,
            "stochastic": d.stochastic,
            "options": [f"{o.name}={_text(o.default)}" for o in d.options.values()],
            "aliases": dict(sorted(d.aliases.items())),
            "summary": d.summary,
            "reference": d.reference,
        }
        for d in solver_registry().values()
    ]


def transforms() -> Rows:
    """What can be added to a solver: ``solver+transform:options``."""
    return [
        {
            "name": t.name,
            "options": [f"{o.name}={_text(o.default)}" for o in t.options.values()],
            "summary": t.summary,
            "reference": t.reference,
        }
        for t in transform_registry().values()
    ]


def schedules() -> Rows:
    """Named spacings."""
    return [
        {
            "name": s.name,
            "options": [f"{o.name}={_text(o.default)}" for o in s.options.values()],
            "aliases": list(s.aliases),
            "summary": s.summary,
            "reference": s.reference,
        }
        for s in schedule_registry().values()
    ]


def models() -> Rows:
    """Embedded models."""
    from .targets import builtin_names, load_target

    rows = []
    for name in builtin_names():
        target = load_target(name)
        rows.append(
            {
                "name": name,
                "shape": list(target.model.shape),
                "conditional": target.conditional,
                "guidance": list(target.guidance),
                "samples": target.samples,
                "summary": target.note,
                "fingerprint": target.fingerprint,
            }
        )
    return rows


def metrics() -> Rows:
    """Numbers of a report."""
    return [
        {
            "name": m.name,
            "label": m.label,
            "unit": m.unit,
            "better": m.better,
            "summary": " ".join(m.meaning.split()),
        }
        for m in METRICS
    ]


def guidance() -> Rows:
    """Guidance methods: what can stand as ``guidance`` of :func:`fewstep.sample`, in the order in which they act."""
    return [
        {
            "name": name,
            "class": m.__name__,
            "experimental": m.experimental,
            "caution": m.caution,
            "options": [f"{o.name}={_text(o.default)}" for o in options_of(m).values()],
            "summary": summary_of(m),
            "reference": m.reference,
            "documentation": inspect.getdoc(m) or "",
        }
        for name, m in sorted(methods().items(), key=lambda item: item[1].rank)
    ]


def recipes() -> Rows:
    """Recipe files in the current folder and below."""
    from .recipes import listed

    return listed()


LISTS: dict[str, tuple[Callable[[], Rows], tuple[tuple[str, str], ...]]] = {
    "solvers": (
        solvers,
        (
            ("name", "solver"),
            ("order", "order"),
            ("stochastic", "stochastic"),
            ("summary", ""),
            ("options", "options"),
        ),
    ),
    "transforms": (transforms, (("name", "transform"), ("summary", ""), ("options", "options"))),
    "schedules": (
        schedules,
        (("name", "schedule"), ("summary", ""), ("options", "options"), ("aliases", "also")),
    ),
    "models": (
        models,
        (
            ("name", "model"),
            ("shape", "shape"),
            ("conditional", "classes"),
            ("guidance", "guidance"),
            ("summary", ""),
        ),
    ),
    "metrics": (metrics, (("name", "metric"), ("unit", "unit"), ("better", "better"), ("summary", ""))),
    "recipes": (
        recipes,
        (
            ("file", "recipe"),
            ("model", "model"),
            ("nfe", "NFE"),
            ("guidance", "guidance"),
            ("error", "error"),
            ("fixed", "without tuning"),
            ("method", ""),
        ),
    ),
    "guidance": (
        guidance,
        (
            ("name", "guidance"),
            ("experimental", "experimental"),
            ("summary", ""),
            ("caution", "caution"),
            ("options", "options"),
        ),
    ),
}
"""Name of a list -> its rows and the columns of its table."""


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
