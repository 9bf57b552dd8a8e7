"""What a model uses, proven by intervention: its accuracy on the same images without, or with moved, evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.proportion import proportion_confint

from bench.datasets.phantom import Phantom
from bench.models import Model
from bench.precision import full_precision

INTERVENTIONS: dict[str, dict[str, str]] = {
    "as they are": {},
    "finding removed": {"remove": "finding"},
    "finding moved": {"move": "finding"},
    "marker removed": {"remove": "marker"},
    "marker moved": {"move": "marker"},
    "marker swapped": {"swap": "marker"},
}
_BATCH = 64


def table(dataset: Phantom, model: Model, n: int = 512) -> pd.DataFrame:
    """Measure a model on images as they are, and on the same images changed in one respect.

    Parameters
    ----------
    dataset : Phantom
        `phantom` or `phantom_shortcut`.
    model : Model
        Of the data set's classes, on whichever device.
    n : int
        Its first n images; all of them where there are fewer.

    Returns
    -------
    DataFrame
        Columns images (what was done to them), n, accuracy (share of images whose top class is the label or has a
        finding in the unchanged image), low and high (its 95 % Wilson interval), same_class (share whose top class
        is that of the unchanged image), chance (accuracy of a guess at random).
    """
    n = min(n, dataset.size)
    present = np.array([_present(dataset, index) for index in range(n)])
    top = {what: _top(replace(dataset, **change), model, n) for what, change in INTERVENTIONS.items()}  # type: ignore[arg-type]
    usual = top["as they are"]
    rows = [_row(what, present[np.arange(n), classes], classes == usual) for what, classes in top.items()]
    return pd.DataFrame(rows).assign(chance=float(present.mean()))


def _present(dataset: Phantom, index: int) -> np.ndarray:
    """(K,) bool: the label, and the classes whose finding the image shows."""
    classes = len(dataset.class_names)
    return np.isin(np.arange(classes), [index % classes, *dataset.draw(index).roi])


def _row(what: str, right: np.ndarray, same: np.ndarray) -> dict[str, float | str]:
    low, high = proportion_confint(right.sum(), len(right), method="wilson")
    return {
        "images": what,
        "n": len(right),
        "accuracy": float(right.mean()),
        "low": float(low),
        "high": float(high),
        "same_class": float(same.mean()),
    }


def _top(dataset: Phantom, model: Model, n: int) -> np.ndarray:
    """(n,) int: the model's top class of the first n images."""
    with torch.no_grad(), full_precision():
        return np.concatenate([model.module(batch).argmax(1).cpu().numpy() for batch in _batches(dataset, model, n)])


def _batches(dataset: Phantom, model: Model, n: int) -> Iterator[torch.Tensor]:
    device = next(model.module.parameters()).device
    for start in range(0, n, _BATCH):
        indices = range(start, min(n, start + _BATCH))
        yield torch.stack([model.preprocess(dataset.draw(index).image) for index in indices]).to(device)
