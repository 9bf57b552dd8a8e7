"""Compactness: how few pixels carry the map?

None of these asks whether the pixels are the right ones: a map of one arbitrary pixel scores best.
"""

from __future__ import annotations

import numpy as np

from metrics.base import Metric, Samples
from metrics.quantus_bridge import QuantusMetric


class Sparseness(QuantusMetric):
    """Gini index of the absolute attributions (Quantus's Sparseness): 0 all equal, towards 1 a single pixel."""

    name = "sparseness"
    quantus_name = "Sparseness"
    group = "compactness"
    bounds = (0.0, 1.0)
    sign_policy = "absolute"
    reference = "Chalasani et al., ICML 2020 (arXiv:1810.06583)"


class Complexity(QuantusMetric):
    """Entropy, in nats, of the absolute attributions' shares (Quantus's Complexity): 0 a single pixel.

    At most ln(H W): it depends on the resolution of the image, and a map upsampled from tokens cannot be below
    the logarithm of a token's pixels.
    """

    name = "complexity"
    quantus_name = "Complexity"
    group = "compactness"
    higher_is_better = False
    bounds = (0.0, np.inf)
    sign_policy = "absolute"
    reference = "Bhatt, Weller & Moura, IJCAI 2020 (arXiv:2005.00631)"


class CdamCompactness(Metric):
    """Share of the pixels whose absolute attribution is at most 5 % of the largest."""

    name = "cdam_compactness"
    group = "compactness"
    bounds = (0.0, 1.0)
    sign_policy = "absolute"
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364), as in their released code"

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        size = np.abs(samples.maps)
        return (size <= 0.05 * size.max(axis=(1, 2), keepdims=True)).mean(axis=(1, 2))
