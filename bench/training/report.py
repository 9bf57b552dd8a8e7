"""What a training leaves for people: the curve as a table and as a picture, and the model card."""

from __future__ import annotations

import io
import json
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench import datasets
from bench.recipes import Recipe
from leaderboards.statistics import MIN_CLUSTERS

_FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "top1_present": "top class is present",
    "all_labels": "all classes are right",
    "auroc": "AUROC",
    "auprc": "AUPRC (average precision)",
    "ece": "expected calibration error",
    "mae": "mean absolute error",
    "mse": "mean squared error",
    "rmse": "root mean squared error",
}
_MOST_CLASSES = 12  # that a table has columns for


def curve_csv(history: list[dict[str, float]]) -> bytes:
    """Return a row per epoch: losses, the last learning rate, seconds."""
    table = pd.DataFrame(history, index=pd.RangeIndex(1, len(history) + 1, name="epoch"))
    return table.to_csv(lineterminator="\n").encode()


def curve_png(history: list[dict[str, float]], best_epoch: int) -> bytes:
    """Return a picture of the losses over the epochs, the best one marked."""
    table = pd.DataFrame(history, index=range(1, len(history) + 1))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table.index, table["train_loss"], marker=".", label="training")
    axes.plot(table.index, table["val_loss"], marker=".", label="validation")
    axes.axvline(best_epoch, color="grey", linestyle=":", label=f"kept: epoch {best_epoch}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def card(recipe: Recipe, report: dict[str, Any]) -> bytes:
    """Return the model card, Markdown."""
    sections = [
        f"# {report['model']}\n\n{recipe.description}",
        _model(recipe, report),
        _data(recipe, report),
        _training(recipe, report),
        _performance(report),
        _use(recipe),
    ]
    return ("\n\n".join(sections) + "\n").encode()


def _table(*rows: tuple[Any, ...]) -> str:
    head, *body = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _model(recipe: Recipe, report: dict[str, Any]) -> str:
    start = recipe.starts_from or "random weights"
    facts = [
        ("architecture", f"`{recipe.architecture}` {json.dumps(recipe.kwargs) if recipe.kwargs else ''}".strip()),
        ("started from", start),
        ("trained", "the classifier alone, on frozen features" if recipe.freeze_backbone else "all weights"),
        ("preprocessing", recipe.preprocessing or "whole image, mean and std of the architecture in timm"),
        ("weights", f"`{report['checkpoint']}`, fingerprint {report['model_fingerprint']}"),
    ]
    return "## Model\n\n" + _table(("", ""), *facts)


def _data(recipe: Recipe, report: dict[str, Any]) -> str:
    data = datasets.get(recipe.dataset)
    names = list(report["data"]["train"]["classes"])
    names = names if len(names) <= _MOST_CLASSES else []
    rows = [
        (split, part["images"], part["groups"], *(part["classes"][name] for name in names), part["fingerprint"])
        for split, part in report["data"].items()
    ]
    share = report["fraction"]
    part = "" if share == 1 else f" The training split is {share:.2%} of the whole one, chosen class by class."
    table = _table(("split", "images", "groups", *names, "fingerprint"), *rows)
    facts = f"`{data.name}`: {data.where}; licence: {data.licence}."
    return f"## Data\n\n{facts} {_groups(report)}{part}\n\n{table}"


def _groups(report: dict[str, Any]) -> str:
    """Say which groups the splits share."""
    shared = {pair.replace(", ", " and "): n for pair, n in report["shared_groups"].items() if n}
    if shared:
        counts = "; ".join(f"{n} in {pair}" for pair, n in shared.items())
        return f"**Groups (a patient, or near-duplicates) are divided between splits: {counts}.** Figures are too good."
    if all(part["images"] == part["groups"] for part in report["data"].values()):
        return "Every image is a group of its own: which ones are of one patient, or near-duplicates, is not known."
    return "No group (a patient, or near-duplicates) is in more than one split."


def _training(recipe: Recipe, report: dict[str, Any]) -> str:
    hidden = {"name", "description", "source", "notes", "kwargs", "published_epoch"}  # they stand elsewhere
    fields = recipe.model_dump(mode="json", exclude=hidden)
    fields["augment"] = recipe.augment.model_dump(mode="json", exclude_defaults=True)
    rows = [(key, f"`{json.dumps(value)}`") for key, value in fields.items() if value or key in recipe.model_fields_set]
    history, best = report["history"], report["best_epoch"]
    kept = f"Epochs: {len(history)}; number {best} has the least validation loss, {history[best - 1]['val_loss']:.4f}."
    kept += f" The source kept number {recipe.published_epoch}." if recipe.published_epoch else ""
    source = f" Source: {recipe.source}." if recipe.source else ""
    notes = f"\n\n{recipe.notes}" if recipe.notes else ""
    place = f"Seed {report['seed']}, on {report['device']}, PyTorch {report['torch']}."
    curve = f"![Losses over the epochs]({report['model']}.curve.png)"
    head = f"Recipe `{recipe.name}`.{source} {kept} {place}{notes}"
    return f"## Training\n\n{head}\n\n{_table(('field', 'value'), *rows)}\n\n{curve}"


def _performance(report: dict[str, Any]) -> str:
    rows = []
    for key in report["test"]:
        if key != "images":
            cells = [_cell(report[s][key], report["intervals"][s][key]) for s in ("val", "test")]
            rows.append((_FIGURES.get(key, key.replace("_", " ").replace("auroc", "AUROC")), *cells))
    head = ("", f"val ({report['val']['images']} images)", f"test ({report['test']['images']} images)")
    how = f"95 % intervals from {report['resamples']} bootstrap resamples of whole groups."
    for split in ("val", "test"):
        if (groups := report["data"][split]["groups"]) < MIN_CLUSTERS:
            how += f" None on the {split} split: its groups, {groups}, are fewer than {MIN_CLUSTERS}, too few for one."
    aim = "The validation split chose the epoch; the test split decided nothing."
    return f"## Performance\n\n{how} {aim}\n\n{_table(head, *rows)}{_calibration(report['calibration']['test'])}"


def _cell(value: float | None, interval: list[float | None]) -> str:
    low, high = interval
    if value is None:
        return "undefined"
    return f"{value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _calibration(bins: list[dict[str, float]]) -> str:
    if not bins:
        return ""
    rows = [
        (f"{b['from']:.2f} to {b['to']:.2f}", b["count"], f"{b['probability']:.3f}", f"{b['frequency']:.3f}")
        for b in bins
    ]
    head = ("probability", "number", "mean probability", "frequency")
    return f"\n\nCalibration on the test split, in bins of equal width:\n\n{_table(head, *rows)}"


def _use(recipe: Recipe) -> str:
    evidence = f" It is meant to read the region `{recipe.evidence}`." if recipe.evidence else ""
    return (
        "## Intended use\n\n"
        f"A subject for explanation methods: what they say about it can be scored.{evidence} It is no medical device, "
        "its figures hold for images like those it was tested on, and nobody may be diagnosed with it."
    )
