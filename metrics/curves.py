"""Faithfulness read off removal curves: how the output falls as the most, or the least, relevant features go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.integrate import trapezoid
from skimage.segmentation import slic

from metrics.base import Samples
from metrics.imputers import Imputer, PixelImputer
from metrics.perturbation import Output, Outputs, PatchMetric, PerturbationMetric, patch_ranks, ranks, target_output

Order = Literal["most", "least"]
Steps = Annotated[int, Field(ge=2)]


class RemovalMetric(PerturbationMetric):
    """Base of the metrics that remove features in the order of their relevance.

    Ties in relevance are broken by a lottery drawn from the sample's seed, the same for every explainer. `bounds` are
    those of the default `output`.
    """

    group = "faithfulness"
    undefined_reason = "the model's output is not finite"
    orders: ClassVar[tuple[Order, ...]] = ("most",)
    perturbed: ClassVar[slice] = slice(1, None)  # which of the `counts` need a forward pass

    def ranks(self, samples: Samples) -> np.ndarray:
        """Return (N, F) int: 0 for the most relevant feature of each map to F - 1 for the least relevant one."""
        return patch_ranks(samples)

    def counts(self, samples: Samples) -> np.ndarray:
        """Return (S + 1,) int, rising from 0: how many features are gone after each step."""
        raise NotImplementedError

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, orders x S, F) bool: order by order, every step that is `perturbed`."""
        return in_orders(self.ranks(samples), self.counts(samples)[self.perturbed], self.orders)

    def curves(self, samples: Samples, seen: Outputs) -> list[np.ndarray]:
        """Return for each order (N, S + 1): the output on the whole image and after each step."""
        start = target_output(samples.logits, samples.targets, self.output)[:, None]
        after = np.split(seen.target(self.output), len(self.orders), axis=1)
        return [np.concatenate([start, curve], axis=1) for curve in after]


def in_orders(ranks: np.ndarray, counts: np.ndarray, orders: Sequence[Order]) -> np.ndarray:
    """Return (N, orders x S, F) bool: the `counts` (S,) "most" or "least" relevant features by their `ranks` (N, F)."""
    ranked = [ranks if order == "most" else ranks.shape[1] - 1 - ranks for order in orders]
    return np.concatenate([of_order[:, None] < counts[:, None] for of_order in ranked], axis=1)


def removal_counts(features: int, steps: int) -> np.ndarray:
    """Return how many features are gone after each step, from 0 to `features`, halves rounded up, no duplicates."""
    return np.unique((2 * features * np.arange(steps + 1) + steps) // (2 * steps))


class CurveMetric(RemovalMetric):
    """Area under the output's curve, from the whole image to the fully replaced one.

    After step s of `steps`, round(F s / steps) of the F features are gone, halves rounded up; where an image has fewer
    features than steps, steps that remove nothing new are left out. The area is a trapezoid sum over the fraction of
    features removed, in [0, 1].

    Parameters
    ----------
    steps : int
        Steps from the whole image to the fully replaced one; the number of features gives the exact area.
    """

    steps: Steps = 28

    def counts(self, samples: Samples) -> np.ndarray:
        """Return (S + 1,) int, from 0 to the number of features."""
        return removal_counts(self.ranks(samples).shape[1], self.steps)

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64: the area under the curve."""
        counts = self.counts(samples)
        return trapezoid(self.curves(samples, seen)[0], counts / counts[-1], axis=1)

    def each(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N, F + 1): the curve after every single feature, interpolated linearly between the steps."""
        counts = self.counts(samples)
        every = np.arange(counts[-1] + 1)
        return np.stack([np.interp(every, counts, curve) for curve in self.curves(samples, seen)[0]])


class SymmetricGain(CurveMetric):
    """Area between the output's curves when the least and when the most relevant features are removed first.

    Both curves start at the whole image and end at the fully replaced one, where their difference is zero: only the
    steps between need forward passes.
    """

    orders = ("least", "most")
    perturbed = slice(1, -1)
    chance = 0.0
    formula = "area of the curve least relevant first - area of the curve most relevant first"
    rewards = "The output holds while irrelevant features go, and falls as soon as relevant ones do."

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64."""
        counts = self.counts(samples)
        least, most = np.split(seen.target(self.output), 2, axis=1)
        return trapezoid(np.pad(least - most, ((0, 0), (1, 1))), counts / counts[-1], axis=1)


class SymmetricRelevanceGain(SymmetricGain, PatchMetric):
    """Area between the output's curves when the least and when the most relevant patches are replaced first.

    In units of the output. Both curves are taken at the same `steps`; see `CurveMetric`.

    Parameters
    ----------
    steps : int
        Steps from the whole image to the fully replaced one.
    imputer : str
        What replaces the patches; "mean" is the mean colour of the image.
    """

    name = "srg"
    fooled_by = "A blob at the image's centre, wherever the objects are central and the centre alone decides."
    reference = "Bluecher, Vielhaben & Strodthoff, TMLR 2024 (arXiv:2401.06654)"


class MorfAuc(CurveMetric, PatchMetric):
    """Area under the output's curve as the most relevant patches are replaced first; see `CurveMetric`."""

    name = "morf_auc"
    higher_is_better = False
    formula = "area under the output over the fraction of patches replaced, most relevant first"
    rewards = "The output falls as soon as the first patches go."
    fooled_by = "Scattered patches: holes all over the image drive the model off its data, whatever they cover."
    reference = "Samek et al., IEEE TNNLS 2017 (arXiv:1509.06321)"


class LerfAuc(CurveMetric, PatchMetric):
    """Area under the output's curve as the least relevant patches are replaced first; see `CurveMetric`."""

    name = "lerf_auc"
    orders = ("least",)
    formula = "area under the output over the fraction of patches replaced, least relevant first"
    rewards = "The output holds until the last patches go."
    fooled_by = "One compact blob over the object: the image is eaten from its border, and stays natural inside."
    reference = "Samek et al., IEEE TNNLS 2017 (arXiv:1509.06321)"


class DeletionAuc(MorfAuc):
    """Area under the target's probability as the most relevant patches are deleted first (RISE's deletion).

    `morf_auc` with RISE's choices. RISE deletes 224 pixels at a time, here patches are deleted; a deleted patch is
    zero in the model's normalised units in both.
    """

    name = "deletion_auc"
    bounds = (0.0, 1.0)
    formula = "area under the target's probability over the fraction of patches deleted, most relevant first"
    reference = "Petsiuk, Das & Saenko, BMVC 2018 (arXiv:1806.07421)"

    imputer: Imputer = "zero"
    output: Output = "probability"


class InsertionAuc(LerfAuc):
    """Area under the target's probability as patches return to a blurred image, most relevant first (RISE's insertion).

    An image with its k most relevant patches inserted is one with all others removed: the curve is that of `lerf_auc`
    read backwards, and costs no pass which that one has not. RISE inserts 224 pixels at a time, and its blur has a
    deviation of 5 pixels of 224 in a window of 11: see `metrics.imputers` for the blur here.
    """

    name = "insertion_auc"
    bounds = (0.0, 1.0)
    formula = "area under the target's probability over the fraction of patches inserted, most relevant first"
    rewards = "A few patches are enough for the model to see the target."
    reference = "Petsiuk, Das & Saenko, BMVC 2018 (arXiv:1806.07421)"

    imputer: Imputer = "blur"
    output: Output = "probability"


class Aopc(MorfAuc):
    """Mean drop of the output over all steps from no patch to all patches replaced, most relevant first.

    Area over the perturbation curve. The paper perturbs the first 100 regions of 9 x 9 pixels with random colours;
    here every patch is replaced in turn. With fewer `steps` than patches the curve is interpolated.
    """

    name = "aopc"
    higher_is_better = True
    formula = "mean over k = 0 ... P of: output on the whole image - output without the k most relevant of P patches"

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64."""
        curve = self.each(samples, seen)
        return curve[:, 0] - curve.mean(axis=1)


class PixelFlipping(MorfAuc):
    """Mean height of the target's probability while patches are flipped, most relevant first.

    The area starts after the first flip, as in Quantus, and is divided by its width: P - 1 flips of P patches. With
    fewer `steps` than patches the curve is interpolated.
    """

    name = "pixel_flipping"
    bounds = (0.0, 1.0)
    formula = "trapezoid area of the output after 1 ... P flips, most relevant first, / (P - 1)"
    deviation = (
        "Patches are flipped, not single channel values, and the area is divided by its width. Where Quantus can step "
        "by a patch its curve is the same, and its area is P - 1 times this score."
    )
    reference = "Bach et al., PLoS ONE 2015 (doi:10.1371/journal.pone.0130140)"

    imputer: Imputer = "black"
    output: Output = "probability"

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        flipped = self.each(samples, seen)[:, 1:]
        return trapezoid(flipped, axis=1) / (flipped.shape[1] - 1)


class RegionPerturbation(MorfAuc):
    """Mean drop of the target's probability after each replaced patch, most relevant first.

    As `aopc`, without the whole image as a step, and with Quantus's choices of imputer and output.
    """

    name = "region_perturbation"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    formula = "mean over k = 1 ... P of: output on the whole image - output without the k most relevant of P patches"
    deviation = (
        "Quantus returns the curve, which is the same with its patch_size set to the patch; its attribute says lower "
        "is better, but it holds drops: higher is better. All P regions are replaced, not the first 100."
    )
    reference = "Samek et al., IEEE TNNLS 2017 (arXiv:1509.06321)"

    imputer: Imputer = "black"
    output: Output = "probability"

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        curve = self.each(samples, seen)
        return curve[:, 0] - curve[:, 1:].mean(axis=1)


class Selectivity(MorfAuc):
    """Area under the target's probability as the most relevant patches are removed, with Quantus's choices.

    `morf_auc` with the lowest value of the image as imputer, read as a probability. It differs from `pixel_flipping`
    by the step from the whole image to the first removal, which the paper counts in.
    """

    name = "selectivity"
    bounds = (0.0, 1.0)
    deviation = (
        "Quantus returns the curve after the first removal, which is the same; here the whole image is its start."
    )
    reference = "Montavon, Samek & Mueller, Digital Signal Processing 2018 (arXiv:1706.07979)"

    imputer: Imputer = "black"
    output: Output = "probability"


class Rationale(RemovalMetric, PatchMetric):
    """Base of ERASER's metrics: the mean drop of the output over rationales of 1, 5, 10, 20 and 50 % of the patches.

    A rationale is the most relevant share of the patches, at least one.
    """

    percentages: ClassVar[tuple[int, ...]] = (1, 5, 10, 20, 50)
    bounds = (-1.0, 1.0)
    reference = "DeYoung et al., ACL 2020 (arXiv:1911.03429)"

    output: Output = "probability"

    def rationale_sizes(self, samples: Samples) -> np.ndarray:
        """Return (5,) int: how many patches the rationales have."""
        patches = self.ranks(samples).shape[1]
        return np.maximum((patches * np.array(self.percentages) + 50) // 100, 1)

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64."""
        curve = self.curves(samples, seen)[0]
        return curve[:, 0] - curve[:, 1:].mean(axis=1)


class Comprehensiveness(Rationale):
    """Mean drop of the target's probability when the rationale is replaced, and the rest is kept."""

    name = "comprehensiveness"
    formula = "mean over r = 1, 5, 10, 20, 50 % of: output on the whole image - output without the r most relevant"
    rewards = "Without the most relevant patches the model no longer sees the target."
    fooled_by = "Scattered patches: holes all over the image drive the model off its data, whatever they cover."

    def counts(self, samples: Samples) -> np.ndarray:
        """Return (6,) int: 0, then the sizes of the rationales."""
        return np.concatenate([[0], self.rationale_sizes(samples)])


class Sufficiency(Rationale):
    """Mean drop of the target's probability when the rationale alone is kept, and the rest is replaced.

    Not Quantus's Sufficiency, which compares the samples of a batch with each other.
    """

    name = "sufficiency"
    higher_is_better = False
    orders = ("least",)
    formula = "mean over r = 1, 5, 10, 20, 50 % of: output on the whole image - output on the r most relevant alone"
    rewards = "The most relevant patches alone are enough for the model to see the target."
    fooled_by = "One compact blob over the object: what is left looks natural, whatever the model attends to in it."
    deviation = "Another metric than Quantus's Sufficiency, which compares samples of a batch with each other."

    def counts(self, samples: Samples) -> np.ndarray:
        """Return (6,) int: 0, then how many patches are outside the rationales."""
        return np.concatenate([[0], self.ranks(samples).shape[1] - self.rationale_sizes(samples)])


class Accuracy(RemovalMetric):
    """Base of the metrics that ask, after each step, for the predicted class alone.

    The steps between the whole image and the fully replaced one are equally far apart.

    Parameters
    ----------
    steps : int
        Parts into which the removal is cut: 10 gives 10 %, 20 %, ... 90 %.
    output : {"accuracy"}
        Whether the model predicts the class in question.
    """

    output: Literal["accuracy"] = "accuracy"  # type: ignore[assignment]
    steps: Steps = 10

    def counts(self, samples: Samples) -> np.ndarray:
        """Return (S + 1,) int: 0, then what is gone after each step between the ends."""
        return removal_counts(self.ranks(samples).shape[1], self.steps)[:-1]

    def correct(self, seen: Outputs, classes: np.ndarray) -> list[np.ndarray]:
        """Return for each order (N, S) float64: 1 where the model predicts the class (N,), else 0."""
        right = np.where(np.isnan(seen.predicted), np.nan, seen.predicted == classes[:, None])
        return np.split(right, len(self.orders), axis=1)


class RoadMorf(Accuracy, PatchMetric):
    """How often the target stays the prediction while patches are imputed, most relevant first (ROAD).

    Averaged over 10 %, 20 %, ... 90 % of the patches removed. The mean over a data set whose targets are the true
    classes is the mean of the paper's accuracies. ``morf_auc[imputer=road,output=probability]`` is its smooth relative.

    Parameters
    ----------
    imputer : str
        "road", noisy linear imputation from the neighbours, is what the metric is named after.
    """

    name = "road_morf"
    higher_is_better = False
    bounds = (0.0, 1.0)
    formula = "mean over 10 %, 20 %, ... 90 % of patches imputed, most relevant first, of: 1 if the target is predicted"
    rewards = "The prediction changes as soon as the first patches are gone."
    fooled_by = "Every map, where the prediction on the whole image is not the target: all score 0, the best."
    deviation = (
        "Per sample and per patch, on 9 steps instead of 50. Quantus fails on RGB images, counts the first batch alone "
        "and returns means over samples."
    )
    reference = "Rong et al., ICML 2022 (arXiv:2202.00449)"

    imputer: Imputer = "road"

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        return self.correct(seen, samples.targets)[0].mean(axis=1)


class RoadLerf(RoadMorf):
    """How often the target stays the prediction while patches are imputed, least relevant first (ROAD).

    Averaged over 10 %, 20 %, ... 90 % of the patches removed; see `road_morf`.
    """

    name = "road_lerf"
    higher_is_better = True
    orders = ("least",)
    formula = (
        "mean over 10 %, 20 %, ... 90 % of patches imputed, least relevant first, of: 1 if the target is predicted"
    )
    rewards = "The prediction stays until the last patches are gone."
    fooled_by = "One compact blob over the object: the image is eaten from its border, and stays natural inside."


class Road(RoadMorf):
    """How much more often the target stays the prediction with the least than with the most relevant patches imputed.

    `road_lerf` minus `road_morf`, from the same forward passes.
    """

    name = "road"
    higher_is_better = True
    orders = ("least", "most")
    bounds = (-1.0, 1.0)
    chance = 0.0
    formula = "road_lerf - road_morf"
    rewards = "The prediction stays while irrelevant patches go, and changes as soon as relevant ones do."
    fooled_by = "A blob at the image's centre, wherever the objects are central and the centre alone decides."

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        least, most = self.correct(seen, samples.targets)
        return (least - most).mean(axis=1)


class PixelMetric(RemovalMetric):
    """Base of the metrics that remove single pixels of the map at the input's resolution.

    A token map has ties of a whole patch: its pixels go in the order of a lottery, patch by patch.
    """

    at_once: ClassVar[int] = 8  # samples whose masks are in memory, each a few megabytes

    imputer: PixelImputer = "mean"

    def ranks(self, samples: Samples) -> np.ndarray:
        """Return (N, H W) int32."""
        return samples.keep("pixel ranks", lambda: pixel_ranks(samples))

    def chunks(self, samples: Samples) -> list[Samples]:
        """Split the samples into parts of `at_once`."""
        return split(samples, self.at_once)


def pixel_ranks(samples: Samples) -> np.ndarray:
    """Return (N, H W) int32: 0 for the most relevant pixel of each map."""
    return ranks(samples.maps.reshape(len(samples), -1), samples.seeds).astype(np.int32)


def split(samples: Samples, size: int) -> list[Samples]:
    """Split the samples into parts of `size`."""
    rows = np.arange(len(samples))
    return [samples.take(rows[start : start + size]) for start in range(0, len(samples), size)]


class PixelSymmetricGain(PixelMetric, SymmetricGain):
    """Area between the output's curves when the least and when the most important pixels are replaced first.

    The fidelity of the authors of CDAM (LIF - MIF), at the resolution of the input. Their ties fall in raster order,
    here by lottery.

    Parameters
    ----------
    steps : int
        Steps from the whole image to the fully replaced one.
    imputer : str
        "mean" is the mean colour of the image, and "blur" a strong blur, the authors' two.
    """

    name = "pixel_srg"
    formula = "area of the curve least important pixels first - area of the curve most important pixels first"
    fooled_by = "A blob at the image's centre, wherever the objects are central and the centre alone decides."
    reference = "Brocki, Binda & Chung, TMLR 2024 (arXiv:2312.02364)"

    steps: Steps = 40


class PositivePerturbationAuc(Accuracy, PixelMetric):
    """Area under the accuracy as 10 % to 90 % of the pixels are blackened, most relevant first (Chefer et al.).

    Accuracy is with respect to the true label: 1 where the model predicts it, else 0, for one image. The area is a
    trapezoid sum divided by its width, so that a prediction which always stays scores 1.

    Parameters
    ----------
    imputer : str
        "black_pixel" is 0 before normalisation.
    """

    name = "positive_perturbation_auc"
    higher_is_better = False
    bounds = (0.0, 1.0)
    formula = "area, over its width, of [true class predicted] at 10 %, 20 %, ... 90 % of pixels blackened, MoRF"
    rewards = "The true class is lost as soon as the first pixels go."
    fooled_by = "Scattered pixels: noise all over the image drives the model off its data. Where the model is wrong on "
    fooled_by += "the whole image, every map scores near 0, the best."
    reference = "Chefer, Gur & Wolf, CVPR 2021 (arXiv:2012.09838)"

    imputer: PixelImputer = "black_pixel"
    steps: Annotated[int, Field(ge=3)] = 10

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        reasons = super().undefined(samples)
        return reasons if samples.labels is not None else [reason or "no true label" for reason in reasons]

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 in [0, 1]."""
        assert samples.labels is not None
        (correct,) = self.correct(seen, samples.labels)
        return trapezoid(correct, axis=1) / (correct.shape[1] - 1)


class NegativePerturbationAuc(PositivePerturbationAuc):
    """Area under the accuracy as 10 % to 90 % of the pixels are blackened, least relevant first (Chefer et al.).

    See `positive_perturbation_auc`.
    """

    name = "negative_perturbation_auc"
    higher_is_better = True
    orders = ("least",)
    formula = "area, over its width, of [true class predicted] at 10 %, 20 %, ... 90 % of pixels blackened, LeRF"
    rewards = "The true class is kept until the last pixels go."
    fooled_by = "One compact blob over the object: the image is eaten from its border, and stays natural inside."


class Irof(RemovalMetric):
    """Area over the output's curve, relative to the whole image, as superpixels are replaced, most relevant first.

    A superpixel's relevance is the mean of the map over it. The curve runs over 0 ... L of the L superpixels, its
    area is divided by L: 0 where the output never falls, 1 where it vanishes at once. The superpixels are SLIC's with
    scikit-image's defaults on the model's input, each image's own, and do not depend on the map.

    Parameters
    ----------
    n_segments : int
        About how many superpixels SLIC makes.
    imputer : str
        "mean" is the mean colour of the image.
    """

    name = "irof"
    bounds = (-np.inf, 1.0)
    formula = "1 - (trapezoid area of output without the l most relevant of L superpixels / output, l = 0 ... L) / L"
    rewards = "The output falls as soon as the first superpixels go."
    fooled_by = "Scattered superpixels: holes all over the image drive the model off its data, whatever they cover."
    deviation = (
        "Quantus fails on RGB images, fills with the mean of the batch, leaves the whole image out of the curve and "
        "does not divide by L: its score on one image is this one times L, plus half of 1 + the first ratio."
    )
    reference = "Rieger & Hansen, 2020 (arXiv:2003.08747)"

    imputer: PixelImputer = "mean"
    output: Output = "probability"
    n_segments: Steps = 100

    def segments(self, samples: Samples) -> np.ndarray:
        """Return (N, H, W) int32: the superpixel of each pixel."""
        return samples.once(f"slic {self.n_segments}", lambda whole: superpixels(whole, self.n_segments))

    def sizes(self, samples: Samples) -> np.ndarray:
        """Return (N,) int: the number of superpixels of each image."""
        return self.segments(samples).max(axis=(1, 2)) + 1

    def relevance(self, samples: Samples) -> np.ndarray:
        """Return (N, L) float64: the mean of the map over each superpixel; -inf where an image has fewer."""
        pairs = zip(samples.maps, self.segments(samples), strict=True)
        length = self.sizes(samples).max()
        return np.stack([segment_means(attribution, segments, length) for attribution, segments in pairs])

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        reasons = super().undefined(samples)
        for row, means in enumerate(self.relevance(samples)):
            means = means[means > -np.inf]
            if not reasons[row] and np.ptp(means) == 0:
                reasons[row] = "all superpixels tie" if len(means) > 1 else "one superpixel only"
        return reasons

    def ranks(self, samples: Samples) -> np.ndarray:
        """Return (N, L) int; superpixels that an image has not come last, and take no part in its lottery."""
        relevance, sizes = self.relevance(samples), self.sizes(samples)
        ranked = np.tile(np.arange(relevance.shape[1]), (len(samples), 1))
        for row, size in enumerate(sizes):
            ranked[row, :size] = ranks(relevance[row : row + 1, :size], samples.seeds[row : row + 1])
        return ranked

    def counts(self, samples: Samples) -> np.ndarray:
        """Return (L + 1,) int: every single superpixel, for the image that has most."""
        return np.arange(self.sizes(samples).max() + 1)

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, L, L) bool; once all superpixels of an image are gone, nothing changes."""
        counts = self.counts(samples)
        return super().removed(samples) & (counts[:-1] < self.sizes(samples)[:, None])[:, None]

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 up to 1."""
        curves = zip(self.curves(samples, seen)[0], self.sizes(samples), strict=True)
        return np.array([1 - trapezoid(curve[: size + 1] / curve[0]) / size for curve, size in curves])

    def chunks(self, samples: Samples) -> list[Samples]:
        """Split the samples into parts whose superpixels are looked at together."""
        return split(samples, 16)


def superpixels(samples: Samples, n_segments: int) -> np.ndarray:
    """Return (N, H, W) int32: SLIC's superpixels of each image, numbered from 0 without gaps."""
    images = samples.inputs.double().movedim(1, -1).cpu().numpy()
    return np.stack([slic(image, n_segments=n_segments, start_label=0) for image in images]).astype(np.int32)


def segment_means(attribution: np.ndarray, segments: np.ndarray, length: int) -> np.ndarray:
    """Return (L,) float64: the mean of `attribution` (H, W) over each of `segments` (H, W); -inf where none is."""
    sizes = np.bincount(segments.ravel(), minlength=length)
    sums = np.bincount(segments.ravel(), attribution.ravel(), minlength=length)
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), -np.inf)
