"""Two real processes of a launcher give what one gives: ``fewstep tune`` and ``fewstep eval`` under ``torchrun``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from fewstep.eval.cli import main

TWO = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "fewstep.eval",
]


def both(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folders in which a command ran as one process and as two."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    monkeypatch.chdir(alone)
    assert main(command.split()) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*TWO, *command.split()], cwd=together, env=environment, check=True, timeout=300)
    return alone, together


def test_recipe(tmp_path, monkeypatch):
    """The same file to the byte; each rank solved its half of the trajectories."""
    command = "tune --model builtin:gmm --nfe 4 --method closed-form --out recipe.json"
    alone, together = both(command, tmp_path, monkeypatch)
    assert (alone / "recipe.json").read_bytes() == (together / "recipe.json").read_bytes()
    parts = [f.stem.rsplit("-", 1)[1] for f in together.glob(".fewstep-trajectories/*-160-*.npz")]
    assert parts == ["16", "16"]


def test_results(tmp_path, monkeypatch):
    """The same samples to the bit."""
    command = "eval -m builtin:gmm -s dpmpp_2m --nfe 4,5 -n 16 --chunk 4 -p 1 -o results"
    alone, together = both(command, tmp_path, monkeypatch)
    hashes = [(folder / "results/samples.jsonl").read_bytes() for folder in (alone, together)]
    assert hashes[0] == hashes[1]
    assert json.loads((together / "results/metrics.json").read_text())["run"]["processes"] == 2
