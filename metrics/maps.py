"""What metrics of the map alone share: pixels or tokens, and one ranking of each map for all of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from metrics.base import Metric, Samples
from metrics.perturbation import patch_grid, patch_sums
from metrics.quantus_bridge import evaluate

T = TypeVar("T")


class MapMetric(Metric):
    """Base of the metrics that look at a map alone, or at a map and its ROI.

    Parameters
    ----------
    unit : {"pixel", "token"}
        What is scored: the pixels of the map, or the mean of the map over each patch of `Samples.patch`. An ROI then
        consists of the patches that it covers at least by half; where there is none, of those that it covers most.
    """

    unit: Literal["pixel", "token"] = "pixel"

    def view(self, samples: Samples) -> Samples:
        """Return the samples with `maps` and `roi` as this metric sees them."""
        return samples if self.unit == "pixel" else samples.keep("by token", lambda: by_token(samples))

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of the map at `row` of a `view`."""
        raise NotImplementedError

    def measure(self, view: Samples) -> np.ndarray:
        """Return (N,) float64: the scores of a `view`'s maps."""
        first = self.of_map(view, 0)  # computes what the maps keep for each other, before threads ask for it
        return np.array([first, *for_each_map(lambda row: self.of_map(view, row + 1), len(view) - 1)])

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64."""
        return self.measure(self.view(samples))

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        view, reasons = self.view(samples), super().undefined
        key = "undefined", self.needs_roi, self.undefined_on_constant
        return list(view.keep(key, lambda: reasons(view)))


class QuantusMapMetric(MapMetric):
    """Base of the metrics of a map that Quantus has, computed here in a fraction of its time.

    Parameters
    ----------
    engine : {"fast", "quantus"}
        "quantus": Quantus itself, whose check of the attributions costs far more than most metrics, and which refuses
        maps that are negative throughout. "fast": the same numbers, computed here.
    """

    quantus_name: ClassVar[str] = ""

    engine: Literal["fast", "quantus"] = "fast"

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return the parameters of the Quantus metric that differ from its defaults."""
        return {}

    def build(self, samples: Samples, row: int) -> Any:
        """Return a new Quantus metric for the sample at `row`, so that none sees what another left behind."""
        import quantus  # takes seconds: only when it is needed

        return getattr(quantus, self.quantus_name)(disable_warnings=True, **self.quantus_params(samples, row))

    def measure(self, view: Samples) -> np.ndarray:
        """Return (N,) float64, by either engine."""
        if self.engine == "fast":
            return super().measure(view)
        nobody = nn.Identity()  # is asked: no model is
        rows = range(len(view))
        return np.array([evaluate(self.build(view, row), view, row, nobody) for row in rows], dtype=float)


def by_token(samples: Samples) -> Samples:
    """Return the samples with one value per patch in `maps` (N, h, w), and the ROI's patches in `roi` (N, h, w)."""
    (rows, columns), (down, across) = patch_grid(samples), samples.patch
    with np.errstate(invalid="ignore"):  # maps that are not finite
        maps = patch_sums(samples).reshape(-1, rows, columns) / (down * across)
    covered = samples.roi.reshape(-1, rows, down, columns, across).sum(axis=(2, 4))
    needed = np.minimum(covered.max(axis=(1, 2), keepdims=True), (down * across + 1) // 2)
    roi = (covered >= needed) & (covered > 0)
    return replace(samples, maps=maps, roi=roi, inputs=samples.inputs[..., :rows, :columns], patch=(1, 1))


def for_each_map(compute: Callable[[int], T], n: int) -> list[T]:
    """Return ``[compute(0), ..., compute(n - 1)]``, by as many threads as PyTorch may use: NumPy lets them run."""
    threads = min(torch.get_num_threads(), n)
    if threads <= 1:
        return [compute(row) for row in range(n)]
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda rows: [compute(row) for row in rows], np.array_split(np.arange(n), threads))
        return [result for part in parts for result in part]


def distinct(samples: Samples, row: int) -> tuple[np.ndarray, int]:
    """Return a map's values (M,), and how often each of them stands in the map.

    A map upsampled from tokens to the nearest is its tokens, each as often as a patch has pixels; any other is its
    pixels, each once.
    """
    return samples.keep("distinct", lambda: [_distinct(each, samples.patch) for each in samples.maps])[row]


def _distinct(attribution: np.ndarray, patch: tuple[int, int]) -> tuple[np.ndarray, int]:
    (height, width), (down, across) = attribution.shape, patch
    if down * across > 1 and height % down == 0 and width % across == 0:
        patches = attribution.reshape(height // down, down, width // across, across)
        tokens = patches[:, :1, :, :1]
        # the first row of pixels gives most other maps away
        if (patches[0, 0] == tokens[0, 0]).all() and (patches == tokens).all():
            return tokens.ravel(), down * across
    return attribution.ravel(), 1


def inside(samples: Samples, row: int) -> np.ndarray:
    """Return (M,): how many of the pixels of each of the map's `distinct` values lie in the ROI."""
    roi = samples.roi[row]
    if distinct(samples, row)[1] == 1:
        return roi.ravel()
    (height, width), (down, across) = roi.shape, samples.patch
    return roi.reshape(height // down, down, width // across, across).sum(axis=(1, 3)).ravel()


def minmax_scaled(values: np.ndarray) -> np.ndarray:
    """Return `values` of any shape, scaled to 0 the smallest and 1 the largest."""
    low = values.min()
    return (values - low) / (values.max() - low)


class Groups(NamedTuple):
    """Runs of equal values, in order: how many pixels each has (G,) int, and how many of them are marked (G,) int."""

    sizes: np.ndarray
    marked: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """How many pixels there are up to and with each group, (G,) int."""
        if self.sizes.max() == 1:
            return np.arange(1, len(self.sizes) + 1)
        return np.cumsum(self.sizes, dtype=np.int32)

    def top(self, n: int) -> tuple[int, tuple[int, int, int]]:
        """Return how many of the first `n` pixels are marked for sure, and the tie at the n-th place.

        The tie is the number of its pixels, of those marked, and of those still to draw.
        """
        if self.sizes.max() == 1:
            return int(self.marked[: n - 1].sum(dtype=np.int64)), (1, int(self.marked[n - 1]), 1)
        seen = self.seen
        tie = int(np.searchsorted(seen, n))
        size = int(self.sizes[tie])
        sure = int(self.marked[:tie].sum(dtype=np.int64))
        return sure, (size, int(self.marked[tie]), n - int(seen[tie]) + size)


def grouped(values: np.ndarray, marked: np.ndarray, times: int = 1) -> Groups:
    """Return the groups of equal `values`, from the largest.

    Each of `values` (M,) stands for `times` pixels, `marked` (M,) of them are marked.
    """
    new, counts = _ordered_by_bit(values, marked) if times == 1 else _ordered(values, marked)
    if new.all():
        return Groups(np.full(len(values), times, dtype=np.min_scalar_type(times)), counts)
    starts = np.flatnonzero(np.concatenate([[True], new]))
    sizes = np.diff(starts, append=len(values)) * times
    return Groups(sizes, np.add.reduceat(counts.astype(np.int64), starts))


def _ordered(values: np.ndarray, marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return in order whether each value but the first differs from the one before, and what of each is marked."""
    order = np.argsort(values)[::-1]
    ranked = values[order]
    return ranked[1:] != ranked[:-1], marked[order]


def _ordered_by_bit(values: np.ndarray, marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_ordered`, of bool marks: one takes the place of its value's last bit, and the numbers alone are sorted.

    Sorting numbers takes a third of the time of sorting indices. Where it makes two values equal it is not done.
    """
    bits = (0.0 - values).view(np.int64)  # the largest first, and one zero only
    used = bool(np.bitwise_or.reduce(bits) & 1)
    bits &= ~np.int64(1)
    bits |= marked
    ranked = bits.view(np.float64)
    ranked.sort()
    flags = (bits & 1).astype(np.uint8)
    bits >>= 1
    new = bits[1:] != bits[:-1]
    return (new, flags) if new.all() or not used else _ordered(values, marked)


def ranking(samples: Samples, row: int) -> Groups:
    """Return a map's groups of equal pixels from the most relevant, those in the ROI marked; kept for all metrics."""
    return samples.keep("rankings", lambda: _rankings(samples))[row]


def _rankings(samples: Samples) -> list[Groups]:
    distinct(samples, 0)  # kept, before threads ask for it
    return for_each_map(lambda row: _ranking(samples, row), len(samples))


def _ranking(samples: Samples, row: int) -> Groups:
    values, times = distinct(samples, row)
    groups = grouped(values, inside(samples, row), times)
    # a byte per pixel and array at full resolution
    return Groups(*(each.astype(np.min_scalar_type(each.max()), copy=False) for each in groups))


def hypergeometric(total: int, marked: int, drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of `marked` may be among `drawn` of `total`, (S,) float64, and how probable each number is.

    Numbers more than 12 standard deviations and 12 away from the mean are left out: they add up to less than
    float64 resolves.
    """
    mean, share = drawn * marked / total, marked / total
    spread = 12 + 12 * np.sqrt(drawn * share * (1 - share) * (total - drawn) / max(total - 1, 1))
    low = max(0, drawn + marked - total, int(mean - spread))
    high = min(drawn, marked, int(mean + spread) + 1)
    count = np.arange(low, high + 1, dtype=float)
    before = count[:-1]
    ratio = (marked - before) * (drawn - before) / ((before + 1) * (total - marked - drawn + before + 1))
    log = np.concatenate([[0.0], np.cumsum(np.log(ratio))])
    probability = np.exp(log - log.max())
    return count, probability / probability.sum()
