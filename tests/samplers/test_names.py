"""The names of ComfyUI, k-diffusion and diffusers mean solvers here, or it is known why they do not."""

from __future__ import annotations

import names_table
import pytest

import fewstep as fs
from fewstep.eval import listing

NAMES = names_table.COMFYUI | names_table.DIFFUSERS | dict.fromkeys(names_table.K_DIFFUSION, "")
NAMES["dpm_adaptive"] = names_table.COMFYUI["dpm_adaptive"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_a_solver_or_has_none(name: str) -> None:
    if names_table.has_spec(NAMES[name]):
        solver = fs.solver(name)
        assert fs.solver(solver.spec).spec == solver.spec
    else:
        with pytest.raises(ValueError, match="no solver"):
            fs.solver(name)


def test_names_of_gpu_versions_mean_the_same() -> None:
    for name in names_table.COMFYUI:
        if name.endswith("_gpu"):
            assert fs.solver(name).spec == fs.solver(name.removesuffix("_gpu")).spec


def test_the_listing_shows_them() -> None:
    rows = listing.solvers()
    shown = {row["name"] for row in rows} | {alias for row in rows for alias in row["aliases"]}
    assert {name for name, note in NAMES.items() if names_table.has_spec(note)} <= shown
    for row in rows:
        for alias, spec in row["aliases"].items():
            assert fs.solver(alias).spec == fs.solver(spec).spec


def test_the_page_holds_every_name() -> None:
    assert names_table.PAGE.read_text(encoding="utf-8") == names_table.page()
