"""Chung et al. 2024: do attention maps, Grad-CAM and Chefer's method point at what physicians annotated?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from scipy import stats

import adapters
import metrics
from bench.datasets import chung2024 as annotated
from bench.studies.base import TRIVIAL, Done, Part, Section, Study, Weights, training_of
from explainer_bench import written
from leaderboards import beside
from metrics import Samples

DATASETS = {"CP-Child": "cp_child", "DUKE": "duke", "Kvasir": "kvasir", "MURA": "mura"}
REPOSITORY = "github.com/ugent-korea/attention_maps"
ANNOTATIONS = ("224_mask_annot_from_dr", "data/224_mask_annot_from_dr", "attention_maps_masks")  # where they may lie
TASK = {"kvasir": ",task=finding"}  # the others have two classes
MODELS = {"Random": "random", "Supervised": "supervised", "DINO": "dino", "MAE": "mae"}
SIDE, PATCH = 224, 16
TOP = {5: "rect_iou_top5", 10: "rect_iou_top10", 20: "rect_iou_top5[percent=20]", 40: "rect_iou_top5[percent=40]"}
POINTING = "pointing_game"
# The study's Grad-CAM keeps whichever sign the decomposition happens to give; beside it stand one with a rule for the
# sign, and the usual one.
EXPLAINERS = (
    *("gradcam_eigen_aug[sign=raw]", "raw_attention", "transformer_attribution"),
    *("gradcam_eigen_aug", "gradcam"),
)
DRAWS = 40  # of random token maps

# What the authors asked for in their outlook: scores by token, by the size of the ROI, and corrected for chance.
OUTLOOK = (
    *("pointing_game[ties=expected]", "iou_top5", "iou_top5[unit=token]", "relevance_rank_accuracy[unit=token]"),
    *("average_precision", "average_precision[corrected=true]"),
    *(f"pointing_game[roi_size={size}]" for size in ("small", "medium", "large")),
)


class Chung2024(Study):
    """Three explainers x four initialisations of ViT-B/16 x four data sets, 50 annotated images each, class 1.

    Scored by the pointing game and by the IoU of the annotation with the rectangle around the top 5, 10, 20 and 40 %
    of the pixels; beside the published table stand the trivial rows, scores by token and strata by ROI size.

    Parameters
    ----------
    masks_only : bool
        Score the trivial rows on the annotations alone: no images, no models.
    """

    name = "chung2024"
    title = "Chung et al. 2024: evaluating visual explanations of attention maps for Transformer-based medical imaging"
    reference = "Chung, Won, Kim, Kim & Ozbulak, iMIMIC at MICCAI 2024 (arXiv:2503.09535)"
    remarks: ClassVar[str] = (
        "Published values: the table of the authors' slides. It does not say which top share its IoU is of: any "
        "rectangle around the top 20 or 40 % is too large for two of its values, so it is 5 or 10 %, and both stand "
        "here. The published shares count images without an annotation as misses; ours leave them out (see n), and on "
        "MURA those, too, whose name fits several images. The published Grad-CAM is the row with sign=raw: it keeps "
        "whichever half of the principal component the linear algebra library happens to make positive, so its values "
        "may differ from machine to machine."
    )

    masks_only: bool = False

    def parts(self, data_root: Path | None) -> list[Part]:
        """Return the 16 models."""
        if self.masks_only:
            return []
        return [self._part(dataset, model, data_root) for dataset in DATASETS for model in MODELS]

    def _part(self, dataset: str, model: str, data_root: Path | None) -> Part:
        name = DATASETS[dataset]
        recipe = f"chung2024_{name}_{MODELS[model]}"
        variant = "chung2024_resize" if dataset in ("CP-Child", "DUKE") else "chung2024_crop"
        how = f"{training_of(recipe)}; or the authors' checkpoint ({REPOSITORY})"
        return Part(
            names={"dataset": dataset, "model": model},
            dataset=f"{name}[annotations={written(_annotations(data_root))}{TASK.get(name, '')}]",
            weights=Weights(recipe, how, "vit_base_patch16_224", variant),
            explainers=[*EXPLAINERS, *TRIVIAL],
            metrics=[POINTING, *TOP.values(), *OUTLOOK],
            samples=50,
            target=1,
        )

    def before(self, data_root: Path | None, out: Path) -> Iterator[Section]:
        """Yield what trivial maps score on the annotations."""
        folder = _annotations(data_root)
        if not self.masks_only and not _is_annotations(folder):
            return
        table = pd.concat([_of_masks(name, folder) for name in DATASETS], ignore_index=True)
        table = table.merge(self._best(), on=["dataset", "score"], how="left")
        pairs = table[["value", "n", "published_best", "n_published"]].itertuples(index=False)
        hits = table.pop("hits").eq(True) & table["score"].eq("pointing game")
        table["fisher_p"] = [_fisher(*row) if share else np.nan for row, share in zip(pairs, hits, strict=True)]
        yield Section("masks", "Trivial maps on the annotations, beside the best published score", _WIDE, _wide(table))
        yield Section("masks_intervals", "The same, with intervals", _LONG, table)

    def _best(self) -> pd.DataFrame:
        """The best published value of any model and explainer, per data set and score."""
        table = self.published[self.published["metric"].isin([POINTING, TOP[5]])]
        best = table.loc[table.groupby(["dataset", "metric"])["value"].idxmax()]
        kind = best["metric"].map({POINTING: "pointing game", TOP[5]: "IoU"})
        by = best["model"] + ", " + best["explainer"]
        columns = {"dataset": best["dataset"], "score": kind, "published_best": best["value"], "published_by": by}
        return pd.DataFrame(columns).assign(n_published=50)

    def sections(self, done: Sequence[Done], out: Path) -> Iterator[Section]:
        """Yield the published table beside ours, then what the authors asked for."""
        table = self.beside(done)
        outlook = table["metric"].isin(OUTLOOK)
        yield Section("beside", "Published and ours", self.remarks, table[~outlook])
        text = (
            "Scores by token, strata by the size of the ROI, masks instead of rectangles where the data set has them."
        )
        yield Section("outlook", "What the authors asked for", text, table[outlook].dropna(axis=1, how="all"))


_WIDE = (
    "Shares of the 50 annotations of each data set; an empty annotation counts as a miss, as published. Where several "
    "pixels tie at the maximum, any of them in the annotation is a hit; the prior points at its first maximal pixel, "
    "row by row. Random rows are expectations."
)
_LONG = (
    "Intervals of hits are Wilson's where every image is of another patient, the others are bootstrapped over patients "
    "(DUKE's 50 masks are of 42). Random rows are expectations over all draws, so theirs tell of the images alone. "
    "fisher_p tests, unpaired and uncorrected, whether a trivial map and the best of the 12 published methods differ "
    "at all, as if all images were independent. The prior leaves out the image, not its patient. draws_sd is the "
    "standard deviation of the mean over single draws of a random map."
)


def _annotations(data_root: Path | None) -> Path:
    """The folder of the annotations below the data's root, under its name in the authors' repository or ours."""
    root = data_root or Path()
    candidates = [root, *(root / name for name in ANNOTATIONS)]
    return next(filter(_is_annotations, candidates), candidates[1])


def _is_annotations(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in annotated.MASKS.values())


def _fisher(value: float, n: float, published: float, n_published: float) -> float:
    """Fisher's exact test that two shares of `n` and `n_published` images are equal."""
    hits = round(value * n), round(published * n_published)
    return float(stats.fisher_exact([[hits[0], n - hits[0]], [hits[1], n_published - hits[1]]]).pvalue)


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per score and map, a column per data set, the best published value last of each score."""
    wide = table.pivot(index=["score", "map"], columns="dataset", values="value")
    wide = wide.reindex(pd.MultiIndex.from_frame(table[["score", "map"]].drop_duplicates())).reset_index()
    best = table.drop_duplicates(["dataset", "score"]).pivot(index="score", columns="dataset", values="published_best")
    best = best.dropna().reset_index().assign(map="best published")
    both = pd.concat([wide, best], ignore_index=True)
    order = both["score"].map(list(wide["score"].unique()).index)
    return both.loc[order.sort_values(kind="stable").index, ["score", "map", *DATASETS]].reset_index(drop=True)


Row = tuple[str, str, np.ndarray, float]  # score, map, value of each image, spread of the mean over random draws


def _of_masks(dataset: str, folder: Path) -> pd.DataFrame:
    """Return a row per score and trivial map: its value, interval, and how many images, groups and empty masks."""
    names, arrays = zip(*annotated.masks(folder, DATASETS[dataset]), strict=True)
    masks, groups = np.stack(arrays), pd.factorize(np.array([_patient(dataset, name) for name in names]))[0]
    rows = [
        {
            "dataset": dataset,
            "score": score,
            "map": name,
            "value": values.mean(),
            **_bounds(values, groups),
            "draws_sd": sd,
        }
        for score, name, values, sd in (*_area(masks), *_pointing(masks), *_overlap(masks))
    ]
    rows.insert(1, {"dataset": dataset, "score": "ROI area", "map": "median", "value": np.median(masks.mean((1, 2)))})
    return pd.DataFrame(rows).assign(n=len(masks), n_groups=groups.max() + 1, n_empty=(~masks.any((1, 2))).sum())


def _patient(dataset: str, name: str) -> str:
    """Return the patient that a mask's name tells, or the name."""
    return {"DUKE": name.rpartition("-")[2], "MURA": name.partition("_")[0]}.get(dataset, name)


def _bounds(values: np.ndarray, groups: np.ndarray) -> dict[str, float | bool]:
    """Return Wilson's interval of hits of independent images, else the bootstrap's over groups."""
    hits = bool(np.isin(values, [0, 1]).all())
    if hits and len(set(groups)) == len(values):
        low, high = beside.wilson(float(values.mean()), len(values))
    else:
        low, high = (float(bound[0]) for bound in beside.interval(values[:, None], groups))
    return {"low": low, "high": high, "hits": hits}


def _area(masks: np.ndarray) -> Iterator[Row]:
    yield "ROI area", "mean", masks.mean((1, 2)), np.nan


def _pointing(masks: np.ndarray) -> Iterator[Row]:
    touched = np.asarray(_tokens(masks).any((2, 4))).reshape(len(masks), -1)
    flat, prior = masks.reshape(len(masks), -1), _prior(masks).reshape(len(masks), -1)
    centre = _maps("center_gaussian", masks)
    by_token = _tokens(centre).mean((2, 4)).repeat(PATCH, 1).repeat(PATCH, 2)
    for name, values in {
        "random pixel": masks.mean((1, 2)),
        "random token": touched.mean(1),
        "image centre": _score(POINTING, masks, centre),
        "centred Gaussian by token": _score(POINTING, masks, by_token),
        "best constant token (oracle)": touched[:, touched.mean(0).argmax()].astype(float),
        "leave-one-out ROI prior": flat[np.arange(len(masks)), prior.argmax(1)].astype(float),
    }.items():
        yield "pointing game", name, values, np.nan


def _overlap(masks: np.ndarray) -> Iterator[Row]:
    yield "IoU", "whole image", masks.mean((1, 2)), np.nan
    drawn = [_maps("random_token", masks, seed) for seed in range(DRAWS)]
    for percent in (5, 10):
        draws = np.stack([_score(TOP[percent], masks, maps) for maps in drawn])
        yield "IoU", f"random tokens, top {percent} %", draws.mean(0), float(draws.mean(1).std(ddof=1))
    centre, prior = _maps("center_gaussian", masks), _prior(masks)
    for percent, metric in TOP.items():
        yield "IoU", f"centred Gaussian, top {percent} %", _score(metric, masks, centre), np.nan
    for percent in (5, 10):
        yield "IoU", f"leave-one-out ROI prior, top {percent} %", _score(TOP[percent], masks, prior), np.nan
    square = _score(TOP[5], masks, _maps("center_square", masks))
    yield "IoU", "centred square of 60 % of the image", square, np.nan


def _tokens(arrays: np.ndarray) -> np.ndarray:
    """Split (N, H, W) into tokens: (N, h, PATCH, w, PATCH)."""
    grid = SIDE // PATCH
    return arrays.reshape(len(arrays), grid, PATCH, grid, PATCH)


def _prior(masks: np.ndarray) -> np.ndarray:
    """Return (N, H, W): the mean of the other masks."""
    return (masks.sum(0) - masks) / (len(masks) - 1)


def _images(masks: np.ndarray) -> torch.Tensor:
    """Stand-ins for the images: random rows are seeded by an image's content."""
    return torch.from_numpy(masks[:, None].repeat(3, 1).astype(np.float32))


def _maps(explainer: str, masks: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return (N, H, W) of a trivial row, which asks no model."""
    explained = adapters.get(explainer)(torch.nn.Identity(), _images(masks), np.ones(len(masks), int), seed=seed)
    return explained[:, 0].astype(float)


def _score(metric: str, masks: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Return (N,): the scores, 0 where the annotation is empty."""
    n = len(masks)
    samples = Samples(
        model=torch.nn.Identity(),
        inputs=_images(masks),
        targets=np.ones(n, int),
        maps=maps,
        roi=masks,
        logits=np.zeros((n, 2)),
        seeds=np.arange(n, dtype=np.uint32),
        patch=(PATCH, PATCH),
    )
    return np.nan_to_num(metrics.get(metric)(samples).values)
