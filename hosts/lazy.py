"""Modules that need diffusers, loaded when one of their names is first asked for."""

from __future__ import annotations

from collections.abc import Container
from importlib import import_module
from typing import Any


def loaded(module: str, package: str, names: Container[str], name: str) -> Any:
    """A name of a module of a package: what the package's ``__getattr__`` returns.

    Raises AttributeError for what is not among ``names``, and ImportError with the remedy without diffusers.
    """
    if name not in names:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "diffusers":
            raise
        raise ImportError(
            f"{name} needs diffusers: pip install 'fewstep[diffusers]'", name="diffusers"
        ) from error
