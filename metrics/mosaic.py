"""Localization by construction: in a mosaic of images it is known which parts show the target's class."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from explainer_bench import RequestError
from metrics.base import Metric, Samples


class Focus(Metric):
    """Share of a mosaic's positive relevance that lies in the images of the target's class (Focus; grid pointing game).

    The sample is put beside other images, some of the target's class and some of none, and the mosaic is explained
    for the target. Needs no ROI. It costs one further explanation per sample and explainer; the sample's own map is
    not looked at. With one image of the target's class in the mosaic this is the grid pointing game, with two of four
    it is Focus. The images are smaller than those the model was trained on, and several at once: a model that does
    not recognise the classes there says little about an explainer.
    """

    name = "focus"
    group = "localization"
    bounds = (0.0, 1.0)
    sign_policy = "positive"
    needs_mosaics = True
    undefined_on_constant = False  # the map of the mosaic counts, see `score`
    expensive = True
    formula = "sum of the positive map in the mosaic's images of the target's class / sum of the positive map"
    rewards = "Among several images the map marks those of the class that is explained."
    fooled_by = "A map that marks whatever looks most striking, where that happens to be of the target's class."
    deviation = (
        "Quantus leaves building the mosaics to the user and gives 0 where no attribution is positive; "
        "here that is undefined. Otherwise the same."
    )
    undefined_reason = "map of the mosaic is constant, not finite or nowhere positive"
    reference = "Arias-Duart et al., FUZZ-IEEE 2022 (arXiv:2109.15035); Boehle, Fritz & Schiele, CVPR 2021 "
    reference += "(arXiv:2104.00032)"

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        reasons = zip(super().undefined(samples), _mosaics(samples)[1], strict=True)
        return [reason or ("" if own.any() else "no mosaic of the target's class") for reason, own in reasons]

    def chance_level(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64: the share of the mosaic that shows the target's class; NaN without a mosaic."""
        area = _mosaics(samples)[1].mean(axis=(1, 2))
        return np.where(area > 0, area, np.nan)

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        if samples.reexplain is None:
            raise RequestError("the metric 'focus' explains mosaics: give Samples a `reexplain`.")
        images, own = _mosaics(samples)
        maps = samples.reexplain(samples.model, images, samples.targets, np.arange(len(samples)))
        return np.array([positive_share(*pair) for pair in zip(maps, own, strict=True)])


def _mosaics(samples: Samples) -> tuple[Tensor, np.ndarray]:
    if samples.mosaics is None:
        raise RequestError("the metric 'focus' needs mosaics of images: give Samples a `mosaics`.")
    return samples.keep("mosaics", samples.mosaics)


def positive_share(attribution: np.ndarray, part: np.ndarray) -> float:
    """Return the share of the positive values of a map (H, W) that lies in `part` (H, W) bool.

    NaN where the map is constant, not finite or nowhere positive.
    """
    top = attribution.max()
    if not np.isfinite(attribution).all() or top <= 0 or np.ptp(attribution) == 0:
        return np.nan
    positive = np.maximum(attribution, 0) / top  # a large map must not overflow in the sum
    return float(positive[part].sum() / positive.sum())
