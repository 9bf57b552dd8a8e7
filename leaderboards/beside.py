"""Published values beside ours: intervals for both, and what a trivial row scores on the same images."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from leaderboards import aggregate, statistics

KEYS = ["dataset", "model", "metric", "explainer"]
N_BOOT = 2_000
_OURS = {"mean": "ours", "ci_low": "ours_low", "ci_high": "ours_high"}
_OVER = ["over_trivial", "over_trivial_low", "over_trivial_high"]


def interval(
    values: np.ndarray, clusters: np.ndarray, read: Callable[[np.ndarray], np.ndarray] = lambda means: means
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of what is `read` off the mean of values (N, K), resampled by clusters (N,) int.

    `read` turns means (B, K) of B resamples into (B, ...); low and high are (...).
    """
    return statistics.interval(read(statistics.bootstrap_means(values, clusters, N_BOOT, np.random.default_rng(0))))


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `n` images; NaN where either is unknown."""
    if not (np.isfinite(share) and n > 0):
        return np.nan, np.nan
    low, high = proportion_confint(share * n, n, method="wilson")
    return float(low), float(high)


def beside(published: pd.DataFrame, long: pd.DataFrame, scores: pd.DataFrame, trivial: Collection[str]) -> pd.DataFrame:
    """Put published values and ours side by side.

    Parameters
    ----------
    published : DataFrame
        ``dataset, model, explainer, metric, value, n, mark``; `n` is the number of images where the value is a share
        of them, else NaN; `mark` says where the value was read.
    long : DataFrame
        Long boards, under the published names of data set and model.
    scores : DataFrame
        Per-sample scores under the same names: ``dataset, model, explainer, metric, sample, group, value, chance``.
    trivial : collection of str
        The explainers that are trivial rows.

    Returns
    -------
    DataFrame
        ``dataset, model, metric, explainer, published, mark, published_low, published_high, ours, ours_low, ours_high,
        n, chance, best_trivial, over_trivial, over_trivial_low, over_trivial_high``: intervals of shares (scores of 0
        and 1 only, no two images of one group) are Wilson's, the others bootstrapped over groups; `over_trivial` is
        the paired difference to the best trivial row, positive where better. An undefined score counts as the worst of
        its image, as on the board. Rows that only one side has stay.
    """
    theirs = published.rename(columns={"value": "published"})
    bounds = [wilson(value, n) for value, n in zip(theirs["published"], theirs["n"], strict=True)]
    theirs[["published_low", "published_high"]] = np.reshape(bounds, (-1, 2))
    better = long.drop_duplicates("metric").set_index("metric")["higher_is_better"]
    parts = [_of_part(rows, better, trivial) for _, rows in scores.groupby(KEYS[:2], sort=False)]
    ours = long[[*KEYS, "n", "chance", *_OURS]].rename(columns=_OURS)
    ours = _with_wilson(ours.merge(pd.concat(parts, ignore_index=True), on=KEYS, how="left"))
    table = theirs.drop(columns="n").merge(ours, on=KEYS, how="outer")
    ran = long[["dataset", "model"]].drop_duplicates()
    return table.merge(ran, on=["dataset", "model"]).sort_values(KEYS[:3], kind="stable", ignore_index=True)


def _with_wilson(table: pd.DataFrame) -> pd.DataFrame:
    """Replace the intervals of shares, whose number of images is `counted`, by Wilson's."""
    shares = table["counted"].notna()
    bounds = [wilson(*pair) for pair in table.loc[shares, ["ours", "counted"]].itertuples(index=False, name=None)]
    table.loc[shares, ["ours_low", "ours_high"]] = np.reshape(bounds, (-1, 2))
    return table.drop(columns="counted")


def _of_part(scores: pd.DataFrame, better: pd.Series, trivial: Collection[str]) -> pd.DataFrame:
    """Compare the explainers of one model and data set image by image; undefined scores are charged as on the board.

    `counted` is the number of images where a score is a share of them and each is a group of its own, else NaN.
    """
    metrics, explainers = (sorted(scores[key].unique()) for key in ("metric", "explainer"))
    sign = np.where(better.reindex(metrics), -1.0, 1.0)
    cube = aggregate.charged(aggregate.cube_of(scores, metrics, explainers), sign)
    tables = []
    for place, metric in enumerate(metrics):
        values = pd.DataFrame(-sign[place] * cube.values[:, :, place], columns=explainers)
        table = _differences(values, cube.clusters, trivial).set_index("explainer").reindex(explainers)
        share = (values.isna() | values.abs().isin([0, 1])).all() & (len(values) == len(set(cube.clusters)))
        table = table.assign(counted=values.notna().sum().where(share)).reset_index()
        tables.append(table.assign(dataset=scores["dataset"].iloc[0], model=scores["model"].iloc[0], metric=metric))
    return pd.concat(tables, ignore_index=True)


def _differences(values: pd.DataFrame, clusters: np.ndarray, trivial: Collection[str]) -> pd.DataFrame:
    """Compare every explainer (a column, higher is better) with the trivial one of the best mean, image by image."""
    known = values[sorted(set(trivial) & set(values))].mean().dropna()
    if known.empty:
        return pd.DataFrame(columns=["explainer", "best_trivial", *_OVER])
    best = str(known.idxmax())
    differences = values.sub(values[best], axis=0).to_numpy()
    named = dict(zip(_OVER, (statistics.mean(differences), *interval(differences, clusters)), strict=True))
    return pd.DataFrame({"explainer": values.columns, "best_trivial": best, **named})
