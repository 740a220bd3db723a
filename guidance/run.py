"""What a method of guidance is told: the run before it starts, and each evaluation of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from ..schedules import Node, NoiseSchedule, conversion
from ..schedules.parametrization import Prediction
from .predictor import Network

Space = Literal["denoised", "epsilon", "v", "flow", "network"]
"""Where a rule that is not affine works: a form of the prediction, or the network's own."""

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"


class Noise(Protocol):
    """A standard normal of the shape of ``like``: for each row a pure function of that sample's seed and ``key``."""

    def __call__(self, like: torch.Tensor, *key: int) -> torch.Tensor: ...


class Evaluate(Protocol):
    """A prediction of a branch (by name) or of another network, counted, at any state and node."""

    def __call__(
        self, branch: str | Network, x: torch.Tensor, node: Node, rows: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Run:
    """A run, as far as it is known before it starts.

    ``nodes`` are those of the evaluations in order (empty where the host chooses them on the way), ``end`` is where
    the run ends. ``startup`` evaluations, then ``stages`` a step. ``history`` is the number of tensors that the
    solver keeps from step to step, ``deterministic`` is false where it draws noise, ``first_order`` is true for the
    plain first-order step (DDIM, Euler). ``branches`` are the predictions that the host can give, ``condition``
    whether it passes the condition through :meth:`Session.condition`, ``gradients`` whether autograd reaches the
    state through the network, ``moves`` whether the host evaluates and changes the state between steps. ``noise`` is
    where methods draw theirs. ``solver`` and ``model`` are names, compared with those in a file of fitted numbers.
    """

    noise_schedule: NoiseSchedule
    prediction: Prediction
    nodes: tuple[Node, ...] = ()
    end: Node | None = None
    stages: int = 1
    startup: int = 0
    history: int = 0
    deterministic: bool = True
    first_order: bool = False
    branches: frozenset[str] = frozenset({CONDITIONAL})
    condition: bool = False
    gradients: bool = True
    moves: bool = True
    noise: Noise | None = None
    solver: str = ""
    model: str = ""

    def __deepcopy__(self, memo: object) -> Run:
        return self  # frozen

    def locate(self, index: int) -> tuple[int, int]:
        """``(step, stage)`` of an evaluation."""
        if index <= self.startup:
            return 0, index
        return divmod(index - self.startup, self.stages)

    @property
    def steps(self) -> int:
        """Number of steps, 0 if unknown."""
        return self.locate(len(self.nodes) - 1)[0] + 1 if self.nodes else 0

    @property
    def memoryless(self) -> bool:
        """Whether nothing but the state is kept from step to step, and the host can change it."""
        return self.moves and not self.history and not self.startup and self.stages == 1

    def after(self, index: int) -> Node:
        """Where the step that an evaluation belongs to ends: the node of the next step's first evaluation."""
        step = self.locate(index)[0]
        for i in range(index + 1, len(self.nodes)):
            if self.locate(i)[0] > step:
                return self.nodes[i]
        assert self.end is not None
        return self.end

    def time(self, node: Node) -> float:
        """Diffusion time in [0, 1], 1 at pure noise: t over its greatest value for VP, sigma for flow models.

        For variance exploding models, whose t is sigma without a limit, ``k / (1 + k)`` with k = sigma / alpha.
        """
        if self.noise_schedule.frame == "vp":
            return node.t / float(self.noise_schedule.time(self.noise_schedule.level_max))
        return node.sigma / (node.alpha + node.sigma)


@dataclass(frozen=True)
class Record:
    """What one evaluation did: the scale w in use (1: unguided), rows run by branch, adaptive guidance's cosine."""

    step: int
    stage: int
    t: float
    scale: float
    rows: Mapping[str, int]
    skipped: bool
    cosine: torch.Tensor | None


@dataclass(eq=False)
class Call:
    """One evaluation on its way through the methods.

    ``scale`` is w now, ``guided`` whether the unconditional prediction is asked for, and of which ``rows`` (all if
    None). ``answer`` is a prediction in the place of an evaluation. ``corrector`` counts the evaluations between two
    steps from 0 and is None in a step's own. ``supplied`` says that a method gives the unconditional prediction,
    ``gradient`` that one differentiates through the networks to ``x``, ``noised`` that the condition is not the true
    one.
    """

    x: torch.Tensor
    node: Node
    run: Run
    index: int
    step: int
    stage: int
    scale: float = 1.0
    guided: bool = False
    evaluate: Evaluate | None = None
    predict: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    previous: Node | None = None
    corrector: int | None = None
    rows: torch.Tensor | None = None
    answer: torch.Tensor | None = None
    supplied: bool = False
    gradient: bool = False
    noised: bool = False
    cosine: torch.Tensor | None = None
    branches: dict[str, torch.Tensor | None] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether it is the first evaluation of its step, the one at which what is kept between steps advances."""
        return not self.stage and not self.corrector

    def space(self, space: Space) -> Prediction:
        """The form that ``space`` names."""
        return self.run.prediction if space == "network" else space

    def to(self, value: torch.Tensor, space: Space) -> torch.Tensor:
        """A prediction of the network in another form."""
        return self._convert(value, self.run.prediction, self.space(space))

    def back(self, value: torch.Tensor, space: Space) -> torch.Tensor:
        """The inverse of :meth:`to`."""
        return self._convert(value, self.space(space), self.run.prediction)

    def factor(self, space: Space) -> float:
        """What a difference of two predictions is multiplied by in another form."""
        return conversion(self.run.prediction, self.space(space), self.node)[1]

    def _convert(self, value: torch.Tensor, source: Prediction, target: Prediction) -> torch.Tensor:
        if source == target:
            return value
        c_x, c_m = conversion(source, target, self.node)
        return torch.add(c_m * value, self.x.to(value.dtype), alpha=c_x)
