"""Class sensitivity: does the map change with the class it explains?"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import rankdata
from skimage.metrics import structural_similarity

from explainer_bench import RequestError
from metrics.base import Metric, Samples, pearson
from metrics.curves import CurveMetric
from metrics.perturbation import Outputs, PatchMetric, rivals, target_output


class OtherClassMetric(Metric):
    """Base of the metrics that compare the target's map with the map of one other class."""

    group = "class_sensitivity"
    higher_is_better = False
    bounds = (-1.0, 1.0)
    undefined_reason = "map of the other class is constant or not finite"

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        return _with_two_classes(samples, super().undefined(samples))

    def other_maps(self, samples: Samples) -> np.ndarray:
        """Return (N, H, W) float64: each sample's map for its other class."""
        if samples.explain is None:
            raise RequestError(f"metric {self.name!r} needs maps of other classes: give Samples an `explain`.")
        classes = self.other_classes(samples.logits, samples.targets, samples.seeds)[:, 0]
        return np.asarray(samples.explain(classes), dtype=float)


class ClassCorrelation(OtherClassMetric):
    """Correlation, over pixels, of the target's map with the map of another class; 1 for a class-blind map.

    Parameters
    ----------
    other : {"second", "least"}
        The most probable class besides the target, or the least probable one; the first of those that tie.
    similarity : {"pearson", "spearman"}
        Correlation of the values, or of their ranks, where equal values share their mean rank.
    """

    name = "class_correlation"
    formula = "corr(map of the target, map of another class) over pixels"
    rewards = "The map changes with the class that it is asked to explain."
    fooled_by = "Noise that is drawn anew for each class scores 0, as do two maps of unrelated places."
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364); least probable class: Li et al., KDD 2021"

    other: Literal["second", "least"] = "second"
    similarity: Literal["pearson", "spearman"] = "pearson"

    def other_classes(self, logits: np.ndarray, targets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Return (N, 1) int: the class to compare with; (N, 0) of a model with a single class."""
        others = rivals(logits if self.other == "second" else -logits, targets)
        return others[:, None][:, : logits.shape[1] - 1]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        pair = [maps.reshape(len(samples), -1) for maps in (samples.maps, self.other_maps(samples))]
        if self.similarity == "spearman":
            pair = [rankdata(maps, axis=1, nan_policy="propagate") for maps in pair]
        return pearson(*pair)


class RandomLogit(OtherClassMetric):
    """SSIM, as of images, of the target's map with the map of a random other class; 1 for a class-blind map.

    Each map is divided by its largest magnitude; then both are shifted and scaled together, from the lowest to the
    highest value of the pair, to [0, 1], the range of the images that SSIM is made for. Negative values stay what
    they are, low ones: a map and its negative are dissimilar. The square windows are two patches and a pixel wide, or
    the largest odd width that fits, and lie wholly within the map. In windows narrower than a patch most of a token
    map is constant, and constant windows count as alike: two random token maps would score 0.4, not 0.
    """

    name = "random_logit"
    version = "2"
    formula = "mean over windows of SSIM(map of the target, map of a random other class), both within [0, 1]"
    rewards = "The map of another class has another structure."
    fooled_by = "Noise that is drawn anew for each class scores close to 0."
    deviation = (
        "Quantus flattens the maps: its windows are runs of 7 pixels in raster order, not squares, and a map times -1 "
        "counts as similar. Quantus's own number is `quantus:RandomLogit`."
    )
    reference = "Sixt, Granz & Landgraf, ICML 2020 (arXiv:1912.09818); SSIM: Wang et al., IEEE TIP 2004"

    def other_classes(self, logits: np.ndarray, targets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Return (N, 1) int: a class drawn from each seed; (N, 0) of a model with a single class."""
        classes = logits.shape[1]
        if classes < 2:
            return np.empty((len(targets), 0), dtype=int)
        # the generator and the call with which Quantus draws it
        draws = np.array([np.random.RandomState(int(seed)).randint(0, classes - 1) for seed in seeds], dtype=int)
        return (draws + (draws >= targets))[:, None]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        window = 2 * max(samples.patch) + 1
        pairs = zip(samples.maps, self.other_maps(samples), strict=True)
        return np.array([map_ssim(*pair, window) if np.ptp(pair[1]) > 0 else np.nan for pair in pairs])


def map_ssim(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Return the SSIM of two maps (H, W), neither of them zero throughout, brought to [0, 1] as `RandomLogit` states.

    Parameters
    ----------
    a, b : ndarray
        (H, W) float64, at least 3 pixels high and wide.
    window : int
        Odd width of the square windows in pixels; reduced to the largest odd width that fits.
    """
    pair = np.stack([a / np.abs(a).max(), b / np.abs(b).max()])
    pair = (pair - pair.min()) / np.ptp(pair)
    fits = min(window, (min(a.shape) - 1) // 2 * 2 + 1)
    return float(structural_similarity(*pair, win_size=fits, data_range=1.0))


class ClassPointing(Metric):
    """Share of the positive relevance in the target's ROI, of that in the target's and in another class's ROI.

    The other class is the most probable one besides the target that has a ROI with pixels outside the target's, as
    found in images that show several objects. Pixels in both ROIs are left out: they speak for neither class. Pixels
    outside both do not count either, so this asks which of two objects the map means, not whether it means any.
    """

    name = "class_pointing"
    group = "class_sensitivity"
    bounds = (0.0, 1.0)
    needs_roi = True
    sign_policy = "positive"
    formula = "m(A \\ B) / (m(A \\ B) + m(B \\ A)): m sums the positive map, A is the target's ROI, B the other class's"
    rewards = "The map marks the target's object and not another class's object in the same image."
    fooled_by = "A map that always marks the larger or brighter object, wherever that is the target's."
    reference = (
        "Zhang et al., IJCV 2018 (arXiv:1608.00507), for contrastive maps of two objects; Arras, Osman & Samek, "
    )
    reference += "Information Fusion 2022 (arXiv:2003.07258), for the share of the mass"

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        own, other = apart(samples)
        cases = {
            "no other class has a ROI of its own": ~other.any((1, 2)),
            "the other class's ROI covers the target's": ~own.any((1, 2)),
            "no positive attribution in either ROI": ~((samples.maps > 0) & (own | other)).any((1, 2)),
        }
        reasons = super().undefined(samples)
        for why, holds in cases.items():
            reasons = [reason or why * held for reason, held in zip(reasons, holds.tolist(), strict=True)]
        return reasons

    def chance_level(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64: the share of the target's ROI of the area of both; NaN without another ROI."""
        own, other = (part.sum((1, 2)) for part in apart(samples))
        return np.divide(own, own + other, out=np.full(len(samples), np.nan), where=(own > 0) & (other > 0))

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        positive = np.maximum(samples.maps, 0)
        # a large map must not overflow in the sum
        positive /= positive.max(axis=(1, 2), keepdims=True)
        own, other = ((positive * part).sum((1, 2)) for part in apart(samples))
        return own / (own + other)


def apart(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, H, W) bool twice: the target's ROI and the other class's, each without the pixels of both."""
    other = samples.once("ROI of another class", _other_roi)
    return samples.roi & ~other, other & ~samples.roi


def _other_roi(samples: Samples) -> np.ndarray:
    """Return (N, H, W) bool: the ROI of the most probable class whose ROI is not within the target's."""
    if samples.roi_of is None:
        raise RequestError("the metric 'class_pointing' needs ROIs of other classes: give Samples a `roi_of`.")
    found = np.zeros_like(samples.roi)
    for classes in np.argsort(-samples.logits, axis=1, kind="stable").T:
        missing = ~found.any((1, 2)) & (classes != samples.targets)
        if missing.any():
            roi = samples.roi_of(classes)
            take = missing & (roi & ~samples.roi).any((1, 2))
            found[take] = roi[take]
    return found


class ContrastiveFaithfulness(CurveMetric, PatchMetric):
    """How much more the target's logit falls than its rival's while the most relevant patches are replaced first.

    The rival is the most probable class besides the target on the unperturbed image. Both drops are counted from the
    unperturbed image; their difference is integrated, by a trapezoid sum, over the fraction of patches replaced, from
    0 to the last step before all are. The perturbed images are those of `srg` with the same steps and imputer: where
    it is scored too, this costs no forward pass.

    No chance level is stated, and it is not 0: replacing any patches brings the two logits of a confident prediction
    closer together. Compare with the random rows of the board.

    Parameters
    ----------
    steps : int
        Steps from the whole image to the fully replaced one.
    imputer : str
        What replaces the patches; "mean" is the mean colour of the image.
    output : "logit"
        What is read off the model.
    """

    name = "contrastive_faithfulness"
    perturbed = slice(1, -1)
    group = "class_sensitivity"
    formula = "area, over the fraction of patches replaced, of (drop of the target's logit - drop of its rival's logit)"
    rewards = "What the map marks speaks for the target rather than for classes in general."
    fooled_by = "A class-blind map of the object, wherever the image shows no object of the rival's class."
    reference = "MoRF: Samek et al., IEEE TNNLS 2017 (arXiv:1509.06321); the rival's logit: ours"

    output: Literal["logit"] = "logit"

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        return _with_two_classes(samples, super().undefined(samples))

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in units of the logit."""
        counts = self.counts(samples)
        classes = samples.targets, rivals(samples.logits, samples.targets)
        target, rival = (target_output(samples.logits, each, "logit") for each in classes)
        drop = (target - rival)[:, None] - (seen.logit - seen.rival)
        return trapezoid(np.pad(drop, ((0, 0), (1, 0))), counts[:-1] / counts[-1], axis=1)


def _with_two_classes(samples: Samples, reasons: list[str]) -> list[str]:
    alone = "fewer than two classes" if samples.logits.shape[1] < 2 else ""
    return [reason or alone for reason in reasons]
