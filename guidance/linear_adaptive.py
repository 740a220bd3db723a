"""LinearAG: the unconditional prediction as a fitted linear function of what is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..schedules.spec import Fraction
from .method import Method, method
from .run import CONDITIONAL, UNCONDITIONAL, Call, Run
from .tensors import wide

if TYPE_CHECKING:
    from .composition import Guidance

FORMAT = 1
_KNOWN = ("linear", "recorder")


@dataclass(frozen=True)
class LinearCoefficients:
    """``u_t = sum_{j <= t} conditional[t][j] c_j + sum_{j < t} unconditional[t][j] u_j + intercept[t]``, t from 1 on.

    They hold for one model, solver, time grid, guidance and space of prediction, which are kept with them: ``times``
    are the network's times of all evaluations.
    """

    conditional: tuple[tuple[float, ...], ...]
    unconditional: tuple[tuple[float, ...], ...]
    intercept: tuple[float, ...]
    prediction: str = ""
    solver: str = ""
    guidance: str = ""
    times: tuple[float, ...] = ()
    model: str = ""

    def save(self, path: str | Path) -> None:
        """Write a JSON file; floats are exact."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LinearCoefficients:
        """Read what :meth:`save` wrote; ValueError if it is something else."""
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            for key in ("conditional", "unconditional"):
                data[key] = tuple(map(tuple, data[key]))
            for key in ("intercept", "times"):
                data[key] = tuple(data[key])
            return cls(**data)
        except OSError as error:
            raise ValueError(
                f"cannot read LinearAG coefficients from {str(path)!r}: {error.strerror}"
            ) from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} does not hold LinearAG coefficients: {error}") from None

    def check(self, run: Run, guidance: str) -> None:
        """ValueError naming the first thing that differs from what they were fitted for."""
        mine = (self.prediction, self.solver, self.guidance, self.model)
        others = (run.prediction, run.solver, guidance, run.model)
        for what, a, b in zip(("prediction", "solver", "guidance", "model"), mine, others):
            if a and b and a != b:
                raise ValueError(
                    f"LinearAG coefficients were fitted for {what} {a!r}, this run has {b!r}; fit them again"
                )
        times = tuple(node.t for node in run.nodes)
        if len(self.conditional) != len(times):
            raise ValueError(
                f"LinearAG coefficients were fitted for {len(self.conditional)} evaluations, this run has "
                f"{len(times)}; fit them again"
            )
        if self.times and any(abs(a - b) > 1e-6 * max(1.0, abs(b)) for a, b in zip(self.times, times)):
            raise ValueError(
                "LinearAG coefficients were fitted at other times; fit them again for this schedule"
            )


def fit_linear(
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    *,
    intercept: bool = False,
    ridge: float = 0.0,
    evaluate: Sequence[int] | None = None,
    **meant_for: Any,
) -> LinearCoefficients:
    """Least squares over recorded trajectories, for each step by itself, in float64.

    Args: conditional, unconditional: the predictions of M trajectories under full guidance, (M, T, ...). intercept:
    also fit a constant. ridge: weight of the squared coefficients, relative to the mean square of the regressors;
    1e-6 helps where late predictions are nearly the same. evaluate: if given, the steps whose u will be run: the
    others are replaced by what was fitted for them, as in use. meant_for: prediction, solver, guidance, times and
    model, kept with the result.
    """
    if conditional.shape != unconditional.shape or conditional.ndim < 2:
        raise ValueError(
            f"two tensors (M, T, ...) of one shape are needed, got {tuple(conditional.shape)} and "
            f"{tuple(unconditional.shape)}"
        )
    steps = conditional.shape[1]
    c, u = (p.double().movedim(1, 0).reshape(steps, -1) for p in (conditional, unconditional))
    known, rows_c, rows_u, constants = [u[0]], [()], [()], [0.0]
    for t in range(1, steps):
        columns = [*c[: t + 1], *known, *([torch.ones_like(c[0])] if intercept else [])]
        a, b = torch.stack(columns, dim=1), u[t]
        if ridge:
            weight = (ridge * a.square().mean() * a.shape[0]) ** 0.5
            a = torch.cat([a, weight * torch.eye(a.shape[1], dtype=a.dtype)])
            b = torch.cat([b, torch.zeros(a.shape[1], dtype=b.dtype)])
        solution = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
        weights = solution.tolist()
        rows_c.append(tuple(weights[: t + 1]))
        rows_u.append(tuple(weights[t + 1 : 2 * t + 1]))
        constants.append(weights[-1] if intercept else 0.0)
        replaced = evaluate is not None and t not in evaluate
        known.append(torch.stack(columns, dim=1) @ solution if replaced else u[t])
    return LinearCoefficients(tuple(rows_c), tuple(rows_u), tuple(constants), **meant_for)


@dataclass
class _Known:
    """All predictions so far, newest last."""

    conditional: list[torch.Tensor] = field(default_factory=list)
    unconditional: list[torch.Tensor] = field(default_factory=list)


@method(
    "linear",
    rank=15,
    reference="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, "
    "https://arxiv.org/abs/2312.12487",
    experimental=True,
)
@dataclass(frozen=True)
class LinearAG(Method):
    """LinearAG: in some evaluations u is a fitted linear combination of all predictions so far, and does not run.

    ``u_t = sum_{j <= t} bc_j c_j + sum_{j < t} bu_j u_j``, in the network's space, with numbers for all pixels and
    prompts (:class:`LinearCoefficients`). NFE is N plus the number of evaluations of u.

    ``file`` (text) or ``coefficients`` (Python) holds what :class:`Recorder` has fitted. ``evaluate`` lists the
    evaluations whose u runs, from 0, which must be there; left out, every other one of the first half. From the share
    ``conditional_from`` of the evaluations on there is no guidance. Experimental: the published pattern of steps is
    recalled, not read. ValueError for coefficients of another model, solver, schedule, guidance or prediction.
    """

    file: str = ""
    _: KW_ONLY
    evaluate: tuple[int, ...] = ()
    conditional_from: Fraction = 1.0
    coefficients: LinearCoefficients | None = None

    needs_scale = True
    needs_steps = True

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"when the unconditional branch runs"})

    def check(self, run: Run, guidance: Guidance) -> None:
        from .cfg import CFG

        if any(isinstance(m, CFG) and not m.constant and m != CFG() for m in guidance.methods):
            raise ValueError(
                "guidance 'linear' needs every step guided; leave out cfg's interval and schedule"
            )
        if self.evaluate and 0 not in self.evaluate:
            raise ValueError(
                "guidance 'linear' has nothing to go on without evaluation 0; add it to 'evaluate'"
            )
        self._coefficients(run).check(run, described(guidance))

    def begin(self, run: Run) -> tuple[LinearCoefficients, _Known]:
        return self._coefficients(run), _Known()

    def _coefficients(self, run: Run) -> LinearCoefficients:
        if self.coefficients is not None:
            return self.coefficients
        if not self.file:
            raise ValueError(
                "guidance 'linear' needs coefficients: record runs with fs.guidance.Recorder(), fit and save them, and "
                "give the file"
            )
        return LinearCoefficients.load(self.file)

    def plan(self, call: Call, state: tuple[LinearCoefficients, _Known]) -> None:
        n = len(call.run.nodes)
        if call.index >= self.conditional_from * n:
            call.guided = False
        chosen = call.index in self.evaluate if self.evaluate else call.index % 2 == 0 and 2 * call.index < n
        call.supplied = call.guided and not chosen

    def branches(
        self, predictions: dict[str, torch.Tensor], call: Call, state: tuple[LinearCoefficients, _Known]
    ) -> None:
        coefficients, known = state
        if not call.guided:
            return
        known.conditional.append(predictions[CONDITIONAL].detach())
        if call.supplied:
            t = call.index
            terms = [
                *zip(coefficients.conditional[t], known.conditional),
                *zip(coefficients.unconditional[t], known.unconditional),
            ]
            total = torch.full_like(known.conditional[0], coefficients.intercept[t])
            for weight, value in terms:
                total.add_(value, alpha=weight)
            predictions[UNCONDITIONAL] = total
        known.unconditional.append(predictions[UNCONDITIONAL].detach())


@dataclass(frozen=True)
class Recorder(Method):
    """Keeps c and u of every evaluation of fully guided runs, to fit :class:`LinearAG` to::

        recorder = fs.guidance.Recorder()
        fs.sample(denoiser, x, "dpmpp_2m", steps=20, guidance=fs.CFG(7.5) + recorder)     # as often as wanted
        recorder.fit().save("linear.json")

    ``runs`` holds one pair of lists a run, tensors on the CPU. It changes no result.
    """

    runs: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list, compare=False)
    meant_for: dict[str, Any] = field(default_factory=dict, compare=False)

    name: ClassVar[str] = "recorder"
    rank: ClassVar[int] = 30
    needs_scale = True
    needs_steps = True
    reads_values = True

    def check(self, run: Run, guidance: Guidance) -> None:
        times = tuple(node.t for node in run.nodes)
        spec = described(guidance)
        now = {"prediction": run.prediction, "solver": run.solver, "guidance": spec, "times": times}
        now["model"] = run.model
        if self.runs and now != self.meant_for:
            raise ValueError(
                "a Recorder keeps runs of one kind: use a new one for another solver, schedule or guidance"
            )
        self.meant_for.update(now)

    def begin(self, run: Run) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        state: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.runs.append(state)
        return state

    def branches(
        self,
        predictions: dict[str, torch.Tensor],
        call: Call,
        state: tuple[list[torch.Tensor], list[torch.Tensor]],
    ) -> None:
        if UNCONDITIONAL not in predictions or call.rows is not None or call.supplied:
            raise ValueError(
                "a Recorder needs the unconditional prediction of every evaluation; use plain guidance"
            )
        for kept, name in zip(state, (CONDITIONAL, UNCONDITIONAL)):
            kept.append(wide(predictions[name]).detach().cpu())

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditional and unconditional predictions, (samples, evaluations, ...)."""
        if not any(c for c, _ in self.runs):
            raise ValueError("nothing is recorded; run fs.sample(..., guidance=fs.CFG(w) + recorder) first")
        c, u = (torch.cat([torch.stack(run[i], dim=1) for run in self.runs if run[i]]) for i in range(2))
        return c, u

    def fit(
        self, *, intercept: bool = False, ridge: float = 0.0, evaluate: Sequence[int] | None = None
    ) -> LinearCoefficients:
        """Coefficients for runs of this kind; see :func:`fit_linear`."""
        return fit_linear(
            *self.stacked(), intercept=intercept, ridge=ridge, evaluate=evaluate, **self.meant_for
        )


def described(guidance: Guidance) -> str:
    """The text of a composition without what only records or replaces u."""
    return "+".join(m.spec for m in guidance.methods if m.name not in _KNOWN)
