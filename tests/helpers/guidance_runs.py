"""Drives guidance without a network: predictions are given, one of each branch for every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import fewstep as fs
from fewstep.guidance import Guidance, Method, Run, Session
from fewstep.schedules import EDM, VP, Node, NoiseSchedule

EDM_NODE = Node(1.0, 1.0, 1.0)


def vp_node(abar: float, t: float = 0.0) -> Node:
    return Node(t, abar**0.5, (1.0 - abar) ** 0.5)


def run_of(
    nodes: Sequence[Node], prediction: Any = "denoised", schedule: NoiseSchedule | None = None, **kwargs: Any
) -> Run:
    kwargs = {"branches": frozenset({"conditional", "unconditional"}), "end": Node(0.0, 1.0, 0.0)} | kwargs
    return Run(schedule or EDM(), prediction, nodes=tuple(nodes), **kwargs)


def drive(
    guidance: Method | Guidance,
    conditional: Any,
    unconditional: Any,
    nodes: Sequence[Node] | None = None,
    x: Any = None,
    session: Session | None = None,
    **kwargs: Any,
) -> tuple[list[torch.Tensor], Session]:
    """The guided prediction of every evaluation; predictions are (T, B, ...)."""
    c, u = torch.as_tensor(np.asarray(conditional)), torch.as_tensor(np.asarray(unconditional))
    nodes = list(nodes or [EDM_NODE] * len(c))
    states = torch.zeros_like(c) if x is None else torch.as_tensor(np.asarray(x))
    session = session or guidance.session(run_of(nodes, **kwargs))
    results = []
    for i, node in enumerate(nodes):
        call = session.begin(states[i], node)
        given = {"conditional": c[i], "unconditional": u[i]}
        results.append(
            session.finish(
                call, {k: given[k] if rows is None else given[k][rows] for k, rows in call.branches.items()}
            )
        )
    return results, session


class Counted(fs.Denoiser):
    """A denoiser whose ``calls`` lists (branch, rows)."""

    calls: list[tuple[str, int]]


def two_gaussians(
    schedule: NoiseSchedule | None = None,
    prediction: Any = "epsilon",
    conditional: tuple[float, float] = (1.0, 0.25),
    unconditional: tuple[float, float] = (0.0, 1.25),
    **kwargs: Any,
) -> Counted:
    """Exact networks of N(mean, variance), with and without the condition, whose mean it then is."""
    schedule = schedule or VP.linear()
    calls: list[tuple[str, int]] = []

    def network(name: str, mean: float, variance: float):
        def run(x: torch.Tensor, t: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
            calls.append((name, len(x)))
            numbers = schedule.alpha_sigma(t.double().cpu().numpy())
            shape = (-1, *(1 for _ in x.shape[1:]))
            a, s = (torch.from_numpy(np.asarray(n)).to(x).reshape(shape) for n in numbers)
            center = mean
            if condition:
                center = condition[0].reshape(len(x), -1).mean(1).to(x).reshape(shape)
            d = center + a * variance * (x - a * center) / (a**2 * variance + s**2)
            if prediction == "denoised":
                return d
            eps = (x - a * d) / s
            return {"epsilon": eps, "v": a * eps - s * d, "flow": eps - d}[prediction]

        return run

    denoiser = Counted(
        network("conditional", *conditional),
        schedule,
        prediction,
        unconditional=network("unconditional", *unconditional),
        **kwargs,
    )
    denoiser.calls = calls
    return denoiser


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
