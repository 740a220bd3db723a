"""Writes docs/parity.md: every golden file, the run of fewstep that repeats it, and the error. Run as a script."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import golden_files
import golden_runs
import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

HEAD = """# Parity with the original implementations

Every run of an original implementation on the same mixture with a known denoiser, repeated by fewstep in float64. The
error is the largest difference of the final state; a file's tolerance is stated in it. `pytest
tests/samplers/test_golden.py` checks all of them, `python tests/helpers/parity_table.py` writes this page.

| original | files | fewstep | tolerance | error |
|---|---|---|---|---|
"""


def rows() -> list[tuple[str, str, str, float, float]]:
    """(original, files, spec, tolerance, error), cases that differ in the number of steps together."""
    found: dict[tuple[str, str, str], list[tuple[str, float, float]]] = defaultdict(list)
    golden = golden_files.load()
    for name in golden.names():
        case = golden.case(name)
        run = golden_runs.find(case)
        if run is None:
            continue
        error = float(np.abs(golden_runs.execute(case, run) - case[run.expected]).max())
        stem, _, steps = name.rpartition("_n")
        key = (original(case.entry), stem or name, shortened(str(run.solver), run.options))
        found[key].append((steps if stem else "", case.tol, error))
    merged = []
    for (source, stem, spec), cases in found.items():
        steps = [n for n, _, _ in cases if n]
        files = (
            f"{stem}_n{{{','.join(steps)}}}" if len(steps) > 1 else f"{stem}_n{steps[0]}" if steps else stem
        )
        merged.append((source, files, spec, min(t for _, t, _ in cases), max(e for *_, e in cases)))
    return merged


def original(entry) -> str:
    return f"{entry['repo']} {entry['commit'][:8]}" if entry.get("commit") else entry["repo"]


def shortened(spec: str, options) -> str:
    """A spec with the options of a run, long lists of numbers cut."""
    given = ",".join(f"{k}={v}".lower() for k, v in options.items())
    base, plus, transform = spec.partition("+")
    text = base + (("," if ":" in base else ":") + given if given else "") + plus + transform
    text = re.sub(
        r"\d+\.\d{7,}(e-?\d+)?", lambda m: f"{float(m[0]):.6g}", text
    )  # machines differ in the last digit
    return re.sub(r"=([^,/+]+/[^,/+]+)/[^,+]+", r"=\1/...", text)


def page() -> str:
    lines = [f"| {o} | {f} | `{s}` | {t:.0e} | {e:.1e} |" for o, f, s, t, e in rows()]
    missing = ["", "## Not repeated", "", "| files | reason |", "|---|---|"]
    missing += [f"| {', '.join(names)} | {reason} |" for reason, names in golden_runs.not_repeated().items()]
    return HEAD + "\n".join(lines + missing) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
