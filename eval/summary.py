"""From chunks to numbers: reads a results folder, never a model, so it works on a half-finished run as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from . import manifold
from .metrics import (
    Estimate,
    Jackknife,
    Moments,
    frechet_interval,
    jackknife,
    mean_interval,
    median_interval,
    rms_distance,
    share_interval,
    without_groups,
)
from .store import Chunk, Store
from .sweep import Cell, Panel, Plan
from .work import chunks_of, jobs


class Summary:
    """The numbers of one panel, computed cell by cell as chunks arrive."""

    def __init__(self, plan: Plan, panel: Panel, store: Store) -> None:
        self.panel, self.store, self.size = panel, store, plan.config.chunk
        self.reference_job, self.check_job = jobs(panel)[:2]
        self._converged: Jackknife | None = None
        self._moments: Moments | None = None
        self._images: Mapping[str, np.ndarray] | None = None
        self._reach: np.ndarray | None = None

    def complete(self, key: str, chunks: Iterable[Chunk]) -> bool:
        """Whether all chunks of a key are on disk."""
        return all(self.store.has(key, chunk) for chunk in chunks)

    def head(self) -> dict[str, Any]:
        """What the panel says before any cell: reference, its resolution, the floor."""
        panel = self.panel
        r = panel.reference
        head: dict[str, Any] = {
            "id": panel.id,
            "model": panel.model,
            "guidance": panel.guidance,
            "cost": panel.cost,
            "note": panel.note,
            "warnings": list(panel.warnings),
            "samples": panel.samples,
            "budgets": list(panel.budgets),
            "rows": [{"solver": row.solver, "schedule": row.schedule, "label": row.label, "order": row.order,
                      "stochastic": row.stochastic} for row in panel.rows],
            "reference": {"solver": r.solver, "schedule": r.schedule, "steps": r.steps, "key": r.key,
                          "guidance": r.guidance},
            "floor": None,
            "agreement": None,
            "features": None,
        }  # fmt: skip
        parts = panel.chunks(self.size)
        if (failure := self.store.failure(r.key)) is not None:
            head["warnings"].append(f"there is no converged solution, so no distance to it: {failure}")
        if not self.complete(r.key, parts):
            return head
        arrays, infos = self.store.load_chunks(r.key, parts)
        head["reference"]["nfe"] = _mean_nfe(infos)
        head["reference"]["ms_per_sample"] = _time(infos).value
        if "features" in arrays:
            head["floor"] = frechet_interval(self._floor()).to_json()
            head["features"] = {"fingerprint": panel.features, "reference_count": self._reference_moments().count,
                                "dimension": arrays["features"].shape[1]}  # fmt: skip
        head["agreement"] = _agreement(arrays)
        checked = chunks_of(panel, self.check_job, self.size)
        if self.complete(r.check_key, checked):
            coarse, _ = self.store.load_chunks(r.check_key, checked)
            distance = rms_distance(coarse["samples"], arrays["samples"][: len(coarse["samples"])])
            head["reference"]["resolution"] = mean_interval(distance).to_json()
        return head

    def cell(self, cell: Cell) -> dict[str, Any]:
        """One cell: its place, its status (``ok``, ``pending``, ``failed``, ``unreachable``) and its numbers."""
        row = self.panel.rows[cell.row]
        result: dict[str, Any] = {
            "row": cell.row,
            "solver": row.solver,
            "schedule": row.schedule,
            "budget": cell.budget,
        }
        if cell.message is not None:
            return {**result, "key": None, "status": "unreachable", "message": cell.message}
        result |= {"key": cell.key, "steps": cell.steps}
        failure = self.store.failure(cell.key)
        if failure is not None:
            return {**result, "status": "failed", "message": failure}
        parts = self.panel.chunks(self.size)
        if not self.complete(cell.key, parts):
            return {**result, "status": "pending", "message": None}
        arrays, infos = self.store.load_chunks(cell.key, parts)
        result |= {"status": "ok", "message": None, "samples": self.panel.samples}
        result |= {"nfe": _mean_nfe(infos), "calls": infos[0]["calls"]}
        if "distance" in arrays and self.complete(self.panel.reference.key, parts):
            result["rms"] = mean_interval(arrays["distance"]).to_json()
            result["rms_median"] = median_interval(arrays["distance"]).to_json()
        if "features" in arrays:
            sampled = jackknife(arrays["features"], self._reference_moments())
            result["frechet"] = frechet_interval(sampled).to_json()
            if self.complete(self.panel.reference.key, parts):
                result["frechet_excess"] = frechet_interval(sampled, self._floor()).to_json()
            result |= self._variety(arrays)
        if (agreement := _agreement(arrays)) is not None:
            result["agreement"] = agreement
        result["ms_per_sample"] = _time(infos).to_json()
        if len({row.tobytes() for row in arrays["sha256"]}) < self.panel.samples:
            result["message"] = f"{row.label} at NFE {cell.budget}: some samples are identical"
        return result

    def images(self, key: str) -> np.ndarray | None:
        """The kept images of a cell or of the reference."""
        kept = []
        for chunk in self.panel.chunks(self.size):
            if not self.store.has(key, chunk):
                break
            arrays, _ = self.store.load_chunk(key, chunk)
            if not len(arrays.get("images", ())):
                break
            kept.append(arrays["images"])
        return np.concatenate(kept) if kept else None

    def samples(self, cell: Cell, seed: int) -> Iterable[dict[str, Any]]:
        """The lines of ``samples.jsonl`` of a finished cell."""
        arrays, _ = self.store.load_chunks(cell.key, self.panel.chunks(self.size))
        labels = arrays.get("label")
        for i, digest in enumerate(arrays["sha256"]):
            line = {"cell": cell.key, "index": i, "seed": seed + i, "sha256": digest.tobytes().hex()}
            yield line if labels is None else {**line, "label": int(labels[i])}

    def _reference_moments(self) -> Moments:
        if self._moments is None:
            self._images, info = self.store.load_arrays(f"reference-{self.panel.features}.safetensors")
            self._moments = Moments(info["count"], self._images["mean"], self._images["covariance"])
        return self._moments

    def _variety(self, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
        """Precision, recall and diversity; needs more samples than neighbours."""
        self._reference_moments()
        features, labels, images = arrays["features"], arrays.get("label"), self._images
        if images is None or len(features) <= manifold.NEIGHBOURS:
            return {}
        reference = images["features"]
        if self._reach is None:
            self._reach = manifold.radii(reference)
        inside, reached = manifold.precision_recall(features, reference, reach=self._reach)
        data = manifold.spread(reference, images.get("label") if labels is not None else None)

        def diversity(rows: np.ndarray) -> float:
            return manifold.spread(features[rows], None if labels is None else labels[rows]) / data

        numbers = {
            "precision": share_interval(int(inside.sum()), len(inside)),
            "recall": share_interval(int(reached.sum()), len(reached)),
            "diversity": frechet_interval(without_groups(diversity, len(features))),
        }
        return {name: estimate.to_json() for name, estimate in numbers.items()}

    def _floor(self) -> Jackknife:
        """The Fréchet distance of the converged samples."""
        if self._converged is None:
            arrays, _ = self.store.load_chunks(self.panel.reference.key, self.panel.chunks(self.size))
            self._converged = jackknife(arrays["features"], self._reference_moments())
        return self._converged


def _agreement(arrays: Mapping[str, np.ndarray]) -> dict[str, float | None] | None:
    if "label" not in arrays or "predicted" not in arrays:
        return None
    return share_interval(int(np.sum(arrays["label"] == arrays["predicted"])), len(arrays["label"])).to_json()


def _mean_nfe(infos: list[dict[str, Any]]) -> float:
    """Evaluations a sample, mean over all; an integer where it is one."""
    mean = sum(info["nfe"] * info["count"] for info in infos) / sum(info["count"] for info in infos)
    return int(mean) if float(mean).is_integer() else mean


def _time(infos: list[dict[str, Any]]) -> Estimate:
    return median_interval([1000.0 * info["seconds"] / info["count"] for info in infos])


def summarise(store: Store, run: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``metrics.json`` for whatever is in the folder."""
    plan = Plan.from_json(run["plan"])
    panels = []
    for panel in plan.panels:
        summary = Summary(plan, panel, store)
        panels.append({**summary.head(), "cells": [summary.cell(c) for c in panel.cells]})
    complete = all(c["status"] != "pending" for p in panels for c in p["cells"])
    return {
        "format": 1,
        "complete": complete,
        "run": {k: v for k, v in run.items() if k != "plan"},
        "panels": panels,
    }


def write(store: Store, run: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``cells.jsonl``, ``samples.jsonl``, ``metrics.json`` and ``report.html``; returns the metrics."""
    from .report import build

    plan = Plan.from_json(run["plan"])
    result = summarise(store, run)
    store.save_json("metrics.json", result)
    store.save_lines(
        "cells.jsonl", ({"panel": p["id"], **cell} for p in result["panels"] for cell in p["cells"])
    )
    images, lines = {}, []
    for panel, numbers in zip(plan.panels, result["panels"]):
        summary = Summary(plan, panel, store)
        finished = {c["key"] for c in numbers["cells"] if c["status"] == "ok"}
        for key in [panel.reference.key, *finished]:
            if (kept := summary.images(key)) is not None:
                images[key] = kept
        for cell in panel.cells:
            if cell.key in finished:
                lines += summary.samples(cell, plan.config.seed)
    store.save_lines("samples.jsonl", lines)
    store.save_text("report.html", build(result, images))
    return result
