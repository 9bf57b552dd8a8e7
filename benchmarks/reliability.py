"""What the metrics of a finished run are worth as instruments: their null distribution, and how well they repeat.

    explainer-bench run all_metrics --out runs/all_metrics
    python benchmarks/reliability.py runs/all_metrics

Printed as Markdown, one row per metric. *Null* is the score of the row `random_token` over images: mean, and the range
of the middle 95 %; *stated* is the chance level that the metric states. *Split-half* is Spearman's correlation between
the mean scores of the methods on one half of the images and on the other, averaged over random halves: 1 where any half
gives the same ranking. *W* is Kendall's coefficient of concordance of the images: 1 where every single image ranks the
methods alike, 0 where they agree no more than by chance. *Better than random* is the share of the methods whose scores
are better than those of `random_token` (paired Wilcoxon test over images, one-sided, 5 %). *With srg* is Spearman's
correlation between the methods' mean scores and those of `srg`, better with better. Trivial rows are not methods.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

import adapters
import metrics
from bench import report

NULL = "random_token"
SPLITS = 200


def main() -> None:
    """Print the table of the run named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    scores = report.scores(Path(sys.argv[1]))
    reference = None
    if "srg" in set(scores["metric"]):
        reference = goodness(scores[scores["metric"] == "srg"], "srg").mean()
    rows = {metric: row(of_metric, metric, reference) for metric, of_metric in scores.groupby("metric")}
    order = sorted(rows, key=lambda name: (metrics.base.GROUPS.index(metrics.get(name).group), name))
    print(pd.DataFrame(rows).T.loc[order].rename_axis("metric").to_markdown())


def goodness(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return images x methods, higher is better, images with a score for every method only."""
    table = scores.pivot_table(index=["dataset", "model", "sample"], columns="explainer", values="value", dropna=False)
    methods = [name for name in table if not adapters.get(str(name)).trivial]
    table = table[methods].dropna(axis=1, how="all").dropna()
    return table if metrics.get(metric).higher_is_better else -table


def row(scores: pd.DataFrame, metric: str, reference: pd.Series | None) -> dict[str, str]:
    """Return the figures of one metric."""
    table, null = goodness(scores, metric), scores[scores["explainer"] == NULL]
    values, stated = null["value"].dropna(), null["chance"].mean()
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return {
        "images": str(len(table)),
        "null": f"{values.mean():.3f} [{low:.3f}, {high:.3f}]" if len(values) else "",
        "stated": "" if np.isnan(stated) else f"{stated:.3f}",
        "split-half": _number(split_half(table)),
        "W": _number(concordance(table)),
        "better than random": _number(better_than_random(scores, metric, table)),
        "with srg": "" if reference is None else _number(_correlation(table.mean(), reference.reindex(table.columns))),
    }


def split_half(table: pd.DataFrame) -> float:
    """Return the mean rank correlation of the methods' means over random halves of the images."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(SPLITS):
        order = rng.permutation(len(table))
        halves = table.iloc[order[::2]].mean(), table.iloc[order[1::2]].mean()
        found.append(_correlation(*halves))
    return float(np.nanmean(found)) if np.isfinite(found).any() else np.nan


def concordance(table: pd.DataFrame) -> float:
    """Return Kendall's W of the images' rankings, without a correction for ties."""
    ranks = table.rank(axis=1)
    n, methods = ranks.shape
    if n < 2 or methods < 2:
        return np.nan
    spread = ((ranks.sum() - ranks.sum().mean()) ** 2).sum()
    return float(12 * spread / (n**2 * (methods**3 - methods)))


def better_than_random(scores: pd.DataFrame, metric: str, table: pd.DataFrame) -> float:
    """Return the share of the methods that a paired test finds better than the null row."""
    sign = 1 if metrics.get(metric).higher_is_better else -1
    null = scores[scores["explainer"] == NULL].set_index(["dataset", "model", "sample"])["value"]
    gaps = table.sub(sign * null, axis=0).dropna()
    if not len(gaps) or not gaps.shape[1]:
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all differences zero: no better
        p = [scipy.stats.wilcoxon(gaps[name], alternative="greater").pvalue if gaps[name].any() else 1 for name in gaps]
    return float(np.mean(np.array(p) < 0.05))


def _correlation(a: pd.Series, b: pd.Series) -> float:
    both = pd.concat([a, b], axis=1).dropna()
    if len(both) < 3 or (both.nunique() < 2).any():
        return np.nan
    return float(scipy.stats.spearmanr(both.iloc[:, 0], both.iloc[:, 1]).statistic)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    main()
