"""What goes wrong in tuning has a clear outcome, and what was done is kept."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import fewstep as fs
from fewstep.eval import targets
from fewstep.eval.cli import main
from fewstep.eval.launched import Group
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import fit, solve_together, source_of
from fewstep.samplers import NumericalError
from fewstep.tuning import Recipe, Source, error, solve, table_of, tune
from fewstep.tuning.grids import starting_grids

COMMAND = "tune --model builtin:gmm --nfe 4 --trajectories 12 --teacher-steps 40 --test 0".split()
COMMAND += ["--method", "closed-form", "--schedule", "arctan"]


def failing(after: int, how: str = "raises") -> Source:
    """The mixture, whose network fails from some call on."""
    inner, calls = source_of(load_target("builtin:gmm"), batch=4), [0]

    def bind(indices):
        denoiser = inner.bind(indices)

        class Predictor:
            prediction = denoiser.prediction

            def __call__(self, x, node):
                calls[0] += 1
                if calls[0] > after and how == "raises":
                    raise RuntimeError("out of memory")
                return denoiser(x, node) * (math.nan if calls[0] > after else 1.0)

        return cast(Any, Predictor())

    return Source(bind, inner.noise, inner.noise_schedule, 4)


def test_a_network_that_fails_half_way_keeps_what_is_solved(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        solve(failing(60), range(8), 40, cache=tmp_path, key="k")
    assert len(list(tmp_path.iterdir())) == 1  # four of eight, and nothing half-written
    again = solve(failing(40), range(8), 40, cache=tmp_path, key="k")
    whole = solve(source_of(load_target("builtin:gmm"), batch=4), range(8), 40)
    torch.testing.assert_close(again.result, whole.result, rtol=0, atol=0)


def test_nan_is_named_with_its_time():
    with pytest.raises(NumericalError, match=r"not finite \(NaN or infinity\) at t = "):
        solve(failing(10, "nan"), range(8), 40)


def test_a_network_that_is_finite_for_the_teacher_only_is_refused():
    good = source_of(load_target("builtin:gmm"))
    truth = solve(good, range(8), 20)
    with pytest.raises(ValueError, match="no method gives finite results on this model"):
        tune(failing(0, "nan"), 4, truth, grids=starting_grids(good, truth, 4, ["arctan"]))


@pytest.mark.parametrize("method", ["dc", "search", "fit"])
def test_too_few_trajectories_are_refused_by_every_method(method):
    with pytest.raises(ValueError, match="7 trajectories are too few for a fit; take at least 8, better 32"):
        fit(load_target("builtin:gmm"), 4, method=method, trajectories=7)


def test_a_full_disk_is_said_and_leaves_no_part_of_a_recipe(tmp_path, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert main([*COMMAND, "-o", str(tmp_path / "r.json")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [".fewstep-trajectories"]
    monkeypatch.undo()
    monkeypatch.setattr(targets.Target, "noise", None)  # the trajectories are there: none is solved again
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / ".fewstep-trajectories").iterdir()}
    monkeypatch.undo()
    assert main([*COMMAND, "-o", str(tmp_path / "r.json")]) == 0
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_recipe_that_cannot_be_written_is_known_before_the_work(tmp_path, capsys):
    assert main([*COMMAND, "-o", str(tmp_path)]) == 2
    assert "is a folder; --out names the file" in capsys.readouterr().err
    assert not (tmp_path / ".fewstep-trajectories").exists()


def test_interrupted_it_goes_on_to_the_same_recipe(tmp_path, monkeypatch):
    out = tmp_path / "r.json"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.eval.tuning.starting_grids", interrupted)
        assert main([*COMMAND, "-o", str(out)]) == 130
    assert not out.exists()
    assert main([*COMMAND, "-o", str(out)]) == 0
    other = tmp_path / "elsewhere" / "r.json"
    assert main([*COMMAND, "-o", str(other)]) == 0
    assert json.loads(other.read_text()) == json.loads(out.read_text())


@pytest.mark.parametrize("method", ["fit", "closed-form", "dc", "search"])
def test_it_never_makes_things_worse(method):
    """With the solution at hand from the start nothing can be better than what is there: the fixed choice stays."""
    model = load_target("builtin:gmm")
    point = torch.randn(model.model.shape, dtype=torch.float64)
    known = fs.Denoiser(lambda x, t: point.expand_as(x), model.noise_schedule, "denoised")
    replaced = _Bound(model, known)
    recipe = cast(
        Recipe,
        fit(
            replaced,
            4,
            method=method,
            trajectories=8,
            teacher_steps=40,
            budget=2000,
            schedules=["arctan", "karras"],
        ),
    )
    assert recipe.kind == "fixed" and recipe.errors["held_out"] == recipe.errors["fixed"] < 1e-9
    solver, _, spacing = recipe.method.partition(" on ")
    source = source_of(replaced)
    grid = starting_grids(source, solve(source, range(8), 20), 4, [spacing])[spacing]
    assert recipe.table == table_of(solver, grid)
    assert error(recipe.table, source, solve(source, range(100, 108), 20)) < 1e-9


class _Bound(targets.Target):
    """A target with another network."""

    def __init__(self, target: targets.Target, denoiser: fs.Denoiser) -> None:
        super().__init__(target.model)
        object.__setattr__(self, "_denoiser", denoiser)

    def denoiser(self, indices):
        return self._denoiser  # type: ignore[attr-defined]


def test_processes_share_the_trajectories(tmp_path):
    """Each rank of a launcher solves its part; rank 0 goes on with all of them, and they are those of one process."""

    class Together:
        def wait_for_everyone(self) -> None:
            pass

    source, indices = source_of(load_target("builtin:gmm")), range(50, 59)
    parts = [
        solve_together(source, indices, 20, tmp_path, "k", Group(rank, 2, Together()), lambda n: None)
        for rank in (1, 0)
    ]
    assert parts[0] is None and parts[1] is not None and len(list(tmp_path.iterdir())) == 2
    alone = solve(source, indices, 20)
    torch.testing.assert_close(parts[1].states, alone.states, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="share trajectories through a folder"):
        solve_together(source, indices, 20, None, "k", Group(1, 2, Together()), lambda n: None)
