"""Dynamic compensation (DC-Solver): the newest prediction is moved to a slightly different time before it is used.

Zhao et al., "DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation",
https://arxiv.org/abs/2409.03755.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..schedules import TimeGrid
from ..schedules.spec import suggestion
from .coefficients import lagrange
from .rebuilding import Key, Rebuilding, Step
from .registry import Solver, transform
from .trace import Linear, Trace, combination

CASCADES: dict[str, tuple[float, ...]] = {
    "sd21": (  # fmt: skip
        1523.676619658719,
        -1111.4746450817747,
        198.38349617752823,
        -1346.0890022783242,
        1007.1949412581944,
        -186.2547577408646,
        168.39730243270586,
        -128.0389489406508,
        24.884789751788965,
        -8140.644018577604,
        5906.748279115223,
        -1035.9941123139745,
        6941.413899402556,
        -5193.980659818976,
        950.3205652979913,
        -848.2104675050633,
        650.6903333310611,
        -121.28674276636774,
        13309.270384617059,
        -9616.6703205253,
        1668.7685962068279,
        -11037.107794392457,
        8256.66668566493,
        -1503.7992035851387,
        1293.9740435093065,
        -999.5629328211232,
        188.2217041354989,
        -6747.4218216104955,
        4853.153053347587,
        -835.5116792834909,
        5489.115183777738,
        -4096.897218212316,
        743.0953413127122,
        -619.5612763258621,
        480.1497146559675,
        -90.89633128561563,
    )
}
"""Published coefficients: rising powers of i / NFE, in each falling powers of guidance / 12, in each of NFE / 50."""
FIRST = 3
"""The first ratio that a polynomial gives, counted from 1; those before are 1."""


@transform(
    "dc",
    order=lambda inner_order, inner, /, **_: min(inner_order, 1),
    reference="DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation, "
    "https://arxiv.org/abs/2409.03755",
)
def dc(
    inner: Solver,
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    ratios: tuple[float, ...] = (),
    file: str = "",
    cascade: str = "",
    guidance: float = 7.5,
    order: int = 2,
) -> Linear:
    """Dynamic compensation: before the step from t_i the prediction there is replaced by one at a displaced time.

    ``m_i <- sum_{k=0..K} m_{i-k} L_k(t')``, ``t' = r_i t_i + (1 - r_i) t_{i-1}``, L_k the Lagrange basis through the
    nodes t_i to t_{i-K}, K = ``order``; the replaced value is what later steps see. A corrector uses the new
    prediction as it is. r_i = 1 changes nothing and is what the first K evaluations have. Ratios belong to a number
    of steps; the same ones on ever finer grids are first order.

    The r_i are ``ratios`` (one for every evaluation), those of a JSON ``file`` (a list, or an object with the list
    under ``"ratios"``), or of the published polynomial that ``cascade`` names (``sd21``) at the ``guidance`` scale and
    the number of evaluations, or of the polynomial in a ``.json`` file. ``fewstep tune --method dc`` finds both.
    """
    if inner.evaluations_per_step != 1:
        raise ValueError(
            f"dc needs a solver with one evaluation a step, {inner.spec!r} has {inner.evaluations_per_step}"
        )
    if order < 1:
        raise ValueError(f"option 'order' of transform 'dc' must be at least 1, got {order}")
    if sum(map(bool, (ratios, file, cascade))) != 1:
        raise ValueError("transform 'dc' needs exactly one of ratios, file and cascade")
    if file:
        ratios = _read(file, "ratios")
    elif cascade:
        ratios = cascade_ratios(_cascade(cascade), guidance, grid.steps)
    if len(ratios) != grid.steps:
        raise ValueError(f"dc has {len(ratios)} ratios for {grid.steps} evaluations; it needs one for each")
    compensation = _Compensation(trace, inner, ratios, order)
    return compensation.run(lambda view, x: inner.solve(view, x, grid), x)


class _Compensation(Rebuilding):
    name = "dc"

    def __init__(self, inner: Trace, solver: Solver, ratios: tuple[float, ...], order: int) -> None:
        super().__init__(inner, solver)
        self.ratios, self.order = ratios, order
        self.replaced: dict[Key, Linear] = {}

    def rebuild(self, step: Step, corrected: bool) -> Linear:
        newest = len(self.evaluations) - 1 if corrected else -1
        terms = ((w, self.value(k) if k[0] == newest else self._replaced(k)) for k, w in step.weights.items())
        return step.base + combination(*terms)

    def _replaced(self, key: Key) -> Linear:
        number, form = key
        if number < self.order or self.ratios[number] == 1.0:
            return self.value(key)
        if key not in self.replaced:
            nodes = [self.evaluations[number - k].node.t for k in range(self.order + 1)]
            at = self.ratios[number] * nodes[0] + (1.0 - self.ratios[number]) * nodes[1]
            weights = [float(w[0]) for w in lagrange(nodes, np.array([at]))]
            values = [
                self.value(key),
                *(self._replaced((number - k, form)) for k in range(1, self.order + 1)),
            ]
            self.replaced[key] = self.inner.keep(combination(*zip(weights, values)))
        return self.replaced[key]


def _read(file: str, what: str) -> tuple[float, ...]:
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
        return tuple(float(r) for r in (data[what] if isinstance(data, dict) else data))
    except OSError as error:
        raise ValueError(f"cannot read the {what} of dc from {file!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file!r} does not hold a list of numbers, or an object with one under {what!r}"
        ) from None


def cascade_ratios(coefficients: Sequence[float], guidance: float, steps: int) -> tuple[float, ...]:
    """The ratios of a cascade polynomial: r_i = sum_p c_p (i / NFE)^p with c_p quadratic in both other numbers."""
    degree = len(coefficients) // 9 - 1
    return tuple(
        1.0 if i < FIRST else float(np.dot(coefficients, monomials(i, steps, guidance, degree)))
        for i in range(1, steps + 1)
    )


def monomials(i: int, steps: int, guidance: float, degree: int) -> np.ndarray:
    """What the coefficients of a cascade polynomial multiply in ratio i, counted from 1."""
    falling = [2, 1, 0]
    in_both = np.outer(np.power(guidance / 12, falling), np.power(steps / 50, falling)).ravel()
    return np.outer(np.power(i / steps, np.arange(degree + 1)), in_both).ravel()


def _cascade(name: str) -> tuple[float, ...]:
    """The coefficients of a published polynomial, or of a file that ``fewstep tune --method dc`` wrote."""
    if name in CASCADES:
        return CASCADES[name]
    if not name.endswith(".json"):
        raise ValueError(
            f"no cascade polynomial {name!r}; allowed: {', '.join(CASCADES)}, or a .json file"
            f"{suggestion(name, CASCADES)}"
        )
    coefficients = _read(name, "cascade")
    if not coefficients or len(coefficients) % 9:
        raise ValueError(
            f"{name!r}: a polynomial has nine coefficients for every power, not {len(coefficients)}"
        )
    return coefficients
