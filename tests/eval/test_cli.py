"""The command line as a user meets it: results, JSON, mistakes, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.eval.cli import main

EVAL = [
    "eval",
    "-m",
    "builtin:digits-exact",
    "-s",
    "euler,dpmpp_2m",
    "--nfe",
    "4,5",
    "-n",
    "16",
    "--chunk",
    "8",
    "-p",
    "1",
]


LONGER = [*EVAL[:-6], "-n", "24", "--chunk", "2", "-p", "1"]
"""The same in 12 chunks a cell: long enough to be killed on the way, however busy the machine is."""


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "results"
    assert main([*LONGER, "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "results"
    assert main([*EVAL, "-o", str(path)]) == 0
    return path


def numbers(folder: Path) -> list[dict]:
    """The cells without what was measured on the clock."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return [
        {k: v for k, v in c.items() if k != "ms_per_sample"} for p in metrics["panels"] for c in p["cells"]
    ]


def test_the_folder_holds_everything(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert {"run.json", "cells.jsonl", "samples.jsonl", "metrics.json", "report.html", "chunks"} <= names
    run = json.loads((folder / "run.json").read_text())
    assert run["versions"]["torch"] and run["host"]["cpu"] and run["finished"] and run["config"]["seed"] == 0
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert [c["nfe"] for c in cells] == [4, 5, 4, 5]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 16 and len(samples[0]["sha256"]) == 64
    assert [s["seed"] for s in samples[:16]] == list(range(16))


def test_again_is_at_once_and_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = numbers(folder), (folder / "samples.jsonl").read_bytes()
    chunks = {p: p.stat().st_mtime_ns for p in folder.glob("chunks/*/*")}
    assert main([*EVAL, "-o", str(folder)]) == 0
    assert "continuing: 4 of 4 cells" in capsys.readouterr().out
    assert (numbers(folder), (folder / "samples.jsonl").read_bytes()) == before
    assert {p: p.stat().st_mtime_ns for p in folder.glob("chunks/*/*")} == chunks
    assert json.loads((folder / "run.json").read_text())["sessions"] == 2


def test_json_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVAL, "-o", str(tmp_path / "r"), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["complete"] and "fewstep eval" in captured.err
    cell = result["panels"][0]["cells"][0]
    assert cell["rms"]["low"] < cell["rms"]["value"] < cell["rms"]["high"]


def test_report_is_rebuilt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert "RMS distance at NFE" in capsys.readouterr().out and (folder / "report.html").exists()
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]


def test_compare_pairs_the_same_indices(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*EVAL, "--schedule", "beta", "-o", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder), str(tmp_path / "b"), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["panels"][0]["cells"]
    rms = cells[0]["metrics"]["rms"]
    assert rms["difference"]["value"] == pytest.approx(rms["b"] - rms["a"])
    assert rms["verdict"] in ("better", "worse", "not resolved")
    assert main(["compare", str(folder), str(folder), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)["panels"][0]["cells"]
    assert {m["verdict"] for c in same for m in c["metrics"].values()} == {"identical"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(["-n", "8"], "the indices differ"), (["--seed", "5"], "the seed differs: 0 .* 5")],
)
def test_compare_refuses_what_is_not_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main([*EVAL, *change, "-o", str(tmp_path / "other")]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder), str(tmp_path / "other")]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--nfe", "0"], "an NFE budget must be at least 1, got 0"),
        (["eval", "--nfe", "four"], "--nfe: 'four'"),
        (["eval", "-s", "unipcc"], "did you mean 'unipc'"),
        (["eval", "-s", "unipc:ordr=3"], "did you mean 'order'"),
        (["eval", "-m", "builtin:digit-unet"], "did you mean 'digits-unet'"),
        (["eval", "-m", "builtin:digits-exact", "-s", "heun", "--nfe", "4,6"], "nearest budgets: 3, 5, 7"),
        (["eval", "--schedule", "karass"], "did you mean 'karras'"),
        (["eval", "-p", "0"], "processes must be at least 1"),
        (["eval", "--bogus", "1"], "No such option: --bogus"),
        (["explain"], "Missing argument"),
        (["explain", "nope"], "no solver 'nope'"),
        (["explain", "euler", "-o", "picture.pdf"], "a picture is written as"),
        (["list", "solver"], "did you mean 'solvers'"),
        (["report", "/nonexistent"], "not a results folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_an_unwritable_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*EVAL, "-o", str(tmp_path / "file" / "r")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write to the results folder")


@pytest.mark.parametrize("what", ["solvers", "schedules", "models", "metrics", "guidance"])
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["name"] and row["summary"] for row in rows)
    assert main(["list", what]) == 0
    assert rows[0]["name"].split(":")[0] in capsys.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in [
        (["--help"], ["eval", "report", "compare", "list", "explain"]),
        (["eval", "--help"], ["--solvers", "--nfe", "goes on where it stopped", "--out"]),
        (["explain", "--help"], ["stability", "--noise"]),
    ]:
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)
    assert main(["--version"]) == 0
    assert "torch" in capsys.readouterr().out


def test_explain_writes_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "dpmpp_2m", "--steps", "4", "-o", str(tmp_path / "s.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 4
    assert (tmp_path / "s.svg").read_text().startswith("<svg")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_and_gives_the_same_numbers(
    stop: signal.Signals, longer: Path, tmp_path: Path
) -> None:
    """Killed after the first chunks of the first cell, continued by the same command."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fewstep.eval", *LONGER, "-o", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    deadline = time.monotonic() + 60
    while (
        len(list(out.glob("chunks/*/*.safetensors"))) < 3
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.002)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert error.strip() == "interrupted; run the same command to go on"
    done = len(list(out.glob("chunks/*/*.safetensors")))
    assert 3 <= done < len(list(longer.glob("chunks/*/*.safetensors")))
    assert main([*LONGER, "-o", str(out)]) == 0
    assert numbers(out) == numbers(longer)
    assert (out / "samples.jsonl").read_bytes() == (longer / "samples.jsonl").read_bytes()
    assert not list(out.glob("**/.*.tmp"))
