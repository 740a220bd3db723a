"""Guidance as an axis: what a text means, what a run may spend, what it is measured against; metrics of variety."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.eval import guiding, manifold, work
from fewstep.eval.overview import overviews
from fewstep.eval.report import build
from fewstep.eval.session import _write_reference_features
from fewstep.eval.store import Store
from fewstep.eval.summary import summarise
from fewstep.eval.sweep import Config, Plan, expand, split_specs
from fewstep.eval.targets import load_target
from fewstep.guidance import parse

UNET = "builtin:digits-unet"
TEXTS = ("1", "3", "apg:3,eta=0.5+cads", "cfg:3+adaptive:0.5", "pcg:3")
SMALL = Config((UNET,), ("ddim", "dpmpp_2m"), (8, 12), guidance=TEXTS, samples=24, chunk=12)


@pytest.fixture(scope="module", autouse=True)
def short_references() -> object:
    """Converged enough for what is asked here."""
    patch = pytest.MonkeyPatch()
    patch.setattr("fewstep.eval.reference.plan.__defaults__", (24,))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return expand(SMALL)


@pytest.fixture(scope="module")
def result(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict:
    store = Store(tmp_path_factory.mktemp("run"))
    store.prepare()
    _write_reference_features(plan, store)
    for _ in work.work(plan, store):
        pass
    assert not list(work.pending(plan, store))
    run = {
        "plan": json.loads(json.dumps(plan.to_json())),
        "command": "fewstep eval",
        "versions": {"fewstep": "0"},
        "host": {"cpu": "", "cores": 1},
        "processes": 1,
        "config": {"threads": 1, "device": "cpu", "seed": 0},
        "started": "2026-01-01",
        "finished": None,
        "seconds": 1.0,
    }
    return summarise(store, run)


# words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["apg:10+cads", "cfg:3+adaptive:0.99", "pcg:3,steps=2", "extrapolate:h3/s4,branch=unconditional+cfg:2.5"],
)
def test_the_text_of_a_guidance_means_it(text: str) -> None:
    shown = guiding.choice(text)
    assert isinstance(shown, str) and parse(shown) == parse(text) and guiding.choice(shown) == shown
    assert "scale=" not in shown and "gamma=" not in shown


def test_a_scale_is_a_number_however_it_is_written() -> None:
    assert [guiding.choice(t) for t in (3.0, "3", "cfg:3", "cfg:scale=3.0")] == [3.0] * 4
    assert split_specs(["1,3 apg:3,eta=0.5+cads"]) == ("1", "3", "apg:3,eta=0.5+cads")


@pytest.mark.parametrize(
    ("guidance", "reference"),
    [
        ("cfg:3+adaptive:0.99", 3.0),
        ("cfg:3+cads", 3.0),
        ("pcg:3", 3.0),
        ("apg:3+adaptive", "apg:3"),
        ("extrapolate:h2/s2", None),
        ("cfg:3,high=2+extrapolate:h2", "cfg:3,high=2"),
    ],
)
def test_what_saves_or_draws_noise_is_not_in_the_converged_solution(guidance: str, reference: object) -> None:
    assert guiding.converged(guiding.choice(guidance)) == reference


# plan -------------------------------------------------------------------------------------------------------------


def test_steps_are_those_that_the_budget_pays_for(plan: Plan) -> None:
    panels = {p.id.removeprefix("digits-unet-"): p for p in plan.panels}
    steps = {name: [c.steps for c in p.cells if c.row == 0] for name, p in panels.items()}
    assert steps == {
        "w1": [8, 12],
        "w3": [4, 6],
        "cads+apg:3,eta=0.5": [4, 6],
        "cfg:3+adaptive:0.5": [4, 6],  # however little it spends in the end
        "pcg:3": [3, 4],  # 3 n - 2
    }
    assert [c.most for c in panels["pcg:3"].cells if c.row == 0] == [7, 10]


def test_a_guidance_that_a_solver_cannot_have_marks_its_cells(plan: Plan) -> None:
    pcg = plan.panels[-1]
    assert [c.message is None for c in pcg.cells] == [True, True, False, False]
    assert "between steps" in str(pcg.cells[-1].message)
    with pytest.raises(ValueError, match="between steps"):
        expand(replace(SMALL, solvers=("dpmpp_2m",), guidance=("pcg:3",)))


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ("apgg:3", "did you mean 'apg'"),
        ("apg:3,etaa=1", "did you mean 'eta'"),
        ("adaptive", "needs a scale"),
        ("apg:3+cfg:2", "both give a scale"),
        ("-1", "must be >= 0"),
    ],
)
def test_mistakes_are_named_before_any_work(guidance: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(replace(SMALL, guidance=(guidance,)))


def test_a_model_without_an_unconditional_network_has_what_needs_none() -> None:
    config = Config(
        ("builtin:gmm",), ("dpmpp_2m",), (10,), guidance=("1", "extrapolate:h3/s3", "3"), samples=2
    )
    plain, skipped = expand(replace(config, models=("builtin:gmm", UNET), guidance=config.guidance)).panels[
        :2
    ]
    assert (plain.guidance, skipped.guidance) == (None, "extrapolate:h3/s3")
    assert (plain.cells[0].steps, skipped.cells[0].steps) == (10, 11) and skipped.cells[0].most == 10


def test_a_batch_that_is_decided_for_is_part_of_the_key(plan: Plan) -> None:
    other = expand(replace(SMALL, chunk=8))
    pairs = list(zip(plan.panels, other.panels))
    same = [[a.key == b.key for a, b in zip(p.cells, q.cells) if a.key] for p, q in pairs]
    assert all(same[0] + same[1]) and not any(same[2] + same[3] + same[4])


def test_panels_share_a_converged_solution(plan: Plan) -> None:
    keys = [p.reference.key for p in plan.panels]
    assert keys[1] == keys[3] == keys[4] and len(set(keys)) == 3
    chunks = [(job.key, chunk.name) for _, job, chunk in work.all_work(plan)]
    assert len(chunks) == len(set(chunks))


def test_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# work -------------------------------------------------------------------------------------------------------------


def cells(result: dict, name: str) -> list[dict]:
    (panel,) = (p for p in result["panels"] if p["id"] == f"digits-unet-{name}")
    return [c for c in panel["cells"] if c["status"] == "ok"]


def test_evaluations_are_counted_at_the_network(result: dict) -> None:
    assert [c["nfe"] for c in cells(result, "w3")] == [8, 12] * 2
    saved = cells(result, "cfg:3+adaptive:0.5")
    assert [c["steps"] for c in saved] == [4, 6] * 2
    assert all(c["steps"] + 1 <= c["nfe"] < 2 * c["steps"] for c in saved)
    assert [c["nfe"] for c in cells(result, "pcg:3")] == [7, 10]


def test_noise_has_no_distance_and_saving_is_measured_against_what_it_saves(result: dict) -> None:
    assert all("rms" not in c for c in cells(result, "cads+apg:3,eta=0.5") + cells(result, "pcg:3"))
    saved, full = cells(result, "cfg:3+adaptive:0.5"), cells(result, "w3")
    assert all(a["rms"]["value"] > b["rms"]["value"] for a, b in zip(saved, full))


def test_variety_is_measured(result: dict) -> None:
    for name in ("w1", "w3"):
        for cell in cells(result, name):
            assert (
                all(0 <= cell[m]["value"] <= 1 for m in ("precision", "recall"))
                and cell["diversity"]["value"] > 0
            )
    guided, plain = cells(result, "w3")[-1], cells(result, "w1")[-1]
    assert guided["diversity"]["value"] < plain["diversity"]["value"]


def test_overview_and_report_show_every_guidance(result: dict) -> None:
    (overview,) = overviews(result["panels"])
    labels = [row["label"] for row in overview["rows"]]
    assert "ddim  3" in labels and "dpmpp_2m  cads+apg:3,eta=0.5" in labels and len(labels) == 10
    assert {c["row"] for c in overview["cells"]} == set(range(10))
    page = build(result, {})
    assert "guidance compared" in page and "cfg:3+adaptive:0.5" in page and "guidance 3" in page
    assert overviews(result["panels"][:2]) == []  # one scale beside none is no comparison


# metrics ----------------------------------------------------------------------------------------------------------


def test_precision_and_recall_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(50, 3)) * 1.5 + 0.5

    def inside(x: np.ndarray, others: np.ndarray, k: int) -> bool:
        for i, centre in enumerate(others):
            near = sorted(np.linalg.norm(centre - o) for j, o in enumerate(others) if j != i)
            if np.linalg.norm(x - centre) <= near[k - 1] + 1e-12:
                return True
        return False

    for k in (1, 3):
        precision, recall = manifold.precision_recall(a, b, k)
        assert precision.tolist() == [inside(x, b, k) for x in a]
        assert recall.tolist() == [inside(x, a, k) for x in b]
    assert all(share.all() for share in manifold.precision_recall(a, a))
    assert not any(share.any() for share in manifold.precision_recall(a + 100, b))


def test_lost_variety_is_seen_in_recall_and_spread_alone() -> None:
    rng = np.random.default_rng(1)
    data = rng.normal(size=(600, 4))
    narrow = 0.3 * rng.normal(size=(600, 4))
    precision, recall = manifold.precision_recall(narrow, data)
    assert precision.mean() > 0.95 and recall.mean() < 0.5
    assert manifold.spread(narrow) == pytest.approx(0.3 * manifold.spread(data), rel=0.1)
    labels = np.arange(600) % 3
    by_hand = sum(((data[labels == c] - data[labels == c].mean(0)) ** 2).sum() for c in range(3)) / 597
    assert manifold.spread(data, labels) == pytest.approx(by_hand**0.5)
    assert manifold.spread(data + 10.0 * labels[:, None], labels) == pytest.approx(
        manifold.spread(data, labels)
    )


def test_the_condition_of_the_network_is_its_embedding() -> None:
    denoiser = load_target(UNET).denoiser(range(4))
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 300.0)
    assert denoiser.condition is not None
    assert torch.equal(denoiser.fn(x, t), denoiser.fn(x, t, denoiser.condition))
    other = denoiser.fn(x, t, denoiser.condition.flip(0))
    assert not torch.allclose(other, denoiser.fn(x, t))


def test_command_line_and_folder(tmp_path: Path) -> None:
    from fewstep.eval.cli import main

    command = ["eval", "-m", UNET, "-s", "ddim", "--nfe", "4", "-n", "6", "--chunk", "6", "-p", "1", "--json"]
    command += ["--guidance", "2,cfg:2+extrapolate:h3/s3,protect_first=0", "-o", str(tmp_path)]
    assert main(command) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [p["guidance"] for p in metrics["panels"]] == [2.0, "cfg:2+extrapolate:h3/s3,protect_first=0"]
    assert main(["report", str(tmp_path)]) == 0


def test_what_was_measured_against_a_method_is_listed() -> None:
    from fewstep.eval.listing import guidance

    cautions = {row["name"]: row["caution"] for row in guidance()}
    assert "fewer steps" in cautions["extrapolate"] and not cautions["cfg"]
