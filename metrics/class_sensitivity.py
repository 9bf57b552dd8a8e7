"""Class sensitivity: does the map change with the class it explains?"""

from __future__ import annotations

from typing import Any

import numpy as np

from explainer_bench import RequestError
from metrics.base import Metric, Samples, pearson
from metrics.quantus_bridge import QuantusMetric, evaluate, preprocess


class OtherClassMetric(Metric):
    """Base of the metrics that compare the target's map with the map of one other class."""

    group = "class_sensitivity"
    higher_is_better = False
    bounds = (-1.0, 1.0)
    undefined_reason = "map of the other class is constant or not finite"

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        alone = "fewer than two classes" if samples.logits.shape[1] < 2 else ""
        return [reason or alone for reason in super().undefined(samples)]

    def other_maps(self, samples: Samples) -> np.ndarray:
        """Return (N, H, W) float64: each sample's map for its other class."""
        if samples.explain is None:
            raise RequestError(f"metric {self.name!r} needs maps of other classes: give Samples an `explain`.")
        classes = self.other_classes(samples.logits, samples.targets, samples.seeds)[:, 0]
        return np.asarray(samples.explain(classes), dtype=float)


class ClassCorrelation(OtherClassMetric):
    """Pearson correlation of the target's map with that of the most probable other class; 1 for a class-blind map."""

    name = "class_correlation"
    chance = 0.0
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364)"

    def other_classes(self, logits: np.ndarray, targets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Return (N, 1) int: the most probable class besides the target; none of a model with a single class."""
        others = np.array(logits, dtype=float)
        others[np.arange(len(targets)), targets] = -np.inf
        return others.argmax(axis=1)[:, None][:, : logits.shape[1] - 1]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        size = (len(samples), -1)
        return pearson(samples.maps.reshape(size), self.other_maps(samples).reshape(size))


class RandomLogit(OtherClassMetric, QuantusMetric):
    """SSIM of the target's map with that of a random other class (Quantus's RandomLogit).

    Quantus 0.6.0 flattens the maps before the SSIM: its window of 7 slides over pixels in raster order, not over
    squares. SSIM multiplies a term of the means with one of the deviations, and both change sign with the map: a map
    and its negative come out similar. The class is the one that Quantus draws from the sample's seed.
    """

    name = "random_logit"
    quantus_name = "RandomLogit"
    reference = "Sixt, Granz & Landgraf, ICML 2020 (arXiv:1912.09818)"

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return the number of classes, and the seed that the other class is drawn from."""
        return {"num_classes": samples.logits.shape[1], "seed": int(samples.seeds[row])}

    def other_classes(self, logits: np.ndarray, targets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Return (N, 1) int: the class that Quantus draws from each seed; none of a model with a single class."""
        classes = logits.shape[1]
        if classes < 2:
            return np.empty((len(targets), 0), dtype=int)
        draws = np.array([np.random.RandomState(int(seed)).randint(0, classes - 1) for seed in seeds], dtype=int)
        return (draws + (draws >= targets))[:, None]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        others = self.other_maps(samples)
        compare = self._fast if self.engine == "fast" else self._full
        varied = np.ptp(others, axis=(1, 2)) > 0
        return np.array([compare(samples, row, others[row]) if varied[row] else np.nan for row in range(len(samples))])

    def _fast(self, samples: Samples, row: int, other: np.ndarray) -> float:
        metric = self.build(samples, row)
        pair = [preprocess(metric, attribution).reshape(1, -1) for attribution in (samples.maps[row], other)]
        return float(metric.similarity_func(*pair, batched=True)[0])

    def _full(self, samples: Samples, row: int, other: np.ndarray) -> float:
        def stored(**_: Any) -> np.ndarray:
            return other[None, None]

        return evaluate(self.build(samples, row), samples, row, samples.model, stored)
