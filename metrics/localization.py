"""Localization: does the map point at the region of interest?

An ROI is where a human looks, which need not be what the model uses: a faithful map may score badly here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator
from scipy.special import gammaln

from explainer_bench import RequestError
from metrics.base import Samples, Scores
from metrics.maps import (
    MapMetric,
    QuantusMapMetric,
    distinct,
    grouped,
    hypergeometric,
    inside,
    minmax_scaled,
    ranking,
)

Percent = Annotated[float, Field(gt=0, le=100)]

SMALL, LARGE = 0.05, 0.25  # the shares of the image where medium ROIs begin and end
FULL = "ROI covers the whole image"


def roi_area(samples: Samples) -> np.ndarray:
    """Return (N,) float64: the fraction of each image that its ROI covers."""
    return np.count_nonzero(samples.roi, axis=(1, 2)) / samples.roi[0].size


def roi_size(samples: Samples) -> np.ndarray:
    """Return (N,) str: "small" where the ROI covers less than 5 % of the image, "medium" below 25 %, else "large"."""
    return np.array(["small", "medium", "large"])[np.digitize(roi_area(samples), [SMALL, LARGE])]


def bounding_boxes(roi: np.ndarray) -> np.ndarray:
    """Return (N, H, W) bool: the smallest upright rectangle around each of `roi` (N, H, W), around all of its parts."""
    rows, columns = (_span(np.asarray(roi.any(axis=axis))) for axis in (2, 1))
    return rows[:, :, None] & columns[:, None, :]


def _span(lines: np.ndarray) -> np.ndarray:
    begun = np.logical_or.accumulate(lines, axis=1)
    left = np.logical_or.accumulate(lines[:, ::-1], axis=1)[:, ::-1]
    return begun & left


class RoiMetric(MapMetric):
    """Base of the metrics that compare a map with the region of interest.

    The chance level is the expected score of random values without ties, or of the map's own values in random places
    where the score depends on the values.

    Parameters
    ----------
    roi : str
        One of the regions that the data set names (``roi=lung``). Such a score says whether the map is where a person
        would look, so it counts as plausibility. Empty: the region where the evidence is known, or assumed, to be.
    unit : {"pixel", "token"}
        What is scored, see `MapMetric`.
    region : {"mask", "box"}
        The ROI itself, or the smallest upright rectangle around all of it.
    corrected : bool
        Score ``(s - chance) / (1 - chance)``: 0 by chance, 1 at best, below 0 where a map is worse than chance.
        Undefined where the ROI covers the whole image.
    roi_size : {"any", "small", "medium", "large"}
        Score only the images whose ROI (its mask, in pixels) covers less than 5 % of the image, 5 to 25 %, or at least
        25 %; undefined on the others.
    """

    group = "localization"
    bounds = (0.0, 1.0)
    needs_roi = True
    needs_background: ClassVar[bool] = False  # an ROI of the whole image has no score

    roi: str = ""
    region: Literal["mask", "box"] = "mask"
    corrected: bool = False
    roi_size: Literal["any", "small", "medium", "large"] = "any"

    def __post_init__(self) -> None:
        if self.roi:
            self.group = "plausibility"  # type: ignore[misc]
        if self.corrected:
            low = -np.inf if self.chance is None else (self.bounds[0] - self.chance) / (1 - self.chance)
            self.bounds, self.chance = (low, 1.0), 0.0  # type: ignore[misc]

    def named(self, samples: Samples) -> Samples:
        """Return the samples whose `roi` is the region that `roi` names."""
        if not self.roi:
            return samples
        if samples.roi_of is None:
            raise RequestError(f"the metric {self.spec!r} needs named regions: give Samples a `roi_of`.")
        of_region = samples.roi_of
        return samples.keep(("roi", self.roi), lambda: replace(samples, roi=of_region(samples.targets, self.roi)))

    def __call__(self, samples: Samples) -> Scores:
        """Score every sample, see `Metric`."""
        return super().__call__(self.named(samples))

    def view(self, samples: Samples) -> Samples:
        """Return the samples with `maps` and `roi` as this metric sees them."""
        if self.region == "mask":
            return super().view(samples)
        boxed = samples.keep("boxed", lambda: replace(samples, roi=bounding_boxes(samples.roi)))
        return super().view(boxed)

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        reasons = super().undefined(samples)
        if self.corrected or self.needs_background:
            pairs = zip(reasons, self.view(samples).roi, strict=True)
            reasons = [reason or (FULL if roi.all() else "") for reason, roi in pairs]
        if self.roi_size != "any":
            off = f"ROI is not {self.roi_size}"
            sizes = roi_size(samples)
            reasons = [
                reason or ("" if size == self.roi_size else off) for reason, size in zip(reasons, sizes, strict=True)
            ]
        return reasons

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64."""
        values, view = super().score(samples), self.view(samples)
        if not self.corrected:
            return values
        level = np.array([self.by_chance(view, row) for row in range(len(view))])
        return (values - level) / (1 - level)

    def chance_level(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64: the expected score by chance; NaN where it is unknown or the metric undefined."""
        samples = self.named(samples)
        view, known = self.view(samples), [not reason for reason in self.undefined(samples)]
        levels = [np.nan if not row_known else self.by_chance(view, row) for row, row_known in enumerate(known)]
        return np.array(levels) * (0 if self.corrected else 1)

    def by_chance(self, view: Samples, row: int) -> float:
        """Return the chance level of the map at `row` of a `view`, before any correction: the ROI's share."""
        return np.count_nonzero(view.roi[row]) / view.roi[row].size


class PointingGame(RoiMetric, QuantusMapMetric):
    """1 if the map's maximum lies in the ROI, else 0 (Quantus's PointingGame).

    The chance level is that of maps without ties: with ``ties="any"`` a map of whole tokens has more pixels at its
    maximum, and a random one hits more often.

    Parameters
    ----------
    ties : {"any", "expected"}
        Of several pixels at the maximum, "any" in the ROI is a hit, as in Quantus and in Chung et al. 2024;
        "expected" scores the share of them that lies in the ROI.
    """

    name = "pointing_game"
    quantus_name = "PointingGame"
    reference = "Zhang et al., IJCV 2018 (arXiv:1608.00507)"
    formula = "1 if argmax_i a_i is in the ROI, else 0"
    rewards = "The most relevant pixel lies in the ROI, whatever the rest of the map shows."
    fooled_by = "A point at the centre, where ROIs tend to be; with ties=any, a map whose maximum is a large area."
    deviation = "Quantus calls an empty mask a hit; here it is undefined."

    ties: Literal["any", "expected"] = "any"

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        attribution = view.maps[row]
        hits = view.roi[row][attribution == attribution.max()]
        return float(hits.any() if self.ties == "any" else hits.mean())


class RelevanceMassAccuracy(RoiMetric, QuantusMapMetric):
    """Share of the positive relevance that lies in the ROI (Quantus's RelevanceMassAccuracy on the positive part)."""

    name = "relevance_mass_accuracy"
    quantus_name = "RelevanceMassAccuracy"
    sign_policy = "positive"
    undefined_reason = "no positive attribution"
    reference = "Arras, Osman & Samek, Information Fusion 2022 (arXiv:2003.07258)"
    formula = "sum_{i in ROI} max(a_i, 0) / sum_i max(a_i, 0)"
    rewards = "Most of the positive attribution lies in the ROI."
    fooled_by = "A single pixel that happens to lie in the ROI; any map, where the ROI is large."
    deviation = "On signed maps Quantus's ratio is unbounded, since its denominator may cancel out: here a < 0 is 0."

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return what makes Quantus take the positive part."""
        return {"normalise_func": positive_part}

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        return view.keep("mass", lambda: [_positive_mass(view, each) for each in range(len(view))])[row]


def positive_part(attribution: np.ndarray) -> np.ndarray:
    """Return max(a, 0), of any shape."""
    return np.maximum(attribution, 0)


def _positive_mass(view: Samples, row: int) -> float:
    values, times = distinct(view, row)
    positive, marked = positive_part(values), inside(view, row)
    total, within = positive.sum() * times, (positive * marked).sum()
    return float(min(within / total, 1)) if total > 0 else np.nan


class EnergyPointingGame(RelevanceMassAccuracy):
    """Share of the positive relevance that lies in the ROI: `relevance_mass_accuracy` by another name.

    The name used for class activation maps. Score-CAM states it for bounding boxes: ``region="box"``.
    """

    name = "energy_pointing_game"
    reference = "Wang et al. (Score-CAM), CVPR Workshops 2020 (arXiv:1910.01279)"


class AttributionLocalisation(RelevanceMassAccuracy):
    """Share of the positive relevance that lies in the ROI: Quantus's AttributionLocalisation of positive attributions.

    The same number as `relevance_mass_accuracy`. The weighted variant of the paper divides it by the ROI's share, its
    chance level; ``corrected=True`` takes that level out and keeps 1 the best score.
    """

    name = "attribution_localisation"
    quantus_name = "AttributionLocalisation"
    reference = "Kohlbrenner et al., IJCNN 2020 (arXiv:1910.09840)"
    deviation = (
        "Quantus counts negative attributions as evidence by default (abs=True); here positive_attributions=True, "
        "abs=False. Its weighted=True multiplies where the paper divides, and by a size that depends on the batch."
    )

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return what makes Quantus count positive attributions only."""
        return {"abs": False, "positive_attributions": True}


class TopMetric(RoiMetric):
    """Base of the metrics of the most relevant pixels: those tied at the last rank count by their expected hits."""

    def expected_hits(self, view: Samples, row: int, n: int) -> float:
        """Return how many of the `n` most relevant pixels lie in the ROI, on average over the orders of tied ones."""
        sure, (size, marked, left) = ranking(view, row).top(n)
        return sure + left * marked / size


class RelevanceRankAccuracy(TopMetric, QuantusMapMetric):
    """Share of the K most relevant pixels that lie in the ROI of K pixels (Quantus's RelevanceRankAccuracy).

    Pixels tied at the K-th rank (common in maps of tokens or segments) count by their expected number of hits.
    """

    name = "relevance_rank_accuracy"
    quantus_name = "RelevanceRankAccuracy"
    reference = "Arras, Osman & Samek, Information Fusion 2022 (arXiv:2003.07258)"
    formula = "#(top K in ROI) / K, with K the number of the ROI's pixels"
    rewards = "The most relevant pixels are those of the ROI."
    fooled_by = "Any map, where the ROI is large; a location prior, where ROIs tend to be at the same place."
    deviation = (
        "Which of several tied pixels Quantus takes is left to its sorting algorithm and differs between machines; "
        "here they count by their expected number of hits."
    )

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        size = int(np.count_nonzero(view.roi[row]))
        return self.expected_hits(view, row, size) / size


class TopKIntersection(TopMetric, QuantusMapMetric):
    """Share of the k most relevant pixels that lie in the ROI (Quantus's TopKIntersection).

    Pixels tied at the k-th rank count by their expected number of hits. An ROI of fewer than k pixels cannot score 1.

    Parameters
    ----------
    percent : float
        k, in percent of the pixels, in (0, 100]; at 224 x 224 the default is about Quantus's 1,000, or 4 tokens.
    """

    name = "top_k_intersection"
    quantus_name = "TopKIntersection"
    reference = "Theiner, Mueller-Budack & Ewerth, WACV 2022 (arXiv:2104.14995)"
    formula = "#(top k in ROI) / k"
    rewards = "The most relevant pixels lie in the ROI, however much of it they leave out."
    fooled_by = "A few tokens at the centre, where ROIs tend to be; any map, where the ROI is large."
    deviation = RelevanceRankAccuracy.deviation

    percent: Percent = 2.0

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return Quantus's k."""
        return {"k": n_top(samples.maps[row].size, self.percent)}

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        n = n_top(view.maps[row].size, self.percent)
        return self.expected_hits(view, row, n) / n


def n_top(size: int, percent: float) -> int:
    """Return how many of `size` pixels are `percent` of them, at least one."""
    return max(1, round(size * percent / 100))


class IoUTop5(RoiMetric):
    """IoU of the ROI with the most relevant pixels, as many as 5 % of the image.

    Where pixels tie at the last rank, the mean over their orders.

    Parameters
    ----------
    percent : float
        Share of the image's pixels, in (0, 100].
    """

    name = "iou_top5"
    version = "2"  # version 1 was rect_iou_top5
    reference = "Jaccard index; thresholds of Chung, Won, Kim, Kim & Ozbulak, iMIMIC 2024 (arXiv:2503.09535)"
    formula = "|top P % and ROI| / |top P % or ROI|"
    rewards = "The most relevant pixels are those of the ROI, and the ROI is about as large as they are many."
    fooled_by = "Any map, where the ROI is large; no map scores 1 unless the ROI covers P % of the image."

    percent: Percent = 5.0

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        n = n_top(view.maps[row].size, self.percent)
        sure, tie = ranking(view, row).top(n)
        return mean_iou(np.count_nonzero(view.roi[row]), n, sure, tie)

    def by_chance(self, view: Samples, row: int) -> float:
        """Return the mean IoU of the ROI with as many random pixels."""
        size, total = np.count_nonzero(view.roi[row]), view.maps[row].size
        n = n_top(total, self.percent)
        return mean_iou(size, n, 0, (total, size, n))


class IoUTop10(IoUTop5):
    """IoU of the ROI with the most relevant pixels, as many as 10 % of the image; see `iou_top5`."""

    name = "iou_top10"

    percent: Percent = 10.0


@lru_cache(maxsize=2**16)
def mean_iou(roi: int, n: int, sure: int, tie: tuple[int, int, int]) -> float:
    """Return the mean IoU of `n` pixels with an ROI of `roi`: `sure` hits, and those of random draws from a tie.

    Parameters
    ----------
    roi, n, sure : int
        Numbers of pixels.
    tie : tuple of int
        The number of tied pixels, of those in the ROI, and of those to draw.
    """
    drawn, probability = hypergeometric(*tie)
    hits = sure + drawn
    return float((probability * (hits / (roi + n - hits))).sum())


class BoundingBoxIoU(RoiMetric):
    """Base of the IoUs of the ROI with the bounding rectangle of the map's top pixels."""

    reference = "Chung, Won, Kim, Kim & Ozbulak, iMIMIC 2024 (arXiv:2503.09535)"
    formula = "|B and ROI| / |B or ROI|, with B the bounding rectangle of the top P %"
    rewards = "The most relevant pixels stand together and fill the ROI's bounding rectangle."
    fooled_by = "Scattered pixels, where the ROI is large: their rectangle is the image. A fixed square at the centre."
    undefined_reason = "chance level unknown"

    percent: Annotated[float, Field(ge=0, lt=100)] = 5.0

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        return box_iou(view.maps[row], view.roi[row], self.percent)

    def by_chance(self, view: Samples, row: int) -> float:
        """Return the mean IoU of the ROI with the rectangle around as many random pixels."""
        return mean_box_iou(view.roi[row], int(view.maps[row].size * (self.percent / 100)) + 1)


class RectIoUTop5(BoundingBoxIoU):
    """IoU of the ROI with the bounding rectangle of the top 5 % of the pixels.

    The pixels are those not below the k-th largest value, with ``k = int(H W (percent / 100))`` counted from 0; one
    rectangle bounds all of them, however scattered: of scattered ones it is the image, and the IoU the ROI's share of
    it. On maps scaled to [0, 1] this is the authors' code; on others theirs gives 0 wherever the threshold exceeds 1,
    because it overwrites the map while comparing with it. The chance level is exact; it is unknown where so few pixels
    are taken that more than a million rectangles may bound them.

    Parameters
    ----------
    percent : float
        Share of the image's pixels, in [0, 100).
    """

    name = "rect_iou_top5"


class RectIoUTop10(BoundingBoxIoU):
    """IoU of the ROI with the bounding rectangle of the top 10 % of the pixels; see `rect_iou_top5`."""

    name = "rect_iou_top10"

    percent: Annotated[float, Field(ge=0, lt=100)] = 10.0


def box_iou(attribution: np.ndarray, roi: np.ndarray, percent: float) -> float:
    """Return the IoU of `roi` (H, W) bool with the rectangle around the top `percent` of `attribution` (H, W)."""
    k = int(attribution.size * (percent / 100))
    top = attribution >= np.partition(attribution, -1 - k, axis=None)[-1 - k]
    rows, columns = (np.flatnonzero(top.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    both = np.count_nonzero(roi[box])
    return both / (roi[box].size + np.count_nonzero(roi) - both)


MOST_BOXES = 10**6


def mean_box_iou(roi: np.ndarray, n: int) -> float:
    """Return the mean IoU of `roi` (H, W) bool with the bounding rectangle of `n` random pixels; NaN where too many."""
    return _mean_box_iou(np.packbits(roi).tobytes(), roi.shape, n)


@lru_cache(maxsize=2**12)  # the same for every explainer
def _mean_box_iou(packed: bytes, shape: tuple[int, int], n: int) -> float:
    roi = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=shape[0] * shape[1]).reshape(shape)
    sizes = likely_boxes(*shape, n)
    if sizes is None:
        return np.nan
    sums = np.pad(roi.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    total = 0.0
    for height, width, probability in sizes:
        both = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
        total += probability * (both / (height * width + sums[-1, -1] - both)).sum()
    return float(total)


@lru_cache(maxsize=64)
def likely_boxes(rows: int, columns: int, n: int) -> list[tuple[int, int, float]] | None:
    """Return the height and width of the rectangles that may bound `n` random pixels, and how probable each place is.

    All but 1e-9 of the probability is there. None where there are more than `MOST_BOXES` rectangles.
    """
    heights, widths = np.arange(rows + 1), np.arange(columns + 1)
    area = np.multiply.outer(heights, widths).astype(float)
    # all n pixels lie in a given rectangle: C(area, n) / C(rows columns, n)
    within = _log_falling(np.maximum(area, n), n) - _log_falling(np.array(float(rows * columns)), n)
    within = np.where(area >= n, np.exp(within), 0)
    # and touch its four sides: inclusion and exclusion of each side, which is a second difference in both directions
    exact = np.diff(np.diff(np.pad(within, ((1, 0), (1, 0))), 2, axis=0), 2, axis=1).clip(0)
    places = np.multiply.outer(rows - heights[1:] + 1, columns - widths[1:] + 1)
    by_mass = np.argsort((exact * places).ravel())[::-1]
    cut = int(np.searchsorted(np.cumsum((exact * places).ravel()[by_mass]), 1 - 1e-9)) + 1
    likely = by_mass[:cut]
    if places.ravel()[likely].sum() > MOST_BOXES:
        return None
    return [(int(i // columns) + 1, int(i % columns) + 1, float(exact.ravel()[i])) for i in likely]


def _log_falling(size: np.ndarray, n: int) -> np.ndarray:
    return gammaln(size + 1) - gammaln(size - n + 1)


class Curve(NamedTuple):
    """What the whole ranking of one map says of the ROI."""

    auc: float
    average_precision: float
    best_iou: float


def curve(view: Samples, row: int) -> Curve:
    """Return the scores that need the whole ranking; computed in one go and kept."""
    return view.keep("curves", lambda: [_curve(view, each) for each in range(len(view))])[row]


def _curve(view: Samples, row: int) -> Curve:
    groups = ranking(view, row)
    found = np.flatnonzero(groups.marked)  # the curves bend only where the ROI's pixels are
    sizes, marked = groups.sizes[found].astype(float), groups.marked[found].astype(float)
    seen, hits = groups.seen[found], np.cumsum(marked)
    misses, size = seen - hits, hits[-1]
    outside = view.maps[row].size - size
    below = outside - misses + (sizes - marked) / 2  # outsiders that rank below, ties half
    auc = (marked * below).sum() / (size * outside) if outside else np.nan
    return Curve(float(auc), float((marked * hits / seen).sum() / size), float((hits / (size + misses)).max()))


class Auc(RoiMetric, QuantusMapMetric):
    """Area under the ROC curve of the map as a detector of the ROI's pixels (Quantus's AUC).

    The probability that a pixel of the ROI is more relevant than one outside, ties counted half.
    """

    name = "auc"
    quantus_name = "AUC"
    chance = 0.5
    needs_background = True
    reference = "Fawcett, Pattern Recognition Letters 2006 (doi:10.1016/j.patrec.2005.10.010)"
    formula = "P(a_i > a_j) + P(a_i = a_j) / 2, i in the ROI, j outside"
    rewards = "The ROI's pixels rank above the others, wherever the threshold would be."
    fooled_by = "A blurred location prior; a small ROI among much irrelevant background gives .9 to a loose map."
    deviation = "Quantus gives NaN for an ROI of the whole image with no reason; a NaN pixel raises there."

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        return curve(view, row).auc

    def by_chance(self, view: Samples, row: int) -> float:
        """Return one half."""
        return 0.5


class AveragePrecision(RoiMetric):
    """Average precision of the map as a detector of the ROI's pixels, as scikit-learn defines it.

    Tied pixels enter together. Unlike `auc`, it looks at the top of the ranking; it depends on the ROI's size.
    """

    name = "average_precision"
    reference = "Everingham et al. (PASCAL VOC), IJCV 2010; sklearn.metrics.average_precision_score"
    formula = "sum_t (R_t - R_{t-1}) P_t over the map's distinct values t, with recall R and precision P of a >= t"
    rewards = "The ROI's pixels come first in the ranking."
    fooled_by = "Any map, where the ROI is large; a location prior, where ROIs tend to be at the same place."

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        return curve(view, row).average_precision

    def by_chance(self, view: Samples, row: int) -> float:
        """Return the mean over all orders of the pixels."""
        total, size = view.maps[row].size, np.count_nonzero(view.roi[row])
        others = (size - 1) / (total - 1)
        return float((_harmonic(total) * (1 - others) + total * others) / total)


@lru_cache
def _harmonic(n: int) -> float:
    return float((1 / np.arange(1, n + 1)).sum())


class IoUBestThreshold(RoiMetric):
    """IoU of the ROI with the pixels not below a threshold, at the best threshold for the image.

    An upper bound on what thresholding the map can give. It has no closed chance level: it is at least the ROI's
    share of the image, which any map reaches.
    """

    name = "iou_best_threshold"
    reference = "after Choe et al., CVPR 2020 (arXiv:2001.07437), whose MaxBoxAcc has one threshold for the data set"
    formula = "max_t |{a >= t} and ROI| / |{a >= t} or ROI|"
    rewards = "Some threshold separates the ROI from the rest."
    fooled_by = "Any map, where the ROI is large: the lowest threshold scores the ROI's share."

    @field_validator("corrected")
    @classmethod
    def _without_correction(cls, corrected: bool) -> bool:
        if corrected:
            raise ValueError("its chance level is unknown")
        return corrected

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        return curve(view, row).best_iou

    def by_chance(self, view: Samples, row: int) -> float:
        """Return NaN."""
        return np.nan


class Overlap(NamedTuple):
    """Numbers of pixels: all, the ROI's, the foreground's, and those in both."""

    total: int
    roi: int
    foreground: int
    both: int | np.ndarray

    def accuracy(self) -> Any:
        """Return the share of the pixels that are foreground in the ROI or background outside."""
        return (self.total - self.roi - self.foreground + 2 * self.both) / self.total

    def miou(self) -> Any:
        """Return the mean of the foreground's and the background's IoU."""
        hits, clear = self.both, self.total - self.roi - self.foreground + self.both
        return (hits / (self.roi + self.foreground - hits) + clear / (self.total - hits)) / 2


class SegmentationMetric(RoiMetric):
    """Base of the scores of a map as a segmentation: foreground is what exceeds the map's mean."""

    reference = "Chefer, Gur & Wolf, CVPR 2021 (arXiv:2012.09838), imagenet_seg_eval.py"

    def overlap(self, view: Samples, row: int) -> Overlap:
        """Return how foreground and ROI overlap."""
        return view.keep("overlap", lambda: [_overlap(*pair) for pair in zip(view.maps, view.roi, strict=True)])[row]

    def by_chance(self, view: Samples, row: int) -> float:
        """Return the mean score of as much foreground in random places."""
        overlap = self.overlap(view, row)
        both, probability = hypergeometric(overlap.total, overlap.roi, overlap.foreground)
        return float((probability * self.of_overlap(overlap._replace(both=both))).sum())

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        return float(self.of_overlap(self.overlap(view, row)))

    def of_overlap(self, overlap: Overlap) -> Any:
        """Return the score."""
        raise NotImplementedError


def _overlap(attribution: np.ndarray, roi: np.ndarray) -> Overlap:
    foreground = attribution > attribution.mean()
    roi_size, both = int(np.count_nonzero(roi)), int(np.count_nonzero(foreground & roi))
    return Overlap(attribution.size, roi_size, int(np.count_nonzero(foreground)), both)


class SegmentationPixelAccuracy(SegmentationMetric):
    """Share of the pixels that are on the right side of the map's mean: above it in the ROI, not above it elsewhere.

    The paper adds the pixels of the whole set up; images of one size give the same mean.
    """

    name = "segmentation_pixel_accuracy"
    formula = "(#{i in ROI: a_i > mean a} + #{i not in ROI: a_i <= mean a}) / M"
    rewards = "The map's mean separates the ROI from the rest."
    fooled_by = "A single bright pixel, where the ROI is small: all the rest is background, and right."

    def of_overlap(self, overlap: Overlap) -> Any:
        """Return the accuracy."""
        return overlap.accuracy()


class SegmentationMiou(SegmentationMetric):
    """Mean of two IoUs: of the ROI with the pixels above the map's mean, and of the rest with the rest.

    Per image. The paper adds intersections and unions up over the whole set before dividing, so that large ROIs count
    for more there.
    """

    name = "segmentation_miou"
    needs_background = True
    formula = "(IoU({a > mean a}, ROI) + IoU({a <= mean a}, rest)) / 2"
    rewards = "The map's mean separates the ROI from the rest."
    fooled_by = "A single bright pixel, where the ROI is small: nearly half, for the background."

    def of_overlap(self, overlap: Overlap) -> Any:
        """Return the mean IoU."""
        return overlap.miou()


class SegmentationMap(RoiMetric):
    """Average precision of the channels [1 - m, m], m the map scaled to [0, 1], as scores of [background, ROI].

    Pixels of both channels are ranked together, so that the values matter and not only their order: half of them are
    right whatever the ROI. Scores closer than 1e-12 tie. Their mean over images is the mAP of the paper.
    """

    name = "segmentation_map"
    reference = SegmentationMetric.reference
    formula = "AP of the 2 M scores [1 - m, m] for the labels [not ROI, ROI], m = (a - min a) / (max a - min a)"
    rewards = "The ROI is close to the map's maximum and the rest close to its minimum."
    fooled_by = "A single bright pixel, where the ROI is small: the background alone gives nearly 1."

    def of_map(self, view: Samples, row: int) -> float:
        """Return the score of one map."""
        values, times = distinct(view, row)
        scaled, marked = minmax_scaled(values), inside(view, row)
        high = scaled > 0.5
        right = marked == high if times == 1 else np.where(high, marked, times - marked)
        return Channels.ranked(scaled, right, times).average_precision()

    def by_chance(self, view: Samples, row: int) -> float:
        """Return the mean over all places of the map's values."""
        values, times = distinct(view, row)
        scaled, total, share = minmax_scaled(values), view.maps[row].size, super().by_chance(view, row)
        # the first scores are those of the `high` largest values as ROI, and of the `low` smallest as background
        seen, high = Channels.ranked(scaled, (scaled > 0.5) * times, times).cumulative()
        low = seen - high
        high_before, low_before = (np.concatenate([[0.0], counts[:-1]]) for counts in (high, low))
        right, right_before = share * high + (1 - share) * low, share * high_before + (1 - share) * low_before

        def covariance(high_within: np.ndarray, low_within: np.ndarray) -> np.ndarray:
            twice = np.maximum(high + low_within - total, 0) + np.maximum(low + high_within - total, 0)
            shared = high_within + low_within - twice
            return shared - (high - low) * (high_within - low_within) / total

        spread = (
            share * (1 - share) * total / (total - 1) * (covariance(high, low) - covariance(high_before, low_before))
        )
        return float(((right * (right - right_before) + spread) / seen).sum() / total)


STEPS = 40  # bits of a score that count: 1 - m is rounded, and equal scores of the two channels must stay equal


class Channels(NamedTuple):
    """The ranking of the scores [1 - m, m] of M pixels, some scores marked, one of each pixel.

    A pixel's two scores mirror each other around 1/2, and so do their ranks: a ranking of the larger ones is enough.

    Parameters
    ----------
    seen, marked : ndarray
        (G,) number of larger scores down to each distinct one above 1/2, and how many of them are marked.
    halves : int
        The number of pixels whose scores are both 1/2.
    """

    seen: np.ndarray
    marked: np.ndarray
    halves: int

    @classmethod
    def ranked(cls, scaled: np.ndarray, marked: np.ndarray, times: int) -> Channels:
        """Rank `scaled` (M,) in [0, 1], `times` pixels of each value, `marked` (M,) of their larger scores marked."""
        doubt = np.rint(np.minimum(scaled, 1 - scaled) * 2.0**STEPS)
        groups = grouped(-doubt, marked, times)
        seen, hits = groups.seen, np.cumsum(groups.marked, dtype=np.int32)
        halves = int(np.count_nonzero(doubt == 2.0 ** (STEPS - 1))) * times
        return cls(seen[:-1], hits[:-1], halves) if halves else cls(seen, hits, 0)

    def _halfway(self) -> tuple[int, int]:
        # pixels of two scores of 1/2 have one of them marked
        return int(self.seen[-1:].sum()) + 2 * self.halves, int(self.marked[-1:].sum()) + self.halves

    def average_precision(self) -> float:
        """Return the average precision of the marked scores."""
        pixels = int(self.seen[-1:].sum()) + self.halves
        seen, marked = self._halfway()
        hits = self.marked / self.seen
        above = (np.diff(self.marked) * hits[1:]).sum() + (self.marked[:1] * hits[:1]).sum()
        # below 1/2 the same pixels in reverse, and what was not marked is
        unmarked = self.seen - self.marked
        rest = (pixels - unmarked[:-1]) / (2 * pixels - self.seen[:-1])
        below = (np.diff(unmarked) * rest).sum() + unmarked[:1].sum() / 2
        return float((above + self.halves * (marked / seen) + below) / pixels)

    def cumulative(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many scores there are down to each distinct one, and how many of them are marked, (L,) float."""
        pixels = int(self.seen[-1:].sum()) + self.halves
        seen, marked = (np.concatenate([[0], counts[:-1]]) for counts in (self.seen, self.marked))
        middle = zip(self._halfway(), strict=True) if self.halves else ((), ())
        triples = zip((self.seen, self.marked), middle, (2 * pixels - seen, pixels - seen + marked), strict=True)
        both = [np.concatenate([above, half, below[::-1]]).astype(float) for above, half, below in triples]
        return both[0], both[1]
