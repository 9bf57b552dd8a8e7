"""Goncalves et al. 2022: does attention make models of medical images better, and easier to explain?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch

import adapters
from bench import models, recipes
from bench.precision import full_precision
from bench.problem import Problem, Shard
from bench.runner import Progress
from bench.store import key
from bench.studies.base import NO_PRIOR, PUBLISHED, TRIVIAL, Done, Part, Section, Study, Weights, training_of
from bench.training import performance
from leaderboards import beside
from leaderboards import survey_figures as figures


class Kind(NamedTuple):
    """A model of the study: our name of it, whether the authors began from ImageNet weights, and its plain CNN."""

    architecture: str
    pretrained: bool
    backbone: str = ""


DATASETS = {"APTOS2019": "aptos2019", "ISIC2020": "isic2020", "MIMIC-CXR": "mimic_cxr"}
MODELS = {
    "DenseNet-121": Kind("densenet121_goncalves", True),
    "ResNet-50": Kind("resnet50_goncalves", True),
    "SEDenseNet-121": Kind("se_densenet121_goncalves", False, "DenseNet-121"),
    "SEResNet-50": Kind("se_resnet50_goncalves", True, "ResNet-50"),
    "CBAMDenseNet-121": Kind("cbam_densenet121_goncalves", False, "DenseNet-121"),
    "CBAMResNet-50": Kind("cbam_resnet50_goncalves", False, "ResNet-50"),
    "DeiT": Kind("deit_tiny_patch16_224", True),
}
FRACTIONS = (1, 10, 50, 100)  # % of the training images
SAMPLES = 32
METHODS = {"deeplift": "DeepLIFT", "lrp_epsilon": "LRP", "transformer_attribution": "LRP (Chefer)"}
EXPLAINERS = (*METHODS, "gradcam", "integrated_gradients", *NO_PRIOR)
COMPACTNESS = "sparseness[unit=token]"  # the maps of CNNs are of pixels, some of DeiT's of tokens
METRICS = ("srg", "faithfulness_correlation", "saco", COMPACTNESS, "class_correlation", "contrastive_faithfulness")
BATCH = 32
PER_CLASS = 2  # images in a figure
KEYS = ["dataset", "model", "fraction"]


class Goncalves2022(Study):
    """Seven models x three data sets x four shares of the training images: accuracy, size, maps, and their scores.

    The published accuracies stand beside ours and beside what they lacked: balanced accuracy, AUROC and AUPRC with
    intervals, the score of always saying the more frequent class, and paired differences between each attention model
    and its plain backbone. The maps are those of the study, DeepLIFT and LRP of the label; it scored none, so the
    scores of every cell are ours alone.
    """

    name = "goncalves2022"
    title = "Goncalves et al. 2022: a survey on attention mechanisms for medical applications"
    reference = "Goncalves, Rio-Torto, Teixeira & Cardoso, IEEE Access 10 (2022), doi 10.1109/ACCESS.2022.3206449"
    remarks: ClassVar[str] = (
        "Published: micro accuracies of one run each, read off the paper's figures to +-0.003; their intervals are "
        "Wilson's where the size of the test split is known (APTOS2019, 550 images, from memory). Only DenseNet-121, "
        "ResNet-50, SEResNet-50 and DeiT began from ImageNet weights: whoever compares attention with none compares "
        "pretrained with untrained, but for SEResNet-50 (`pretrained` is of the study). "
        "Ours: the whole test split; intervals bootstrap whole "
        "patients where they are known. Majority is the accuracy of always saying the more frequent class. Shares of "
        "the training images are drawn by class, not by the authors' generator; the images of MIMIC-CXR are chosen by "
        "the public labels, as theirs were not released."
    )

    def parts(self, data_root: Path | None) -> list[Part]:
        """Return the 84 models."""
        return [part for dataset in DATASETS for model in MODELS for part in _parts(dataset, model)]

    def before(self, data_root: Path | None, out: Path) -> Iterator[Section]:
        """Yield the parameter counts."""
        yield Section("parameters", "Parameters, published and counted", _PARAMETERS, parameters())

    def measure(self, done: Done, progress: Progress) -> pd.DataFrame:
        """Return the logits of the whole test split: ``sample, group, label, logit_0, logit_1``."""
        run = done.open(done.device)
        (problem,) = run.problems
        cell = run.store.path("test_split", key=key(problem.dataset.fingerprint, problem.identity))
        if not run.store.exists(cell, "parquet"):
            run.store.write_table(cell, _predict(problem, run.device, progress))
        return run.store.read_table(cell)

    def sections(self, done: Sequence[Done], out: Path) -> Iterator[Section]:
        """Yield the accuracies, the differences that attention makes, the maps, and their scores."""
        accuracy = _accuracy(done, self.published)
        for dataset, rows in accuracy.groupby("dataset", sort=False):
            name = f"accuracy_{DATASETS[str(dataset)]}"
            picture = figures.accuracy(rows, KINDS, out / f"{name}.png")
            caption = {f"{dataset}: accuracy by share of the training images": picture}
            yield Section(name, f"{dataset}: accuracy, published and ours", self.remarks, rows[_BRIEF], caption)
        yield Section("accuracy", "All figures, with 95 % intervals", _FIGURES, _long(accuracy))
        attention = _attention(done, self.published)
        if len(attention):
            yield Section("attention", "What attention adds to its own backbone", _ATTENTION, attention)
        for dataset in accuracy["dataset"].unique():
            yield _pictures([each for each in done if each.part.names["dataset"] == dataset], out)
        yield from _explanations(done, out)


PRETRAINED = {name: kind.pretrained for name, kind in MODELS.items()}
KINDS = {name: (kind.backbone or name, kind.pretrained) for name, kind in MODELS.items()}
_BRIEF = ["model", "pretrained", "fraction", "published", "accuracy", "accuracy_low", "accuracy_high", "majority"]
_BRIEF += ["balanced_accuracy", "auroc", "auprc", "prevalence"]
_PARAMETERS = (
    "With two classes. The published count of DeiT leaves out what is no layer: its position embeddings, 197 x 192, "
    "and its class token, 192; torchinfo 1.6.4 did not count them. `over_backbone` is what attention adds."
)
_FIGURES = (
    "AUPRC is the average precision of class 1, ece the expected calibration error in 15 bins of equal width. "
    "`majority` is what always saying the more frequent class scores; of AUPRC, what any constant does."
)
_ATTENTION = (
    "Accuracy of the attention model less that of the plain CNN on the same images, with paired intervals that "
    "bootstrap whole patients where they are known; from one training each, so they say nothing of other seeds. "
    "Where only the plain CNN was pretrained, the difference is not attention's: train both alike "
    "(`goncalves2022[architecture=...,init=...]`, see the recipe's notes)."
)
_SCORES = (
    "Scores of the explanations of the label, means over images; the study had none. `over_trivial` is the paired "
    "difference of srg to the best of the rows that know nothing of the model, with its interval. Higher is better for "
    "srg, faithfulness_correlation, saco and contrastive_faithfulness; class_correlation is 1 for a map that does not "
    "depend on the class. The data sets have no masks, so nothing is said of localization."
)


def parameters() -> pd.DataFrame:
    """Return the published parameter counts beside ours: ``model, published, ours, difference, over_backbone``."""
    table = pd.read_csv(PUBLISHED / "goncalves2022_parameters.csv").rename(columns={"parameters": "published"})
    with torch.device("meta"):  # nothing is counted but shapes
        built = {name: models.create(kind.architecture, num_classes=2).module for name, kind in MODELS.items()}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in built.items()}
    table["ours"] = table["model"].map(counts)
    table["difference"] = table["ours"] - table["published"]
    plain = table["model"].map({name: counts[kind.backbone] for name, kind in MODELS.items() if kind.backbone})
    table["over_backbone"] = table["ours"] / plain - 1
    table["pretrained"] = table["model"].map(PRETRAINED).map(_YES)
    return table


_YES = {True: "yes", False: "no"}


def _parts(dataset: str, model: str) -> Iterator[Part]:
    spec = f"goncalves2022[dataset={DATASETS[dataset]},architecture={MODELS[model].architecture}]"
    recipe = recipes.get(spec)
    how = f"{training_of(spec, ' --fraction F')}; F: as the name ends (1 without)"
    for percent in FRACTIONS:
        ending = "" if percent == 100 else f"_{percent / 100:g}"
        yield Part(
            names={"dataset": dataset, "model": model, "fraction": str(percent)},
            dataset=DATASETS[dataset],
            weights=Weights(f"{recipe.checkpoint_name}{ending}", how, MODELS[model].architecture, "goncalves2022"),
            explainers=EXPLAINERS,
            metrics=METRICS,
            samples=SAMPLES,
            target="label",
            balanced=True,
        )


def _predict(problem: Problem, device: torch.device, progress: Progress) -> pd.DataFrame:
    """Return the logits of every image of the split, read batch by batch."""
    samples = problem.dataset.samples
    columns = {
        "sample": [s.id for s in samples],
        "group": [s.group for s in samples],
        "label": [s.label for s in samples],
    }
    rows = []
    for start in range(0, len(samples), BATCH):
        images = Shard(0, samples[start : start + BATCH], problem.dataset, problem.model).inputs
        with torch.no_grad(), full_precision():
            rows.append(problem.module(images.to(device)).detach().double().cpu().numpy())
        progress("test split", min(start + BATCH, len(samples)), len(samples))
    logits = np.concatenate(rows)
    return pd.DataFrame(columns | {f"logit_{k}": logits[:, k] for k in range(logits.shape[1])})


def _names(done: Done) -> dict[str, Any]:
    """What the tables call a part; `fraction` is a number there."""
    return {**done.part.names, "fraction": int(done.part.names["fraction"])}


def _accuracy(done: Sequence[Done], published: pd.DataFrame) -> pd.DataFrame:
    """One row per part: the published accuracy, and our figures with intervals."""
    theirs = published.rename(columns={"accuracy": "published"})
    bounds = [beside.wilson(share, n) for share, n in zip(theirs["published"], theirs["n"], strict=True)]
    theirs[["published_low", "published_high"]] = bounds
    table = pd.DataFrame([_figures(each) for each in done])
    table.insert(2, "pretrained", table["model"].map(PRETRAINED).map(_YES))
    merged = table.merge(theirs.drop(columns="n"), on=KEYS, how="left")
    first = ["dataset", "model", "pretrained", "fraction", "published", "published_low", "published_high", "mark"]
    return merged[[*first, *(name for name in merged if name not in first)]]


def _figures(done: Done) -> dict[str, Any]:
    table = done.measured
    labels, logits = table["label"].to_numpy(), table.filter(like="logit_").to_numpy()
    found = performance.measure("cross_entropy", logits, labels, list(table["group"]), split=f"{done.part.name} test")
    positive = float(labels.mean())
    row = {**_names(done), "images": len(labels), "groups": table["group"].nunique(), "prevalence": positive}
    row["majority"] = max(positive, 1 - positive)
    for name, value in found.figures.items():
        low, high = found.intervals[name]
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """One row per part and figure, the published one beside accuracy."""
    table = table.assign(half=0.5, unknown=np.nan)
    baselines = {"accuracy": "majority", "balanced_accuracy": "half", "auroc": "half", "auprc": "prevalence"}
    published = ["published", "published_low", "published_high", "mark"]
    parts = []
    for name, baseline in {**baselines, "ece": "unknown"}.items():
        ours = {"ours": name, "ours_low": f"{name}_low", "ours_high": f"{name}_high", "majority": baseline}
        part = table[[*KEYS, "images", "groups"]].assign(figure=name, **{new: table[old] for new, old in ours.items()})
        parts.append(part.join(table[published]) if name == "accuracy" else part)
    merged = pd.concat(parts, ignore_index=True)
    return merged[[*KEYS, "figure", *published, "ours", "ours_low", "ours_high", "majority", "images", "groups"]]


def _attention(done: Sequence[Done], published: pd.DataFrame) -> pd.DataFrame:
    """One row per attention model whose plain backbone was run on the same data with the same share."""
    parts = {tuple(_names(each).values()): each.measured for each in done}
    known = published.set_index(KEYS)["accuracy"]
    rows = []
    for (dataset, model, fraction), table in parts.items():
        backbone = MODELS[model].backbone
        if (plain := parts.get((dataset, backbone, fraction))) is None:
            continue
        alike = "" if MODELS[model].pretrained == MODELS[backbone].pretrained else f"only {backbone} pretrained"
        difference = float(known[dataset, model, fraction] - known[dataset, backbone, fraction])
        names = {"dataset": dataset, "fraction": fraction, "model": model, "backbone": backbone, "confounded": alike}
        rows.append({**names, "published": difference, **_difference(table, plain)})
    return pd.DataFrame(rows)


def _difference(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """Accuracy and balanced accuracy of the first less those of the second, image by image, with intervals."""
    both = first.merge(second, on=["sample", "group", "label"], suffixes=("_first", "_second"))
    difference = _right(both, "_first").astype(float) - _right(both, "_second")
    labels = both["label"].to_numpy()
    classes = (labels[:, None] == np.unique(labels)).astype(float)
    sums = np.column_stack([difference, difference[:, None] * classes, classes])
    groups = pd.factorize(both["group"])[0]
    row: dict[str, float] = {}
    for name, read in {"accuracy": _plain, "balanced_accuracy": _balanced}.items():
        low, high = beside.interval(sums, groups, read)
        row |= {name: float(read(sums.mean(0)[None])[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def _right(table: pd.DataFrame, suffix: str = "") -> np.ndarray:
    """Return (N,) bool: whether the logit of the label is the largest; a tie goes to class 0."""
    logits = table[[f"logit_0{suffix}", f"logit_1{suffix}"]].to_numpy()
    return logits.argmax(1) == table["label"].to_numpy()


def _plain(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


def _balanced(means: np.ndarray) -> np.ndarray:
    """(B, 1 + 2 K) means of the difference, of its part in each class, and of each class's share -> (B,)."""
    gains, shares = np.split(means[:, 1:], 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (gains / shares).mean(axis=1)


def _pictures(done: Sequence[Done], out: Path) -> Section:
    """The maps of images that every model gets right, at the largest share that most models were trained with."""
    fraction = max(FRACTIONS, key=lambda percent: (sum(_names(d)["fraction"] == percent for d in done), percent))
    chosen = [each for each in done if _names(each)["fraction"] == fraction]
    dataset, count = chosen[0].part.names["dataset"], len(chosen)
    name, title = f"maps_{DATASETS[dataset]}", f"{dataset}: maps of images that all models get right"
    what = f"The {count} of 7 models that were trained with {fraction} % of the training images. "
    samples = _all_right(chosen)
    if not samples:
        return Section(name, title, f"{what}No image of the test split is classified rightly by all of them.")
    columns = [column for each in chosen for column in _columns(each, samples)]
    rows, images = _images(chosen[0], samples)
    picture = figures.grid(rows, images, columns, out / f"{name}.png")
    caption = {f"{dataset}: {', '.join(samples)}": picture}
    return Section(name, title, what + _MAPS, None, caption)


_MAPS = (
    "DeepLIFT from a zero baseline in normalised space, and LRP with the epsilon rule, for CNNs; for DeiT Chefer's "
    "transformer attribution. All explain the label. Red speaks for it, blue against it; each map is scaled on its "
    "own, so that the strongest 2 % of its mass are saturated."
)


def _all_right(done: Sequence[Done]) -> list[str]:
    """Choose images that all get right: up to `PER_CLASS` of each class, in the order of their ids' hashes."""
    right = [set(each.measured.loc[_right(each.measured), "sample"]) for each in done]
    table = done[0].measured
    table = table[table["sample"].isin(set.intersection(*right))]
    order = [hashlib.sha256(sample.encode()).hexdigest() for sample in table["sample"]]
    table = table.assign(order=order).sort_values("order").groupby("label").head(PER_CLASS)
    return list(table.sort_values(["label", "order"])["sample"])


def _shard(problem: Problem, samples: Sequence[str]) -> Shard:
    known = {sample.id: sample for sample in problem.dataset.samples}
    return Shard(0, [known[sample] for sample in samples], problem.dataset, problem.model)


def _images(done: Done, samples: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Name the class of each image, and bring it to the model's input size."""
    (problem,) = done.open().problems
    chosen = _shard(problem, samples).samples
    names = [problem.dataset.class_names[sample.label] for sample in chosen]
    return names, [problem.model.resize(problem.dataset.load(sample).image) for sample in chosen]


def _columns(done: Done, samples: Sequence[str]) -> Iterator[figures.Column]:
    """Explain images by those of the study's methods that support the model."""
    (problem,) = done.open(done.device).problems
    shard = _shard(problem, samples)
    labels = np.array([sample.label for sample in shard.samples])
    for name, title in METHODS.items():
        explainer = adapters.get(name)
        if not explainer.supports(problem.model.module):
            with full_precision():
                maps = explainer(problem.model.module, shard.inputs, labels)[:, 0]
            yield figures.Column(done.part.names["model"], title, maps)


def _explanations(done: Sequence[Done], out: Path) -> Iterator[Section]:
    """Yield the scores of the explanations: a row per map-making method and part, then every score."""
    table = pd.concat([_scores(each) for each in done], ignore_index=True)
    brief = _brief(table[~table["explainer"].isin(TRIVIAL)])
    pictures = {}
    for dataset, rows in brief.groupby("dataset", sort=False):
        path = out / f"explanations_{DATASETS[str(dataset)]}.png"
        pictures[f"{dataset}: srg over the best trivial row"] = figures.explanations(rows, KINDS, path)
    yield Section("explanations", "Scores of the explanations", _SCORES, brief, pictures)
    yield Section("explanations_all", "Every score, trivial rows included", "", table)


def _scores(done: Done) -> pd.DataFrame:
    names = _names(done)
    supported = done.long[done.long["status"] != "unsupported"]
    long, each = (table.assign(**names) for table in (supported, done.scores))
    nothing = pd.DataFrame(columns=[*beside.KEYS, "value", "n", "mark"]).astype({"value": float, "n": float})
    table = beside.beside(nothing, long, each, TRIVIAL)
    table = table.drop(columns=["published", "published_low", "published_high", "mark"])
    table.insert(2, "fraction", names["fraction"])
    return table.rename(columns={"ours": "mean", "ours_low": "low", "ours_high": "high"})


def _brief(table: pd.DataFrame) -> pd.DataFrame:
    """One row per part and method: the mean of every metric, and how far srg is above the best trivial row."""
    rows = [*KEYS, "explainer"]
    wide = table.pivot(index=rows, columns="metric", values="mean").reindex(columns=list(METRICS))
    over = table[table["metric"] == "srg"].set_index(rows).filter(like="over_trivial")
    joined = over.join(wide)
    return joined.reset_index()
