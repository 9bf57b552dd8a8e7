"""Localization: does the map point at the region of interest?"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from metrics.base import Metric, Samples
from metrics.quantus_bridge import QuantusMetric


def roi_area(samples: Samples) -> np.ndarray:
    """Return (N,) float64: the fraction of each image that its ROI covers."""
    return samples.roi.mean(axis=(1, 2))


class RoiShareByChance(QuantusMetric):
    """Base of the Quantus metrics on which a random map scores the ROI's share of the image, on average."""

    group = "localization"
    bounds = (0.0, 1.0)
    needs_roi = True

    def chance_level(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64: the ROI's share of each image."""
        return roi_area(samples)


class PointingGame(RoiShareByChance):
    """1 if any pixel that attains the map's maximum lies in the ROI, else 0 (Quantus's PointingGame).

    Quantus calls an empty mask a hit; here it is undefined. The chance level is that of pixels without ties: a map
    of whole tokens has more pixels at its maximum, and a random one hits more often.
    """

    name = "pointing_game"
    quantus_name = "PointingGame"
    reference = "Zhang et al., IJCV 2018 (arXiv:1608.00507)"


class RelevanceMassAccuracy(RoiShareByChance):
    """Share of the positive relevance that lies in the ROI (Quantus's RelevanceMassAccuracy on the positive part).

    On signed maps Quantus's ratio is unbounded, since its denominator may cancel out.
    """

    name = "relevance_mass_accuracy"
    quantus_name = "RelevanceMassAccuracy"
    sign_policy = "positive"
    reference = "Arras, Osman & Samek, Information Fusion 2022 (arXiv:2003.07258)"

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        nothing = samples.maps.max(axis=(1, 2)) <= 0
        reasons = super().undefined(samples)
        return [
            reason or ("no positive attribution" if none else "") for reason, none in zip(reasons, nothing, strict=True)
        ]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        return super().score(replace(samples, maps=np.maximum(samples.maps, 0)))


class RelevanceRankAccuracy(RoiShareByChance):
    """Share of the K most relevant pixels that lie in the ROI of K pixels (Quantus's RelevanceRankAccuracy).

    Pixels tied at the K-th rank (common in maps of tokens or segments) count by their expected number of hits; which
    of them Quantus takes is left to the sorting algorithm and differs between machines. Without such ties the two
    engines agree.
    """

    name = "relevance_rank_accuracy"
    quantus_name = "RelevanceRankAccuracy"
    reference = "Arras, Osman & Samek, Information Fusion 2022 (arXiv:2003.07258)"

    def fast(self, samples: Samples, row: int) -> float:
        """Return the score of one sample."""
        return rank_accuracy(samples.maps[row], samples.roi[row])


def rank_accuracy(attribution: np.ndarray, roi: np.ndarray) -> float:
    """Return the expected share of the K largest of `attribution` (H, W) in `roi` (H, W) bool with K pixels.

    The expectation is over the order of tied pixels.
    """
    size = int(roi.sum())
    cut = np.partition(attribution, -size, axis=None)[-size]
    above, tied = attribution > cut, attribution == cut
    left = size - above.sum()
    return float((above & roi).sum() + left * (tied & roi).sum() / tied.sum()) / size


class BoundingBoxIoU(Metric):
    """IoU of the ROI with the bounding box of the map's top pixels.

    Top are the pixels not below the k-th largest value, counted from 0, with ``k = int(H W (percent / 100))``; one box
    bounds all of them together, however scattered. On maps scaled to [0, 1] this is the authors' code; on others
    theirs gives 0 wherever the threshold exceeds 1, because it overwrites the map while comparing with it.

    Parameters
    ----------
    percent : float
        Share of the image's pixels, in [0, 100).
    """

    group = "localization"
    bounds = (0.0, 1.0)
    needs_roi = True
    reference = "Chung, Won, Kim, Kim & Ozbulak, iMIMIC 2024 (arXiv:2503.09535)"

    percent: Annotated[float, Field(ge=0, lt=100)] = 5.0

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        pairs = zip(samples.maps, samples.roi, strict=True)
        return np.array([box_iou(attribution, roi, self.percent) for attribution, roi in pairs])


class IoUTop5(BoundingBoxIoU):
    """IoU of the ROI with the bounding box of the top 5 % of the pixels."""

    name = "iou_top5"


class IoUTop10(BoundingBoxIoU):
    """IoU of the ROI with the bounding box of the top 10 % of the pixels."""

    name = "iou_top10"

    percent: Annotated[float, Field(ge=0, lt=100)] = 10.0


def box_iou(attribution: np.ndarray, roi: np.ndarray, percent: float) -> float:
    """Return the IoU of `roi` (H, W) bool with the box around the top `percent` of `attribution` (H, W)."""
    k = int(attribution.size * (percent / 100))
    threshold = np.partition(attribution, -1 - k, axis=None)[-1 - k]
    rows, columns = np.nonzero(attribution >= threshold)
    box = np.zeros(attribution.shape, dtype=bool)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return float((box & roi).sum() / (box | roi).sum())
