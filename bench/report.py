"""From a folder of cells to boards: the plan that a run leaves, and what any later reader makes of it."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import explainer_bench
import leaderboards
from adapters import Explainer
from bench.problem import SHARD, Problem, Shard, evidence
from bench.runner import Run
from bench.store import Store
from explainer_bench import RequestError

N_PICTURES = 6
_KINDS = "map:", "region:"  # what the names of arrays in the file of pictures begin with
_NAMES = ["dataset", "model", "explainer", "metric"]


def write_plan(run: Run) -> None:
    """Write ``plan.json``: every cell of the run with its path, and what the boards say of explainers and metrics."""
    cells: list[dict[str, Any]] = []
    explainers: list[dict[str, Any]] = []
    for problem in run.problems:
        dataset, model = problem.names
        for explainer in run.explainers:
            reason = run.refusal(problem, explainer)
            explainers.append(
                {
                    "dataset": dataset,
                    "model": model,
                    "explainer": explainer.spec,
                    "explainer_version": explainer.version,
                    "params": json.dumps(explainer.params, sort_keys=True, default=str),
                    "trivial": explainer.trivial,
                    "signed": explainer.signed,
                    "status": "unsupported" if reason else "ok",
                    "info": reason or _circular(run, explainer),
                }
            )
        for index in range(problem.n_shards):
            cells += _cells(run, problem, problem.shard(index))
    metrics = [
        {
            "metric": m.spec,
            "metric_version": m.version,
            "group": m.group,
            "higher_is_better": m.higher_is_better,
            "description": " ".join((inspect.getdoc(type(m)) or "").partition("\n\n")[0].split()),
        }
        for m in run.metrics
    ]
    constants = _constants(run)
    run.store.write_json("plan.json", {"cells": cells, "explainers": explainers, "metrics": metrics, "run": constants})


def _cells(run: Run, problem: Problem, shard: Shard) -> Iterator[dict[str, Any]]:
    known = run.known(problem, shard)
    dataset, model = problem.names
    for explainer in run.supported(problem):
        for metric in run.metrics:
            classes = known.classes(explainer, metric)
            yield {
                "dataset": dataset,
                "model": model,
                "explainer": explainer.spec,
                "metric": metric.spec,
                "n": len(shard.samples),
                "shard": shard.index,
                "scores": run.score_cell(problem, shard, explainer, metric, known),
                "explanations": [run.explanation_cell(problem, shard, explainer, c) for c in classes],
            }


def _circular(run: Run, explainer: Explainer) -> str:
    """Return which metrics measure nothing but how the explainer makes its maps, or ""."""
    names = [metric.spec for metric in run.metrics if explainer.asks and metric.asks == explainer.asks]
    return f"circular: made of what {' and '.join(names)} asks the model" if names else ""


def _constants(run: Run) -> dict[str, Any]:
    return {
        "seed": run.suite.seed,
        "device": run.device.type,
        "precision": run.precision,
        "quantus": importlib.metadata.version("quantus"),
        "torch": torch.__version__,
        "explainer_bench": explainer_bench.__version__,
        "git": _git(),
        "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "fingerprints": [[*p.names, p.dataset.fingerprint, p.model.fingerprint] for p in run.problems],
    }


def _git() -> str:
    """Return the state of this package's own checkout, or "" where there is none, or no git."""
    house = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(house), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (house / ".git").exists() or not shutil.which("git"):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_pictures(run: Run) -> None:
    """Keep the first images of every problem with their ROI and maps, for the page."""
    for problem in run.problems:
        shard = problem.shard(0)
        known = run.known(problem, shard)
        rows = _varied([sample.label for sample in shard.samples])[:N_PICTURES]
        arrays = {}
        for explainer in run.supported(problem):
            cell = run.explanation_cell(problem, shard, explainer, known.targets)
            if run.store.exists(cell, "npz"):
                arrays[f"map:{explainer.spec}"] = run.maps(problem, shard, explainer, known.targets)[rows].numpy()
        samples, targets = [shard.samples[row] for row in rows], known.targets[rows]
        images = [problem.model.resize(problem.dataset.load(sample).image) for sample in samples]
        names = problem.dataset.class_names
        proven = evidence(problem.dataset, problem.model)
        region = proven or next(iter(problem.dataset.regions), "")
        others = [name for name in problem.dataset.regions if name != region]
        titles = [
            f"explained: {names[target]}; labelled: {names[sample.label]}"
            for target, sample in zip(targets, samples, strict=True)
        ]
        run.store.write_arrays(
            run.store.path("pictures", *problem.names, key="first"),
            names=np.array(problem.names),
            images=np.stack(images),
            roi=shard.roi(known.targets)[rows],
            titles=np.array(titles),
            samples=np.array([sample.id for sample in samples]),
            region=np.array(region),
            proven=np.array(bool(proven)),
            **{f"region:{name}": shard.roi(known.targets, name)[rows] for name in others},
            **arrays,
        )


def _varied(labels: list[int]) -> list[int]:
    """Return all places, the first of every class first, then the second ones."""
    return sorted(range(len(labels)), key=lambda place: labels[:place].count(labels[place]))


@dataclass(frozen=True)
class Report:
    """Boards, the cells of the plan they stand on, and a line for all that failed, or is undefined for every map."""

    boards: leaderboards.Boards
    done: int
    missing: int
    failures: list[str]
    undefined: list[str]


def read(folder: Path) -> Report:
    """Aggregate whatever cells a run has left so far; computes no score.

    Raises
    ------
    RequestError
        If `folder` holds no run.
    """
    store, plan = _open(folder)
    cells = pd.DataFrame(plan["cells"])
    cells["error"] = [_error(store, cell) for cell in plan["cells"]]
    cells["done"] = [store.exists(cell, "parquet") for cell in cells["scores"]]
    scores = _scores(store, plan)
    cells["defined"] = _defined(cells, scores)
    failed = cells[cells["error"] != ""]
    by_metric = cells.groupby(["dataset", "model", "metric"])
    # a metric that fails wherever it has something to score
    broken = ~by_metric["defined"].transform("any") & by_metric["error"].transform("max").ne("")
    scores = scores.merge(cells.loc[~broken, _NAMES].drop_duplicates(), on=_NAMES)
    if scores.empty:
        raise RequestError(f"every metric failed in {folder}: see {folder / 'failures'}.")
    explainers = [_explainer_row(store, row, cells, broken) for row in plan["explainers"]]
    boards = leaderboards.build(scores, pd.DataFrame(plan["metrics"]), pd.DataFrame(explainers), _run(plan["run"]))
    done = int(cells["done"].sum())
    missing = len(cells) - done - len(failed)
    return Report(boards, done, missing, _failure_lines(failed, broken), undefined_lines(scores))


def scores(folder: Path) -> pd.DataFrame:
    """Return every score of a run: ``dataset, model, explainer, metric, sample, group, value, reason, chance``.

    Raises
    ------
    RequestError
        If `folder` holds no finished scores.
    """
    return _scores(*_open(folder))


def _open(folder: Path) -> tuple[Store, dict[str, Any]]:
    if not (folder / "plan.json").is_file():
        raise RequestError(f"{folder} holds no plan.json: name the output folder of a run.")
    store = Store(folder)
    return store, store.read_json("plan.json")


def _scores(store: Store, plan: Mapping[str, Any]) -> pd.DataFrame:
    cells = [cell for cell in plan["cells"] if store.exists(cell["scores"], "parquet")]
    if not cells:
        raise RequestError(f"{store.root} holds no finished scores: run the suite, or see {store.root / 'failures'}.")
    return pd.concat([store.read_table(cell["scores"]).assign(**_names(cell)) for cell in cells], ignore_index=True)


def _failure_lines(failed: pd.DataFrame, broken: pd.Series) -> list[str]:
    """Return a line for each metric that failed for everyone, and for each explainer that failed otherwise."""
    lines = []
    for culprit, rows in (("metric", failed[broken[failed.index]]), ("explainer", failed[~broken[failed.index]])):
        for (dataset, model, name), cells in rows.groupby(["dataset", "model", culprit], sort=True):
            samples = cells.drop_duplicates("shard")["n"].sum()
            lines.append(f"{culprit} {name} on {dataset}, {model}: {samples} samples: {cells['error'].iloc[0]}")
    return lines


def _names(cell: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in _NAMES}


def _defined(cells: pd.DataFrame, scores: pd.DataFrame) -> np.ndarray:
    """Tell of each cell whether its explainer has a score of that metric anywhere."""
    known = set(scores.loc[np.isfinite(scores["value"]), _NAMES].itertuples(index=False, name=None))
    return np.array([names in known for names in cells[_NAMES].itertuples(index=False, name=None)])


def undefined_lines(scores: pd.DataFrame) -> list[str]:
    """Return a line for the metrics that have no score of some images, whichever map is scored: how many, and why."""
    alike: dict[str, list[str]] = {}
    for (dataset, model, metric), rows in scores.groupby(["dataset", "model", "metric"], sort=True):
        nowhere = rows.groupby("sample")["value"].transform(lambda values: not np.isfinite(values).any())
        if nowhere.any():
            reason = rows.loc[nowhere & ~rows["reason"].isin(["constant map"]), "reason"].mode()
            images, total = rows.loc[nowhere, "sample"].nunique(), rows["sample"].nunique()
            why = reason.iloc[0] if len(reason) else "constant map"
            where = f"on {dataset}, {model}: undefined on {images} of {total} images: {why}"
            alike.setdefault(where, []).append(str(metric))
    return [f"{', '.join(names)} {line}" for line, names in alike.items()]


def _error(store: Store, cell: Mapping[str, Any]) -> str:
    """Return the first recorded error on the way to a score that is not there."""
    if store.exists(cell["scores"], "parquet"):
        return ""
    return next(filter(None, map(store.failure, [*cell["explanations"], cell["scores"]])), "")


def _explainer_row(store: Store, row: Mapping[str, Any], cells: pd.DataFrame, broken: pd.Series) -> dict[str, Any]:
    """Complete a row of the plan: a metric that failed for every explainer is no fault of this one."""
    mine = cells[
        (cells[["dataset", "model", "explainer"]] == [row["dataset"], row["model"], row["explainer"]]).all(axis=1)
    ]
    per_shard = mine.groupby("shard")
    failed = mine[(mine["error"] != "") & ~broken[mine.index]]
    status = {"status": "failed", "info": failed["error"].iloc[0]} if len(failed) else {}
    maps = [(cell[0], n) for cell, n in zip(per_shard["explanations"].first(), per_shard["n"].first(), strict=True)]
    timed = [(float(store.read_arrays(cell)["seconds"]), n) for cell, n in maps if store.exists(cell, "npz")]
    seconds = sum(s for s, _ in timed) / sum(n for _, n in timed) if timed else np.nan
    n_failed = int(failed.groupby("shard")["n"].first().sum())
    return {**row, "n_failed": n_failed, "seconds_per_image": seconds, **status}


def _run(constants: Mapping[str, Any]) -> dict[str, Any]:
    prints = constants["fingerprints"]
    return {
        **constants,
        "dataset_fingerprint": {dataset: data for dataset, _, data, _ in prints},
        "model_fingerprint": {(dataset, model): weights for dataset, model, _, weights in prints},
    }


def write(report: Report, folder: Path, out: Path) -> list[Path]:
    """Write the CSV files and the page of the run in `folder` to `out`."""
    files = leaderboards.write(report.boards, out)
    return [*files, leaderboards.page.write(report.boards, list(_pictures(Store(folder))), out)]


def _pictures(store: Store) -> Iterator[dict[str, Any]]:
    plan = store.read_json("plan.json")
    signed = {row["explainer"]: row["signed"] for row in plan["explainers"]}
    for dataset, model, *_ in plan["run"]["fingerprints"]:
        cell = store.path("pictures", dataset, model, key="first")
        if not store.exists(cell, "npz"):
            continue
        stored = store.read_arrays(cell)
        maps, regions = ({k.removeprefix(kind): v for k, v in stored.items() if k.startswith(kind)} for kind in _KINDS)
        for i, sample in enumerate(stored["samples"]):
            roi = stored["roi"][i]
            yield {
                "dataset": dataset,
                "model": model,
                "sample": str(sample),
                "title": str(stored["titles"][i]),
                "image": stored["images"][i],
                "roi": roi if roi.any() else None,
                "region": str(stored.get("region", "")),
                "proven": bool(stored.get("proven", False)),
                "others": {name: array[i] for name, array in regions.items()},
                "maps": {name: array[i] for name, array in maps.items()},
                "signed": signed,
            }


def write_manifest(run: Run, seconds: float) -> None:
    """Write ``manifest.json``: what was asked, of what, with what, on what, and what it cost."""
    packages = ("torch", "torchvision", "timm", "quantus", "captum", "zennit", "grad-cam", "numpy", "pandas", "scipy")
    run.store.write_json(
        "manifest.json",
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "suite": run.suite.model_dump(),
            "run": run.store.read_json("plan.json")["run"],
            "shard": run.shard,
            "shard_size": SHARD,
            "batch_size": run.batch_size,
            "cells": dict(sorted(run.done.items())),
            "seconds": round(seconds, 3),
            "stages": run.stages,
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "hardware": {
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if run.device.type == "cuda" else "",
            },
        },
    )
