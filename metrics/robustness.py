"""Robustness: how much does the map change when the image hardly does?

Every metric here explains `draws` noisy copies of each image, for the same class. Metrics with the same noise share
them: of one explainer the four with uniform noise cost as much as one. The noise is in the units of the model's
normalised inputs, drawn from the sample's seed, the same for all explainers; a stochastic explainer draws anew on
each copy, so that its own spread counts. None of these asks whether the map explains anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metrics.base import Samples
from metrics.quantus_bridge import with_gradients
from metrics.reexplaining import Noise, ReexplainingMetric, logits_of, noisy

_EPSILON = 1e-6  # takes the place of zeros that values are divided by, as in Quantus


@dataclass(frozen=True)
class Changes:
    """How far N maps move on their noisy copies; every array is (N, draws) float64.

    Parameters
    ----------
    map_norm : ndarray
        Euclidean norm of the change of the map.
    map_relative : ndarray
        Norm of the change of each attribution, divided by the attribution.
    map_scaled : ndarray
        Norm of the change where every map is divided by its largest size.
    image_norm, image_relative : ndarray
        The same of the image's values.
    """

    map_norm: np.ndarray
    map_relative: np.ndarray
    map_scaled: np.ndarray
    image_norm: np.ndarray
    image_relative: np.ndarray


def changes(image: np.ndarray, copies: np.ndarray, attribution: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Return (5, draws) float64: the fields of `Changes` of one image.

    Parameters
    ----------
    image : ndarray
        (C, H, W).
    copies : ndarray
        (draws, C, H, W), noisy.
    attribution : ndarray
        (H, W), the map of the image.
    maps : ndarray
        (draws, H, W), those of the copies.
    """
    moved, shifted = maps - attribution, copies - image
    scaled = _scaled(maps) - _scaled(attribution)
    parts = moved, moved / _nonzero(attribution), scaled, shifted, shifted / _nonzero(image)
    return np.stack([np.linalg.norm(part.reshape(len(part), -1), axis=1) for part in parts])


def _nonzero(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, _EPSILON, values)


def _scaled(maps: np.ndarray) -> np.ndarray:
    largest = np.abs(maps).max(axis=(-2, -1), keepdims=True)
    return maps / np.where(largest == 0, 1, largest)


class RobustnessMetric(ReexplainingMetric):
    """Base of the metrics of noisy copies: `read` makes scores of how the maps change.

    Parameters
    ----------
    draws : int
        Noisy copies per image, each explained; Quantus takes 200, and a maximum grows with their number.
    radius : float
        Of the noise, in the units of the normalised inputs: uniform in +- radius, or normal with that standard
        deviation.
    """

    group = "robustness"
    higher_is_better = False
    bounds = (0.0, np.inf)
    noise: ClassVar[Noise] = "uniform"

    draws: Annotated[int, Field(ge=1)] = 10
    radius: Annotated[float, Field(gt=0)] = 0.2

    def read(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N,) float64 from how the maps change."""
        raise NotImplementedError

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        return self.read(samples, samples.keep(("changes", *self._copies), lambda: self._changes(samples)))

    @property
    def _copies(self) -> tuple[Noise, float, int]:
        return self.noise, self.radius, self.draws

    def _changes(self, samples: Samples) -> Changes:
        return Changes(*np.stack([self._changes_of(samples, row) for row in range(len(samples))], axis=1))

    def _changes_of(self, samples: Samples, row: int) -> np.ndarray:
        images = noisy(samples, row, *self._copies)
        maps = self.explain(samples, samples.model, images, np.full(self.draws, row))
        return changes(_array(samples.inputs[row]), _array(images), samples.maps[row], maps)

    def logits(self, samples: Samples) -> np.ndarray:
        """Return (N, 1 + draws, K) float64: the model's output on image and copies, once for all explainers."""
        return samples.once(("logits of copies", *self._copies), self._logits)

    def _logits(self, samples: Samples) -> np.ndarray:
        model = with_gradients(samples.model, samples.inputs)
        copies = (noisy(samples, row, *self._copies) for row in range(len(samples)))
        pairs = zip(samples.inputs, copies, strict=True)
        return np.stack([logits_of(model, torch.cat([image[None], noise])) for image, noise in pairs])


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


class SensitivityMetric(RobustnessMetric):
    """Base of the two that compare the change of the map with its size."""

    rewards = "A low score: noise too small to matter hardly changes the map."
    fooled_by = "Any map that does not look at the image: one fixed for all, such as a centre Gaussian, scores 0, best."
    reference = "Yeh et al., NeurIPS 2019 (arXiv:1901.09392)"

    def relative(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N, draws): the norm of the change over that of the map."""
        return seen.map_norm / np.linalg.norm(samples.maps, axis=(1, 2))[:, None]


class MaxSensitivity(SensitivityMetric):
    """Largest change of the map under uniform noise, relative to the map's size (Euclidean norms).

    Costs `draws` explanations per image, which the metrics of uniform noise share. The largest of few draws is below
    that of many, and scores of another `draws` or `radius` cannot be compared.
    """

    name = "max_sensitivity"
    formula = "max over draws of |e(x + noise) - e(x)| / |e(x)|, noise uniform in +- radius"
    deviation = "10 draws, not 200; each sample draws from its own seed."

    def read(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        return self.relative(samples, seen).max(axis=1)


class AvgSensitivity(SensitivityMetric):
    """Mean change of the map under uniform noise, relative to the map's size (Euclidean norms).

    Costs `draws` explanations per image, which the metrics of uniform noise share. Komorowski, Baniecki & Biecek
    (arXiv:2304.06133) take ``draws=3, radius=0.33``.
    """

    name = "avg_sensitivity"
    formula = "mean over draws of |e(x + noise) - e(x)| / |e(x)|, noise uniform in +- radius"
    deviation = "10 draws, not 200; each sample draws from its own seed."

    def read(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        return self.relative(samples, seen).mean(axis=1)


class LocalLipschitz(RobustnessMetric):
    """Largest change of the map per change of the image, over Gaussian noise; each map divided by its largest size.

    Costs `draws` explanations per image, apart from those of the metrics of uniform noise. Without the division, as
    the authors have it, the score would follow the unit of the explainer.

    Parameters
    ----------
    draws : int
        Noisy copies per image.
    radius : float
        Standard deviation of the noise, in the units of the normalised inputs.
    """

    name = "local_lipschitz"
    formula = "max over draws of |e(x + noise) - e(x)| / |noise|, e over its largest size; noise normal, std radius"
    rewards = "A low score: the map follows the image smoothly."
    fooled_by = "Any map that does not look at the image: one fixed for all scores 0, best."
    deviation = "10 draws, not 200; Quantus divides by the largest size in the whole batch, here every map by its own."
    reference = "Alvarez-Melis & Jaakkola, WHI 2018 (arXiv:1806.08049)"
    noise: ClassVar[Noise] = "gaussian"

    radius: Annotated[float, Field(gt=0)] = 0.1

    def read(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        return (seen.map_scaled / (seen.image_norm + 1e-10)).max(axis=1)


class RelativeStability(RobustnessMetric):
    """Base of the two that divide the relative change of every attribution by what the noise did to something else."""

    rewards = "A low score: the map changes no more than what it explains, where the predicted class stays the same."
    fooled_by = (
        "Any map that does not look at the image: one fixed for all scores 0, best. Attributions near 0 decide it."
    )
    scale_invariant = False  # where a map has zeros
    deviation = (
        "Quantus's noise is positive only, uniform in .02 to .2: it brightens the image; and one copy with another "
        "predicted class makes its score NaN. Here the noise is symmetric and such copies are dropped."
    )
    undefined_reason = "every noisy copy has another predicted class"
    reference = "Agarwal et al., 2022 (arXiv:2203.06877)"

    def largest(self, samples: Samples, map_change: np.ndarray, other_change: np.ndarray) -> np.ndarray:
        """Return (N,) float64: the largest ratio of the copies of the same class; NaN without any."""
        ratio = map_change / _nonzero(other_change)
        predicted = self.logits(samples).argmax(axis=2)
        same = predicted[:, 1:] == predicted[:, :1]
        return np.where(same.any(axis=1), np.where(same, ratio, -np.inf).max(axis=1), np.nan)


class RelativeInputStability(RelativeStability):
    """Largest relative change of the attributions per relative change of the image's values.

    Costs `draws` explanations per image, which the metrics of uniform noise share, and as many forward passes for
    all explainers together. Copies that the model puts in another class than the image do not count. Zeros that are
    divided by count as 1e-6, so that maps with zeros score orders of magnitude higher than those without.
    """

    name = "relative_input_stability"
    formula = "max over draws with the same class of |(e(x) - e(x')) / e(x)| / |(x - x') / x|"

    def read(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        return self.largest(samples, seen.map_relative, seen.image_relative)


class RelativeOutputStability(RelativeStability):
    """Largest relative change of the attributions per change of the logits.

    Costs, copies of another class and zeros are as for `relative_input_stability`.
    """

    name = "relative_output_stability"
    formula = "max over draws with the same class of |(e(x) - e(x')) / e(x)| / |f(x) - f(x')|, f the logits"

    def read(self, samples: Samples, seen: Changes) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        logits = self.logits(samples)
        moved = np.linalg.norm(logits[:, 1:] - logits[:, :1], axis=2)
        return self.largest(samples, seen.map_relative, moved)
