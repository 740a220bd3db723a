"""The working tree as packaging sees it: its root, its packages, copies of it and what is built from it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKAGES = {"tests", "docs", "examples", "benchmarks", "example_workflows", "build", "dist"}
# What a clone does not have: environments, caches, builds, results.
_LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", "*.egg-info", "build", "dist", "results", "fewstep-results"
)


def settings(root: Path = ROOT) -> dict[str, Any]:
    """pyproject.toml, parsed."""
    # Python 3.10 has no tomllib; pytest brings tomli there.
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk(root: Path = ROOT) -> list[str]:
    """Dotted names of the folders that hold an ``__init__.py``, the root itself being ``fewstep``."""
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "_"))
            and not (here == Path() and (name in NOT_PACKAGES or name.endswith(".egg-info")))
        ]
        if "__init__.py" in files:
            found.append(".".join(("fewstep", *here.parts)))
    return sorted(found)


def library_files(root: Path = ROOT) -> list[Path]:
    """Every .py file of the library."""
    files = [root / "__init__.py"]
    for package in packages_on_disk(root):
        if package.count(".") == 1:
            files += sorted((root / package.partition(".")[2]).rglob("*.py"))
    return [file for file in files if file.is_file()]


def copy_to(destination: Path, *, library_only: bool = False) -> Path:
    """Copy the tree, as a clone would hold it, to a new folder.

    ``library_only`` leaves out the folders that are not part of the package.
    """

    def ignore(folder: str, names: list[str]) -> set[str]:
        ignored = set(_LEFT_BEHIND(folder, names))
        if library_only and Path(folder) == ROOT:
            ignored |= NOT_PACKAGES & set(names)
        return ignored

    shutil.copytree(ROOT, destination, ignore=ignore)
    return destination


def python(
    arguments: Sequence[str | Path],
    *,
    cwd: Path,
    interpreter: str | Path = sys.executable,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run an interpreter in a folder, free of this process's PYTHONPATH and of pytest's settings."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTEST_", "PYTHONPATH", "PYTHONHOME"))
    }
    return subprocess.run(
        [str(interpreter), *map(str, arguments)],
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` of a tree with this environment's setuptools, without a download."""
    out.mkdir(parents=True, exist_ok=True)
    call = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    done = python(["-c", call], cwd=source)
    assert done.returncode == 0, done.stdout
    return out / done.stdout.strip().splitlines()[-1]


def install(wheel: Path, environment: Path) -> Path:
    """A new virtual environment that holds the wheel, with this one's packages behind it: its interpreter."""
    done = python(["-m", "venv", "--without-pip", environment], cwd=environment.parent)
    assert done.returncode == 0, done.stdout
    interpreter = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    behind = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "behind.pth").write_text("\n".join(sorted(behind)) + "\n", encoding="utf-8")
    return interpreter
