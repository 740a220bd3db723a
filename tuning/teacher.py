"""The converged solution from given noise, at every level: what a few-step sampler is fitted to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..samplers import NumericalError, Stepper, compile
from ..schedules import Node, NoiseSchedule, TimeGrid, conversion, make_grid
from ..schedules.parametrization import Prediction
from .table import angle, init_noise_sigma, unit

SOLVER = "unipc:order=3,lower_order_final=false"
SPACING = "arctan"


class Predictor(Protocol):
    """What samplers are given: ``predictor(x, node)`` in the space that ``prediction`` names."""

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor: ...


@dataclass(frozen=True)
class Source:
    """A model as a fit sees it.

    Attributes:
        bind: sample indices -> the predictor (with guidance, if any) for a batch of these samples; an index may be
            repeated.
        noise: sample indices -> unit start noise (B, ...).
        noise_schedule: of the model.
        batch: most samples that go through the network at once.
        dtype: in which the network takes states; None for that of the run, float64 on the CPU.
    """

    bind: Callable[[Sequence[int]], Predictor]
    noise: Callable[[Sequence[int]], torch.Tensor]
    noise_schedule: NoiseSchedule
    batch: int = 64
    dtype: torch.dtype | None = None

    def predict(self, indices: Sequence[int], z: torch.Tensor, node: Node) -> torch.Tensor:
        """Denoised predictions for states in the frame z, in the dtype of z; a multiple of the samples may be given.

        Raises NumericalError if a prediction is not finite.
        """
        rows = list(indices) * (len(z) // len(indices))
        parts = []
        with torch.no_grad():
            for i in range(0, len(rows), self.batch):
                predictor = self.bind(rows[i : i + self.batch])
                x = unit(node) * z[i : i + self.batch]
                c_x, c_m = conversion(predictor.prediction, "denoised", node)
                answer = predictor(x if self.dtype is None else x.to(self.dtype), node)
                parts.append(c_x * x + c_m * answer.to(z.dtype))
        prediction = torch.cat(parts)
        if not torch.isfinite(prediction).all():
            raise NumericalError(
                f"the network's prediction is not finite (NaN or infinity) at t = {node.t:g}",
                0,
                node.t,
                "tuning",
            )
        return prediction

    @property
    def top(self) -> float:
        """The noisiest level, where every run starts."""
        return float(self.noise_schedule.level_max)


@dataclass(frozen=True)
class Trajectories:
    """Converged trajectories in the frame z: states and predictions at nodes from the top down, and the result.

    Shapes: ``noise`` (B, ...), of unit size, ``angles`` (nodes,), ``states`` and ``predictions`` (nodes, B, ...),
    ``result`` (B, ...).
    """

    indices: tuple[int, ...]
    noise: torch.Tensor
    angles: np.ndarray
    states: torch.Tensor
    predictions: torch.Tensor
    result: torch.Tensor

    def at(self, node: Node) -> torch.Tensor:
        """The state at a node, by cubic Hermite interpolation in the angle; the ODE gives the slopes."""
        where = angle(node)
        if where == 0.0:
            return self.result
        right = int(np.clip(np.searchsorted(-self.angles, -where), 1, len(self.angles) - 1))
        a, b = float(self.angles[right - 1]), float(self.angles[right])
        u, h = (where - a) / (b - a), b - a
        return (
            (1 + 2 * u) * (1 - u) ** 2 * self.states[right - 1]
            + u * (1 - u) ** 2 * h * self._slope(right - 1)
            + u * u * (3 - 2 * u) * self.states[right]
            + u * u * (u - 1) * h * self._slope(right)
        )

    def _slope(self, i: int) -> torch.Tensor:
        at = float(self.angles[i])
        return (math.cos(at) * self.states[i] - self.predictions[i]) / math.sin(at)

    def subset(self, rows: Sequence[int]) -> Trajectories:
        """Some of the samples, by position."""
        keep = list(rows)
        indices = tuple(self.indices[i] for i in keep)
        return Trajectories(
            indices,
            self.noise[keep],
            self.angles,
            self.states[:, keep],
            self.predictions[:, keep],
            self.result[keep],
        )

    @property
    def start(self) -> torch.Tensor:
        """States at the top."""
        return self.states[0]

    def begin(self, grid: TimeGrid) -> torch.Tensor:
        """The states of a run on a grid: the samples' noise, as recipes start from it."""
        return self.noise * (init_noise_sigma(grid.noise_schedule.frame, grid[0]) / unit(grid[0]))


def solve(
    source: Source,
    indices: Sequence[int],
    steps: int = 160,
    *,
    cache: Path | None = None,
    key: str = "",
    advance: Callable[[int], None] = lambda n: None,
) -> Trajectories:
    """Converged trajectories of samples, ``source.batch`` at a time; what is in ``cache`` already is read from there.

    ``key`` names everything that the trajectories depend on besides index and steps; ``advance`` is told how many
    samples are done.
    """
    grid = make_grid(source.noise_schedule, steps, SPACING)
    parts = []
    for i in range(0, len(indices), source.batch):
        chunk = list(indices[i : i + source.batch])
        file = None if cache is None else cache / f"{key}-{steps}-{_name(chunk)}.npz"
        part = None if file is None else _read(file)
        if part is None:
            part = _solve(source, chunk, grid)
            if file is not None:
                _write(file, part)
        parts.append(part)
        advance(len(chunk))
    angles = np.array([angle(node) for node in list(grid)[:-1]])
    noise = source.noise(list(indices))
    states, predictions = (
        torch.from_numpy(np.concatenate([p[k] for p in parts], 1)).to(noise.device) for k in (0, 1)
    )
    result = torch.from_numpy(np.concatenate([p[2] for p in parts])).to(noise.device)
    return Trajectories(tuple(indices), noise.to(result.dtype), angles, states, predictions, result)


Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def _solve(source: Source, indices: list[int], grid: TimeGrid) -> Part:
    noise = source.noise(indices)
    wide = torch.float64 if noise.device.type == "cpu" else torch.float32
    start = noise.to(wide) * init_noise_sigma(grid.noise_schedule.frame, grid[0])
    stepper = Stepper(compile(SOLVER, grid), start)
    states, predictions = [], []
    while not stepper.done:
        z = stepper.x / unit(stepper.node)
        prediction = source.predict(indices, z, stepper.node)
        states.append(z.cpu().numpy())
        predictions.append(prediction.cpu().numpy())
        stepper.step(prediction)
    return np.stack(states), np.stack(predictions), (stepper.x / unit(grid[-1])).cpu().numpy()


def _name(indices: Sequence[int]) -> str:
    return f"{indices[0]}-{indices[-1]}-{len(indices)}"


def _read(file: Path) -> Part | None:
    try:
        with np.load(file) as data:
            return data["states"], data["predictions"], data["result"]
    except (OSError, ValueError, KeyError, EOFError):
        return None  # absent, or cut off while it was written: solved again


def _write(file: Path, part: Part) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as handle:
        np.savez(handle, states=part[0], predictions=part[1], result=part[2])
    partial.replace(file)
