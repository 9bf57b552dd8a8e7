"""Faithfulness: does the model's output follow what the map calls relevant?"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from scipy.integrate import trapezoid
from torch import Tensor

from metrics.base import Samples, pearson
from metrics.perturbation import Imputer, PatchMetric, logits_without, patch_grid, patch_ranks, patch_sums


class FaithfulnessEstimate(PatchMetric):
    """Pearson correlation, over patches, of a patch's relevance and the logit's drop when it alone is replaced.

    Quantus's FaithfulnessEstimate with one patch as one feature, which Quantus 0.6.0 cannot express on RGB images in
    general; where it can, the two agree. A patch's relevance is the sum of the map over it. The perturbed logits do
    not depend on the map: they are computed once for all explainers.

    Parameters
    ----------
    imputer : str
        What replaces a patch; Quantus's default, "black", is the lowest value of the image.
    """

    name = "faithfulness_estimate"
    group = "faithfulness"
    bounds = (-1.0, 1.0)
    chance = 0.0
    undefined_reason = "no patch changes the logit more than another"
    reference = "Alvarez-Melis & Jaakkola, NeurIPS 2018 (arXiv:1806.07538)"

    imputer: Imputer = "black"

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        key = ("logits without each patch", self.imputer, samples.patch)
        without = samples.once(key, lambda whole: logits_without_each(whole, self.imputer))
        # the unperturbed logit is a constant of the sample: the correlation does not see it
        return pearson(patch_sums(samples), -without)


def logits_without_each(samples: Samples, imputer: str) -> np.ndarray:
    """Return (N, P) float64: the target's logit with each patch alone replaced."""
    patches = int(np.prod(patch_grid(samples)))
    places = torch.arange(patches, device=samples.inputs.device)
    return logits_without(samples, patches, lambda rows, steps: steps[:, None] == places, imputer)


class SymmetricRelevanceGain(PatchMetric):
    """Area between the logit's curves when the least and when the most relevant patches are replaced first.

    After step s of `steps`, round(P s / steps) of the P patches are replaced, halves rounded up; where an image has
    fewer patches than steps, steps that replace nothing new are left out. The area is a trapezoid sum over the
    fraction of patches replaced, in [0, 1], in units of the logit. Both curves start at the whole image and end at
    the fully replaced one, where their difference is zero: only the steps between need forward passes.

    Parameters
    ----------
    steps : int
        Steps from the whole image to the fully replaced one.
    imputer : str
        What replaces the patches; "mean" is the mean colour of the image.
    """

    name = "srg"
    group = "faithfulness"
    chance = 0.0
    undefined_reason = "one patch only"
    reference = "Bluecher, Vielhaben & Strodthoff, TMLR 2024 (arXiv:2401.06654)"

    steps: Annotated[int, Field(ge=2)] = 28
    imputer: Imputer = "mean"

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64."""
        patches = int(np.prod(patch_grid(samples)))
        counts = removal_counts(patches, self.steps)
        if len(counts) < 3:
            return np.full(len(samples), np.nan)
        ranks = patch_ranks(samples)
        most_first = self._curves(samples, ranks, counts[1:-1])
        least_first = self._curves(samples, patches - 1 - ranks, counts[1:-1])
        gap = np.pad(least_first - most_first, ((0, 0), (1, 1)))
        return trapezoid(gap, counts / patches, axis=1)

    def _curves(self, samples: Samples, ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
        places = torch.as_tensor(ranks, device=samples.inputs.device)
        limits = torch.as_tensor(counts, device=samples.inputs.device)

        def removed(rows: Tensor, steps: Tensor) -> Tensor:
            return places[rows] < limits[steps, None]

        return logits_without(samples, len(counts), removed, self.imputer)


def removal_counts(patches: int, steps: int) -> np.ndarray:
    """Return how many patches are replaced after each step, from 0 to `patches`, halves rounded up, no duplicates."""
    return np.unique((2 * patches * np.arange(steps + 1) + steps) // (2 * steps))
