"""What studies read from a finished part: its images, predictions, models, and the maps that were stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from bench.models.preprocessing import VARIANTS, Preprocessing
from bench.problem import Shard
from bench.runner import Known, Run
from bench.studies.base import Done


def explained(run: Run) -> Iterator[tuple[Shard, Known]]:
    """Yield the shards of a run of one data set and model with what was predicted."""
    (problem,) = run.problems
    for shard in problem.shards(range(problem.n_shards)):
        yield shard, run.known(problem, shard)


def of_classes(
    run: Run, shard: Shard, known: Known, explainer: str, native: bool = False
) -> list[dict[int, np.ndarray]]:
    """Return, per sample of a shard, an explainer's stored maps by class.

    Parameters
    ----------
    run : Run
        Of one data set and model.
    shard, known
        As `explained` yields them.
    explainer : str
        Its spec.
    native : bool
        (h, w) as explained, such as a grid of tokens, instead of (H, W) at the input's resolution.

    Returns
    -------
    list of dict
        Empty dicts where the explainer failed, or does not support the model.
    """
    (problem,) = run.problems
    found: list[dict[int, np.ndarray]] = [{} for _ in shard.samples]
    for one in (each for each in run.supported(problem) if each.spec == explainer):
        for classes in known.classes(one):
            cell = run.explanation_cell(problem, shard, one, classes)
            if not run.store.exists(cell, "npz"):
                continue
            maps = run.store.read_arrays(cell)["maps"] if native else run.maps(problem, shard, one, classes).numpy()
            for row, (number, values) in enumerate(zip(classes, maps, strict=True)):
                found[row][int(number)] = values
    return found


def models(done: Sequence[Done]) -> pd.DataFrame:
    """Return a row per part: the model's file and preprocessing, the images, and its accuracy on them."""
    return pd.DataFrame([{**one.part.names, **_model(one)} for one in done])


def _model(done: Done) -> dict[str, object]:
    run = done.open()
    (problem,) = run.problems
    right = [
        logits.argmax() == sample.label
        for shard, known in explained(run)
        for logits, sample in zip(known.logits, shard.samples, strict=True)
    ]
    return {
        "weights": done.part.weights.stem,
        "architecture": problem.model.architecture,
        "preprocessing": described(problem.model.preprocessing),
        "data": problem.names[0],
        "split": problem.dataset.split,
        "images": len(problem.samples),
        "target": str(done.suite.target),
        "accuracy": float(np.mean(right)),
    }


def described(preprocessing: Preprocessing) -> str:
    """Say which named variants a preprocessing is, at whatever size, and what it does."""
    known = [
        name
        for name, variant in VARIANTS.items()
        if variant.preprocessing.scaled_to(preprocessing.input_size) == preprocessing
    ]
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    side = preprocessing.shortest_side
    size = " x ".join(map(str, preprocessing.input_size))
    geometry = f"shortest side {side}, centre of {size}" if side else f"squashed to {size}"
    return f"{' = '.join(known) or 'no published variant'}: {geometry}, mean {mean}, std {std}"
