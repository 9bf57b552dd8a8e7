"""Faithfulness: does the model's output follow what the map calls relevant?

Here features are removed in ways that do not depend on the map (one by one, in random subsets, in squares), so that
the perturbed images serve every explainer; only `saco` groups the patches by the map. Curves in a map's order are in
`metrics.curves`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field
from scipy.stats import rankdata

from metrics.base import Samples, pearson
from metrics.imputers import Imputer, PixelImputer
from metrics.perturbation import (
    Output,
    Outputs,
    PatchMetric,
    PerturbationMetric,
    n_patches,
    patch_grid,
    patch_ranks,
    patch_sums,
)

Positive = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=3)]
Share = Annotated[float, Field(gt=0, lt=1)]

FOOLED = (
    "Maps of how far each patch lies from what the imputer puts there (contrast, edges), where the model reacts to the "
    "change as such."
)


class DropCorrelation(PerturbationMetric):
    """Base of the metrics that correlate what a map says of removed features with the output's drop.

    Parameters
    ----------
    similarity : {"pearson", "spearman"}
        The correlation; "spearman" is Pearson's of the ranks.
    """

    group = "faithfulness"
    bounds = (-1.0, 1.0)
    chance = 0.0
    undefined_reason = "no removal changes the output, or what the map says of it, more than another"

    similarity: Literal["pearson", "spearman"] = "pearson"

    def relevance(self, samples: Samples) -> np.ndarray:
        """Return (N, F) float64: the sum of the map over each feature."""
        return patch_sums(samples)

    def kinds(self, samples: Samples) -> int:
        """Return how many kinds of removal follow each other; the score is the mean of their correlations."""
        return 1

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        relevance = sums(seen.removed, self.relevance(samples))
        # the unperturbed output is a constant of the sample: no correlation sees it
        pair = (
            of_each.reshape(len(samples) * self.kinds(samples), -1)
            for of_each in (relevance, -seen.target(self.output))
        )
        if self.similarity == "spearman":
            pair = (rankdata(of_each, axis=1) for of_each in pair)
        return pearson(*pair).reshape(len(samples), -1).mean(axis=1)


class FaithfulnessEstimate(DropCorrelation, PatchMetric):
    """Correlation, over patches, of a patch's relevance and the output's drop when it alone is replaced.

    Quantus's FaithfulnessEstimate with one patch as one feature, which Quantus 0.6.0 cannot express on RGB images in
    general; where it can, the two agree. A patch's relevance is the sum of the map over it. The perturbed images do
    not depend on the map: they serve all explainers.

    Parameters
    ----------
    imputer : str
        What replaces a patch; Quantus's default, "black", is the lowest value of the image.
    """

    name = "faithfulness_estimate"
    asks = "single_patches"
    undefined_reason = "no patch changes the output more than another"
    reference = "Alvarez-Melis & Jaakkola, NeurIPS 2018 (arXiv:1806.07538)"
    formula = "corr over patches p of: sum of the map over p, f(x) - f(x without p)"
    rewards = "A patch is as relevant as the output falls when it alone goes."
    fooled_by = FOOLED + " Occlusion with the same imputer scores 1: it is the yardstick itself."
    deviation = "Patches instead of runs of pixels in the map's order; per image; maps are not normalised by the batch."

    imputer: Imputer = "black"

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, P, P) bool: each patch alone."""
        return each_alone(samples)


class TokenAblationCorrelation(FaithfulnessEstimate):
    """Correlation, over patches, of a patch's relevance and the output's drop when its token leaves the sequence.

    The drops are the token ablation map (TAM) that the CDAM paper compares maps with: a token leaves after the
    positional embedding, class and register tokens stay. No pixel is invented, so nothing leaves the training
    distribution but the length of the sequence. Defined for timm's Vision Transformers.

    Parameters
    ----------
    imputer : str
        "token_removal"; another imputer makes this a `faithfulness_estimate`.
    """

    name = "token_ablation_correlation"
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364)"
    formula = "corr over patches p of: sum of the map over p, f(x) - f(x without the token of p)"
    rewards = "A patch is as relevant as the output falls when the model never sees its token."
    fooled_by = "Token ablation scores 1: it is the yardstick itself; so do maps of it in any units."
    deviation = ""

    imputer: Imputer = "token_removal"


class FaithfulnessCorrelation(DropCorrelation, PatchMetric):
    """Correlation, over random subsets of patches, of their relevance and the output's drop when they go at once.

    The subsets are drawn from the sample's seed and their size alone: they are the same for every explainer, and for
    `sensitivity_n` at the same size. A fifth of the patches is the default because a Vision Transformer fills in single
    patches from their neighbours: on photographs, explainers stand out from random maps the better the larger the
    subset, up to about a third of the patches; from there on, maps of mere edges gain most. The 224 features of
    Quantus's default would be more than there are patches.

    Parameters
    ----------
    subset : float
        Patches in a subset: a fraction of them below 1, else their number. At least one goes, and at least one stays.
    runs : int
        Subsets.
    """

    name = "faithfulness_correlation"
    undefined_reason = "no subset changes the output, or the map's sum over it, more than another"
    reference = "Bhatt, Weller & Moura, IJCAI 2020 (arXiv:2005.00631)"
    formula = "corr over random subsets S of patches of: sum of the map over S, f(x) - f(x without S)"
    rewards = "The relevance of patches adds up to the drop of the output when they go together."
    fooled_by = FOOLED
    deviation = "Subsets of patches, not of single channel values; the same subsets for every explainer; per image."

    subset: Annotated[float, Field(gt=0)] = 0.2
    runs: Several = 100

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, runs, F) bool: random subsets."""
        return samples.once(("random subsets", self.subset, self.runs), self.subsets)

    def subsets(self, samples: Samples) -> np.ndarray:
        """Return (N, runs, F) bool: `removed`, drawn anew."""
        features = self.relevance(samples).shape[1]
        return random_subsets(samples.seeds, features, subset_size(self.subset, features), self.runs)


class PixelRemoval(DropCorrelation):
    """Base of the correlations whose features are single pixels.

    Every sample is a part of its own: the masks of its runs take runs x H x W bytes, whatever the number of samples,
    and are named alike for every explainer, whichever samples its maps are defined on.
    """

    def relevance(self, samples: Samples) -> np.ndarray:
        """Return (N, H W) float64: the maps."""
        return samples.maps.reshape(len(samples), -1)

    def chunks(self, samples: Samples) -> list[Samples]:
        """Split the samples one by one."""
        return [samples.take(np.array([row])) for row in range(len(samples))]


class FaithfulnessCorrelationPixels(PixelRemoval, FaithfulnessCorrelation):
    """Correlation, over random subsets of pixels, of their relevance and the logit's drop when they go black at once.

    The setting of Komorowski et al.: 224 pixels, 0.45 % of an image of 224 x 224, go black in each of 100 runs; maps
    are neither normalised nor rectified. So few pixels that are not next to each other hardly move a model: expect
    scores close to chance, and judge them by their interval.

    Parameters
    ----------
    subset : float
        Pixels in a subset: a fraction of them below 1, else their number. At least one goes, and at least one stays.
    runs : int
        Subsets.
    imputer : str
        What replaces a pixel; "black" is the lowest value of the image, as in Quantus.
    """

    name = "faithfulness_correlation_pixels"
    reference = "Komorowski, Baniecki & Biecek, CVPR-W 2023 (arXiv:2304.06133); Bhatt et al., IJCAI 2020 (2005.00631)"
    formula = "corr over random subsets S of 224 pixels of: sum of the map over S, f(x) - f(x with S black)"
    rewards = "The relevance of pixels adds up to the drop of the logit when they go black together."
    fooled_by = "Brightness maps, where dark specks as such lower the logit; and luck: the drops are mostly noise."
    deviation = (
        "A feature is a pixel, as in the study's Quantus; in 0.6.0 it is one channel's value. Equal to 0.6.0 on the "
        "same subsets; they are the same for every explainer."
    )

    subset: Annotated[float, Field(gt=0)] = 224
    imputer: PixelImputer = "black"

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, runs, H W) bool: random subsets, too large to keep."""
        return self.subsets(samples)


class SensitivityN(DropCorrelation, PatchMetric):
    """Correlation over random subsets of n patches, as `faithfulness_correlation`, averaged over sizes n.

    The sizes run from one patch to `largest`, evenly on a logarithmic scale, as in the paper; sizes that coincide on
    a small grid count once. The correlation is taken for each image and size, then averaged over sizes.

    Parameters
    ----------
    sizes : int
        How many sizes.
    largest : float
        The largest subset, as a fraction of the patches, in (0, 1); one patch stays in any case.
    runs : int
        Subsets of each size.
    """

    name = "sensitivity_n"
    undefined_reason = "at some n, no subset changes the output, or the map's sum over it, more than another"
    reference = "Ancona, Ceolini, Oeztireli & Gross, ICLR 2018 (arXiv:1711.06104)"
    formula = "mean over n of corr over random subsets S of n patches of: sum of the map over S, f(x) - f(x without S)"
    rewards = "The relevance of patches adds up to the output's drop, for few patches and for many."
    fooled_by = FOOLED
    deviation = (
        "Quantus correlates across images, in the first batch only, and pairs the drop after cumulative removal in the "
        "map's order with the relevance of the last step alone; here it is per image, over random subsets."
    )

    sizes: Positive = 5
    largest: Share = 0.8
    runs: Several = 100

    def counts(self, samples: Samples) -> list[int]:
        """Return the sizes n, rising, without duplicates."""
        patches = n_patches(samples)
        most = subset_size(self.largest, patches)
        return np.unique(np.geomspace(most, 1, self.sizes).round().astype(int)).tolist()

    def kinds(self, samples: Samples) -> int:
        """Return the number of sizes."""
        return len(self.counts(samples))

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, S runs, P) bool: random subsets of each of S sizes."""
        return samples.once(("random subsets", *self.counts(samples), self.runs), self.subsets)

    def subsets(self, samples: Samples) -> np.ndarray:
        """Return (N, S runs, P) bool: `removed`, drawn anew."""
        patches = n_patches(samples)
        subsets = [random_subsets(samples.seeds, patches, count, self.runs) for count in self.counts(samples)]
        return np.concatenate(subsets, axis=1)


class BoxSensitivity(PixelRemoval):
    """Correlation, over random square boxes, of the map's sum in a box and the output's drop when it is blurred.

    The boxes lie anywhere, whatever the patches. They are drawn uniformly, in whole pixels, from the sample's seed
    and the side alone: the same for every explainer. The correlation is taken for each side, then averaged.

    Parameters
    ----------
    largest : float
        The longest side, as a fraction of the image's shorter side.
    sides : int
        How many sides, each half as long as the one before.
    boxes : int
        Boxes of each side.
    imputer : str
        What is put in the box: "blur", or "zero" for the paper's constant.
    """

    name = "box_sensitivity"
    undefined_reason = "at some side, no box changes the output, or the map's sum in it, more than another"
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364), after Ancona et al., ICLR 2018 (arXiv:1711.06104)"
    formula = "mean over sides of corr over random boxes B of: sum of the map in B, f(x) - f(x blurred in B)"
    rewards = "Regions, wherever they lie, are as relevant as the output falls without them."
    fooled_by = "A blob where the object lies: overlapping boxes blur the map, so that only its coarse shape counts."

    imputer: PixelImputer = "blur"
    largest: Share = 0.5
    sides: Positive = 3
    boxes: Several = 100

    def lengths(self, samples: Samples) -> list[int]:
        """Return the sides in pixels, rising, without duplicates."""
        longest = self.largest * min(samples.inputs.shape[2:])
        return np.unique([max(1, round(longest / 2**halved)) for halved in range(self.sides)]).tolist()

    def kinds(self, samples: Samples) -> int:
        """Return the number of sides."""
        return len(self.lengths(samples))

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, S boxes, H W) bool."""
        height, width = samples.inputs.shape[2:]
        lengths = self.lengths(samples)
        boxes = [
            random_boxes(int(seed), (height, width), side, self.boxes) for seed in samples.seeds for side in lengths
        ]
        return np.stack(boxes).reshape(len(samples), -1, height * width)


class Infidelity(PatchMetric):
    """Mean squared gap between the map's sum over a square of patches, best scaled, and the output's drop without it.

    The squares are all of those whose sides are 1 to `largest` patches, at every place of the grid, as Yeh et al. have
    it for pixels: no random draws. What they call I^T Phi, the perturbation times the explanation, is the map's sum
    over the square, as the maps are in units of the output per removal already (their binary I). As they do, the map
    is first scaled by the one number that suits it best, because most explainers state no units; unlike theirs this
    number is not negative, which would give a map and its opposite the same score.

    Parameters
    ----------
    largest : int
        The longest side of a square, in patches; no longer than the grid.
    """

    name = "infidelity"
    group = "faithfulness"
    higher_is_better = False
    bounds = (0.0, np.inf)
    undefined_reason = "no square of patches changes the output, or there is only one"
    reference = "Yeh, Hsieh, Suggala, Inouye & Ravikumar, NeurIPS 2019 (arXiv:1901.09392)"
    formula = "min over b >= 0 of the mean over squares S of (b * sum of the map over S - (f(x) - f(x without S)))^2"
    rewards = "The relevance of neighbouring patches adds up, in one unit, to the output's drop when they go together."
    fooled_by = (
        "Images on which the output hardly moves: every map, even zero, does well there; compare explainers image by "
        "image."
    )
    deviation = (
        "Quantus removes one patch after the other and never puts one back, repeats the same computation "
        "n_perturb_samples times, multiplies the map by the change of the input, and does not scale; with independent "
        "patches of side 1, `infidelity_raw` is equal to it."
    )

    largest: Positive = 3

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, 1 + S, P) bool: nothing, then each square."""
        masks = squares(patch_grid(samples), self.largest)
        masks = np.concatenate([np.zeros_like(masks[:1]), masks])
        return np.broadcast_to(masks, (len(samples), *masks.shape))

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64, in squared units of the output."""
        output = seen.target(self.output)
        drops = output[:, :1] - output[:, 1:]
        relevance = sums(seen.removed[:, 1:], patch_sums(samples))
        gaps = self.scale(relevance, drops)[:, None] * relevance - drops
        return np.where(self.tells(drops), (gaps**2).mean(axis=1), np.nan)

    def scale(self, relevance: np.ndarray, drops: np.ndarray) -> np.ndarray:
        """Return (N,) float64: what each map is multiplied with."""
        power = (relevance**2).sum(axis=1)
        return np.maximum((relevance * drops).sum(axis=1), 0) / np.where(power > 0, power, 1)

    def tells(self, drops: np.ndarray) -> np.ndarray:
        """Return (N,) bool: whether the drops (N, S) can tell one map from another."""
        return (drops != 0).any(axis=1) & (drops.shape[1] > 1)


class InfidelityRaw(Infidelity):
    """Mean squared gap between the map's sum over a square of patches and the output's drop without it.

    As `infidelity`, of the map as it is: for explainers whose values are in units of the output.
    """

    name = "infidelity_raw"
    scale_invariant = False
    undefined_reason = "no square of patches changes the output"
    formula = "mean over squares S of patches of (sum of the map over S - (f(x) - f(x without S)))^2"
    rewards = "The map's values, as they are, add up to the output's drop."
    fooled_by = "Maps close to zero beat most maps whose units are not those of the output, whatever they show."

    def scale(self, relevance: np.ndarray, drops: np.ndarray) -> np.ndarray:
        """Return (N,) float64: one."""
        return np.ones(len(relevance))

    def tells(self, drops: np.ndarray) -> np.ndarray:
        """Return (N,) bool: whether any of the drops (N, S) is not zero."""
        return (drops != 0).any(axis=1)


class SalienceGuidedFaithfulness(PatchMetric):
    """Salience-guided faithfulness coefficient (SaCo): do more salient groups of patches matter more, and by how much?

    The patches, ranked by the map, are cut into groups of equal size, and each group is replaced alone; what the
    division leaves over stays, here and there between two groups, as larger groups would be both more salient and
    missed more, whatever the map. Of two groups the one that the map calls more salient should lower the output at
    least as much; each pair counts with the difference of the two groups' salience, which is the map's sum. Where no
    pair of groups differs in its drop, the definition would give any map 1: undefined here.

    Parameters
    ----------
    groups : int
        Groups; no more than there are patches.
    imputer : str
        What replaces a group; "mean" as in the paper.
    output : {"logit", "probability"}
        What is read off the model; the probability in the paper.
    """

    name = "saco"
    group = "faithfulness"
    bounds = (-1.0, 1.0)
    chance = 0.0
    undefined_reason = "no group of patches changes the output, or is more salient, more than another"
    reference = "Wu, Kang, Tang, Hong & Yan, CVPR 2024 (arXiv:2404.01415)"
    formula = "sum over pairs i < j of +-(s_i - s_j), + where drop_i >= drop_j, over sum of |s_i - s_j|"
    rewards = "Groups of patches that the map calls more relevant lower the output more, the clearer the more."
    fooled_by = "Maps of one patch or spot that matters, and nothing else: few pairs carry all the weight."

    groups: Annotated[int, Field(ge=2)] = 10
    output: Output = "probability"

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, K, P) bool: each group alone, the most salient first."""
        patches = n_patches(samples)
        groups = min(self.groups, patches)
        size = patches // groups
        first = np.arange(groups)[:, None] * (patches - size) // (groups - 1)
        ranks = patch_ranks(samples)[:, None]
        return (first <= ranks) & (ranks < first + size)

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        salience, drops = sums(seen.removed, patch_sums(samples)), -seen.target(self.output)
        more, less = np.triu_indices(drops.shape[1], 1)
        weights = salience[:, more] - salience[:, less]
        signed = np.where(drops[:, more] >= drops[:, less], weights, -weights).sum(axis=1)
        total = np.where(np.ptp(drops, axis=1) > 0, np.abs(weights).sum(axis=1), 0)
        return np.divide(signed, total, out=np.full(len(samples), np.nan), where=total > 0)


def sums(removed: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Return (N, S) float64: the sum of `relevance` (N, F) over the features `removed` (N, S, F) in each version."""
    return np.einsum("nsf,nf->ns", removed, relevance)


def each_alone(samples: Samples) -> np.ndarray:
    """Return (N, P, P) bool: one patch removed in each version."""
    patches = n_patches(samples)
    return np.broadcast_to(np.eye(patches, dtype=bool), (len(samples), patches, patches))


def subset_size(subset: float, features: int) -> int:
    """Return a number of features from a fraction (below 1) or a number: at least one, and not all."""
    wanted = subset * features if subset < 1 else subset
    return int(np.clip(round(wanted), 1, max(features - 1, 1)))


def random_subsets(seeds: np.ndarray, features: int, size: int, runs: int) -> np.ndarray:
    """Return (N, runs, F) bool: `size` of the features each time, drawn from each sample's seed and the size."""
    subsets = np.zeros((len(seeds), runs, features), dtype=bool)
    for of_sample, seed in zip(subsets, seeds, strict=True):
        generator = np.random.default_rng([int(seed), size])
        for subset in of_sample:
            subset[generator.choice(features, size, replace=False, shuffle=False)] = True
    return subsets


def random_boxes(seed: int, shape: tuple[int, int], side: int, boxes: int) -> np.ndarray:
    """Return (boxes, H, W) bool: square boxes, each place in the image as likely, drawn from the seed and the side."""
    highest = [length - side + 1 for length in shape]
    corners = np.random.default_rng([seed, side]).integers(highest, size=(boxes, 2))
    down, across = (
        (start[:, None] <= np.arange(length)) & (np.arange(length) < start[:, None] + side)
        for start, length in zip(corners.T, shape, strict=True)
    )
    return down[:, :, None] & across[:, None]


def squares(grid: tuple[int, int], largest: int) -> np.ndarray:
    """Return (S, P) bool: every square of 1 to `largest` patches a side that fits into the grid."""
    patches = np.arange(np.prod(grid)).reshape(grid)
    masks = []
    for side in range(1, min(largest, *grid) + 1):
        inside = sliding_window_view(patches, (side, side)).reshape(-1, side**2)
        mask = np.zeros((len(inside), patches.size), dtype=bool)
        np.put_along_axis(mask, inside, True, axis=1)
        masks.append(mask)
    return np.concatenate(masks)
