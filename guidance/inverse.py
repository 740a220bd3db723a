"""Inverse problems: samples that agree with a measurement ``y = A(x_0) + noise``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch

from ..schedules.spec import NonNegative, Range
from .gradient import gradient_at, towards
from .method import Method, method
from .run import CONDITIONAL, Call, Run
from .tensors import inner, ratio, wide

if TYPE_CHECKING:
    from .composition import Guidance

Operator = Callable[[torch.Tensor], torch.Tensor]
_KEY, _PROBE_KEY = 0x3C6, 0x575


class _Inverse(Method):
    """What they have in common: an operator, a measurement, and the denoised prediction with its derivative."""

    needs_autograd = True
    needs_gradients = True
    required: ClassVar[tuple[str, ...]] = ("operator", "measurement")

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"the agreement with a measurement"})

    def check(self, run: Run, guidance: Guidance) -> None:
        for name in self.required:
            if getattr(self, name) is None:
                raise ValueError(
                    f"guidance {self.name!r} needs {name}; the measurement is y = operator(x_0) + noise, shape (B, ...)"
                )

    def begin(self, run: Run) -> dict[str, torch.Tensor]:
        return {}

    def plan(self, call: Call, state: Any) -> None:
        if call.node.alpha > 0.0:
            call.gradient = True

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        return self.pull(g, call.to(g, "denoised"), call, state) if call.node.alpha > 0.0 else g

    def pull(
        self, g: torch.Tensor, denoised: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The prediction with the measurement's share, or g where ``move`` does it."""
        raise NotImplementedError


@method(
    "dps",
    rank=75,
    reference="Diffusion Posterior Sampling for General Noisy Inverse Problems, https://arxiv.org/abs/2209.14687",
)
@dataclass(frozen=True, eq=False)
class DPS(_Inverse):
    """Diffusion posterior sampling: after each step ``x <- x - scale grad |y - A D(x_s)|``, at the state x_s before it.

    D is the guided denoised prediction, the norm that of each sample, not squared; with the square the step would be
    ``scale / (2 |y - A D|)``. ``scale`` is 0.3 to 1. ``operator`` is A, any differentiable function, ``measurement``
    is y, (B, ...). One evaluation and one backward pass a step. For solvers that keep nothing but the state; the
    paper's is ``ddim:eta=1``.
    """

    scale: float = 1.0
    _: KW_ONLY
    operator: Operator | None = None
    measurement: torch.Tensor | None = None

    needs_steps = True
    needs_memoryless = True

    def pull(
        self, g: torch.Tensor, denoised: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        state["shift"] = -self.scale * gradient_at(self.loss(denoised, call), call.x)
        return g

    def loss(self, denoised: torch.Tensor, call: Call) -> torch.Tensor:
        """What goes down, (B,)."""
        assert self.operator is not None and self.measurement is not None
        return _length(self.measurement - self.operator(denoised))

    def move(self, x: torch.Tensor, call: Call, state: dict[str, torch.Tensor]) -> torch.Tensor:
        shift = state.pop("shift", None)
        return x if shift is None else (wide(x) + wide(shift)).to(x.dtype)


@method(
    "mcg",
    rank=75,
    reference="Improving Diffusion Models for Inverse Problems using Manifold Constraints, https://arxiv.org/abs/2206.00941",
)
@dataclass(frozen=True, eq=False)
class MCG(_Inverse):
    """Manifold constrained gradient for measurements of single elements, without noise.

    After each step ``x <- x - scale grad |mask (y - D(x_s))|^2``, then the known elements become those of the
    measurement with the level's noise, ``x <- (1 - mask) x + mask (alpha_t y + sigma_t e)``. ``mask`` is 1 where y is
    known, ``measurement`` has the shape of the samples. One evaluation and one backward pass a step. For solvers that
    keep nothing but the state.
    """

    scale: float = 1.0
    _: KW_ONLY
    mask: torch.Tensor | None = None
    measurement: torch.Tensor | None = None

    needs_steps = True
    needs_memoryless = True
    needs_noise = True
    required = ("mask", "measurement")

    def pull(
        self, g: torch.Tensor, denoised: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        assert self.mask is not None and self.measurement is not None
        loss = _length(self.mask * (self.measurement - denoised)).square()
        state["shift"] = -self.scale * gradient_at(loss, call.x)
        return g

    def move(self, x: torch.Tensor, call: Call, state: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self.mask is not None and self.measurement is not None and call.run.noise is not None
        shift, node = state.pop("shift", None), call.node
        moved = wide(x) if shift is None else wide(x) + wide(shift)
        known = node.alpha * self.measurement.to(moved)
        if node.sigma > 0.0:
            known = known + node.sigma * wide(call.run.noise(x, _KEY, call.step))
        mask = self.mask.to(moved)
        return (mask * known + (1.0 - mask) * moved).to(x.dtype)


@method(
    "pigdm",
    rank=75,
    reference="Pseudoinverse-Guided Diffusion Models for Inverse Problems, https://openreview.net/forum?id=9_gsMA8MRKQ",
)
@dataclass(frozen=True, eq=False)
class PiGDM(_Inverse):
    """Pseudoinverse guidance for linear A without noise: ``v = J^T (A^+ y - A^+ A D)`` with J the derivative of D.

    ``rule=paper`` moves the state by ``scale alpha_s alpha_t v`` after the step from s to t; for solvers that keep
    nothing but the state. ``rule=tweedie`` adds ``scale (sigma^2 / alpha) v / r^2`` to the denoised prediction, ``r^2
    = sigma^2 / (alpha^2 + sigma^2)``, the full step of the posterior mean under a covariance r^2, with any solver. D
    is the guided denoised prediction. ``operator`` is A, ``inverse`` its pseudoinverse, ``measurement`` y, (B, ...).
    One evaluation and one backward pass a step.
    """

    scale: float = 1.0
    _: KW_ONLY
    rule: Literal["paper", "tweedie"] = "paper"
    operator: Operator | None = None
    inverse: Operator | None = None
    measurement: torch.Tensor | None = None

    needs_steps = True
    required = ("operator", "inverse", "measurement")

    def check(self, run: Run, guidance: Guidance) -> None:
        super().check(run, guidance)
        if self.rule == "paper" and not run.memoryless:
            raise ValueError(
                "guidance 'pigdm' with rule=paper changes the state between steps; use rule=tweedie, or a solver that "
                "keeps nothing else, such as ddim"
            )

    def pull(
        self, g: torch.Tensor, denoised: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        v, node = self.direction(denoised, call.x), call.node
        if self.rule == "tweedie":
            return towards(g, (self.scale * (node.alpha**2 + node.sigma**2) / node.sigma**2) * v, call)
        state["shift"] = (self.scale * node.alpha) * v
        return g

    def direction(self, denoised: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """v at the state that the denoised prediction was made of."""
        assert self.operator is not None and self.inverse is not None and self.measurement is not None
        missing = self.inverse(self.measurement) - self.inverse(self.operator(denoised.detach()))
        return torch.autograd.grad(denoised, x, missing.to(denoised.dtype), retain_graph=True)[0]

    def move(self, x: torch.Tensor, call: Call, state: dict[str, torch.Tensor]) -> torch.Tensor:
        shift = state.pop("shift", None)
        return x if shift is None else torch.add(wide(x), wide(shift), alpha=call.node.alpha).to(x.dtype)


@method(
    "mmps",
    rank=75,
    reference="Learning Diffusion Priors from Observations by Expectation Maximization, https://arxiv.org/abs/2405.13712",
)
@dataclass(frozen=True, eq=False)
class MMPS(_Inverse):
    """Moment matching posterior sampling: the posterior mean under Tweedie's covariance, for linear A.

    ``D + V A^T (R + A V A^T)^{-1} (y - A D)`` with ``V = (sigma^2 / alpha) J``, the covariance of x_0 given x_t by
    the second-order Tweedie formula, solved by ``iterations`` steps of conjugate gradients; exact for a Gaussian
    prior. D is the guided denoised prediction. ``noise`` is the standard deviation of the measurement's, R its
    square. ``operator`` is A, ``measurement`` y, (B, ...). One evaluation and ``iterations + 1`` backward passes a
    step. Any solver.
    """

    iterations: Annotated[int, Range(1)] = 5
    _: KW_ONLY
    noise: NonNegative = 0.0
    operator: Operator | None = None
    measurement: torch.Tensor | None = None

    def pull(
        self, g: torch.Tensor, denoised: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        assert self.operator is not None and self.measurement is not None
        operator, observed = self.operator, self.operator(denoised)
        variance, r = call.node.sigma**2 / call.node.alpha, self.noise**2

        def back(z: torch.Tensor) -> torch.Tensor:  # J^T A^T z
            return torch.autograd.grad(observed, call.x, z, retain_graph=True)[0]

        residual = (self.measurement - observed).detach()
        z, p, rr = torch.zeros_like(residual), residual, inner(residual, residual)
        for _ in range(self.iterations):
            q = r * p + variance * operator(back(p)).detach()
            step = ratio(rr, inner(p, q), 0.0)
            z, residual, last = z + step * p, residual - step * q, rr
            rr = inner(residual, residual)
            p = residual + ratio(rr, last, 0.0) * p
        return towards(g, back(z), call)


@method(
    "tmpd",
    rank=75,
    reference="Tweedie Moment Projected Diffusions For Inverse Problems, https://arxiv.org/abs/2310.06721",
)
@dataclass(frozen=True, eq=False)
class TMPD(_Inverse):
    """Tweedie moment projection: as :class:`MMPS`, with a diagonal in the place of ``A V A^T``, that of its row sums.

    ``D + V A^T (y - A D) / (R + A V A^T 1)``. ``noise`` is the standard deviation of the measurement's, ``operator``
    linear, ``measurement`` y, (B, ...). One evaluation and two backward passes a step. Any solver.
    """

    noise: NonNegative = 0.0
    _: KW_ONLY
    operator: Operator | None = None
    measurement: torch.Tensor | None = None

    def pull(
        self, g: torch.Tensor, denoised: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        assert self.operator is not None and self.measurement is not None
        observed = self.operator(denoised)

        def back(z: torch.Tensor) -> torch.Tensor:  # J^T A^T z
            return torch.autograd.grad(observed, call.x, z, retain_graph=True)[0]

        variance = call.node.sigma**2 / call.node.alpha
        diagonal = self.noise**2 + variance * self.operator(back(torch.ones_like(observed))).detach()
        return towards(g, back(((self.measurement - observed) / diagonal).detach()), call)


@method(
    "stsl",
    rank=75,
    reference="Beyond First-Order Tweedie: Solving Inverse Problems using Latent Diffusion, https://arxiv.org/abs/2312.00852",
    experimental=True,
)
@dataclass(frozen=True, eq=False)
class STSL(DPS):
    """Second-order Tweedie sampling: DPS with a surrogate for the trace of the score's derivative in the loss.

    After each step ``x <- x - scale grad [|y - A D(x_s)| + trace e^T (score(x_s + probe e) - score(x_s)) / probe]``
    with e ~ N(0, I): Hutchinson's estimate of the trace. ``operator`` is A, of latents with the decoder in it,
    ``measurement`` y. Two evaluations and one backward pass a step. Experimental: the constants could not be read,
    and the paper refines the state by several such gradients where here there is one.
    """

    _: KW_ONLY
    trace: NonNegative = 0.02
    probe: Annotated[float, Range(0.0, above=True)] = 0.01

    needs_noise = True
    needs_evaluate = True

    def loss(self, denoised: torch.Tensor, call: Call) -> torch.Tensor:
        first = super().loss(denoised, call)
        assert call.run.noise is not None and call.evaluate is not None
        e = call.run.noise(call.x.detach(), _PROBE_KEY, call.step)
        moved = call.x + self.probe * e
        there = Call(moved, call.node, call.run, call.index, call.step, call.stage)
        other = there.to(wide(call.evaluate(CONDITIONAL, moved, call.node)), "denoised")
        # score = (alpha D - x) / sigma^2; the part that is linear in x has no gradient
        change = (call.node.alpha / call.node.sigma**2) * (other - denoised)
        return first + (self.trace / self.probe) * (wide(e) * change).reshape(len(e), -1).sum(1)


def _length(value: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1)
