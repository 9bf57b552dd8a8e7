"""Compactness: how few pixels carry the map?

None of these asks whether the pixels are the right ones: a map of one arbitrary pixel scores best.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from metrics.base import Samples
from metrics.maps import MapMetric, QuantusMapMetric, distinct, minmax_scaled

ONE_SPOT = "A map of a single pixel, wherever it is"


class Sparseness(QuantusMapMetric):
    """Gini index of the absolute attributions (Quantus's Sparseness): 0 all equal, towards 1 a single pixel.

    As in Quantus, 1e-7 is added to the attributions once their largest is 1: a map of one pixel among 224 x 224
    scores 0.995.
    """

    name = "sparseness"
    quantus_name = "Sparseness"
    group = "compactness"
    bounds = (0.0, 1.0)
    sign_policy = "absolute"
    reference = "Chalasani et al., ICML 2020 (arXiv:1810.06583)"
    formula = "sum_i (2 i - M - 1) a_i / (M sum_i a_i), with a_1 <= ... <= a_M the absolute attributions"
    rewards = "Few pixels hold most of the attribution, whatever the others hold."
    fooled_by = f"{ONE_SPOT}."

    def of_map(self, view: Samples, row: int) -> float:
        """Return the Gini index of one map."""
        size = np.sort(np.abs(distinct(view, row)[0]))  # each value equally often: the index of the pixels
        size /= size[-1]
        rank = np.arange(1 - len(size), len(size), 2, dtype=float)
        return float((rank * size).sum() / (len(size) * (size.sum() + 1e-7 * len(size))))


class Complexity(QuantusMapMetric):
    """Entropy, in nats, of the absolute attributions' shares (Quantus's Complexity): 0 a single pixel.

    At most ln(H W): it depends on the resolution of the image, and a map upsampled from tokens cannot be below
    the logarithm of a token's pixels. ``unit="token"`` compares maps of pixels and of tokens on the same terms.
    """

    name = "complexity"
    quantus_name = "Complexity"
    group = "compactness"
    higher_is_better = False
    bounds = (0.0, np.inf)
    sign_policy = "absolute"
    reference = "Bhatt, Weller & Moura, IJCAI 2020 (arXiv:2005.00631)"
    formula = "-sum_i p_i ln p_i, with p_i = |a_i| / sum_j |a_j|"
    rewards = "The attribution is spread over few pixels."
    fooled_by = f"{ONE_SPOT}."

    def of_map(self, view: Samples, row: int) -> float:
        """Return the entropy of one map."""
        values, times = distinct(view, row)
        size = np.abs(values)
        share = size / size.max()
        share /= times * share.sum()
        return max(0.0, float(-times * (share * np.log(share + 1e-12)).sum()))


class EffectiveComplexity(QuantusMapMetric):
    """Share of the pixels whose attribution exceeds a threshold, on a scaled map.

    Quantus's EffectiveComplexity over the number of pixels, each map scaled by itself. With ``scale="minmax"`` it is
    the complexity of Komorowski et al. (arXiv:2304.06133); with ``scale="max"`` and a threshold of 0.05, one less
    `cdam_compactness`. Where negative attributions are many, "minmax" maps zero to the middle of the scale, so that
    nearly every pixel exceeds the threshold.

    Parameters
    ----------
    eps : float
        The threshold, in [0, 1).
    scale : {"max", "minmax"}
        "max": absolute attributions over the largest of them. "minmax": signed ones, from 0 the smallest to 1 the
        largest.
    """

    name = "effective_complexity"
    quantus_name = "EffectiveComplexity"
    group = "compactness"
    higher_is_better = False
    bounds = (0.0, 1.0)
    sign_policy = "absolute"
    reference = "Nguyen & Martinez, 2020 (arXiv:2007.07584)"
    formula = "#{i: |a_i| / max |a| > eps} / M; scale=minmax: #{i: (a_i - min a) / (max a - min a) > eps} / M"
    rewards = "Few pixels have an attribution worth mentioning."
    fooled_by = f"{ONE_SPOT}; a binary map is as complex as its area."
    deviation = (
        "Quantus gives a number of pixels, here it is their share; its default threshold, 1e-5, counts nearly every "
        "pixel of any map, and its default scaling divides by the largest attribution of the whole batch."
    )

    eps: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scale: Literal["max", "minmax"] = "max"

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return what makes Quantus count as this metric does."""
        minmax = {"abs": False, "normalise_func": minmax_scaled} if self.scale == "minmax" else {}
        return {"eps": self.eps, **minmax}

    def measure(self, view: Samples) -> np.ndarray:
        """Return (N,) float64, by either engine."""
        counts = super().measure(view)
        return counts / view.maps[0].size if self.engine == "quantus" else counts

    def of_map(self, view: Samples, row: int) -> float:
        """Return the share of one map."""
        values, _ = distinct(view, row)
        scaled = minmax_scaled(values) if self.scale == "minmax" else np.abs(values) / np.abs(values).max()
        return float((scaled > self.eps).mean())


class CdamCompactness(MapMetric):
    """Share of the pixels whose absolute attribution is at most 5 % of the largest.

    Parameters
    ----------
    rule : {"library", "notebook"}
        "library": ``|a| <= 0.05 max |a|``, the released code. "notebook": ``|a| < 0.05 max a``, of the authors' earlier
        notebook. They differ where the largest magnitude is negative; where nothing is positive, "notebook" gives 0.
    """

    name = "cdam_compactness"
    group = "compactness"
    bounds = (0.0, 1.0)
    sign_policy = "absolute"
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364), as in their released code"
    formula = "#{i: |a_i| <= 0.05 max |a|} / M; rule=notebook: #{i: |a_i| < 0.05 max a} / M"
    rewards = "Most pixels have next to no attribution."
    fooled_by = f"{ONE_SPOT}."

    rule: Literal["library", "notebook"] = "library"

    def of_map(self, view: Samples, row: int) -> float:
        """Return the share of one map."""
        values, _ = distinct(view, row)
        size = np.abs(values)
        if self.rule == "notebook":
            return float((size < 0.05 * values.max()).mean())
        return float((size <= 0.05 * size.max()).mean())
