"""Published values beside ours: intervals for both, and what a trivial row scores on the same images."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from leaderboards import statistics

KEYS = ["dataset", "model", "metric", "explainer"]
N_BOOT = 2_000


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
        the paired difference to the best trivial row, positive where better. Rows that only one side has stay.
    """
    theirs = published.rename(columns={"value": "published"})
    bounds = [wilson(value, n) for value, n in zip(theirs["published"], theirs["n"], strict=True)]
    theirs[["published_low", "published_high"]] = np.reshape(bounds, (-1, 2))
    ours = _ours(long, scores).merge(_over_trivial(long, scores, trivial), on=KEYS, how="left")
    table = theirs.drop(columns="n").merge(ours, on=KEYS, how="outer")
    ran = long[["dataset", "model"]].drop_duplicates()
    return table.merge(ran, on=["dataset", "model"]).sort_values(KEYS[:3], kind="stable", ignore_index=True)


def _ours(long: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    share = scores["value"].isna() | scores["value"].isin([0, 1])
    alone = ~scores.duplicated([*KEYS, "group"], keep=False)
    binary = (share & alone).groupby([scores[key] for key in KEYS]).all()
    names = {"mean": "ours", "ci_low": "ours_low", "ci_high": "ours_high"}
    table = long[[*KEYS, "n", "chance", *names]].rename(columns=names)
    for row, key in enumerate(table[KEYS].itertuples(index=False, name=None)):
        if binary.get(key, False):
            table.loc[table.index[row], ["ours_low", "ours_high"]] = wilson(
                table["ours"].iloc[row], table["n"].iloc[row]
            )
    return table


def _over_trivial(long: pd.DataFrame, scores: pd.DataFrame, trivial: Collection[str]) -> pd.DataFrame:
    parts = []
    better = long.drop_duplicates("metric").set_index("metric")["higher_is_better"]
    for keys, rows in scores.groupby(KEYS[:3], sort=False):
        values = rows.pivot(index="sample", columns="explainer", values="value")
        group = rows.drop_duplicates("sample").set_index("sample")["group"].reindex(values.index)
        of_part = dict(zip(KEYS, map(str, keys), strict=False))  # type: ignore[arg-type]
        sign = 1.0 if better[of_part["metric"]] else -1.0
        parts.append(_differences(values * sign, pd.factorize(group)[0], trivial).assign(**of_part))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*KEYS, "best_trivial"])


def _differences(values: pd.DataFrame, clusters: np.ndarray, trivial: Collection[str]) -> pd.DataFrame:
    """Compare every explainer (a column, higher is better) with the trivial one of the best mean, image by image."""
    known = values[sorted(set(trivial) & set(values))].mean().dropna()
    if known.empty:
        return pd.DataFrame(columns=["explainer", "best_trivial"])
    best = str(known.idxmax())
    differences = values.sub(values[best], axis=0).to_numpy()
    replicates = statistics.bootstrap_means(differences, clusters, N_BOOT, np.random.default_rng(0))
    low, high = statistics.interval(replicates)
    named = {"over_trivial": statistics.mean(differences), "over_trivial_low": low, "over_trivial_high": high}
    return pd.DataFrame({"explainer": values.columns, "best_trivial": best, **named})
