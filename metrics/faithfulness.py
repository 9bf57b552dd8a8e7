"""Faithfulness: does the model's output follow what the map calls relevant?"""

from __future__ import annotations

import numpy as np

from metrics.base import Samples, pearson
from metrics.imputers import Imputer
from metrics.perturbation import Outputs, PatchMetric, n_patches, patch_sums


class FaithfulnessEstimate(PatchMetric):
    """Pearson correlation, over patches, of a patch's relevance and the output's drop when it alone is replaced.

    Quantus's FaithfulnessEstimate with one patch as one feature, which Quantus 0.6.0 cannot express on RGB images in
    general; where it can, the two agree. A patch's relevance is the sum of the map over it. The perturbed images do
    not depend on the map: they serve all explainers.

    Parameters
    ----------
    imputer : str
        What replaces a patch; Quantus's default, "black", is the lowest value of the image.
    """

    name = "faithfulness_estimate"
    group = "faithfulness"
    bounds = (-1.0, 1.0)
    chance = 0.0
    undefined_reason = "no patch changes the output more than another"
    reference = "Alvarez-Melis & Jaakkola, NeurIPS 2018 (arXiv:1806.07538)"

    imputer: Imputer = "black"

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, P, P) bool: each patch alone."""
        return each_alone(samples)

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        # the unperturbed output is a constant of the sample: the correlation does not see it
        return pearson(patch_sums(samples), -seen.target(self.output))


def each_alone(samples: Samples) -> np.ndarray:
    """Return (N, P, P) bool: one patch removed in each version."""
    patches = n_patches(samples)
    return np.broadcast_to(np.eye(patches, dtype=bool), (len(samples), patches, patches))
