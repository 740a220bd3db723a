"""Reads the golden files: runs of the original implementations on a Gaussian mixture with a known denoiser.

A folder of golden files holds ``INDEX.json`` (one entry a case: name, family, n, nfe, tol, repo, commit), one
``FAMILY.npz`` with arrays named ``CASE/ARRAY`` and the family's mixture ``gmm_w``, ``gmm_mu``, ``gmm_var``,
and ``guidance/*.npz``. The environment variable ``FEWSTEP_GOLDEN`` names another folder of this form, with
other mixtures, step counts and parameters: read those from a case's ``meta`` and write none into a test.

    for name in golden_files.load().names("unipc"): ...     # at collection, for parametrize
    case = golden.case("unipc_bh2_o3_n10")                  # in a test, from the fixture `golden`
    case["x_init"], case.meta["n"], case.tol, case.mixture.denoised(x, alpha, sigma)
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FOLDER = Path(__file__).resolve().parents[1] / "golden"


@dataclass(frozen=True, eq=False)
class Mixture:
    """x0 ~ sum_k w_k N(mu_k, diag(var_k)), with its exact predictions at x = alpha x0 + sigma eps.

    ``w`` (K,), ``mu`` and ``var`` (K, d). States are (..., d); alpha and sigma broadcast against (...).
    With v_k = alpha^2 var_k + sigma^2 and responsibilities r_k(x):
    denoised = sum_k r_k (mu_k + alpha var_k (x - alpha mu_k) / v_k),
    epsilon = sum_k r_k sigma (x - alpha mu_k) / v_k.
    """

    w: NDArray[np.float64]
    mu: NDArray[np.float64]
    var: NDArray[np.float64]

    def _parts(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> tuple[NDArray[np.float64], ...]:
        state = np.asarray(x, dtype=np.float64)[..., None, :]
        a, s = (np.asarray(value, dtype=np.float64)[..., None, None] for value in (alpha, sigma))
        v = a**2 * self.var + s**2
        residual = (state - a * self.mu) / v
        logits = np.log(self.w) - 0.5 * np.sum(np.log(v) + residual * residual * v, axis=-1)
        logits -= logits.max(axis=-1, keepdims=True)
        r = np.exp(logits)
        r /= r.sum(axis=-1, keepdims=True)
        return r[..., None], residual, a, s

    def denoised(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
        """E[x0 | x]."""
        r, residual, a, _ = self._parts(x, alpha, sigma)
        return np.sum(r * (self.mu + a * self.var * residual), axis=-2)

    def epsilon(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
        """E[eps | x]."""
        r, residual, _, s = self._parts(x, alpha, sigma)
        return np.sum(r * s * residual, axis=-2)

    def v(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
        """E[alpha eps - sigma x0 | x]."""
        a, s = (np.asarray(value, dtype=np.float64)[..., None] for value in (alpha, sigma))
        return a * self.epsilon(x, alpha, sigma) - s * self.denoised(x, alpha, sigma)

    def flow(self, x: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
        """E[eps - x0 | x], the velocity of x = (1 - t) x0 + t eps."""
        return self.epsilon(x, alpha, sigma) - self.denoised(x, alpha, sigma)


@dataclass(frozen=True, eq=False)
class Case:
    """One run of a reference implementation: its index entry, its parsed ``meta``, its arrays and the model
    it ran on.
    """

    name: str
    entry: Mapping[str, Any]
    meta: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    mixture: Mixture

    @property
    def family(self) -> str:
        return self.entry["family"]

    @property
    def tol(self) -> float:
        """Absolute tolerance on ``x_final``."""
        return float(self.meta["tol"] if "tol" in self.meta else self.entry["tol"])

    def __getitem__(self, array: str) -> NDArray[Any]:
        try:
            return self.arrays[array]
        except KeyError:
            raise KeyError(f"{self.name} has no array {array!r}, only {sorted(self.arrays)}") from None

    def __contains__(self, array: object) -> bool:
        return array in self.arrays


class Golden:
    """The golden files of one folder. Iterating gives the entries of its index."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "INDEX.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"no golden files: {index} does not exist (FEWSTEP_GOLDEN names the folder)"
            )
        self.index: dict[str, dict[str, Any]] = {
            e["name"]: e for e in json.loads(index.read_text(encoding="utf-8"))
        }
        self._families: dict[str, tuple[Mixture, dict[str, dict[str, NDArray[Any]]]]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.index.values())

    def __len__(self) -> int:
        return len(self.index)

    def names(self, *families: str, prefix: str = "") -> list[str]:
        """Names of the cases of these families (all families if none is given) that start with ``prefix``, in
        the index's order.
        """
        return [
            name
            for name, entry in self.index.items()
            if (not families or entry["family"] in families) and name.startswith(prefix)
        ]

    def case(self, name: str) -> Case:
        """The case of this name. Arrays are read once a family."""
        if name not in self.index:
            raise KeyError(f"no golden case {name!r} in {self.folder}")
        entry = self.index[name]
        mixture, cases = self._family(entry["family"])
        arrays = dict(cases[name])
        return Case(name, entry, json.loads(str(arrays.pop("meta"))), arrays, mixture)

    def guidance(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of ``guidance/NAME.npz``."""
        with np.load(self.folder / "guidance" / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    def _family(self, family: str) -> tuple[Mixture, dict[str, dict[str, NDArray[Any]]]]:
        if family not in self._families:
            cases: dict[str, dict[str, NDArray[Any]]] = {}
            with np.load(self.folder / f"{family}.npz", allow_pickle=False) as file:
                mixture = Mixture(file["gmm_w"], file["gmm_mu"], file["gmm_var"])
                for key in file.files:
                    case, slash, array = key.partition("/")
                    if slash:
                        cases.setdefault(case, {})[array] = file[key]
            self._families[family] = mixture, cases
        return self._families[family]


@functools.cache
def load() -> Golden:
    """The golden files of ``FEWSTEP_GOLDEN``, or of ``tests/golden``."""
    return Golden(os.environ.get("FEWSTEP_GOLDEN") or FOLDER)
