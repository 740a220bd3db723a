"""The integrals against quadrature in high precision, and the weights against what they must integrate exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad

import fewstep as fs
from fewstep.samplers.coefficients import exponential_weights, integrate_ratio, lagrange, moments
from fewstep.schedules import Flow, Node, TimeGrid, VPContinuous

STEPS = [1e-9, 1e-5, 1e-3, 0.1, 0.999, 1.001, 3.0, 15.0]


def exact_moment(h: float, j: int, sign: int) -> float:
    def value(u: float) -> float:
        return math.exp(sign * (h - u)) * u**j / math.factorial(j)

    return quad(value, 0, h, epsabs=0, epsrel=1e-13)[0]


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize(("form", "sign"), [("denoised", -1), ("epsilon", 1)])
def test_moments_have_full_precision(h, form, sign):
    for j, value in enumerate(moments(h, 5, form)):
        assert value == pytest.approx(exact_moment(h, j, sign), rel=2e-12)


def test_moments_at_the_end_of_noise():
    assert moments(math.inf, 1, "denoised") == [1.0]
    with pytest.raises(ValueError, match="first-order limit"):
        moments(math.inf, 2, "denoised")


@pytest.mark.parametrize("form", ["denoised", "epsilon"])
@pytest.mark.parametrize("offsets", [(0.0,), (0.0, -0.4), (0.0, -0.4, -1.1), (0.0, -0.5, -0.9, 0.7)])
def test_exponential_weights_integrate_polynomials_exactly(form, offsets):
    h, sign = 0.7, -1 if form == "denoised" else 1
    weights = exponential_weights(h, offsets, form)
    for q in range(len(offsets)):
        exact = math.factorial(q) * exact_moment(h, q, sign)
        assert np.dot(weights, np.power(offsets, q)) == pytest.approx(exact, rel=1e-11)


def test_a_node_without_signal_has_no_weight():
    assert exponential_weights(0.5, (0.0, -math.inf), "denoised") == [
        *exponential_weights(0.5, (0.0,), "denoised"),
        0.0,
    ]
    assert [float(b[0]) for b in lagrange((0.0, math.inf), np.array([0.3]))] == [1.0, 0.0]


def test_integration_over_the_ratio_to_the_end_of_noise():
    s, zero = Node(0.5, 0.8, 0.6), Node(0.0, 1.0, 0.0)
    found = integrate_ratio(s, zero, lambda rho: [np.ones_like(rho), rho, rho**2])
    np.testing.assert_allclose(found, [-(s.ratio ** (q + 1)) / (q + 1) for q in range(3)], rtol=1e-12)
    t = Node(0.2, 0.99, 0.01)
    found = integrate_ratio(s, t, lambda rho: [rho**3])
    np.testing.assert_allclose(found, [(t.ratio**4 - s.ratio**4) / 4], rtol=1e-12)


# -- whole programs: the increments of interior steps are exact for polynomial predictions ----------------------------

CASES = [
    # spec, form, variable of the polynomial, degree that interior steps integrate exactly
    ("euler", "denoised", "lam", 0),
    ("dpmpp_2m:solver_type=heun", "denoised", "lam", 1),
    ("dpmpp_2m:form=epsilon,solver_type=heun", "epsilon", "lam", 1),
    ("unipc:order=3,lower_order_final=false", "denoised", "lam", 2),
    ("unipc:order=4,variant=bh1,lower_order_final=false", "denoised", "lam", 3),
    ("unipc:order=3,form=epsilon,lower_order_final=false", "epsilon", "lam", 2),
    ("deis:order=2", "epsilon", "t", 1),
    ("deis:order=4", "epsilon", "t", 3),
    ("deis:order=3,variable=rho", "epsilon", "rho", 2),
    ("deis:order=3,variable=log_rho", "epsilon", "lam", 2),
]


@pytest.mark.parametrize(("spec", "form", "variable", "degree"), CASES)
@pytest.mark.parametrize("schedule", [VPContinuous(), Flow()], ids=["vp", "flow"])
def test_interior_steps_are_exact_for_polynomials(spec, form, variable, degree, schedule):
    ratios = np.array([4.0, 3.1, 2.0, 1.5, 1.1, 0.7, 0.5, 0.3])
    grid = TimeGrid.from_levels(schedule, schedule.level_at_ratio(ratios))
    program = fs.compile(spec, grid, prediction=form)
    states, _ = program.unroll()
    sources = [op.dst for op in program.ops if type(op).__name__ == "Evaluate"]

    def coordinate(node: Node) -> float:
        return {"lam": node.lam, "t": node.t, "rho": node.ratio}[variable]

    def propagation(s: Node, t: Node) -> float:
        return t.sigma / s.sigma if form == "denoised" else t.alpha / s.alpha

    def increment(s: Node, t: Node, q: int) -> float:
        """The exact integral of coordinate**q over a step, in this form."""

        def value(lam: float) -> float:
            node = grid.at_ratio(math.exp(-float(lam)))
            power = coordinate(node) ** q
            if form == "denoised":
                return t.alpha * math.exp(float(lam) - t.lam) * power
            return -t.sigma * math.exp(t.lam - float(lam)) * power

        x, w = np.polynomial.legendre.leggauss(40)
        half = (t.lam - s.lam) / 2
        return half * sum(wi * value(s.lam + half * (xi + 1)) for xi, wi in zip(x, w))

    def evaluated(i: int, q: int) -> float:
        """The part of the i-th evaluated state that comes from the predictions coordinate**q."""
        return sum(states[i].get(r, 0.0) * coordinate(grid[j]) ** q for j, r in enumerate(sources))

    for q in range(degree + 1):
        for i in range(degree + 1, len(states) - 1):
            got = evaluated(i + 1, q) - propagation(grid[i], grid[i + 1]) * evaluated(i, q)
            assert got == pytest.approx(increment(grid[i], grid[i + 1], q), rel=1e-8, abs=1e-9), (i, q)
