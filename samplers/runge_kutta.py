"""Explicit Runge-Kutta methods from their Butcher tableaus, in the EDM or the flow frame; rhoRK of DEIS.

A tableau of s stages is the nodes c, the weights b and the strictly lower triangular matrix A. Its order is read from
the order conditions: for every rooted tree of at most p nodes, ``sum_i b_i w_i(tree) = 1 / density(tree)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..schedules import Node, TimeGrid
from ..schedules.spec import suggestion
from .registry import solver
from .steps import FRAMES, FrameName, ddim, frame_name
from .trace import Linear, Trace, combination

Known = Literal[
    "1euler",
    "2heun",
    "midpoint",
    "ralston2",
    "3kutta",
    "3ral",
    "3heun",
    "3vdh",
    "3ssprk",
    "4rk",
    "4rk38",
    "5butcher",
]
Tree = tuple[Any, ...]
TOLERANCE = 1e-9
HIGHEST = 5
"""The highest order that is looked for."""


@dataclass(frozen=True)
class Tableau:
    """A checked explicit tableau: nodes ``c`` (s,), matrix ``a`` (s, s), weights ``b`` (s,)."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    reference: str = ""

    @property
    def stages(self) -> int:
        """Evaluations of a step."""
        return len(self.b)

    @cached_property
    def order(self) -> int:
        """The highest p up to HIGHEST for which every condition of the trees with at most p nodes holds."""
        for p in range(1, HIGHEST + 1):
            if not all(self._satisfies(tree) for tree in trees(p)):
                return p - 1
        return HIGHEST

    def _satisfies(self, tree: Tree) -> bool:
        return abs(float(np.array(self.b) @ self._weights(tree)) * density(tree) - 1.0) < TOLERANCE

    def _weights(self, tree: Tree) -> np.ndarray:
        """``w_i = prod_k sum_j a_ij w_j(subtree k)``, 1 for a leaf."""
        w = np.ones(self.stages)
        for subtree in tree:
            w = w * (np.array(self.a) @ self._weights(subtree))
        return w


@cache
def trees(nodes: int) -> tuple[Tree, ...]:
    """The rooted trees with this many nodes; a tree is the sorted tuple of its subtrees, a leaf is empty."""
    if nodes == 1:
        return ((),)
    return tuple(sorted({grown for tree in trees(nodes - 1) for grown in _with_a_leaf(tree)}))


def _with_a_leaf(tree: Tree) -> Iterator[Tree]:
    yield tuple(sorted((*tree, ())))
    for i, subtree in enumerate(tree):
        for grown in _with_a_leaf(subtree):
            yield tuple(sorted((*tree[:i], grown, *tree[i + 1 :])))


def density(tree: Tree) -> int:
    """The product over all nodes of the size of the subtree there."""
    return _size(tree) * math.prod(map(density, tree))


def _size(tree: Tree) -> int:
    return 1 + sum(map(_size, tree))


def _built_in(rows: Sequence[Sequence[float]], b: Sequence[float]) -> Tableau:
    """From the rows of A below the diagonal, the first (empty) one left out."""
    s = len(b)
    a = tuple(tuple(map(float, (*row, *[0.0] * (s - len(row))))) for row in ((), *rows))
    return Tableau(tuple(math.fsum(row) for row in a), a, tuple(map(float, b)))


TABLEAUS: dict[str, Tableau] = {
    "1euler": _built_in([], [1]),
    "2heun": _built_in([[1]], [1 / 2, 1 / 2]),
    "midpoint": _built_in([[1 / 2]], [0, 1]),
    "ralston2": _built_in([[2 / 3]], [1 / 4, 3 / 4]),
    "3kutta": _built_in([[1 / 2], [-1, 2]], [1 / 6, 2 / 3, 1 / 6]),
    "3ral": _built_in([[1 / 2], [0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9]),
    "3heun": _built_in([[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "3vdh": _built_in([[8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0, 3 / 4]),
    "3ssprk": _built_in([[1], [1 / 4, 1 / 4]], [1 / 6, 1 / 6, 2 / 3]),
    "4rk": _built_in([[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    "4rk38": _built_in([[1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
    "5butcher": _built_in(
        [
            [1 / 4],
            [1 / 8, 1 / 8],
            [0, -1 / 2, 1],
            [3 / 16, 0, 0, 9 / 16],
            [-3 / 7, 2 / 7, 12 / 7, -12 / 7, 8 / 7],
        ],
        [7 / 90, 0, 16 / 45, 2 / 15, 16 / 45, 7 / 90],
    ),
}


def tableau_of(choice: str) -> Tableau:
    """The built-in tableau of this name, or that of a JSON file, which is read once.

    Raises ValueError naming what is wrong.
    """
    if choice in TABLEAUS:
        return TABLEAUS[choice]
    if not choice.endswith(".json"):
        raise ValueError(
            f"option 'tableau' of solver 'rk' must be one of {', '.join(TABLEAUS)} or the path of a .json file, "
            f"got {choice!r}{suggestion(choice, TABLEAUS)}"
        )
    return _read(choice)


@cache
def _read(path: str) -> Tableau:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"tableau {path!r} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"tableau {path!r} is not JSON: {error}") from None
    try:
        return checked(data)
    except ValueError as error:
        raise ValueError(f"tableau {path!r}: {error}") from None


def checked(data: Any) -> Tableau:
    """A tableau from ``{"c": [...], "A": [[...]], "b": [...]}``; ``order`` and ``reference`` may be added.

    Raises ValueError for wrong shapes, a matrix that is not strictly lower triangular, weights that do not add up to 1,
    rows that do not add up to their node, nodes outside [0, 1] and an ``order`` that the tableau does not have.
    """
    allowed = ("c", "A", "b", "order", "reference")
    if not isinstance(data, dict) or not {"c", "A", "b"} <= set(data):
        raise ValueError('must be an object with "c", "A" and "b"')
    for key in data:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r}; allowed: {', '.join(allowed)}{suggestion(key, allowed)}")
    c, b = _numbers(data["c"], "c"), _numbers(data["b"], "b")
    s = len(b)
    if not s or len(c) != s:
        raise ValueError(f"c and b must have as many numbers, one a stage; got {len(c)} and {s}")
    if not isinstance(data["A"], list) or len(data["A"]) != s:
        rows = len(data["A"]) if isinstance(data["A"], list) else repr(data["A"])
        raise ValueError(f"A must have {s} rows, one a stage, got {rows}")
    a = tuple(_numbers(row, f"row {i} of A") for i, row in enumerate(data["A"]))
    for i, row in enumerate(a):
        if len(row) != s:
            raise ValueError(f"row {i} of A must have {s} numbers, got {len(row)}")
        if any(row[i:]):
            raise ValueError(
                f"A must be strictly lower triangular (an explicit method); row {i} has {row[i:]} from the diagonal on"
            )
        if not abs(sum(row) - c[i]) < TOLERANCE:
            raise ValueError(f"row {i} of A must add up to c[{i}] = {c[i]:.12g}, got {sum(row):.12g}")
        if not 0.0 <= c[i] <= 1.0:
            raise ValueError(f"c[{i}] must lie in [0, 1], inside the step, got {c[i]:.12g}")
    if not abs(sum(b) - 1.0) < TOLERANCE:
        raise ValueError(f"b must add up to 1, got {sum(b):.12g}")
    tableau = Tableau(c, a, b, str(data.get("reference", "")))
    if "order" in data and data["order"] != tableau.order:
        raise ValueError(f"it has order {tableau.order} by the order conditions, not {data['order']!r}")
    return tableau


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value
    ):
        raise ValueError(f"{name} must be a list of finite numbers, got {value!r}")
    return tuple(map(float, value))


@solver(
    "rk",
    family="runge_kutta",
    order=lambda tableau, **_: tableau_of(tableau).order,
    evaluations_per_step=lambda tableau, **_: tableau_of(tableau).stages,
    reference="Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902",
    aliases={
        f"deis_rhork_{name}": f"rk:tableau={name},frame=edm"
        for name in ("1euler", "2heun", "3kutta", "3ral", "3heun", "3vdh", "3ssprk", "4rk")
    },
)
def rk(
    trace: Trace, x: Linear, grid: TimeGrid, *, tableau: Known | str = "4rk", frame: FrameName = "auto"
) -> Linear:
    """Any explicit Runge-Kutta method: ``z_t = z_s + h sum_i b_i f_i``, ``h = c_t - c_s``.

    Stage i is at the coordinate ``c_s + c_i h`` with ``z_i = z_s + h sum_j a_ij f_j``. ``frame=edm``: z = x / alpha
    against sigma / alpha, f = eps (rhoRK of DEIS); ``frame=flow`` (what ``auto`` is on flow models): z = x /
    (alpha + sigma) against sigma / (alpha + sigma), f = velocity. The step to sigma = 0, where no stage can be
    evaluated, and in the EDM frame one from alpha = 0 are DDIM's.

    ``tableau`` is the name of a built-in one or the path of a JSON file
    ``{"c": [...], "A": [[...], ...], "b": [...]}``, optionally with ``order`` and ``reference``, read once. The order
    is that of the tableau, from the order conditions. ``1euler`` is ``euler``, ``2heun`` is ``heun``.
    """
    table, name = tableau_of(tableau), frame_name(frame, grid)
    where = FRAMES[name]

    def node(s: Node, t: Node, c: float) -> Node:
        if c in (0.0, 1.0):
            return t if c else s
        coordinate = where.coordinate(s) + c * (where.coordinate(t) - where.coordinate(s))
        return grid.at_ratio(coordinate if name == "edm" else coordinate / (1.0 - coordinate))

    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if t.sigma == 0.0 or not math.isfinite(where.coordinate(s)):
            x = ddim(x, m, s, t)
            continue
        start, h = x / where.scale(s), where.coordinate(t) - where.coordinate(s)
        slopes = [where.derivative(m)]
        for c, row in zip(table.c[1:], table.a[1:]):
            at = node(s, t, c)
            inside = where.scale(at) * (start + h * combination(*zip(row, slopes)))
            slopes.append(where.derivative(trace.evaluate(inside, at)[1]))
        x = where.scale(t) * (start + h * combination(*zip(table.b, slopes)))
    return x
