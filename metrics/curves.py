"""Faithfulness read off removal curves: how the output falls as the most, or the least, relevant features go first."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.integrate import trapezoid

from metrics.base import Samples
from metrics.perturbation import Outputs, PatchMetric, n_patches, patch_ranks


class SymmetricRelevanceGain(PatchMetric):
    """Area between the output's curves when the least and when the most relevant patches are replaced first.

    After step s of `steps`, round(P s / steps) of the P patches are replaced, halves rounded up; where an image has
    fewer patches than steps, steps that replace nothing new are left out. The area is a trapezoid sum over the
    fraction of patches replaced, in [0, 1], in units of the output. Both curves start at the whole image and end at
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

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, 2 S, P) bool: the least relevant first, then the most relevant first."""
        counts = removal_counts(n_patches(samples), self.steps)[1:-1]
        return np.concatenate([first(samples, counts, "least"), first(samples, counts, "most")], axis=1)

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64."""
        counts = removal_counts(n_patches(samples), self.steps)
        if len(counts) < 3:
            return np.full(len(samples), np.nan)
        least, most = np.split(seen.target(self.output), 2, axis=1)
        return trapezoid(np.pad(least - most, ((0, 0), (1, 1))), counts / counts[-1], axis=1)


def first(samples: Samples, counts: np.ndarray, relevant: str) -> np.ndarray:
    """Return (N, S, P) bool: the `counts` (S,) "most" or "least" relevant patches."""
    ranks = patch_ranks(samples)
    ranks = ranks if relevant == "most" else ranks.shape[1] - 1 - ranks
    return ranks[:, None] < counts[:, None]


def removal_counts(patches: int, steps: int) -> np.ndarray:
    """Return how many patches are replaced after each step, from 0 to `patches`, halves rounded up, no duplicates."""
    return np.unique((2 * patches * np.arange(steps + 1) + steps) // (2 * steps))
