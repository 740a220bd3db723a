"""Methods put together: the composition, its text, and the session that a host drives through one run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..schedules import Node
from ..schedules.spec import bind as bind_options
from ..schedules.spec import split, suggestion
from .method import HOOKS, Method, check_scale, methods, options_of
from .run import CONDITIONAL, UNCONDITIONAL, Call, Evaluate, Record, Run
from .tensors import like, wide

if TYPE_CHECKING:
    from .guided import GuidedDenoiser
    from .predictor import Denoiser


@dataclass(frozen=True)
class Guidance:
    """Methods of guidance in their fixed order; ``A + B`` makes one, in either order the same.

    ValueError where two of them contradict each other: two scales, two rules for the same thing, one method twice.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.methods, key=lambda m: m.rank))
        object.__setattr__(self, "methods", ordered)
        owners: dict[str, Method] = {}
        for m in ordered:
            once = [] if m.several else [f"{m.name!r}"]
            scale = [] if m.weight is None else ["the scale"]
            for slot in (*once, *scale, *sorted(m.slots)):
                if slot in owners:
                    raise ValueError(_contradiction(slot, owners[slot], m))
                owners[slot] = m

    def __add__(self, other: Method | Guidance) -> Guidance:
        if isinstance(other, Method):
            other = Guidance((other,))
        if not isinstance(other, Guidance):
            return NotImplemented
        return Guidance((*self.methods, *other.methods))

    @property
    def weight(self) -> float:
        """The scale w, 1 where no method gives one."""
        return next((m.weight for m in self.methods if m.weight is not None), 1.0)

    @property
    def guides(self) -> bool:
        """Whether the unconditional prediction has a part in it."""
        return self.weight != 1.0 or any(m.guides for m in self.methods)

    @property
    def spec(self) -> str:
        """Canonical text; :func:`parse` gives this composition back, but for callables, which have no text."""
        return "+".join(m.spec for m in self.methods)

    def __str__(self) -> str:
        return self.spec

    def has(self, *names: str) -> bool:
        """Whether one of the named methods is in it."""
        return any(m.name in names for m in self.methods)

    def session(self, run: Run) -> Session:
        """What a host drives through one run; ValueError, with the remedy, if the run cannot have this guidance."""
        return Session(self, run)

    def bind(self, denoiser: Denoiser, run: Run | None = None) -> GuidedDenoiser:
        """The predictor for one run of a denoiser; without ``run`` for a host that chooses its steps on the way.

        ValueError, with the remedy, if the denoiser or the run cannot have this guidance.
        """
        from .guided import bind

        return bind(self, denoiser, run)


def parse(spec: str | float | Method | Guidance) -> Guidance:
    """The guidance that ``"name:key=value,...+name:..."`` means; a number is plain classifier-free guidance.

    Names and options are those of :func:`methods`; the first option of a method may stand without its name:
    ``"apg:10+cads+adaptive:0.99"``. Raises ValueError naming what is allowed and the nearest name.
    """
    if isinstance(spec, Guidance):
        return spec
    if isinstance(spec, Method):
        return Guidance((spec,))
    known = methods()
    if not isinstance(spec, str):
        if spec is None or not isinstance(spec, (int, float)):
            raise TypeError(
                f"guidance is a scale, a method such as fs.CFG(5.0), or text such as 'cfg:5'; got {type(spec).__name__}"
            )
        return Guidance((known["cfg"](check_scale(spec)),))  # type: ignore[call-arg]
    chosen = []
    for part in re.split(r"\+(?=\s*[A-Za-z_])", spec):  # not the plus of 1e+3
        name = part.partition(":")[0].strip()
        if name not in known:
            raise ValueError(
                f"no guidance {name!r}; allowed: {', '.join(sorted(known))}{suggestion(name, known)}"
            )
        options = options_of(known[name])
        _, given = split(part, next(iter(options), ""))
        chosen.append(known[name](**bind_options(options, given, f"guidance {name!r}")))
    return Guidance(tuple(chosen))


def _contradiction(slot: str, a: Method, b: Method) -> str:
    if slot == "the scale":
        return (
            f"guidance {a.name!r} and {b.name!r} both give a scale, {a.weight:g} and {b.weight:g}; "
            "give it to one of them"
        )
    if a.name == b.name:
        return f"guidance {a.name!r} is there twice; keep one"
    return f"guidance {a.name!r} and {b.name!r} both decide {slot}; keep one"


class Session:
    """Guidance of one run: the state of every method, and the order in which they act.

    A host does this for every evaluation::

        x = session.move(x, node, evaluate)             # only if session.moves: before each evaluation, and at the end
        call = session.begin(x, node, evaluate)
        predictions = {name: network(name, call.x, node, rows) for name, rows in call.branches.items()}
        prediction = session.finish(call, predictions)

    and passes the condition of the conditional branch through :meth:`condition` in between. ``rows`` are those of the
    batch that the branch is needed for, all if None; the prediction then has these rows only. ``evaluate`` gives
    methods evaluations of their own. States belong to the run and hold one row a sample; ``copy.deepcopy`` gives an
    independent session, which shares networks; :meth:`reset` is the start of a new run. ``trace`` holds a
    :class:`Record` of every evaluation and ``nfe`` counts what really ran, in evaluations of one sample.
    """

    def __init__(self, guidance: Guidance, run: Run) -> None:
        self.guidance, self.run = guidance, run
        _check(guidance, run)
        numbered = list(enumerate(guidance.methods))
        self._hooks = {hook: [(i, m) for i, m in numbered if m.has(hook)] for hook in HOOKS}
        self.plain = not any(
            self._hooks[h] for h in HOOKS if h not in ("plan", "condition", "observe", "move")
        )
        self.moves = bool(self._hooks["move"])
        self._networks = {k: v for m in guidance.methods for k, v in m.networks().items()}
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self._states: dict[int, Any] = {i: m.begin(self.run) for i, m in enumerate(self.guidance.methods)}
        self._call: Call | None = None
        self.index = 0
        self.nfe = 0
        self.trace: list[Record] = []

    @property
    def conditions(self) -> bool:
        """Whether a method changes the condition."""
        return bool(self._hooks["condition"])

    def forget(self, name: str) -> None:
        """Begin anew what a method keeps from step to step: the network is another one from here on."""
        for i, m in enumerate(self.guidance.methods):
            if m.name == name:
                self._states[i] = m.begin(self.run)

    def network(self, branch: str) -> Any:
        """The network that a method brings for its branch, None if the host has to know it."""
        return self._networks.get(branch)

    def begin(self, x: torch.Tensor, node: Node, evaluate: Evaluate | None = None) -> Call:
        """Open an evaluation; ``branches`` of the result says what is to run, and may be empty."""
        call = self._call = self._open(x, node, evaluate)
        return call

    def condition(self, y: torch.Tensor) -> torch.Tensor:
        """The condition that the conditional branch is to be given in the evaluation that is open."""
        assert self._call is not None
        for i, m in self._hooks["condition"]:
            y = m.condition(y, self._call, self._states[i])
        return y

    def finish(self, call: Call, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The guided prediction from those of the branches, in the network's space; closes the evaluation."""
        g = self._combine(call, predictions)
        self.index += 1
        self._call = None
        return g

    def move(self, x: torch.Tensor, node: Node, evaluate: Evaluate | None = None) -> torch.Tensor:
        """The state that the next step starts from, or the result, given the one that the solver arrived at."""
        at_end = self.index == len(self.run.nodes)
        step, stage = self.run.locate(self.index)
        if self.index == 0 or (stage and not at_end):
            return x
        call = Call(x, node, self.run, self.index, step, 0, evaluate=evaluate)
        previous = max(i for i in range(self.index) if self.run.locate(i)[1] == 0)
        call.previous = self.run.nodes[previous]
        call.predict = lambda x, k: self._corrector(x, node, k, evaluate)
        for i, m in self._hooks["move"]:
            x = m.move(x, call, self._states[i])
        return x

    def _open(
        self, x: torch.Tensor, node: Node, evaluate: Evaluate | None, corrector: int | None = None
    ) -> Call:
        step, stage = self.run.locate(self.index)
        guidance = self.guidance
        call = Call(x, node, self.run, self.index, step, stage, guidance.weight, guidance.guides)
        call.evaluate = None if evaluate is None else partial(self._counted, evaluate)
        call.corrector = corrector
        call.branches = {CONDITIONAL: None}
        for i, m in self._hooks["plan"]:
            m.plan(call, self._states[i])
            if call.answer is not None:
                call.branches = {}
                return call
        if call.guided and not call.supplied:
            call.branches.setdefault(UNCONDITIONAL, call.rows)
        if call.gradient:
            call.x = x.detach().requires_grad_()
        return call

    def _counted(
        self, evaluate: Evaluate, branch: Any, x: torch.Tensor, node: Node, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """An evaluation that a method asks for."""
        prediction = evaluate(branch, x, node, rows)
        self.nfe += prediction.shape[0]
        return prediction

    def _corrector(self, x: torch.Tensor, node: Node, k: int, evaluate: Evaluate | None) -> torch.Tensor:
        assert evaluate is not None
        call = self._call = self._open(x, node, evaluate, corrector=k)
        predictions = {name: evaluate(name, call.x, node, rows) for name, rows in call.branches.items()}
        return self._combine(call, predictions)

    def _combine(self, call: Call, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows = {name: p.shape[0] for name, p in predictions.items()}
        self.nfe += sum(rows.values())
        if call.answer is not None:
            g, work = call.answer, {}
        elif self.plain:
            work = dict(predictions)
            g = self._plain(call, work)
        else:
            work = {name: wide(p) for name, p in predictions.items()}
            g = self._guide(call, work).to(next(iter(predictions.values())).dtype)
        if call.gradient:
            g = g.detach()
        for i, m in self._hooks["observe"]:
            m.observe(g, work, call, self._states[i])
        scale = call.scale if call.guided else 1.0
        skipped = call.answer is not None
        self.trace.append(Record(call.step, call.stage, call.node.t, scale, rows, skipped, call.cosine))
        return g

    def _plain(self, call: Call, p: dict[str, torch.Tensor]) -> torch.Tensor:
        c = p[CONDITIONAL]
        return torch.lerp(p[UNCONDITIONAL], c, call.scale) if call.guided else c

    def _guide(self, call: Call, p: dict[str, torch.Tensor]) -> torch.Tensor:
        for i, m in self._hooks["branches"]:
            m.branches(p, call, self._states[i])
        c, u, mask = p[CONDITIONAL], p.get(UNCONDITIONAL), None
        g = c
        if call.guided:
            assert u is not None
            if call.rows is not None:  # the others stay as they are
                u = c.index_put((call.rows,), u)
                chosen = torch.zeros(c.shape[0], dtype=torch.bool, device=c.device)
                mask = like(chosen.index_fill(0, call.rows, True), c)
            for i, m in self._hooks["unconditional"]:
                u = m.unconditional(c, u, call, self._states[i])
            shaped = self._hooks["difference"]
            d = c - u if shaped or self._hooks["combine"] else c
            for i, m in shaped:
                d = m.difference(d, c, u, call, self._states[i])
            combined = [m.combine(c, u, d, call, self._states[i]) for i, m in self._hooks["combine"]]
            g = next((value for value in combined if value is not None), None)
            if g is None:
                g = torch.add(c, d, alpha=call.scale - 1.0) if shaped else torch.lerp(u, c, call.scale)
            if mask is not None:
                g = torch.where(mask, g, c)
        for i, m in self._hooks["add"]:
            g = m.add(g, c, p, call, self._states[i])
        for i, m in self._hooks["correct"]:
            if m.needs_scale and not call.guided:
                continue
            corrected = m.correct(g, c, u, call, self._states[i])
            g = corrected if mask is None or not m.needs_scale else torch.where(mask, corrected, g)
        return g


_REMEDIES = {
    "needs_steps": (
        "must know the steps in advance",
        "use fs.sample, not a host that chooses them on the way",
    ),
    "needs_noise": ("draws noise", "run it where the samples have seeds, as in fs.sample"),
    "needs_condition": (
        "changes the condition",
        "give it to the denoiser: Denoiser(fn, ..., condition=y), called as fn(x, t, y)",
    ),
    "needs_gradients": (
        "differentiates through the network",
        "run it in a host that allows it, outside torch.inference_mode",
    ),
    "needs_autograd": (
        "takes gradients",
        "run it outside torch.inference_mode, for instance under torch.no_grad",
    ),
    "needs_evaluate": ("makes evaluations of its own", "use fs.sample"),
    "needs_memoryless": (
        "changes the state between steps",
        "use a solver that keeps nothing else, such as ddim, euler or ddim:eta=1",
    ),
}


def _check(guidance: Guidance, run: Run) -> None:
    has = {
        "needs_steps": bool(run.nodes),
        "needs_condition": run.condition,
        "needs_noise": run.noise is not None,
        "needs_gradients": run.gradients and not torch.is_inference_mode_enabled(),
        "needs_autograd": not torch.is_inference_mode_enabled(),
        "needs_evaluate": run.moves,
        "needs_memoryless": run.memoryless,
    }
    scaled = guidance.guides or any(m.weight is not None for m in guidance.methods)
    for m in guidance.methods:
        if m.needs_scale and not scaled:
            raise ValueError(
                f"guidance {m.name!r} needs a scale: give it one, or add fs.CFG(w) ('cfg:w' in text)"
            )
        for need, given in has.items():
            if getattr(m, need) and not given:
                why, remedy = _REMEDIES[need]
                solver = f" (solver {run.solver!r})" if need == "needs_memoryless" and run.solver else ""
                raise ValueError(f"guidance {m.name!r} {why}{solver}; {remedy}")
        for branch, network in m.networks().items():
            if network is None and branch not in run.branches:
                raise ValueError(
                    f"guidance {m.name!r} needs a network of its own: give it as an option, "
                    f"or Denoiser(..., branches={{{branch!r}: fn}})"
                )
        m.check(run, guidance)
    if guidance.guides and UNCONDITIONAL not in run.branches:
        raise ValueError(
            f"guidance scale {guidance.weight:g} needs an unconditional network: Denoiser(..., unconditional=fn)"
        )
