"""Extrapolation of predictions while a run goes on (FSampler): some steps go without the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from ..schedules import Node, conversion
from ..schedules.skipping import continuation, explicit_steps, parse_pattern, patterned_steps
from ..schedules.spec import Fraction, NonNegative, Range
from .method import Method, method
from .run import UNCONDITIONAL, Call, Run
from .tensors import like, norm, ratio, wide

if TYPE_CHECKING:
    from .composition import Guidance

_OWNER = "guidance 'extrapolate'"
_GATE_ORDER = 3


@dataclass
class _History:
    """Real values, newest first; what is continued in this step, the learned ratio and the skips in a row."""

    real: list[tuple[Node, torch.Tensor]] = field(default_factory=list)
    continued: torch.Tensor | None = None
    learned: torch.Tensor | None = None
    skips: int = 0
    dtype: torch.dtype = torch.float32


@method("extrapolate", rank=18, reference="FSampler, https://github.com/obisin/ComfyUI-FSampler")
@dataclass(frozen=True)
class Extrapolate(Method):
    """Extrapolation of predictions at run time: on some steps earlier ones are continued and no network runs.

    What is continued is x_0 (``variable=denoised``), or, as FSampler does, ``e = x_0 - x / alpha = -k eps``
    (``epsilon``, k = sigma / alpha), by the polynomial through the newest N real values: ``2 e_0 - e_1``, ``3 e_0 -
    3 e_1 + e_2``, ``4 e_0 - 6 e_1 + 4 e_2 - e_3``; with ``sigma_aware`` it is one in k and not in the number of the
    step. All stages of a skipped step use the same value.

    ``pattern``: ``hN/sK`` skips one step after every K (N = 2, 3, 4; N <= K <= 6; ``hN`` alone is ``hN/sN``);
    ``adaptive`` skips where the states after a step with h3 and with h2 differ by at most ``tolerance`` of the state
    (rms), at most ``max_skips`` in a row, and never in steps that are a multiple of ``anchor`` after the protected
    ones; the step is ``gate=euler`` or ``adams``, Adams-Bashforth's of second order (FSampler's "dpmpp_2m"). The
    first ``protect_first`` and last ``protect_last`` steps are never skipped. ``indices`` names the steps instead:
    not the first two, and after a run of skips two real steps come first; an hN with less history is then h2.
    ``branch=unconditional`` continues u alone, in guided steps: a skip saves one of two evaluations.

    ``learning`` divides by L, a running mean (share ``smoothing`` of the old) of |continuation| / |newest value|,
    kept in [0.5, 2], from three values on; the continuation is of the next value, so L is about the drift of the
    norm, and with ``sigma_aware`` it stays 1. ``gradient`` adds the difference of the slopes ``-e / k`` to the last
    real one, of at most a quarter of the slope. ``validate`` calls the network after all where the continuation is
    not finite or its norm below 1e-8 or 1e-6 of the last. ``norms=sample`` takes norms of each sample, and skips only
    if all agree; ``batch`` takes them of the whole batch (FSampler), so that samples depend on each other.

    For the fixed patterns and what depends on no data there is the transform ``skip``, a linear program: the same
    numbers. The host waits for the device once where a skip is to be validated or gated. Compare before use, at
    equally many calls: ``caution`` says what was measured.
    """

    pattern: str = "h2/s2"
    _: KW_ONLY
    branch: Literal["all", "unconditional"] = "all"
    variable: Literal["epsilon", "denoised"] = "denoised"
    sigma_aware: bool = False
    protect_first: Annotated[int, Range(0)] = 2
    protect_last: Annotated[int, Range(0)] = 2
    indices: tuple[int, ...] = ()
    learning: bool = False
    smoothing: Fraction = 0.9
    gradient: bool = False
    tolerance: NonNegative = 0.10
    max_skips: Annotated[int, Range(1)] = 2
    anchor: Annotated[int, Range(0)] = 4
    gate: Literal["euler", "adams"] = "euler"
    validate: bool = True
    norms: Literal["sample", "batch"] = "sample"

    needs_steps = True
    caution = (
        "against fewer steps of the same solver: variable=epsilon with h2 or h3, learning and pattern=adaptive lose on "
        "multistep solvers, branch=unconditional is no better; variable=denoised and sigma_aware win "
        "(docs/guidance-measured.md)"
    )
    reads_values = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "adaptive":
            parse_pattern(self.pattern, _OWNER)
        elif self.indices:
            raise ValueError(f"{_OWNER} takes indices or pattern=adaptive, not both")
        if self.gradient and self.variable == "denoised":
            raise ValueError(f"{_OWNER} with gradient=true needs variable=epsilon, whose slope it is")

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"when the unconditional branch runs"} if self.branch == "unconditional" else ())

    @property
    def order(self) -> int:
        """Values that a continuation goes through."""
        return _GATE_ORDER if self.pattern == "adaptive" else parse_pattern(self.pattern, _OWNER)[0]

    def check(self, run: Run, guidance: Guidance) -> None:
        if self.branch == "unconditional" and not guidance.guides:
            raise ValueError(f"{_OWNER} with branch=unconditional needs a scale: add fs.CFG(w)")

    def begin(self, run: Run) -> _History:
        return _History()

    def plan(self, call: Call, state: _History) -> None:
        if self.branch == "unconditional" and not call.guided:
            return
        if call.first:
            state.continued = self._continue(call, state) if self._may_skip(call, state) else None
            state.skips = state.skips + 1 if state.continued is not None else 0
        if state.continued is None or call.node.alpha == 0.0:
            return
        if self.branch == "unconditional":
            call.supplied = True
        else:
            call.answer = self._prediction(state.continued, call).to(state.dtype)

    def branches(self, predictions: dict[str, torch.Tensor], call: Call, state: _History) -> None:
        if self.branch == "unconditional" and call.guided:
            if call.supplied:
                assert state.continued is not None
                predictions[UNCONDITIONAL] = self._prediction(state.continued, call)
            else:
                self._learn(predictions[UNCONDITIONAL], call, state)

    def observe(
        self, g: torch.Tensor, predictions: Mapping[str, torch.Tensor], call: Call, state: _History
    ) -> None:
        if self.branch == "all" and call.answer is None:
            self._learn(g, call, state)

    # -- which steps -----------------------------------------------------------------------------------------------

    def _may_skip(self, call: Call, state: _History) -> bool:
        n, have = call.run.steps, len(state.real)
        if call.node.alpha == 0.0:
            return False
        if self.pattern != "adaptive":
            skipped = _skipped(self.pattern, self.indices, n, self.protect_first, self.protect_last)
            return call.step in skipped and have >= 2
        protected = call.step < self.protect_first or call.step >= n - self.protect_last
        anchored = self.anchor and (call.step - self.protect_first) % self.anchor == 0
        return have >= _GATE_ORDER and not protected and not anchored and state.skips < self.max_skips

    def _continue(self, call: Call, state: _History) -> torch.Tensor | None:
        """The value of a skipped step, or None where the network is better asked."""
        k, (last, newest) = call.node.ratio, state.real[0]
        order = min(self.order, len(state.real))
        if self.indices and order < self.order:
            order = 2
        value = self._extrapolate(state, order, k)
        if self.pattern == "adaptive" and not self._gate(value, self._extrapolate(state, 2, k), call, state):
            return None
        if self.learning and state.learned is not None and len(state.real) >= 3:
            value = value / (state.learned if self.norms == "batch" else like(state.learned, value))
        if self.gradient:
            change = newest / last.ratio - value / k  # of the slope -e / k
            value = (
                value - k * ratio(0.25 / k * self._norm(value), self._norm(change)).clamp(max=1.0) * change
            )
        if self.validate:
            length, reference = self._norm(value), self._norm(newest)
            good = torch.isfinite(length) & (length >= 1e-8) & (length >= 1e-6 * reference)
            if not bool(good.all()):
                return None
        return value

    def _gate(self, value: torch.Tensor, lower: torch.Tensor, call: Call, state: _History) -> bool:
        """Whether the states after the gate's step with the two are close."""
        k, y = call.node.ratio, wide(call.x) / call.node.alpha
        h = call.run.after(call.index).ratio - k
        first, base = 1.0, y
        if self.gate == "adams":
            before = call.run.nodes[call.index - call.run.stages].ratio
            first, base = 1.5, y + (0.5 * h / before) * self._offset(state.real[0][1], y)
        high = base - (first * h / k) * self._offset(value, y)
        root = (high.numel() if self.norms == "batch" else high[0].numel()) ** 0.5
        error = abs(first * h / k) * self._norm(value - lower) / root
        return bool((error <= self.tolerance * (self._norm(high) / root).clamp(min=1e-6)).all())

    def _offset(self, value: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``x_0 - x / alpha`` of a value at x / alpha = y."""
        return value if self.variable == "epsilon" else value - y

    # -- values ----------------------------------------------------------------------------------------------------

    def _extrapolate(self, state: _History, order: int, k: float) -> torch.Tensor:
        real = state.real[:order]
        weights = continuation([node.ratio for node, _ in real], k, self.sigma_aware)
        total = weights[0] * real[0][1]
        for weight, (_, value) in zip(weights[1:], real[1:]):
            total.add_(value, alpha=weight)
        return total

    def _learn(self, prediction: torch.Tensor, call: Call, state: _History) -> None:
        """A real value enters the history."""
        if not call.first or call.node.alpha == 0.0:
            return
        state.dtype = prediction.dtype
        c_x, c_m = conversion(call.run.prediction, self.variable, call.node)
        value = c_m * wide(prediction)
        if c_x:
            value = value.add_(wide(call.x), alpha=c_x)
        if self.variable == "epsilon":
            value.mul_(-call.node.ratio)
        state.real = [(call.node, value.detach()), *state.real][:4]
        order = min(self.order, len(state.real))
        if self.learning and len(state.real) >= 3:
            forecast = self._extrapolate(state, order, call.node.ratio)
            seen = (self._norm(forecast) / (self._norm(value) + 1e-8)).reshape(-1)
            old = torch.ones_like(seen) if state.learned is None else state.learned
            state.learned = (self.smoothing * old + (1.0 - self.smoothing) * seen).clamp(0.5, 2.0)

    def _prediction(self, value: torch.Tensor, call: Call) -> torch.Tensor:
        """The network's prediction that a value stands for, at the present state."""
        c_x, c_m = conversion(self.variable, call.run.prediction, call.node)
        scale = -c_m / call.node.ratio if self.variable == "epsilon" else c_m
        result = scale * value
        return result.add_(wide(call.x.detach()), alpha=c_x) if c_x else result

    def _norm(self, value: torch.Tensor) -> torch.Tensor:
        return norm(value) if self.norms == "sample" else torch.linalg.vector_norm(value)


@cache
def _skipped(
    pattern: str, indices: tuple[int, ...], steps: int, protect_first: int, protect_last: int
) -> frozenset[int]:
    order, interval = parse_pattern(pattern, _OWNER)
    if indices:
        return frozenset(explicit_steps(steps, indices))
    return frozenset(patterned_steps(steps, order, interval, protect_first, protect_last))
