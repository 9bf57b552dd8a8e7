"""Made-up tables in the form that the runner hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

METRICS = {
    "faithfulness_estimate": ("faithfulness", True),
    "srg": ("faithfulness", True),
    "pointing_game": ("localization", True),
    "sparseness": ("compactness", True),
    "class_correlation": ("class_sensitivity", False),
}
RUN = {"seed": 0, "device": "cpu", "precision": "fp32", "quantus": "0.6.0", "torch": "2", "explainer_bench": "0"}
RUN |= {"git": "abc", "utc": "2026-01-01T00:00:00Z"}


class Tables(NamedTuple):
    """The arguments of `leaderboards.build`."""

    scores: pd.DataFrame
    metrics: pd.DataFrame
    explainers: pd.DataFrame
    run: dict[str, Any]


def _make_tables(
    values: Mapping[str, np.ndarray],
    trivial: tuple[str, ...] = (),
    groups: np.ndarray | None = None,
    metrics: Mapping[str, tuple[str, bool]] = METRICS,
) -> Tables:
    """Build tables from per-sample values: ``values[explainer]`` is (S, M) float64, NaN where undefined."""
    scores = []
    for explainer, table in values.items():
        for m, metric in enumerate(metrics):
            sample = np.arange(len(table))
            frame = pd.DataFrame({"sample": [f"s{i:04d}" for i in sample], "value": table[:, m], "chance": 0.5})
            frame["group"] = frame["sample"] if groups is None else [f"p{g}" for g in groups]
            frame["reason"] = np.where(frame["value"].isna(), "constant map", "")
            scores.append(frame.assign(dataset="toy", model="vit", explainer=explainer, metric=metric))
    rows = {"dataset": "toy", "model": "vit", "explainer": list(values), "explainer_version": "1", "params": "{}"}
    rows |= {"trivial": [name in trivial for name in values], "seconds_per_image": 0.25, "status": "ok", "info": ""}
    kinds = [{"metric": m, "metric_version": "1", "group": g, "higher_is_better": h} for m, (g, h) in metrics.items()]
    run = {**RUN, "dataset_fingerprint": {"toy": "d1"}, "model_fingerprint": {("toy", "vit"): "m1"}}
    return Tables(pd.concat(scores), pd.DataFrame(kinds), pd.DataFrame(rows).assign(n_failed=0), run)


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., Tables]:
    """Build the tables of a board from per-sample values by explainer."""
    return _make_tables


@pytest.fixture
def tables() -> Tables:
    """A board of six: `good` and its `twin` beat `random`, `plain` is worse, `constant` is undefined in one metric."""
    rng = np.random.default_rng(0)
    better = np.array([1, 1, 1, 1, -1])
    values = {name: rng.normal(size=(48, 5)) for name in ("good", "plain", "random", "constant", "late")}
    values["good"] += 1.5 * better
    values["late"] += 0.5 * better
    values["plain"] -= 0.6 * better
    values["twin"] = values["good"].copy()
    values["constant"][:, 4] = np.nan
    return _make_tables(values, trivial=("random", "constant"))
