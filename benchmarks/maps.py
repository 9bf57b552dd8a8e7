"""Time and memory of the metrics of the map alone: `python benchmarks/maps.py [--maps 1000] [--quantus 20]`.

Random maps at full resolution and random maps of tokens, with random rectangles as ROIs. Every metric of the groups
localization and compactness scores the same samples in turn, as in a run, so that what they share is paid for by the
first that needs it; Quantus's own `__call__` scores a few of the same maps beside it, where Quantus has the metric.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import metrics
from metrics import Metric, Samples
from metrics.maps import MapMetric
from metrics.quantus_bridge import QuantusMetric

SIDE, PATCH = 224, 16


def build(n: int, kind: str) -> Samples:
    """Return `n` samples with random maps and ROIs."""
    rng = np.random.default_rng(0)
    tokens = SIDE // PATCH
    if kind == "pixels":
        maps = rng.standard_normal((n, SIDE, SIDE))
    else:
        maps = rng.standard_normal((n, tokens, tokens)).repeat(PATCH, 1).repeat(PATCH, 2)
    roi = np.zeros((n, SIDE, SIDE), dtype=bool)
    for row, (top, left, height, width) in enumerate(rng.integers(8, SIDE - 8, size=(n, 4))):
        roi[row, top : top + height, left : left + width] = True
    return Samples(
        model=nn.Identity(),
        inputs=torch.zeros(1, 3, SIDE, SIDE).expand(n, -1, -1, -1),
        targets=np.zeros(n, dtype=int),
        maps=maps,
        roi=roi,
        logits=np.zeros((n, 2)),
        seeds=np.arange(n, dtype=np.uint32),
        patch=(PATCH, PATCH),
    )


class PeakMemory:
    """The largest resident memory while a block runs, in bytes above that at its start."""

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._start = self._peak = resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        """Bytes above the start."""
        return self._peak - self._start


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def seconds(metric: Metric, samples: Samples) -> float:
    """Return how long a metric takes for all samples."""
    start = time.perf_counter()
    metric(samples)
    return time.perf_counter() - start


def quantus_ms(metric: Metric, samples: Samples) -> float | None:
    """Return Quantus's milliseconds per map, None where it has no such metric."""
    if not isinstance(metric, QuantusMetric):
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # its advice on parameters
        return 1000 * seconds(metrics.get(metric.spec, engine="quantus"), samples) / len(samples)


def report(kind: str, n: int, n_quantus: int) -> None:
    """Print the table of one kind of map."""
    samples, few = build(n, kind), build(n_quantus, kind)
    scored = [metrics.get(name) for name, cls in metrics.registry.classes.items() if issubclass(cls, MapMetric)]
    scored.sort(key=lambda metric: metric.group)
    quantus = {metric.name: quantus_ms(metric, few) for metric in scored}
    started = time.process_time()
    with PeakMemory() as memory:
        took = {metric.name: seconds(metric, samples) for metric in scored}
    cpu = time.process_time() - started
    print(f"\n{n} maps of {SIDE} x {SIDE}, {kind}; Quantus on {n_quantus} of them")
    print(f"{'metric':28}{'ms/map':>9}{'Quantus':>9}{'ratio':>8}")
    for name, spent in took.items():
        ours, theirs = 1000 * spent / n, quantus[name]
        print(f"{name:28}{ours:9.3f}" + (f"{theirs:9.2f}{theirs / ours:7.0f}x" if theirs else ""))
    print(
        f"{'all':28}{1000 * sum(took.values()) / n:9.3f} ms/map, {sum(took.values()):.2f} s ({cpu:.2f} s of CPU), ",
        end="",
    )
    print(f"{memory.extra / 2**20:.0f} MiB above the samples' own {samples.maps.nbytes / 2**20:.0f} MiB of maps")


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--quantus", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"numpy {np.__version__}, {arguments.threads} threads, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for kind in ("pixels", "tokens"):
        report(kind, arguments.maps, arguments.quantus)


if __name__ == "__main__":
    main()
