"""The rows of one data set x model: means, intervals, ranks, gaps and the trivial rows beaten."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from leaderboards import statistics

CORE_GROUPS = ("faithfulness", "localization", "compactness", "class_sensitivity")


@dataclass(frozen=True)
class Cube:
    """The scores of one data set x model: (S, E, M) arrays, all axes sorted."""

    values: np.ndarray  # NaN where not scored, or undefined for every explainer
    undefined: np.ndarray  # bool: undefined for this explainer, defined for another
    scored: np.ndarray  # bool: a finished cell holds this sample
    chance: np.ndarray
    clusters: np.ndarray  # (S,) int


def cube_of(scores: pd.DataFrame, metrics: list[str], explainers: list[str]) -> Cube:
    """Arrange the scores of one data set x model; samples by name, metrics and explainers in the order given."""
    sample, names = pd.factorize(scores["sample"].astype(str), sort=True)
    shape = (len(names), len(explainers), len(metrics))
    at = (
        sample,
        pd.Index(explainers).get_indexer(pd.Index(scores["explainer"])),
        pd.Index(metrics).get_indexer(pd.Index(scores["metric"])),
    )
    values, chance, scored = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    values[at], chance[at], scored[at] = scores["value"], scores["chance"], True
    values[np.isinf(values)] = np.nan
    clusters = np.zeros(len(names), dtype=int)
    clusters[sample] = pd.factorize(scores["group"].astype(str), sort=True)[0]
    undefined = scored & np.isnan(values) & np.isfinite(values).any(axis=1, keepdims=True)
    return Cube(values, undefined, scored, chance, clusters)


def charged(cube: Cube, sign: np.ndarray) -> Cube:
    """Charge a map that a metric cannot score with the worst score that any other map of its image has.

    Else leaving out the hard images would raise a mean. Images that no map can be scored on (no ROI) stay out.
    """
    costs = np.where(np.isnan(cube.values), -np.inf, cube.values * sign)
    worst = costs.max(axis=1, keepdims=True) * sign
    return replace(cube, values=np.where(cube.undefined, worst, cube.values))


def build_model(
    scores: pd.DataFrame, metrics: pd.DataFrame, explainers: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the wide and the long rows of one data set x model, not yet in their final order."""
    rows, names = explainers.set_index("explainer"), metrics["metric"].to_numpy()
    sign = np.where(metrics["higher_is_better"], -1.0, 1.0)  # as costs, lower is better everywhere
    cube = charged(cube_of(scores, names.tolist(), rows.index.tolist()), sign)
    rows = _with_gaps(rows, cube, scores, names)
    complete = (rows["status"] == "ok").to_numpy()
    replicates = statistics.bootstrap_means(cube.values, cube.clusters, n_boot, rng)
    ranks = statistics.rank(statistics.mean(cube.values) * sign, complete)
    resampled_ranks = statistics.rank(replicates * sign, complete)
    arrays = _per_metric(cube, replicates, sign, ranks, resampled_ranks)
    columns = {"": "mean", "_ci_low": "ci_low", "_ci_high": "ci_high"}
    wide = {f"{name}{end}": arrays[key][:, place] for place, name in enumerate(names) for end, key in columns.items()}
    rows = rows.join(pd.DataFrame(wide, index=rows.index))
    rows = rows.join(_overall(rows.index, complete, metrics["group"], ranks, resampled_ranks))
    rows["beats_baselines"] = _beaten(cube, sign, metrics["group"], rows)
    axes = pd.MultiIndex.from_product([rows.index, names], names=["explainer", "metric"])
    long = pd.DataFrame({key: array.ravel() for key, array in arrays.items()}, index=axes).reset_index()
    described = ["dataset", "model", "explainer_version", "params", "seconds_per_image", "status", "info"]
    return rows.reset_index(), long.merge(rows[described], left_on="explainer", right_index=True)


def _with_gaps(rows: pd.DataFrame, cube: Cube, scores: pd.DataFrame, metrics: np.ndarray) -> pd.DataFrame:
    """Mark the explainers that lack cells which others have; say of each which scores are missing or undefined."""
    scored = cube.scored.sum(axis=0)
    lacks = scored < scored.max(axis=0)
    rows = rows.assign(n_samples=cube.scored.any(axis=2).sum(axis=0), info=rows["info"].fillna("").astype(str))
    gaps = lacks.any(axis=1) | (rows["n_failed"] > 0).to_numpy()
    rows["status"] = rows["status"].mask((rows["status"] == "ok") & gaps, "incomplete")
    counts = cube.undefined.sum(axis=0)
    for position, explainer in enumerate(rows.index):
        notes = [rows.loc[explainer, "info"]]
        if lacks[position].any() and not lacks[position].all():
            notes.append(f"lacks {', '.join(metrics[lacks[position]])}")
        if counts[position].any():
            which = [f"{metrics[m]} {counts[position, m]}" for m in np.flatnonzero(counts[position])]
            ours = scores[(scores["explainer"] == explainer) & scores["metric"].isin(metrics[counts[position] > 0])]
            reasons = sorted(set(ours.loc[ours["value"].isna(), "reason"].astype(str)) - {"", "empty ROI"})
            notes.append(f"undefined, counted as the image's worst: {', '.join(which)} ({', '.join(reasons)})")
        rows.loc[explainer, "info"] = "; ".join(filter(None, notes))
    return rows


def _per_metric(
    cube: Cube, replicates: np.ndarray, sign: np.ndarray, ranks: np.ndarray, resampled_ranks: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the metric columns of the long table, each (E, M)."""
    scored, mean = cube.scored.sum(axis=0), statistics.mean(cube.values)
    n = np.isfinite(cube.values).sum(axis=0)
    squares = np.nansum((cube.values - mean) ** 2, axis=0)
    table = {"n": n - cube.undefined.sum(axis=0), "n_failed": scored.max(axis=0) - scored, "mean": mean}
    table["std"] = np.sqrt(np.divide(squares, n - 1, out=np.full(n.shape, np.nan), where=n > 1))
    table["ci_low"], table["ci_high"] = statistics.interval(replicates)
    table |= {"chance": statistics.mean(cube.chance), "rank": ranks}
    table["rank_low"], table["rank_high"] = statistics.rank_interval(ranks, resampled_ranks)
    tied = [statistics.tie_groups((mean * sign)[:, m], (replicates * sign)[:, :, m]) for m in range(len(sign))]
    return table | {"tie_group": np.stack(tied, axis=1)}


def _overall(
    explainers: pd.Index, complete: np.ndarray, groups: pd.Series, ranks: np.ndarray, resampled_ranks: np.ndarray
) -> pd.DataFrame:
    """Return rank, interval, tie group and group ranks of every explainer; no overall rank for an incomplete one."""
    used = np.isfinite(ranks).any(axis=0)
    if not used.any():
        return pd.DataFrame(index=explainers)
    codes, names = pd.factorize(groups.to_numpy()[used])
    by_group, _ = statistics.mean_ranks(ranks[:, used], codes)
    voting = used & _voting(groups, used)
    codes = pd.factorize(groups.to_numpy()[voting])[0]
    _, mean_rank = statistics.mean_ranks(ranks[:, voting], codes)
    _, resampled = statistics.mean_ranks(resampled_ranks[..., voting], codes)
    mean_rank, resampled = np.where(complete, mean_rank, np.nan), np.where(complete, resampled, np.nan)
    table = {"mean_rank": mean_rank, "rank": statistics.min_rank(mean_rank)}
    table["rank_low"], table["rank_high"] = statistics.rank_interval(table["rank"], statistics.min_rank(resampled))
    table["tie_group"] = statistics.tie_groups(mean_rank, resampled)
    table |= {f"{name}_rank": by_group[:, k] for k, name in enumerate(names)}
    return pd.DataFrame(table, index=explainers)


def _voting(groups: pd.Series, used: np.ndarray) -> np.ndarray:
    """Tell which metrics (M,) decide the overall rank: those of the core groups, or all where there is none of them.

    Robustness and the like are conditions, not merits: a map that looks at nothing fulfils them best.
    """
    core = groups.isin(CORE_GROUPS).to_numpy()
    return core if (core & used).any() else np.ones(len(core), dtype=bool)


def _beaten(cube: Cube, sign: np.ndarray, groups: pd.Series, rows: pd.DataFrame) -> list[str]:
    """Return for every explainer the trivial rows it beats, joined by semicolons; none for an incomplete one."""
    complete = (rows["status"] == "ok").to_numpy()
    voting = _voting(groups, np.isfinite(cube.values).any(axis=(0, 1)))
    codes, costs = pd.factorize(groups[voting])[0], (cube.values * sign)[..., voting]
    wins = statistics.beats(costs, codes, cube.clusters, complete, rows["trivial"].to_numpy(bool))
    mean_rank = rows["mean_rank"].to_numpy() if "mean_rank" in rows else np.full(len(rows), np.nan)
    wins &= mean_rank[:, None] < mean_rank  # never against the board's own order
    return [";".join(rows.index[row]) for row in wins]
