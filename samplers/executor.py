"""Runs a program on tensors, one evaluation at a time, for whoever owns the loop."""

from __future__ import annotations

import copy

import torch

from ..schedules import Node
from .kernels import combine
from .noise import NoiseSource
from .program import Combine, Evaluate, Noise, Program


class NumericalError(ArithmeticError):
    """A prediction or state with NaN or infinity.

    ``step`` is the number of the evaluation (from 0), ``t`` its time, ``solver`` the spec, ``state`` the last finite
    state if there is one.
    """

    def __init__(
        self, message: str, step: int, t: float, solver: str, state: torch.Tensor | None = None
    ) -> None:
        super().__init__(message)
        self.step, self.t, self.solver, self.state = step, t, solver, state

    def __reduce__(self):
        return type(self), (str(self), self.step, self.t, self.solver, self.state)


class Stepper:
    """The mutable part of a run: registers and position. Can be copied, pickled and continued.

    Usage::

        stepper = Stepper(program, x)
        while not stepper.done:
            stepper.step(predict(stepper.x, stepper.node))
        result = stepper.x

    ``x`` is the state that the network is to be given, at ``node``; after the last evaluation it is the result.
    Setting ``x`` replaces the current state (a host that edits latents does that); values that the program keeps
    from before are not touched.

    ``check`` looks at every prediction for NaN and infinity: at once on the CPU, and on other devices only after the
    last evaluation, because looking means waiting for the device.
    """

    def __init__(
        self, program: Program, x: torch.Tensor, noise: NoiseSource | None = None, *, check: bool = True
    ) -> None:
        if program.stochastic and noise is None:
            raise ValueError(
                f"solver {program.solver!r} draws noise; give a noise source such as WhiteNoise(seeds)"
            )
        self.program, self.noise, self.check = program, noise, check
        self.evaluations = 0
        self._registers: dict[int, torch.Tensor] = {0: x}
        self._position = 0
        self._sums: list[torch.Tensor] = []
        self._advance()

    @property
    def done(self) -> bool:
        """Whether ``x`` is the result."""
        return self._position == len(self.program.ops)

    @property
    def node(self) -> Node:
        """Where ``x`` stands: the time of the next evaluation."""
        if self.done:
            raise IndexError("the run is done; there is nothing left to evaluate")
        return self.program.nodes[self._pending.node]

    @property
    def x(self) -> torch.Tensor:
        """The state to evaluate, or the result."""
        return self._registers[self.program.output if self.done else self._pending.src]

    @x.setter
    def x(self, value: torch.Tensor) -> None:
        self._registers[self.program.output if self.done else self._pending.src] = value

    def fork(self) -> Stepper:
        """An independent run from here on that shares the tensors so far (nothing writes to them) and the noise."""
        other = copy.copy(self)
        other._registers, other._sums = dict(self._registers), list(self._sums)
        return other

    @property
    def _pending(self) -> Evaluate:
        op = self.program.ops[self._position]
        assert isinstance(op, Evaluate)
        return op

    def step(self, prediction: torch.Tensor) -> torch.Tensor:
        """Take the prediction for ``(x, node)`` and go on to the next evaluation; returns the new ``x``.

        Raises ValueError if the shape is not that of ``x``, IndexError if the run is done, NumericalError.
        """
        if self.done:
            raise IndexError("the run is done; there is nothing left to evaluate")
        op, x = self._pending, self.x
        if prediction.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(prediction.shape)} for a state of shape {tuple(x.shape)} "
                f"at t = {self.node.t:g}; they must be equal"
            )
        if self.check:
            self._look(prediction)
        self._registers[op.dst] = prediction
        self._release(self._position)
        self._position += 1
        self.evaluations += 1
        self._advance()
        if self.done and self.check and self._sums:
            self._look_back()
        return self.x

    def _advance(self) -> None:
        """Execute up to the next evaluation."""
        ops = self.program.ops
        while self._position < len(ops) and not isinstance(op := ops[self._position], Evaluate):
            if isinstance(op, Combine):
                self._registers[op.dst] = combine([(self._registers[src], coef) for src, coef in op.terms])
            elif isinstance(op, Noise):
                assert self.noise is not None
                like = next(iter(self._registers.values()))
                nodes = self.program.nodes
                self._registers[op.dst] = self.noise(like, nodes[op.start], nodes[op.stop])
            self._release(self._position)
            self._position += 1

    def _release(self, index: int) -> None:
        for register in self.program.releases[index]:
            del self._registers[register]

    def _look(self, prediction: torch.Tensor) -> None:
        # One reduction: the sum of the absolute values is finite exactly if every element is (fp32 and wider).
        wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
        total = torch.linalg.vector_norm(prediction, 1, dtype=wide)
        if prediction.device.type != "cpu":
            self._sums.append(total)
        elif not torch.isfinite(total) and not torch.isfinite(prediction).all():
            self._fail(self.evaluations, self.x)

    def _look_back(self) -> None:
        finite = torch.isfinite(torch.stack(self._sums)).tolist()
        if not all(finite):
            self._fail(finite.index(False), None)

    def _fail(self, step: int, state: torch.Tensor | None) -> None:
        at, solver = self.program.evaluations[step], self.program.solver
        raise NumericalError(
            f"the network's prediction is not finite (NaN or infinity) at evaluation {step + 1} of {self.program.nfe}, "
            f"t = {at.t:g} (sigma = {at.sigma:.4g}, alpha = {at.alpha:.4g}), solver {solver!r}",
            step,
            at.t,
            solver,
            state,
        )
