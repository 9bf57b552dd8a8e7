"""Komorowski et al. 2023: LIME, attention rollout and TransformerLRP on chest radiographs, in their two studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from bench.studies.base import NO_PRIOR, TRIVIAL, Done, Part, Section, Study, Weights, training_of
from bench.studies.maps import explained, models, of_classes
from leaderboards import study_figures
from leaderboards.study_figures import Picture

LRP_STUDY, CVPRW = "LRP study", "CVPR-W 2023"
IMAGES = {LRP_STUDY: 87, CVPRW: 300}
STEMS = {LRP_STUDY: "komorowski2023", CVPRW: "komorowski2023_cvprw"}
MASKED = "COVID-QU-Ex, infection tree"

LIME, LRP = "lime_komorowski", "transformer_attribution"
LIME3, LIME8 = f"{LIME}[num_features=3]", f"{LIME}[num_features=8]"
EXPLAINERS = {
    LRP: "TransformerLRP",
    LIME: "LIME, 2 superpixels",
    LIME3: "LIME, 3 superpixels",
    LIME8: "LIME, 8 superpixels",
    "lime": "LIME, weights",
    "rollout": "attention rollout, mean",
    "rollout[fusion=min]": "attention rollout, min",
    "rollout[fusion=max,discard=0.99]": "attention rollout, max",
}

ESTIMATE = "quantus:FaithfulnessEstimate[features_in_step=224]"
CORRELATION = "faithfulness_correlation_pixels"
SENSITIVITY = "avg_sensitivity[draws=3,radius=0.33]"
COMPLEXITY = "effective_complexity[scale=minmax]"
PUBLISHED = {
    ESTIMATE: "FaithfulnessEstimate",
    CORRELATION: "FaithfulnessCorrelation",
    SENSITIVITY: "AvgSensitivity",
    COMPLEXITY: "EffectiveComplexity, share of the pixels",
}
EVERY_CLASS = ("class_correlation", "class_correlation[other=least]")  # of three classes, the two others
BESIDE = ("faithfulness_estimate", "faithfulness_correlation")  # the same questions of patches
LOCALIZATION = tuple(
    f"{metric}[roi={region}]"
    for region in ("infection", "lung")
    for metric in ("pointing_game", "relevance_mass_accuracy", "relevance_rank_accuracy", "average_precision")
)


class Komorowski2023(Study):
    """Two protocols on COVID-QU-Ex with ViT-B/16, and what their data has masks for: localization.

    "LRP study" is the short paper on relevance propagation: Quantus's FaithfulnessEstimate on 87 random images, LIME
    against TransformerLRP. "CVPR-W 2023" is the workshop paper: FaithfulnessCorrelation, AvgSensitivity and
    EffectiveComplexity on 100 images per class, with attention rollout. Both on the tree of 33,920 images, which has
    lung masks only; localization is scored on the tree with infection masks. The class explained is the label.
    """

    name = "komorowski2023"
    title = "Komorowski et al. 2023: LIME, attention rollout and TransformerLRP on chest radiographs"
    reference = (
        "Komorowski, Husiatynski & Antoniak, Vision transformer medical imaging explanations using Relevance "
        "Propagation; Komorowski, Baniecki & Biecek, Towards evaluating explanations of Vision Transformers for "
        "medical imaging, CVPR Workshops 2023 (arXiv:2304.06133)"
    )
    remarks: ClassVar[str] = (
        "FaithfulnessEstimate is Quantus's own, at its defaults (logits, 'black' is the image's lowest value) but for "
        "the 224 features of a step, which the study does not state; 224 is usual (from memory). Its text speaks of "
        "drops of the probability. Since Quantus 0.6.0 a feature is one channel's value, where it was a pixel: a step "
        "is a third as large as it was. Nor does the study state LIME's map; beside its value stands the binary map "
        "of the later paper. "
        "FaithfulnessCorrelation (224 random pixels go black, 100 runs, Pearson, logits, maps as they are) is ours, in "
        "which a feature is a pixel, as in the Quantus that the paper used; equal to Quantus 0.6.0 on the same "
        "subsets. AvgSensitivity (3 draws of uniform noise within .33) and EffectiveComplexity (share of the pixels "
        "above .1 of the map scaled to [0, 1]) are ours and equal to Quantus 0.6.0's, but that maps are scaled to "
        "[0, 1] for the latter only: the paper's were for all three. The paper's values of AvgSensitivity fit a "
        "division by the norm of the image, as in older versions of Quantus (from memory), not of the map, as in "
        "0.6.0 and here: do not compare them. "
        "The paper's own table was not at hand: its values here are means of 12 chosen images, read off a figure; "
        "another figure shows complexities of .82 to .97 (mean), .81 to .97 (min) and .12 to .34 (max fusion) for 3 "
        "images. Its code explains the predicted class with TransformerLRP and LIME, and scores the map for the label; "
        "here both are the label. It divides columns by the sums of rows in attention rollout, which is mended here. "
        "Images are taken in a seeded order, as many of each class for the CVPR-W paper; the 300 of the paper depend "
        "on the order in which its file system listed them. Where a score is undefined for one map and defined for "
        "another, our mean counts it as the image's worst; n counts those defined."
    )

    def parts(self, data_root: Path | None) -> list[Part]:
        """Return both protocols, and the localization of both models."""
        return [self._lrp_study(), self._cvprw(), self._localization(LRP_STUDY), self._localization(CVPRW)]

    def _lrp_study(self) -> Part:
        return Part(
            names={"dataset": "COVID-QU-Ex", "model": LRP_STUDY},
            dataset="covid_qu_ex[part=lung]",
            weights=_weights(LRP_STUDY),
            explainers=[*EXPLAINERS, *NO_PRIOR],
            metrics=[ESTIMATE, BESIDE[0], *EVERY_CLASS],
            samples=IMAGES[LRP_STUDY],
            target="label",
        )

    def _cvprw(self) -> Part:
        return Part(
            names={"dataset": "COVID-QU-Ex", "model": CVPRW},
            dataset="covid_qu_ex[part=lung]",
            weights=_weights(CVPRW),
            explainers=[*(name for name in EXPLAINERS if name not in (LIME3, LIME8)), *NO_PRIOR],
            metrics=[CORRELATION, SENSITIVITY, COMPLEXITY, BESIDE[1]],
            samples=IMAGES[CVPRW],
            target="label",
            balanced=True,
        )

    def _localization(self, study: str) -> Part:
        return Part(
            names={"dataset": MASKED, "model": study},
            dataset="covid_qu_ex",
            weights=_weights(study),
            explainers=[*EXPLAINERS, *TRIVIAL],
            metrics=LOCALIZATION,
            samples=IMAGES[CVPRW],
            target="label",
            balanced=True,
        )

    def sections(self, done: Sequence[Done], out: Path) -> Iterator[Section]:
        """Yield the published table beside ours, the models, scores by class, localization and pictures."""
        table = self.beside(done)
        yield Section("beside", "Published and ours", self.remarks, table[table["metric"].isin(PUBLISHED)])
        yield Section("models", "What was explained", _MODELS, models(done))
        protocols = [one for one in done if one.part.names["dataset"] != MASKED]
        if protocols:
            yield _by_class(protocols, out)
            others = table["metric"].isin([*BESIDE, *EVERY_CLASS])
            yield Section("patches", "The same questions, of patches and classes", _PATCHES, _trimmed(table[others]))
        localization = table[table["metric"].isin(LOCALIZATION)]
        if len(localization):
            yield Section("localization", "Localization, which the studies lacked", _MASKED, _trimmed(localization))
        if pictured := [one for one in protocols if LIME3 in one.part.explainers]:
            yield _pictures(pictured[0], out)


_MODELS = (
    "The paper preprocessed in three ways: by the mean and standard deviation of the first batch in training (not "
    "reproducible), by mean .58 and standard deviation .21 at 224 x 224 in validation (komorowski2023_validation), and "
    "by .56 and .21 after Resize(256) and CenterCrop(224) in explaining (komorowski2023). The column preprocessing "
    "says which one was used here. Accuracy is that on the images explained."
)
_PATCHES = (
    "FaithfulnessEstimate and FaithfulnessCorrelation of patches instead of scattered pixels, whose removal a Vision "
    "Transformer notices; and the correlation of the map with those of the other classes (second: the more probable "
    "one), 1 for a map that does not know the class."
)
_MASKED = (
    "Against the masks of infections (COVID-19 only) and of lungs, on the test images of the infection tree. Whether "
    "the two trees put the same images into their test parts is not verified: some may be training images of a model "
    "that was trained on the other tree. A map may be faithful and lie outside both: models are known to tell these "
    "classes by other marks than the disease."
)


def _weights(study: str) -> Weights:
    return Weights(STEMS[study], training_of(STEMS[study]), "vit_base_patch16_224", "komorowski2023")


def _trimmed(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of published values, where there are none."""
    return table.dropna(axis=1, how="all")


def _by_class(done: Sequence[Done], out: Path) -> Section:
    scores = pd.concat([_classified(one) for one in done], ignore_index=True)
    figures = {}
    for one in done:
        path = out / f"by_class_{one.part.weights.stem}.png"
        mine = scores[scores["model"] == one.part.names["model"]]
        shown = mine[mine["explainer"].isin([*EXPLAINERS, "random"])]
        study_figures.boxes(shown, {**EXPLAINERS, "random": "random", **PUBLISHED}, path)
        count = mine["sample"].nunique()
        figures[f"{one.part.names['model']}, {count} images by class: median, quartiles, 1.5 quartile ranges"] = path
    by = ["model", "metric", "explainer", "class"]
    table = scores.groupby(by, sort=False)["value"].describe(percentiles=[0.25, 0.5, 0.75]).reset_index()
    table = table.rename(columns={"count": "n", "25%": "lower_quartile", "50%": "median", "75%": "upper_quartile"})
    table["n"] = table["n"].astype(int)
    columns = [*by, "n", "mean", "std", "lower_quartile", "median", "upper_quartile"]
    return Section("by_class", "Scores by class", _BY_CLASS, table[columns], figures)


_BY_CLASS = "As the box plot of the LRP study, which found lower scores for Non-COVID images; classes are the labels."


def _classified(done: Done) -> pd.DataFrame:
    """Return the scores of the published metrics with each image's class, classes in their order."""
    (problem,) = done.open().problems
    names = problem.dataset.class_names
    label = {sample.id: sample.label for sample in problem.samples}
    scores = done.scores[done.scores["metric"].isin(PUBLISHED)]
    scores = scores.assign(label=scores["sample"].map(label), model=done.part.names["model"])
    scores["class"] = [names[number] for number in scores["label"]]
    return scores.sort_values(["label", "sample"], kind="stable")


def _pictures(done: Done, out: Path) -> Section:
    """One image of each class: TransformerLRP for every class, LIME's 3 and 8 best superpixels for its own."""
    run = done.open()
    (problem,) = run.problems
    names = problem.dataset.class_names
    rows: dict[int, list[Picture]] = {}
    for shard, known in explained(run):
        maps = {name: of_classes(run, shard, known, name) for name in (LRP, LIME3, LIME8)}
        for row, sample in enumerate(shard.samples):
            if sample.label not in rows:
                image = problem.model.resize(problem.dataset.load(sample).image)
                of_row = {name: each[row] for name, each in maps.items()}
                said = names[int(known.logits[row].argmax())]
                rows[sample.label] = _row(image, of_row, sample.label, len(names), f"predicted: {said}")
    path = study_figures.grid(
        {names[label]: rows[label] for label in sorted(rows)},
        ["image", *(f"LRP for\n{name}" for name in names), "LIME,\n3 superpixels", "LIME,\n8 superpixels"],
        out / "pictures.png",
    )
    return Section("pictures", "Pictures", _PICTURES, figures={"An image of each class, by its label": path})


_PICTURES = (
    "As the picture grid of the LRP study: the first image of each class with TransformerLRP for every class, each map "
    "from its least to its largest value, and the superpixels that LIME finds best for the label."
)


def _row(
    image: np.ndarray, maps: Mapping[str, Mapping[int, np.ndarray]], label: int, classes: int, title: str
) -> list[Picture]:
    blank = np.full(image.shape[:2], np.nan)
    relevance = [Picture(image, maps[LRP].get(number, blank)) for number in range(classes)]
    masks = [maps[name].get(label, blank) for name in (LIME3, LIME8)]
    superpixels = [Picture(_shown(image, mask), title="" if (mask > 0).any() else "none is for it") for mask in masks]
    return [Picture(image, title=title), *relevance, *superpixels]


def _shown(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image with everything but the superpixels of a binary map darkened, in colour."""
    tint = np.where(mask[..., None] > 0, [1.0, 1.0, 1.0], [0.25, 0.25, 0.4])
    return (image * tint).astype(np.uint8)
