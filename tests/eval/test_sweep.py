"""The plan, the work and the folder: what is decided before, what is written, and that only the plan decides it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.eval import processes, work
from fewstep.eval.ranking import cheaper_than, middle_budget, ranking
from fewstep.eval.session import _write_reference_features
from fewstep.eval.store import Store, chunks, digest
from fewstep.eval.summary import summarise
from fewstep.eval.sweep import Config, Plan, expand, split_numbers, split_specs
from fewstep.eval.targets import load_target

EXACT = "builtin:digits-exact"
SMALL = Config(
    models=(EXACT,), solvers=("euler", "unipc:order=3", "euler_ancestral"), nfe=(4, 5), samples=24, chunk=8
)


def run(plan: Plan, folder: Path, rank: int = 0, world: int = 1) -> Store:
    store = Store(folder)
    store.prepare()
    _write_reference_features(plan, store)
    for _ in work.work(plan, store, rank, world):
        pass
    return store


def tensors(store: Store) -> dict[str, bytes]:
    """Everything that was computed, without what was measured on the clock."""
    found = {}
    for path in sorted(store.folder.glob("chunks/*/*.safetensors")):
        arrays, info = store.load_arrays(str(path.relative_to(store.folder)))
        name = f"{path.parent.name}/{path.name}"
        found[name] = b"".join(arrays[k].tobytes() for k in sorted(arrays)) + str(info["nfe"]).encode()
    return found


def numbers(plan: Plan, store: Store) -> list:
    result = summarise(store, {"plan": json.loads(json.dumps(plan.to_json()))})
    return [
        {k: v for k, v in c.items() if k != "ms_per_sample"} for p in result["panels"] for c in p["cells"]
    ]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return expand(SMALL)


@pytest.fixture(scope="module")
def done(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return run(plan, tmp_path_factory.mktemp("done"))


# words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "specs"),
    [
        (["euler,heun"], ("euler", "heun")),
        (["euler heun"], ("euler", "heun")),
        (["euler, heun"], ("euler", "heun")),
        (["unipc:order=3,variant=bh1"], ("unipc:order=3,variant=bh1",)),
        (["unipc:order=3,variant=bh1,heun"], ("unipc:order=3,variant=bh1", "heun")),
        (
            ["heun,unipc:order=3,variant=bh1 deis:order=2"],
            ("heun", "unipc:order=3,variant=bh1", "deis:order=2"),
        ),
        (
            ["dpmpp_2m+restart:t_min=0.06,t_max=0.3,steps=4,euler"],
            ("dpmpp_2m+restart:t_min=0.06,t_max=0.3,steps=4", "euler"),
        ),
        (["unipc:disable_corrector=0/1,order=3", "euler"], ("unipc:disable_corrector=0/1,order=3", "euler")),
        (["euler", "euler"], ("euler",)),
    ],
)
def test_specs_are_split_at_commas_that_are_not_theirs(texts: list[str], specs: tuple[str, ...]) -> None:
    assert split_specs(texts) == specs


def test_numbers_are_read_or_named() -> None:
    assert split_numbers("4,5 10", int, "--nfe") == (4, 5, 10)
    with pytest.raises(ValueError, match="--nfe: 'x' in '4,x' is not an integer"):
        split_numbers("4,x", int, "--nfe")


# plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nfe": (0, 4)}, "must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"solvers": ("unipcc",)}, "did you mean 'unipc'"),
        ({"solvers": ("unipc:ordr=3",)}, "did you mean 'order'"),
        ({"schedules": ("karass",)}, "did you mean 'karras'"),
        ({"models": ("builtin:digit-exact",)}, "did you mean 'digits-exact'"),
        ({"models": ("some/pipeline",)}, "or a diffusers folder or Hub id"),
        (
            {"solvers": ("heun", "euler"), "nfe": (4, 6)},
            "heun cannot spend exactly 4 or 6 evaluations; nearest budgets: 3, 5, 7",
        ),
        ({"guidance": (2.0,)}, "needs an unconditional network"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
    ],
)
def test_mistakes_are_named_before_any_work(change: dict, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        expand(replace(SMALL, **change))


def test_a_budget_that_cannot_be_met_is_marked_and_explained() -> None:
    panel = expand(Config(models=(EXACT,), solvers=("heun",), nfe=(4, 5, 6), samples=4)).panels[0]
    assert [c.message is None for c in panel.cells] == [False, True, False]
    assert [c.steps for c in panel.cells if c.message is None] == [3]
    assert panel.cells[0].message == "heun cannot spend exactly 4 or 6 evaluations; nearest budgets: 3, 5, 7"


def test_guidance_counts_double() -> None:
    plan = expand(Config(models=("builtin:digits-unet",), solvers=("euler",), guidance=(1.0, 2.0), samples=2))
    plain, guided = plan.panels
    assert (plain.cost, guided.cost) == (1, 2)
    assert guided.budgets == tuple(2 * b for b in plain.budgets)
    assert [c.steps for c in guided.cells] == [c.steps for c in plain.cells] == list(plain.budgets)
    odd = expand(
        Config(models=("builtin:digits-unet",), solvers=("euler",), nfe=(5, 6), guidance=(2.0,), samples=2)
    )
    assert "a guided evaluation counts 2" in str(odd.panels[0].cells[0].message)


def test_too_few_samples_for_the_covariance_is_a_warning(plan: Plan) -> None:
    assert any("24 samples are too few" in w for w in plan.panels[0].warnings)


def test_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_same_choices_have_the_same_keys_and_others_do_not(plan: Plan) -> None:
    from dataclasses import replace

    again = expand(SMALL)
    assert again.key() == plan.key() and again.panels == plan.panels
    other = expand(replace(SMALL, seed=1))
    assert other.key() != plan.key()
    assert not {c.key for c in other.panels[0].cells} & {c.key for c in plan.panels[0].cells}
    more = expand(
        replace(SMALL, samples=48)
    )  # more samples: the same cells, so the chunks there are stay good
    assert [c.key for c in more.panels[0].cells] == [c.key for c in plan.panels[0].cells]


# work -------------------------------------------------------------------------------------------------------------


def test_counted_evaluations_are_the_budget(plan: Plan, done: Store) -> None:
    for cell in numbers(plan, done):
        assert cell["status"] == "ok" and cell["nfe"] == cell["calls"] == cell["budget"]


def test_stochastic_solvers_have_no_distance_to_the_solution(plan: Plan, done: Store) -> None:
    cells = {(c["solver"], c["budget"]): c for c in numbers(plan, done)}
    assert "rms" not in cells["euler_ancestral", 4] and "frechet" in cells["euler_ancestral", 4]
    assert cells["euler", 4]["rms"]["value"] > 0


def test_the_reference_is_converged(plan: Plan, done: Store) -> None:
    head = summarise(done, {"plan": json.loads(json.dumps(plan.to_json()))})["panels"][0]
    best = min(c["rms"]["value"] for c in head["cells"] if c.get("rms"))
    assert head["reference"]["resolution"]["value"] < 0.01 * best


def test_processes_share_the_work_and_the_folder_is_the_same(plan: Plan, done: Store, tmp_path: Path) -> None:
    for rank in (2, 0, 1):
        store = run(plan, tmp_path, rank, 3)
    assert tensors(store) == tensors(done)
    assert numbers(plan, store) == numbers(plan, done)


def test_a_damaged_or_missing_chunk_is_made_again(plan: Plan, done: Store, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(done.folder, folder)
    store = Store(folder)
    cell, parts = plan.panels[0].cells[0], plan.panels[0].chunks(SMALL.chunk)
    store.folder.joinpath("chunks", cell.key, parts[0].name).unlink()
    store.folder.joinpath("chunks", cell.key, parts[1].name).write_bytes(b"")
    assert [c.name for _, _, c in work.pending(plan, store)] == [parts[0].name]
    with pytest.raises(ValueError, match="was damaged"):
        store.load_chunk(cell.key, parts[1])
    assert tensors(run(plan, folder)) == tensors(done)


def test_samples_do_not_depend_on_the_batch(plan: Plan, done: Store, tmp_path: Path) -> None:
    """Equal up to the rounding of a matrix product, whose order may change with the batch."""
    from dataclasses import replace

    other = expand(replace(SMALL, chunk=24))
    store = run(other, tmp_path)
    key = plan.panels[0].reference.key
    small, _ = done.load_chunks(key, plan.panels[0].chunks(8))
    large, _ = store.load_chunks(key, other.panels[0].chunks(24))
    assert np.abs(small["samples"] - large["samples"]).max() < 1e-3
    ancestral = next(c for c in plan.panels[0].cells if plan.panels[0].rows[c.row].stochastic)
    a, _ = done.load_chunks(ancestral.key, plan.panels[0].chunks(8))
    b, _ = store.load_chunks(ancestral.key, other.panels[0].chunks(24))
    assert (
        np.abs(a["images"].astype(int) - b["images"].astype(int)).max() <= 1
    )  # the added noise is keyed by index


def test_worker_processes_write_what_one_process_writes(plan: Plan, done: Store, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    store.save_json("run.json", {"plan": plan.to_json()})
    finished = [item for item in processes.run(plan, store, 2) if item is not None]
    assert len(finished) == len(tensors(done))
    assert tensors(store) == tensors(done)
    assert not list(tmp_path.glob("worker-*.log"))


def model_file(folder: Path, name: str, condition: str) -> None:
    """A module whose network answers NaN under a condition on t."""
    (folder / f"{name}.py").write_text(
        "import torch, fewstep\n"
        "def make():\n"
        "    def fn(x, t):\n"
        f"        return torch.where(({condition})[:, None], torch.nan, 0.1 * x)\n"
        "    return fewstep.Denoiser(fn, fewstep.schedules.VP.linear(), 'epsilon', (3,))\n"
    )


def test_a_network_that_fails_marks_its_cell_and_spares_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file(tmp_path, "nan_once", "t == 874")  # a node of 8 trailing steps and of nothing else here
    monkeypatch.chdir(tmp_path)
    config = Config(("nan_once:make",), ("euler", "heun"), nfe=(3, 4, 8), schedules=("trailing",), samples=4)
    plan = expand(config)
    store = run(plan, tmp_path / "out")
    cells = {(c["solver"], c["budget"]): c for c in numbers(plan, store)}
    assert cells["euler", 4]["status"] == "ok" and cells["euler", 4]["rms"]["value"] > 0
    assert cells["euler", 8]["status"] == "failed" and "euler" in cells["euler", 8]["message"]
    assert not list(work.pending(plan, store))  # a failed cell is over: the same command does not try again


def test_without_a_converged_solution_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file(tmp_path, "nan_often", "(t > 800) & (t < 950)")
    monkeypatch.chdir(tmp_path)
    plan = expand(Config(("nan_often:make",), ("euler",), nfe=(2, 4, 8), schedules=("trailing",), samples=4))
    store = run(plan, tmp_path / "out")
    cells = numbers(plan, store)
    assert [c["status"] for c in cells] == ["ok", "ok", "failed"] and "rms" not in cells[0]
    panel = summarise(store, {"plan": json.loads(json.dumps(plan.to_json()))})["panels"][0]
    assert any("no converged solution" in w for w in panel["warnings"])


def test_a_model_that_cannot_be_called_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_models.py").write_text(
        "import torch, fewstep\n"
        "vp = fewstep.schedules.VP.linear()\n"
        "def short():\n    return fewstep.Denoiser(lambda x, t: x[:, :1], vp, 'epsilon', (3,))\n"
        "def broken():\n    return fewstep.Denoiser(lambda x, t: 1 / 0, vp, 'epsilon', (3,))\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, message in [("short", "answer in the shape of x"), ("broken", "ZeroDivisionError")]:
        with pytest.raises(ValueError, match=message):
            expand(Config(models=(f"odd_models:{name}",), solvers=("euler",), nfe=(2,), samples=4))


# store ------------------------------------------------------------------------------------------------------------


def test_chunks_cover_every_index_once() -> None:
    assert [(c.start, c.stop) for c in chunks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [c.id for c in chunks(7, 3)] == [0, 1, 2]


def test_digests_depend_on_content_only() -> None:
    assert digest({"a": 1, "b": [2.5]}) == digest({"b": [2.5], "a": 1}) != digest({"a": 1, "b": [2.25]})


def test_cut_lines_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text('{"a":1}\n{"a":2}\n{"a"')
    assert list(Store(tmp_path).load_lines("cells.jsonl")) == [{"a": 1}, {"a": 2}]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to the results folder .*file"):
        Store(tmp_path / "file").prepare()


# ranking ----------------------------------------------------------------------------------------------------------


def panel_of(table: dict[str, list[float | None]], budgets: list[int]) -> dict:
    cells = [
        {"row": r, "budget": b, "rms": None if v is None else {"value": v}}
        for r, values in enumerate(table.values())
        for b, v in zip(budgets, values)
    ]
    return {"rows": [{"label": name} for name in table], "budgets": budgets, "cells": cells}


def test_ranking_by_geometric_mean_with_ties_and_gaps() -> None:
    panel = panel_of({"a": [2.0, 1.0], "b": [1.0, 4.0], "c": [2.0, None]}, [4, 8])
    order = ranking(panel, "rms")
    assert [r["row"] for r in order] == [0, 1, 2]  # ratios sqrt(2), 2, 2 (b before c by mean rank)
    assert order[0]["ratio"] == pytest.approx(2**0.5) and order[0]["ranks"] == {4: 2.5, 8: 1.0}
    assert order[1]["ratio"] == pytest.approx(2.0) and order[1]["mean_rank"] == 1.5
    assert order[2]["budgets"] == 1


def test_what_a_better_solver_saves() -> None:
    panel = panel_of({"euler": [4.0, 2.0, 1.0], "x": [2.0, 0.9, 0.1]}, [4, 8, 16])
    assert cheaper_than(panel, "rms", 1, 0) == (16, 8)
    assert cheaper_than(panel, "rms", 0, 0) is None
    assert middle_budget([4, 5, 6, 8, 10, 20]) == 10 and middle_budget([3, 7, 9]) == 7


def test_reference_features_are_images_of_the_data() -> None:
    features = load_target(EXACT).features
    assert features is not None
    images = features.reference_images()[:200]
    values, labels = features(images)
    assert images.dtype == np.uint8 and values.shape == (200, features.dimension) and len(set(labels)) == 10
    assert not torch.is_grad_enabled() or values.dtype == np.float32
