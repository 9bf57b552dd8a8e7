"""What the command line does, from Python."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report as reports
from bench import suite as suites
from bench.runner import STAGES, Progress, Run
from explainer_bench import RequestError
from metrics.base import Precision

_BATCH_SIZES = {"cpu": 16, "cuda": 256}


@dataclass(frozen=True)
class Result:
    """What a run did.

    Parameters
    ----------
    counts : dict
        Cells found, computed and failed, by kind.
    stages : dict
        Per stage: seconds, seconds in the model's forward passes, and the process's peak memory so far in MiB.
    report : Report or None
        The boards, as ``report.boards.wide[dataset]`` and ``report.boards.long[dataset]``; None after a single stage.
    failures : list of str
        One line for each explainer or metric with failed cells.
    """

    counts: dict[str, int]
    stages: dict[str, dict[str, float]]
    report: reports.Report | None
    failures: list[str]


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA where there is one.

    Raises
    ------
    RequestError
        If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        known = device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError, ValueError):
        known = False
    if not known:
        raise RequestError(f"no device {name!r} here: use auto, cpu, cuda or cuda:N.")
    return device


def run(
    suite: str | suites.Suite,
    *,
    out: str | Path,
    data_root: str | Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    shard: tuple[int, int] = (1, 1),
    stages: Sequence[str] | None = None,
    fresh: bool = False,
    precision: Precision = "fp32",
    progress: Progress = lambda *_: None,
) -> Result:
    """Compute a suite, or what is missing of it, into a folder.

    Parameters
    ----------
    suite : str or Suite
        A name, a YAML file, or what `bench.suite.load` returned.
    out : str or Path
        The folder; finished cells found there are kept.
    data_root : str or Path, optional
        The folder that holds the data sets that are not embedded.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    batch_size : int, optional
        Perturbed images per forward pass; changes memory and speed, never a score. 16 on the CPU, 256 on CUDA.
    shard : (int, int)
        ``(i, n)`` computes the i-th of n parts.
    stages : sequence of str, optional
        Only these of predict, explain, score; then no boards are made.
    fresh : bool
        Compute finished cells again.
    precision : "fp32" or "bf16"
        How perturbed images go through the model when metrics ask it; faster and a little different in bf16.
        Predictions and explanations are always fp32.
    progress : callable
        ``progress(stage, done, total)``; one step is one explainer on one shard.

    Raises
    ------
    RequestError
        Before anything is written, if the request cannot be carried out.
    """
    start = time.perf_counter()
    out = Path(out)
    chosen = suites.load(suite) if isinstance(suite, str) else suite
    root = Path(data_root) if data_root is not None else None
    where = choose_device(device)
    batch_size = batch_size or _BATCH_SIZES[where.type]
    this = Run(chosen, out, root, where, batch_size, shard, fresh, precision)
    this.execute(tuple(stages) if stages else STAGES, progress)
    reports.write_plan(this)
    if stages or not any(out.glob("scores/**/*.parquet")):
        failed = [
            f"{n} {kind.removesuffix(' failed')}: see {out / 'failures'}"
            for kind, n in this.done.items()
            if "failed" in kind
        ]
        return Result(dict(this.done), this.stages, None, failed)
    reports.write_pictures(this)
    report = reports.read(out)
    reports.write(report, out, out / "leaderboards")
    reports.write_manifest(this, time.perf_counter() - start)
    return Result(dict(this.done), this.stages, report, report.failures)
