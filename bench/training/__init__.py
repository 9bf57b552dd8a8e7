"""Training: a recipe in; a checkpoint, a report, a curve and a card out, each written whole."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from bench import datasets, models, recipes
from bench.datasets.base import Dataset, Sample
from bench.models import Model, checkpoints
from bench.recipes import Recipe
from bench.store import Store
from bench.training import loop, performance
from bench.training import report as reporting
from bench.training.loop import WAY_OUT, Progress, Split, State, Tell
from bench.training.performance import Performance
from explainer_bench import RequestError, __version__, parse_spec, write_atomically

_FOR_PEOPLE = ("report.json", "curve.csv", "curve.png", "md")  # what is written beside state and checkpoint
VAL_SHARE = 0.05  # of the training split, where a data set has no validation split
_WORDS = {"name", "description", "source", "notes", "published_epoch"}  # of a recipe, that change no number


class Part(NamedTuple):
    """Samples of one split, and the data set that reads them."""

    dataset: Dataset
    samples: list[Sample]


def train(
    recipe: str | Recipe,
    out: Path,
    data_root: Path | None = None,
    weights: Path | None = None,
    fraction: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    fresh: bool = False,
    workers: int = 0,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Train a recipe's model, measure it on the val and test splits, write checkpoint, report, curve and card.

    After every epoch the training's state is written beside the checkpoint. The same call goes on from there, and
    ends with the same weights, bit by bit, as one that was never interrupted. Where it has ended, nothing is trained.

    Parameters
    ----------
    recipe : str or Recipe
        A name, ``name[field=value,...]``, a YAML file, or a recipe.
    out : Path
        Folder of ``NAME.safetensors``, ``NAME.report.json``, ``NAME.curve.csv``, ``NAME.curve.png`` and ``NAME.md``.
    data_root : Path, optional
        Where the data are, for recipes that need some.
    weights : Path, optional
        Local pre-trained weights, for recipes that start from some.
    fraction : float
        Share of the training split to use, class by class, in (0, 1]. A smaller share is part of a larger one.
    device : str
        Where to train.
    seed : int
        Of the new weights, the share, the order and the augmentation: the same seed gives the same numbers on one
        machine.
    progress : callable, optional
        ``progress(steps done, steps in all, what is going on)``.
    fresh : bool
        Start anew, whatever an interrupted or a finished training of that name left in `out`.
    workers : int
        Processes that read images; no number depends on it.
    tell : callable
        Given lines for the user: that an interrupted training is gone on with, that the model is there already, and
        the losses of every epoch.

    Returns
    -------
    dict
        The report: recipe, data, groups that splits share, losses per epoch, figures on the val and test splits with
        95 % intervals, seconds.

    Raises
    ------
    RequestError
        For an unknown recipe or field, a wrong fraction, unusable data or weights, a state or a checkpoint of another
        training, a folder that cannot be written to, or a loss or outputs that are not finite.
    KeyboardInterrupt
        On Ctrl-C, with what is kept as its text.
    """
    if not 0 < fraction <= 1:
        raise RequestError(f"fraction {fraction} is not a share of the training data: give one in (0, 1].")
    recipe = recipes.get(recipe) if isinstance(recipe, str) else recipe
    _check_weights(recipe, weights)
    begun = time.perf_counter()
    parts = choose(recipe, data_root, fraction, seed)
    values = _values(recipe, parts)
    with loop.seeded(seed):
        model = create(
            recipe, weights, [str(name) for name in values["train"]] if values else parts["train"].dataset.class_names
        )
    model.name += "" if fraction == 1 else f"_{fraction:g}"
    request = _request(recipe, model, parts, fraction, seed, device)
    state = State(_prepared(Path(out), model.name) / f"{model.name}.state.pt", request)
    if fresh:
        state.remove()
    if begin := state.load():
        tell(f"{model.name} goes on after epoch {state.epochs} of {recipe.epochs} ({state.path}).")
    elif not fresh and (found := _finished(Path(out) / f"{model.name}.safetensors", state.request)):
        tell(f"{model.name} is there already, nothing is trained: --fresh trains it anew.")
        return {**_describe(Path(out), recipe, found), "seconds": round(time.perf_counter() - begun, 1)}
    with _saying_what_is_kept(state):
        splits = {split: read(recipe, *part, model, workers, values.get(split)) for split, part in parts.items()}
        fitted = loop.fit(
            recipe, model, splits["train"], splits["val"], device, seed, progress, begin, state.save, tell
        )
        if recipe.half:
            model.module.half().float()  # what is measured below is what the checkpoint will hold
        measured = {split: measure(recipe, model, splits[split], device, split) for split in ("val", "test")}
        report = {"model": model.name, **request, "shared_groups": shared_groups(parts), **fitted._asdict()}
        report = _write(Path(out), recipe, model, report | _figures(measured, splits))
    state.remove()
    return {**report, "seconds": round(time.perf_counter() - begun, 1)}


def _request(
    recipe: Recipe, model: Model, parts: dict[str, Part], fraction: float, seed: int, device: str
) -> dict[str, Any]:
    """Return everything that the final weights follow from."""
    return {
        "recipe": recipe.name,
        "params": recipe.model_dump(mode="json", exclude=_WORDS),
        "fraction": fraction,
        "seed": seed,
        "device": device,
        "data": {split: _count(part) for split, part in parts.items()},
        "initial_fingerprint": replace(model).fingerprint,
        "torch": torch.__version__,
        "explainer_bench": __version__,
    }


def _prepared(out: Path, name: str) -> Path:
    """Create the folder; refuse, before anything is computed, what could not be written at the end."""
    for ending in ("state.pt", "safetensors", *_FOR_PEOPLE):
        if (out / f"{name}.{ending}").is_dir():
            raise RequestError(f"{out / name}.{ending} is a folder where a file is to be written: give another --out.")
    return Store(out).prepare().root


def _finished(checkpoint: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the report in the header of a checkpoint of the same request; None where there is no file."""
    if not checkpoint.exists():
        return None
    try:
        found = checkpoints.header(checkpoint).get("training", {})
    except RequestError:
        found = {}
    if not found.get("params"):
        raise RequestError(f"{checkpoint} is no checkpoint of a training: {WAY_OUT}.")
    loop.check_same(checkpoint, {name: found.get(name) for name in request}, request)
    return found


@contextmanager
def _saying_what_is_kept(state: State) -> Iterator[None]:
    """Give Ctrl-C a text."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            f"the training is kept up to epoch {state.epochs}, and the same command without --fresh goes on from here"
        )
        raise KeyboardInterrupt(kept if state.epochs else "no epoch was finished, so nothing is kept") from None


def _check_weights(recipe: Recipe, weights: Path | None) -> None:
    if recipe.starts_from and weights is None:
        raise RequestError(f"recipe {recipe.name} needs --weights FILE: {recipe.starts_from}.")
    if weights is not None and not recipe.starts_from:
        raise RequestError(f"recipe {recipe.name} trains from scratch: leave --weights out.")


def create(recipe: Recipe, weights: Path | None, outputs: Sequence[str]) -> Model:
    """Return the model to train; its new weights depend on PyTorch's current random state only."""
    model = models.create(
        recipe.architecture, recipe.checkpoint_name, outputs, preprocessing=recipe.preprocessing, **recipe.kwargs
    )
    if weights is not None:
        models.load_backbone(model, Path(weights), recipe.pooling)
    return model


def choose(recipe: Recipe, root: Path | None, fraction: float = 1.0, seed: int = 0) -> dict[str, Part]:
    """Return what to train, to validate and to test on.

    Where the data set has no validation split, a twentieth of the training split is one.
    """
    sizes = {"train": recipe.size, "val": recipe.val_size, "test": recipe.test_size}
    parts: dict[str, Part] = {}
    for split, size in sizes.items():
        data = datasets.get(recipe.dataset, split=split, root=root, **({} if size is None else {"size": size}))
        parts[split] = Part(data, data.samples)
    if not parts["val"].samples:
        parts |= _held_out(parts["train"])
    if unknown := {name for pair in recipe.contrasts for name in pair} - set(parts["train"].dataset.class_names):
        raise RequestError(f"recipe {recipe.name}, contrasts: {recipe.dataset} has no class {min(unknown)!r}.")
    for split, part in parts.items():
        if not part.samples:
            raise RequestError(f"data set {part.dataset.name!r} has no samples in its split {split!r}.")
    train = parts["train"]
    _check_classes(recipe, train)
    return parts | {"train": train._replace(samples=subset(train.samples, fraction, seed))}


def _check_classes(recipe: Recipe, train: Part) -> None:
    there = {sample.label for sample in train.samples}
    if len(there) == 1 and recipe.loss != "huber":
        only, name = train.dataset.class_names[there.pop()], parse_spec(recipe.dataset)[0]
        line = f"data set {recipe.dataset}: every image of the training split is of class {only!r}, so there is nothing"
        raise RequestError(f"{line} to learn; `explainer-bench data describe {name}` says where others come from.")


def shared_groups(parts: dict[str, Part]) -> dict[str, int]:
    """Count the groups that two splits have in common, by "train, val" and so on; with any, figures are too good."""
    groups = {split: {sample.group for sample in part.samples} for split, part in parts.items()}
    return {f"{one}, {other}": len(groups[one] & groups[other]) for one, other in combinations(groups, 2)}


def _held_out(train: Part) -> dict[str, Part]:
    """Divide a training split: whole groups of a share of every class, at least one, become the validation split."""
    groups = {sample.group for sample in subset(train.samples, VAL_SHARE)}
    held = {"train": [s for s in train.samples if s.group not in groups]}
    held["val"] = [s for s in train.samples if s.group in groups]
    return {name: train._replace(samples=samples) for name, samples in held.items()}


def _values(recipe: Recipe, parts: dict[str, Part]) -> dict[str, pd.DataFrame]:
    """In a regression, each split's values with the mean and standard deviation of the training split taken out."""
    if recipe.loss != "huber":
        return {}
    if not hasattr(parts["train"].dataset, "targets"):
        raise RequestError(f"data set {recipe.dataset} has no values to learn with loss=huber: take cross_entropy.")
    rated = {s: p.dataset.targets.loc[[sample.id for sample in p.samples]] for s, p in parts.items()}  # type: ignore[attr-defined]
    mean, spread = rated["train"].mean(), rated["train"].std(ddof=0)
    return {split: (table - mean) / spread.where(spread > 0, 1) for split, table in rated.items()}


def _count(part: Part) -> dict[str, Any]:
    data, samples = part
    counts = [sum(sample.label == label for sample in samples) for label in range(len(data.class_names))]
    per_class = dict(zip(data.class_names, counts, strict=True))
    groups = len({sample.group for sample in samples})
    return {"images": len(samples), "groups": groups, "classes": per_class, "fingerprint": data.fingerprint}


def subset(samples: list[Sample], fraction: float, seed: int = 0) -> list[Sample]:
    """Choose a share of every class, at least one sample each, by the hash of the seed and the ids."""
    order = sorted(samples, key=lambda sample: hashlib.sha256(f"{seed} {sample.id}".encode()).digest())
    chosen: list[Sample] = []
    for label in sorted({sample.label for sample in samples}):
        mine = [sample for sample in order if sample.label == label]
        chosen += mine[: max(1, round(fraction * len(mine)))]
    return sorted(chosen, key=lambda sample: sample.id)


def read(
    recipe: Recipe,
    dataset: Dataset,
    samples: list[Sample],
    model: Model,
    workers: int = 0,
    values: pd.DataFrame | None = None,
) -> Split:
    """Return samples to train on or to measure, in memory where they fit."""
    split = Split(
        recipe, dataset, samples, model, workers, None if values is None else values.to_numpy("float32", copy=True)
    )
    height, width = model.input_size
    if len(samples) * height * width * 3 <= loop.IN_MEMORY:
        split.keep()
    return split


def measure(recipe: Recipe, model: Model, split: Split, device: str, name: str = "test") -> Performance:
    """The recipe's figures of merit on a split called `name`, with 95 % intervals over groups."""
    outputs, targets = loop.predict(model, split, device)
    groups = [sample.group for sample in split.samples]
    return performance.measure(
        recipe.loss,
        outputs.double().numpy(),
        targets.numpy(),
        groups,
        model.class_names,
        recipe.contrasts,
        split=name,
    )


def _figures(measured: dict[str, Performance], splits: dict[str, Split]) -> dict[str, Any]:
    """The report's part on performance; what is undefined is null."""

    def known(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    figures = {s: {"images": len(splits[s])} | {k: known(v) for k, v in p.figures.items()} for s, p in measured.items()}
    intervals = {s: {k: [known(v) for v in pair] for k, pair in p.intervals.items()} for s, p in measured.items()}
    calibration = {split: p.calibration for split, p in measured.items()}
    return {**figures, "intervals": intervals, "calibration": calibration, "resamples": measured["test"].resamples}


def _write(out: Path, recipe: Recipe, model: Model, report: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint, and what tells people of it."""
    evidence = {"evidence": recipe.evidence} if recipe.evidence else {}
    models.save(out / f"{model.name}.safetensors", model, half=recipe.half, training=report, **evidence)
    return _describe(out, recipe, report)


def _describe(out: Path, recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Write the report with the fingerprint of what the checkpoint holds, curve and card."""
    checkpoint = out / f"{report['model']}.safetensors"
    report = {**report, "model_fingerprint": models.get(checkpoint).fingerprint, "checkpoint": checkpoint.name}
    history, best = report["history"], report["best_epoch"]
    contents = (
        json.dumps(report, indent=1, sort_keys=True).encode(),
        reporting.curve_csv(history),
        reporting.curve_png(history, best),
        reporting.card(recipe, report),
    )
    for ending, content in zip(_FOR_PEOPLE, contents, strict=True):
        write_atomically(out / f"{report['model']}.{ending}", content)
    return {**report, "checkpoint": str(checkpoint)}
