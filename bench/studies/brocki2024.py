"""Brocki, Binda and Chung 2024: class-discriminative attention maps against seven other importance estimators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd

import metrics
from bench.studies.base import NO_PRIOR, TRIVIAL, Done, Part, Section, Study, Weights, training_of
from bench.studies.maps import explained, models, of_classes
from explainer_bench import RequestError
from leaderboards import beside, study_figures
from leaderboards.study_figures import Picture

IMAGENET, LIDC = "ImageNet", "LIDC-IDRI"
MODEL = "ViT-S/8 DINO"
MALIGNANT = 1

CDAM = {
    "cdam": "CDAM",
    "smooth_cdam": "Smooth CDAM",
    "integrated_cdam": "Integrated CDAM",
    "integrated_cdam[at=norm1]": "Integrated CDAM, 2025",
}
OTHERS = {
    "raw_attention": "AM",
    "gae": "RP",
    "partial_lrp": "Partial LRP",
    "integrated_gradients": "Integrated gradients",
    "smoothgrad": "SmoothGrad",
    "input_x_gradient": "Input x gradient",
    "token_ablation": "TAM",
}
PAIRED = ("token_ablation", "cdam", "gae", "raw_attention")  # of which the pair plot is

IMPUTERS = ("blur", "zero", "mean")
FIDELITY = tuple(f"pixel_srg[imputer={name}]" for name in IMPUTERS)
ORDERS = ("morf_auc[steps=40]", "lerf_auc[steps=40]")
SIDES = (0.125, 0.25, 0.5)  # of the image's side
BOXES = tuple(f"box_sensitivity[imputer={fill},largest={side},sides=1]" for fill in ("blur", "zero") for side in SIDES)
COMPACTNESS = ("cdam_compactness", "cdam_compactness[rule=notebook]")
SENSITIVITY = ("class_correlation", "class_correlation[similarity=spearman]")
LEAST = ("class_correlation[other=least]", "class_correlation[other=least,similarity=spearman]")
LOCALIZATION = ("pointing_game", "relevance_rank_accuracy", "average_precision[corrected=true]")
HEADINGS = {
    "correctness": "Correctness",
    "compactness": "Compactness",
    "class_sensitivity": "Class sensitivity",
    "localization": "Localization of the nodule, which the study lacked",
}
GROUPS = {
    "correctness": (*FIDELITY, *ORDERS, *BOXES),
    "compactness": COMPACTNESS,
    "class_sensitivity": (*SENSITIVITY, *LEAST),
    "localization": LOCALIZATION,
}
N_PICTURED = 3


class Brocki2024(Study):
    """CDAM and its variants against the seven others, on ImageNet and on lung nodules: three benchmarks.

    Correctness: what the logit does as pixels go, most and least important first, and in random boxes. Compactness:
    how many scores are next to nothing. Class sensitivity: how alike the maps of two classes are. ImageNet: DINO
    ViT-S/8 with a linear classifier, the predicted class; LIDC-IDRI: the same backbone trained end to end, malignancy.

    An image of ImageNet has 784 tokens, and token ablation takes a forward pass for each, of every class that is
    compared. The eight curves of an explainer take 39 passes each, the boxes 600 for all together: start with fewer
    images (``--samples 50``).

    Parameters
    ----------
    concept : str
        Folder with images of a concept (30 in the paper), for a row of Concept CDAM.
    """

    name = "brocki2024"
    title = "Brocki, Binda & Chung 2024: class-discriminative attention maps for vision transformers"
    reference = "Brocki, Binda & Chung, Transactions on Machine Learning Research 2024 (arXiv:2312.02364)"
    remarks: ClassVar[str] = (
        "Published: outputs of the authors' first notebook on 1,000 validation images, one vanilla CDAM, of the scores "
        "of the tokens (784 of an image) for the predicted class. Compactness is the share of scores whose size is "
        "below 5 % of the largest score (signed: the notebook's rule); ours are means over images. Pearson's r is "
        "over the tokens of all images together, scores as they are; intervals are bootstrapped over images. The five "
        "tables of the paper were not at hand. "
        "AM is the attention of the last block, RP is gradient attention rollout (ICCV 2021), TAM token ablation. "
        "Integrated CDAM is that of the code of 2024, and that of 2025 beside it; which one the paper's tables used is "
        "not known."
    )

    concept: str = ""

    def parts(self, data_root: Path | None) -> list[Part]:
        """Return ImageNet and LIDC-IDRI."""
        if self.concept and not Path(self.concept).is_dir():
            raise RequestError(f"brocki2024: concept={self.concept} is no folder: name one with images of a concept.")
        return [self._imagenet(), self._lidc()]

    @property
    def explainers(self) -> dict[str, str]:
        """What the study compares, by spec, with the study's names."""
        concept = {f"concept_cdam[folder={self.concept}]": "Concept CDAM"} if self.concept else {}
        return {**CDAM, **concept, **OTHERS}

    def _imagenet(self) -> Part:
        whole = "one file of DINO's ViT-S/8 with a linear classifier as head.weight and head.bias"
        how = f"{training_of('brocki2024_imagenet')}; or, instead, {whole}"
        return Part(
            names={"dataset": IMAGENET, "model": MODEL},
            dataset="imagenet",
            weights=Weights("brocki2024_imagenet", how, "dino_vits8", "brocki2024_imagenet"),
            explainers=[*self.explainers, *NO_PRIOR],
            metrics=[*FIDELITY, *ORDERS, *BOXES, *COMPACTNESS, *SENSITIVITY, *LEAST],
            samples=1000,
        )

    def _lidc(self) -> Part:
        return Part(
            names={"dataset": LIDC, "model": MODEL},
            dataset="lidc_idri[folds=nodule]",
            weights=Weights("brocki2024_lidc", training_of("brocki2024_lidc"), "dino_vits8", "brocki2024_lidc"),
            explainers=[*self.explainers, *TRIVIAL],
            metrics=[*FIDELITY, *ORDERS, *BOXES, *COMPACTNESS, *SENSITIVITY, *LOCALIZATION],
            samples=1000,
            target=MALIGNANT,
        )

    def sections(self, done: Sequence[Done], out: Path) -> Iterator[Section]:
        """Yield the published values beside ours, the three benchmarks, the pair plot and pictures."""
        scores = {one.part.names["dataset"]: tokens(one) for one in done}
        yield Section("beside", "Published and ours", self.remarks, self._tokens(scores))
        yield Section("models", "What was explained", _MODELS, models(done))
        table = self.beside(done)
        for name, group in GROUPS.items():
            rows = table[table["metric"].isin([metrics.get(spec).spec for spec in group])].dropna(axis=1, how="all")
            if len(rows):
                yield Section(name, HEADINGS[name], _TEXTS[name], rows)
        yield Section("pairs", "Pairs of token scores", _PAIRS, figures=dict(_pair_plots(scores, out)))
        yield Section("pictures", "Pictures", _PICTURES, figures=dict(_grids(done, self.explainers, out)))

    def _tokens(self, scores: Mapping[str, Tokens]) -> pd.DataFrame:
        """Put compactness and correlations of the token scores beside the published ones."""
        keys = ["dataset", "model", "metric", "explainer"]
        rows = [(dataset, MODEL, *row) for dataset, of_part in scores.items() for row in _of_tokens(of_part)]
        ours = pd.DataFrame(rows, columns=[*keys, "n", "ours", "ours_low", "ours_high"])
        published = self.published.drop(columns="n").rename(columns={"value": "published"})
        table = published.merge(ours, on=keys, how="outer")[[*keys, "published", "mark", *ours.columns[4:]]]
        return table[table["dataset"].isin(list(scores))].sort_values(keys, kind="stable", ignore_index=True)


_MODELS = (
    "The study reports no accuracy of the ImageNet classifier. For LIDC-IDRI its repository prints a five-fold mean of "
    ".8911 (ViT-S/8), over folds that divide patients and on which the checkpoint was chosen; whether these are the "
    "paper's is not verified. There the images are the axial slices of one fold; the study averaged three views. "
    "Accuracy is that on the images explained."
)
_TEXTS = {
    "correctness": (
        "Fidelity (pixel_srg): the area between the logit's curves as the least and as the most important pixels go, "
        "in 40 steps, replaced by a blurred image (radius 14 of 224 pixels), by 0 (normalised) or by the image's mean "
        "colour, the default of the released code. Ties of tokens fall by lottery, not in raster order. morf_auc and "
        "lerf_auc are the two curves by themselves, of tokens and the mean colour. Box sensitivity: Pearson's r of the "
        "map's sum in 100 random boxes and the logit's drop, for sides of an eighth, a quarter and half of the image, "
        "blurred or 0; the study's sides are not stated in its code. TAM asks nearly what box sensitivity and the "
        "curves ask. Integrated gradients follow captum's Gauss-Legendre sum, where the study took 49 equal steps; "
        "maps of pixels are sums over the channels where it took means: no score here can tell. RP and partial LRP are "
        "enlarged bilinearly, as by their authors, the other token maps to the nearest."
    ),
    "compactness": (
        "Of the pixels of the enlarged maps; both rules, see the card of cdam_compactness. Of a map of a single pixel "
        "it is highest, wherever that is."
    ),
    "class_sensitivity": (
        "Correlation of the map of the explained class with that of the most probable other class, and with that of "
        "the least probable one, by Pearson and by Spearman: 1 for a map that does not know the class; lower is "
        "better. No code of it was released: which of the four the paper's is, is not known (the definition is from "
        "memory). Of two classes the other one is both."
    ),
    "localization": "Against the consensus mask. The nodule is in the centre of its crop: compare the trivial rows.",
}
_PAIRS = (
    "The scores of all tokens of all images, as the study's pair plot: densities (logarithmic) below the diagonal, "
    "histograms on it, Pearson's r above; axes end at the .1 and 99.9 percentiles."
)
_PICTURES = (
    "Maps for the explained class; below, where the map knows the class, those for the most probable other class."
)


class Tokens(NamedTuple):
    """Token scores of a part, on the grid as explained.

    Parameters
    ----------
    values : dict
        (N, T) float64 by explainer: N images, T tokens.
    groups : ndarray
        (N,) int, the images that are drawn together.
    """

    values: dict[str, np.ndarray]
    groups: np.ndarray


def tokens(done: Done) -> Tokens:
    """Read the stored maps of the explained class of the explainers that score tokens."""
    run = done.open()
    values: dict[str, list[np.ndarray]] = {name: [] for name in (*CDAM, *PAIRED)}
    groups: list[str] = []
    for shard, known in explained(run):
        groups += [sample.group for sample in shard.samples]
        for name, rows in values.items():
            maps = of_classes(run, shard, known, name, native=True)
            rows += [of_row[int(target)].ravel() for of_row, target in zip(maps, known.targets, strict=True) if of_row]
    whole = {name: np.stack(rows).astype(float) for name, rows in values.items() if len(rows) == len(groups)}
    return Tokens(whole, pd.factorize(np.array(groups))[0])


def notebook_compactness(scores: np.ndarray) -> np.ndarray:
    """Return (N,): the share of scores (N, T) of a size below 5 % of the largest, signed one: the notebook's rule."""
    return (np.abs(scores) < 0.05 * scores.max(axis=1, keepdims=True)).mean(axis=1)


def _of_tokens(scores: Tokens) -> Iterator[tuple[str, str, int, float, float, float]]:
    """Yield (metric, explainer, n, value, low, high)."""
    for name, values in scores.values.items():
        each = notebook_compactness(values)
        low, high = map(float, beside.interval(each[:, None], scores.groups, lambda mean: mean[:, 0]))
        yield "token_compactness", name, len(each), float(each.mean()), low, high
    for pair in _pairs(scores):
        x, y = (scores.values[name] for name in pair)
        moments = np.stack([x, y, x * x, y * y, x * y], axis=-1).mean(axis=1)
        low, high = map(float, beside.interval(moments, scores.groups, _pearson))
        value = float(_pearson(moments.mean(axis=0, keepdims=True))[0])
        yield "token_pearson", " ~ ".join(sorted(pair)), len(x), value, low, high


def _pairs(scores: Tokens) -> Iterator[tuple[str, str]]:
    return combinations([name for name in PAIRED if name in scores.values], 2)


def _pearson(moments: np.ndarray) -> np.ndarray:
    """(B, 5) means of x, y, x^2, y^2 and xy -> (B,) Pearson's r."""
    x, y, xx, yy, xy = moments.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))


def _pair_plots(scores: Mapping[str, Tokens], out: Path) -> Iterator[tuple[str, Path]]:
    for dataset, of_part in scores.items():
        if not of_part.values:
            continue
        flat = {name: of_part.values[name].ravel() for name in PAIRED if name in of_part.values}
        names = {**CDAM, **OTHERS}
        r = {(names[a], names[b]): float(np.corrcoef(flat[a], flat[b])[0, 1]) for a, b in _pairs(of_part)}
        path = out / f"pairs_{dataset.lower()}.png"
        study_figures.pairs({names[name]: values for name, values in flat.items()}, r, path)
        n, per_image = next(iter(of_part.values.values())).shape
        yield f"{dataset}: {n * per_image} tokens of {n} images", path


def _grids(done: Sequence[Done], labels: Mapping[str, str], out: Path) -> Iterator[tuple[str, Path]]:
    for one in done:
        path = out / f"pictures_{one.part.names['dataset'].lower()}.png"
        shown = {name: label for name, label in labels.items() if name in one.part.explainers}
        study_figures.grid(_rows(one, shown), ["image", *shown.values()], path)
        yield one.part.names["dataset"], path


def _rows(done: Done, labels: Mapping[str, str]) -> dict[str, list[Picture]]:
    run = done.open()
    (problem,) = run.problems
    shard, known = next(explained(run))
    other = known.others[SENSITIVITY[0]][:, 0]
    signed = {explainer.spec: explainer.signed for explainer in run.explainers}
    maps = {name: of_classes(run, shard, known, name, native=True) for name in labels}
    rows = {}
    for row, sample in enumerate(shard.samples[:N_PICTURED]):
        image = problem.model.resize(problem.dataset.load(sample).image)
        blank = np.full(image.shape[:2], np.nan)
        for target in (int(known.targets[row]), int(other[row])):
            name = f"{row + 1}: {problem.dataset.class_names[target]}"
            drawn = [Picture(image, _of(maps[spec][row], target, blank), signed[spec]) for spec in labels]
            rows[name] = [Picture(image), *drawn]
    return rows


def _of(found: Mapping[int, np.ndarray], target: int, blank: np.ndarray) -> np.ndarray:
    """The map for a class, or the one that serves all."""
    return found.get(target, next(iter(found.values())) if len(found) == 1 else blank)
