"""Runs a program on tensors, one evaluation at a time, for whoever owns the loop."""

from __future__ import annotations

import copy
import math

import torch

from ..kernels import backend
from ..schedules import Node
from .kernels import Draw, write
from .noise import NoiseSource
from .passes import Pass
from .philox import PhiloxNoise
from .program import Evaluate, Program


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
        self._sums: list[torch.Tensor] = []
        self._advance(program.passes[0], x)

    @property
    def done(self) -> bool:
        """Whether ``x`` is the result."""
        return self.program.passes[self.evaluations].evaluate is None

    @property
    def node(self) -> Node:
        """Where ``x`` stands: the time of the next evaluation."""
        return self.program.nodes[self._pending.node]

    @property
    def x(self) -> torch.Tensor:
        """The state to evaluate, or the result."""
        return self._registers[self._current]

    @x.setter
    def x(self, value: torch.Tensor) -> None:
        self._registers[self._current] = value

    def fork(self) -> Stepper:
        """An independent run from here on that shares the tensors so far (nothing writes to them) and the noise."""
        other = copy.copy(self)
        other._registers, other._sums = dict(self._registers), list(self._sums)
        return other

    @property
    def _current(self) -> int:
        evaluate = self.program.passes[self.evaluations].evaluate
        return self.program.output if evaluate is None else evaluate.src

    @property
    def _pending(self) -> Evaluate:
        evaluate = self.program.passes[self.evaluations].evaluate
        if evaluate is None:
            raise IndexError("the run is done; there is nothing left to evaluate")
        return evaluate

    def step(self, prediction: torch.Tensor) -> torch.Tensor:
        """Take the prediction for ``(x, node)`` and go on to the next evaluation; returns the new ``x``.

        Raises ValueError if the shape is not that of ``x``, IndexError if the run is done, NumericalError.
        """
        evaluate, registers = self._pending, self._registers
        x = registers[evaluate.src]
        if prediction.shape != x.shape:
            raise ValueError(
                f"the network returned shape {tuple(prediction.shape)} for a state of shape {tuple(x.shape)} "
                f"at t = {self.node.t:g}; they must be equal"
            )
        if self.check:
            self._look(prediction)
        registers[evaluate.dst] = prediction
        following = self.program.passes[self.evaluations + 1]
        self._advance(following, x)
        self.evaluations += 1
        if following.evaluate is None:
            # The host may not wait while a graph is captured.
            if self._sums and not torch.cuda.is_current_stream_capturing():
                self.look_back()
            return registers[self.program.output]
        return registers[following.evaluate.src]

    def _advance(self, following: Pass, like: torch.Tensor) -> None:
        """Execute up to the next evaluation. ``like`` is the state that was evaluated."""
        registers = self._registers
        nodes, drawn = self.program.nodes, None
        for draw in following.draws:
            assert self.noise is not None
            start, stop = nodes[draw.start], nodes[draw.stop]
            if isinstance(self.noise, PhiloxNoise) and following.lone_draw and backend(like) == "triton":
                drawn = Draw(draw.dst, self.noise.keys(like), self.noise.key(start, stop))
            else:
                registers[draw.dst] = self.noise(like, start, stop)
        write(following, registers, drawn)
        for dst, src in following.aliases:
            registers[dst] = registers[src]
        for register in following.releases:
            registers.pop(register, None)  # noise that a kernel computed is in none

    def _look(self, prediction: torch.Tensor) -> None:
        # One reduction: a sum with NaN or infinity in it is not finite either. A finite one may overflow.
        wide = torch.float64 if prediction.dtype == torch.float64 else torch.float32
        total = prediction.sum(dtype=wide)
        if prediction.device.type != "cpu":
            self._sums.append(total)
        elif not math.isfinite(total.item()) and not torch.isfinite(prediction).all():
            self._fail(self.evaluations, self.x)

    def look_back(self) -> None:
        """Look for NaN and infinity in all predictions so far; a captured loop does so when it has run."""
        if not self._sums:
            return
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
