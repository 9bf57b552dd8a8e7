"""Paired uncertainty for boards: bootstrap over clusters, ranks with gaps, tie groups, tests against trivial rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = (2.5, 97.5)
_CHUNK = 512
MIN_CLUSTERS = 6  # the normal approximation of the signed-rank test is too bold below


def generator(name: str, seed: int) -> np.random.Generator:
    """Return the random generator of one data set, the same whatever else is on the board."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _weights(n_clusters: int, n_boot: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield (chunk, G) float64: how often each cluster is drawn in each resample."""
    share = np.ones(n_clusters) / max(n_clusters, 1)
    for start in range(0, n_boot if n_clusters else 0, _CHUNK):
        yield rng.multinomial(n_clusters, share, size=min(_CHUNK, n_boot - start)).astype(float)


def cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count the defined values of every cluster.

    Parameters
    ----------
    values : ndarray
        (S, ...) float64, NaN where undefined.
    clusters : ndarray
        (S,) int in [0, G).

    Returns
    -------
    sums, counts : ndarray
        (G, ...) float64.
    """
    shape = (int(clusters.max(initial=-1)) + 1, *values.shape[1:])
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, clusters, np.nan_to_num(values))
    np.add.at(counts, clusters, np.isfinite(values))
    return sums, counts


def bootstrap_means(values: np.ndarray, clusters: np.ndarray, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """Means over the defined samples in resamples of whole clusters, the same resamples for every column.

    Parameters
    ----------
    values : ndarray
        (S, E, M) float64, NaN where undefined.
    clusters : ndarray
        (S,) int in [0, G), the samples that are drawn together.
    n_boot : int
        Number of resamples B.
    rng : Generator
        Decides the resamples and nothing else.

    Returns
    -------
    ndarray
        (B, E, M) float64; NaN where a resample holds no defined value, and throughout if there are too few clusters
        to say anything of their spread.
    """
    sums, counts = cluster_sums(values.reshape(len(values), int(np.prod(values.shape[1:]))), clusters)
    means = np.full((n_boot, sums.shape[1]), np.nan)
    start = 0
    for weights in _weights(len(sums), n_boot, rng) if len(sums) >= MIN_CLUSTERS else ():
        with np.errstate(invalid="ignore"):
            means[start : start + len(weights)] = (weights @ sums) / (weights @ counts)
        start += len(weights)
    return means.reshape(n_boot, *values.shape[1:])


def mean(values: np.ndarray) -> np.ndarray:
    """(S, ...) -> (...) mean over the defined samples, NaN where there are none."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=0) / np.isfinite(values).sum(axis=0)


def _percentile(replicates: np.ndarray, percent: float, method: str) -> np.ndarray:
    """(B, ...) -> (...) over the replicates that are defined; NaN where none is."""
    result = np.full(replicates.shape[1:], np.nan)
    some = np.isfinite(replicates).any(axis=0)
    result[some] = np.nanpercentile(replicates[:, some], percent, axis=0, method=method)  # type: ignore[call-overload]
    return result


def interval(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, ...) -> low and high (...), the 95 % percentile interval over the replicates that are defined."""
    return _percentile(replicates, CONFIDENCE[0], "linear"), _percentile(replicates, CONFIDENCE[1], "linear")


def rank_interval(ranks: np.ndarray, replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of ranks (...) from (B, ...), of ranks that occurred, widened to hold the rank itself.

    Without replicates every rank is possible.
    """
    low, high = _percentile(replicates, CONFIDENCE[0], "lower"), _percentile(replicates, CONFIDENCE[1], "higher")
    unknown = np.isfinite(ranks) & np.isnan(low)
    low, high = np.where(unknown, 1, low), np.where(unknown, np.isfinite(ranks).sum(axis=0), high)
    return np.fmin(low, ranks), np.fmax(high, ranks)


def rank(cost: np.ndarray, complete: np.ndarray) -> np.ndarray:
    """Rank explainers within each metric: 1 + how many complete ones are better + half of those that tie.

    An incomplete explainer is told where it would stand, and moves no one.

    Parameters
    ----------
    cost : ndarray
        (..., E, M) float64, lower is better; NaN where undefined.
    complete : ndarray
        (E,) bool. If none is complete, all count.

    Returns
    -------
    ndarray
        (..., E, M) float64 average ranks; NaN where undefined.
    """
    # Equal scores summed in another order differ in the last digits; as float32 they tie.
    cost = np.where(np.isnan(cost), np.inf, cost).astype(np.float32)
    ranks = stats.rankdata(cost, axis=-2)
    for row in np.flatnonzero(~complete) if complete.any() else ():
        other = cost[..., row : row + 1, :]
        ranks -= np.isfinite(other) * ((other < cost) + 0.5 * (other == cost))
        ranks[..., row, :] += 0.5
    return np.where(np.isinf(cost), np.nan, ranks)


def mean_ranks(ranks: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average ranks within each group of metrics, then over the groups, one vote each.

    Parameters
    ----------
    ranks : ndarray
        (..., E, M).
    groups : ndarray
        (M,) int in [0, K), the group of each metric.

    Returns
    -------
    by_group, overall : ndarray
        (..., E, K) and (..., E); NaN wherever a rank that enters is.
    """
    by_group = np.stack([ranks[..., groups == k].mean(axis=-1) for k in range(int(groups.max()) + 1)], axis=-1)
    # Rounded, so that the same ranks in another order tie exactly.
    return by_group, by_group.mean(axis=-1).round(9)


def min_rank(values: np.ndarray) -> np.ndarray:
    """(..., E) -> (..., E) ranks from the lowest, ties sharing the lowest rank; NaN where undefined."""
    ranks = stats.rankdata(np.where(np.isnan(values), np.inf, values), method="min", axis=-1)
    return np.where(np.isnan(values), np.nan, ranks)


def tie_groups(cost: np.ndarray, replicates: np.ndarray) -> np.ndarray:
    """Number the groups of explainers that their paired differences do not tell apart, from the best.

    A new group starts at the first explainer whose difference to the best of the group has a 95 % interval above 0.

    Parameters
    ----------
    cost : ndarray
        (E,) float64, lower is better; NaN is in no group.
    replicates : ndarray
        (B, E) float64, the same in each resample.

    Returns
    -------
    ndarray
        (E,) float64 of integers from 1; NaN where `cost` is.
    """
    groups = np.full(len(cost), np.nan)
    order = [row for row in np.argsort(cost, kind="stable") if np.isfinite(cost[row])]
    best, number = order[:1], 1
    for row in order:
        low, _ = interval(replicates[:, row] - replicates[:, best[0]])
        if low > 0:
            best, number = [row], number + 1
        groups[row] = number
    return groups


def _differences(first: np.ndarray, second: np.ndarray, groups: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """By cluster, in [-1, 1]: how much more often `first` (S, M) costs less than `second`, in metrics both have."""
    gap = np.sign((second - first).astype(np.float32))
    votes = np.stack([mean(gap[:, groups == k].T) for k in range(int(groups.max()) + 1)])
    sums, counts = cluster_sums(mean(votes), clusters)
    return sums[counts > 0] / counts[counts > 0]


def _p_value(differences: np.ndarray) -> float:
    """One-sided Wilcoxon signed-rank test that the differences lie above 0."""
    if np.count_nonzero(differences) < MIN_CLUSTERS:
        return 1.0
    return float(stats.wilcoxon(differences.round(9), alternative="greater").pvalue)


def beats(
    cost: np.ndarray, groups: np.ndarray, clusters: np.ndarray, rows: np.ndarray, trivial: np.ndarray
) -> np.ndarray:
    """Test which explainers beat which trivial rows.

    On each sample, every metric that both of a pair have votes for one of them (1, 0 or -1; no other explainer has a
    say). Votes are averaged within groups of metrics, over these groups, and over the samples of a cluster; a one-sided
    Wilcoxon test over clusters follows, Holm-corrected over all pairs, alpha 0.05.

    Parameters
    ----------
    cost : ndarray
        (S, E, M) float64, lower is better; NaN where undefined.
    groups : ndarray
        (M,) int, the group of each metric.
    clusters : ndarray
        (S,) int, the cluster of each sample.
    rows, trivial : ndarray
        (E,) bool: which explainers are tested, and against which.

    Returns
    -------
    ndarray
        (E, E) bool: whether the row beats the column.
    """
    pairs = [(i, j) for i in np.flatnonzero(rows) for j in np.flatnonzero(trivial) if i != j]
    result = np.zeros((cost.shape[1],) * 2, dtype=bool)
    if pairs:
        p_values = [_p_value(_differences(cost[:, i], cost[:, j], groups, clusters)) for i, j in pairs]
        rejected = multipletests(p_values, alpha=0.05, method="holm")[0]
        result[tuple(np.transpose(pairs))] = rejected
    return result
