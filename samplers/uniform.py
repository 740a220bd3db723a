"""A program whose steps are all the same operation, told apart by a counter: for compiled and captured loops.

A step takes the state, what the solver remembers and a prediction, and gives the next state and memory: one
combination, whose coefficients stand in a table with one entry a step. Nothing in it depends on the number of the step
but the entry, so torch.compile compiles one step and a CUDA graph of one step can be replayed for all.
"""

from __future__ import annotations

import torch

from ..kernels import combine, table
from .program import Program


class UniformSteps:
    """The steps of a deterministic program, each as one call of :func:`fewstep.kernels.combine`.

    Usage, with a ``counter`` of shape (1,) on the device of x::

        steps = UniformSteps(program, x.device)
        values = steps.start(x)
        for _ in range(program.nfe):
            prediction = network(values[0], steps.times[counter])
            values = steps(values, prediction, counter)
            counter = counter + 1
        result = values[0]

    ``times`` (evaluations,) are what the network is told, ``table`` (evaluations, values, values + 1) the coefficients,
    float64 on ``device``. A memory that the program does not have yet is zero. ValueError for a program with noise or
    with arithmetic before its first evaluation.
    """

    def __init__(self, program: Program, device: torch.device | str | None = None) -> None:
        if program.stochastic:
            raise ValueError(f"solver {program.solver!r} draws noise, so its steps are not one operation")
        first, *rest = program.passes
        evaluate = first.evaluate
        if first.sums or evaluate is None:
            raise ValueError(
                f"solver {program.solver!r} changes the state before its first evaluation; scale x beforehand"
            )
        # Where every register is kept: the state is first, others have a place for as long as they are needed.
        places = {0: 0}
        width = 1 + program.history
        rows = []
        for item in rest:
            assert evaluate is not None
            current = evaluate.dst
            columns = places | {current: width}
            forms = dict(zip(item.outputs, (dict(zip(item.inputs, row)) for row in item.rows)))
            state = program.output if item.evaluate is None else item.evaluate.src
            values = {**{r: {r: 1.0} for r in columns}, **forms, **{a: {b: 1.0} for a, b in item.aliases}}
            kept = [r for r in values if r != state and r not in item.releases and item.evaluate is not None]
            free = [p for p in range(1, width) if p not in {places.get(r) for r in kept}]
            places = {state: 0} | {r: p if (p := places.get(r, 0)) else free.pop(0) for r in kept}
            entry = [[0.0] * (width + 1) for _ in range(width)]
            for register, place in places.items():
                for src, coef in values[register].items():
                    entry[place][columns[src]] += coef
            rows.append(entry)
            evaluate = item.evaluate
        self.width = width
        self.table = table(rows, device)
        self.times = torch.tensor([n.t for n in program.evaluations], dtype=torch.float32, device=device)

    def start(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The state and an empty memory."""
        return [x, *(torch.zeros_like(x) for _ in range(self.width - 1))]

    def __call__(
        self, values: list[torch.Tensor], prediction: torch.Tensor, counter: torch.Tensor | int
    ) -> list[torch.Tensor]:
        """The state and the memory after a step; ``counter`` is its number, from 0."""
        return combine([*values, prediction], self.table, counter)
