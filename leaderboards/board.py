"""From scores to boards: one wide and one long table per data set, and their CSV files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from explainer_bench import RequestError
from leaderboards import statistics

CORE_GROUPS = ("faithfulness", "localization", "compactness", "class_sensitivity")
GROUPS = (*CORE_GROUPS, "robustness", "randomization")
STATUSES = ("ok", "incomplete", "failed", "unsupported")
RUN_COLUMNS = ("seed", "device", "precision", "quantus", "torch", "explainer_bench", "git", "utc")
LONG_COLUMNS = (
    "dataset, dataset_fingerprint, model, model_fingerprint, explainer, explainer_version, params, metric, "
    "metric_version, group, higher_is_better, n, n_failed, mean, std, ci_low, ci_high, chance, rank, rank_low, "
    "rank_high, tie_group, seconds_per_image, seed, device, precision, quantus, torch, explainer_bench, git, utc, "
    "status, info"
).split(", ")
_INTEGERS = ("n_samples", "n_failed", "n", "tie_group", "seed")
_NEEDED = {
    "scores": "dataset, model, explainer, metric, sample, group, value, reason, chance",
    "metrics": "metric, metric_version, group, higher_is_better",
    "explainers": "dataset, model, explainer, explainer_version, params, trivial, seconds_per_image, status, info, "
    "n_failed",
}


@dataclass(frozen=True)
class Boards:
    """The boards of one run.

    Parameters
    ----------
    wide : dict of DataFrame
        Per data set, one row per model x explainer, sorted by rank.
    long : dict of DataFrame
        Per data set, one row per model x explainer x metric.
    trivial : frozenset of str
        The explainers that are trivial rows.
    """

    wide: dict[str, pd.DataFrame]
    long: dict[str, pd.DataFrame]
    trivial: frozenset[str]


@dataclass(frozen=True)
class _Cube:
    """The scores of one data set x model: (S, E, M) arrays, all axes sorted."""

    values: np.ndarray  # NaN where undefined or not scored
    scored: np.ndarray  # bool: a finished cell holds this sample
    chance: np.ndarray
    clusters: np.ndarray  # (S,) int


def build(
    scores: pd.DataFrame,
    metrics: pd.DataFrame,
    explainers: pd.DataFrame,
    run: Mapping[str, Any],
    n_boot: int = 10_000,
    seed: int = 0,
) -> Boards:
    """Aggregate per-sample scores into boards with paired uncertainty.

    Explainers are ranked within each data set x model. An explainer without a score that others have is listed below
    the others, without a mean rank.

    Parameters
    ----------
    scores : DataFrame
        One row per sample x explainer x metric, of finished cells only: ``dataset, model, explainer, metric, sample,
        group`` (samples that are resampled together), ``value`` (NaN = undefined), ``reason, chance``.
    metrics : DataFrame
        One row per metric: ``metric, metric_version, group, higher_is_better``.
    explainers : DataFrame
        One row per data set x model x explainer: ``dataset, model, explainer, explainer_version, params, trivial,
        seconds_per_image, status`` (ok, failed, unsupported), ``info, n_failed``.
    run : mapping
        ``seed, device, precision, quantus, torch, explainer_bench, git, utc``, and the mappings
        ``dataset_fingerprint[dataset]`` and ``model_fingerprint[dataset, model]``.
    n_boot : int
        Number of bootstrap resamples.
    seed : int
        Seed of the resamples; with the name of a data set it decides them.

    Returns
    -------
    Boards

    Raises
    ------
    RequestError
        Where a table lacks a column, or a score belongs to no known explainer or metric, or comes twice.
    """
    _check(scores, metrics, explainers, run)
    metrics = metrics.assign(_order=metrics["group"].map(GROUPS.index)).sort_values(["_order", "metric"])
    wide, long = {}, {}
    for dataset, rows in explainers.groupby("dataset", sort=True):
        tables = []
        for model, rows_of_model in rows.groupby("model", sort=True):
            ours = scores[(scores["dataset"] == dataset) & (scores["model"] == model)]
            rng = statistics.generator(str(dataset), seed)
            tables.append(_build_model(ours, metrics, rows_of_model.sort_values("explainer"), n_boot, rng))
        wide[str(dataset)] = _finish_wide(pd.concat([table[0] for table in tables]), metrics)
        long[str(dataset)] = _finish_long(pd.concat([table[1] for table in tables]), metrics, run)
    return Boards(wide, long, frozenset(explainers.loc[explainers["trivial"].astype(bool), "explainer"]))


def _check(scores: pd.DataFrame, metrics: pd.DataFrame, explainers: pd.DataFrame, run: Mapping[str, Any]) -> None:
    for name, table in (("scores", scores), ("metrics", metrics), ("explainers", explainers)):
        if missing := sorted(set(_NEEDED[name].split(", ")) - set(table.columns)):
            raise RequestError(f"the table of {name} lacks {', '.join(missing)}: add the missing columns.")
    if missing := sorted({*RUN_COLUMNS, "dataset_fingerprint", "model_fingerprint"} - set(run)):
        raise RequestError(f"the description of the run lacks {', '.join(missing)}: add them.")
    if unknown := sorted(set(metrics["group"]) - set(GROUPS)):
        raise RequestError(f"unknown group of metrics {unknown[0]!r}: use one of {', '.join(GROUPS)}.")
    keys = ["dataset", "model", "explainer"]
    for column, table in ((keys, explainers), (["metric"], metrics)):
        unknown = sorted(set(scores[column].itertuples(index=False)) - set(table[column].itertuples(index=False)))
        if unknown:
            raise RequestError(f"scores of {' / '.join(unknown[0])}, which is in no table of {column[-1]}s: add it.")
    if scores.duplicated([*keys, "metric", "sample"]).any():
        first = scores[scores.duplicated([*keys, "metric", "sample"])].iloc[0]
        raise RequestError(f"sample {first['sample']} of {first['explainer']} has two {first['metric']}: keep one.")


def _cube(scores: pd.DataFrame, metrics: list[str], explainers: list[str]) -> _Cube:
    sample, names = pd.factorize(scores["sample"].astype(str), sort=True)
    shape = (len(names), len(explainers), len(metrics))
    at = (
        sample,
        pd.Index(explainers).get_indexer(scores["explainer"]),
        pd.Index(metrics).get_indexer(scores["metric"]),
    )
    values, chance, scored = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    values[at], chance[at], scored[at] = scores["value"], scores["chance"], True
    values[np.isinf(values)] = np.nan
    clusters = np.zeros(len(names), dtype=int)
    clusters[sample] = pd.factorize(scores["group"].astype(str), sort=True)[0]
    return _Cube(values, scored, chance, clusters)


def _build_model(
    scores: pd.DataFrame, metrics: pd.DataFrame, explainers: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the wide and the long rows of one data set x model, not yet in their final order."""
    rows, names = explainers.set_index("explainer"), metrics["metric"].to_numpy()
    cube = _cube(scores, names.tolist(), rows.index.tolist())
    rows = _with_gaps(rows, cube, scores, names)
    complete = (rows["status"] == "ok").to_numpy()
    sign = np.where(metrics["higher_is_better"], -1.0, 1.0)  # as costs, lower is better everywhere
    replicates = statistics.bootstrap_means(cube.values, cube.clusters, n_boot, rng)
    ranks = statistics.rank(statistics.mean(cube.values) * sign, complete)
    resampled_ranks = statistics.rank(replicates * sign, complete)
    arrays = _per_metric(cube, replicates, sign, ranks, resampled_ranks)
    for position, name in enumerate(names):
        for column, key in ((name, "mean"), (f"{name}_ci_low", "ci_low"), (f"{name}_ci_high", "ci_high")):
            rows[column] = arrays[key][:, position]
    rows = rows.join(_overall(rows.index, complete, metrics["group"], ranks, resampled_ranks))
    rows["beats_baselines"] = _beaten(cube, sign, metrics["group"], complete, rows["trivial"])
    axes = pd.MultiIndex.from_product([rows.index, names], names=["explainer", "metric"])
    long = pd.DataFrame({key: array.ravel() for key, array in arrays.items()}, index=axes).reset_index()
    columns = ["dataset", "model", "explainer_version", "params", "seconds_per_image", "status", "info"]
    return rows.reset_index(), long.merge(rows[columns], left_on="explainer", right_index=True)


def _with_gaps(rows: pd.DataFrame, cube: _Cube, scores: pd.DataFrame, metrics: np.ndarray) -> pd.DataFrame:
    """Mark the explainers that lack scores which others have, and say which and why."""
    defined, scored = np.isfinite(cube.values).sum(axis=0), cube.scored.sum(axis=0)
    lacks = (scored < scored.max(axis=0)) | ((defined == 0) & (defined.max(axis=0) > 0))
    rows = rows.assign(n_samples=cube.scored.any(axis=2).sum(axis=0), info=rows["info"].fillna("").astype(str))
    gaps = lacks.any(axis=1) | (rows["n_failed"] > 0).to_numpy()
    rows["status"] = rows["status"].mask((rows["status"] == "ok") & gaps, "incomplete")
    for explainer, row in zip(rows.index, lacks, strict=True):
        if row.any():
            ours = scores[(scores["explainer"] == explainer) & scores["metric"].isin(metrics[row])]
            reasons = ", ".join(sorted(set(ours.loc[ours["value"].isna(), "reason"].astype(str)) - {""}))
            gap = f"lacks {', '.join(metrics[row])}" + (f" ({reasons})" if reasons else "")
            rows.loc[explainer, "info"] = "; ".join(filter(None, [rows.loc[explainer, "info"], gap]))
    return rows


def _per_metric(
    cube: _Cube, replicates: np.ndarray, sign: np.ndarray, ranks: np.ndarray, resampled_ranks: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the metric columns of the long table, each (E, M)."""
    scored, mean = cube.scored.sum(axis=0), statistics.mean(cube.values)
    n = np.isfinite(cube.values).sum(axis=0)
    squares = np.nansum((cube.values - mean) ** 2, axis=0)
    table = {"n": n, "n_failed": scored.max(axis=0) - scored, "mean": mean}
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
    by_group, mean_rank = statistics.mean_ranks(ranks[:, used], codes)
    _, resampled = statistics.mean_ranks(resampled_ranks[..., used], codes)
    mean_rank, resampled = np.where(complete, mean_rank, np.nan), np.where(complete, resampled, np.nan)
    table = {"mean_rank": mean_rank, "rank": statistics.min_rank(mean_rank)}
    table["rank_low"], table["rank_high"] = statistics.rank_interval(table["rank"], statistics.min_rank(resampled))
    table["tie_group"] = statistics.tie_groups(mean_rank, resampled)
    table |= {f"{name}_rank": by_group[:, k] for k, name in enumerate(names)}
    return pd.DataFrame(table, index=explainers)


def _beaten(cube: _Cube, sign: np.ndarray, groups: pd.Series, complete: np.ndarray, trivial: pd.Series) -> list[str]:
    """Return for every explainer the trivial rows it beats, joined by semicolons; none for an incomplete one."""
    codes, baselines = pd.factorize(groups)[0], trivial.to_numpy(bool)
    wins = statistics.beats(cube.values * sign, codes, cube.clusters, complete, baselines)
    return [";".join(trivial.index[row]) for row in wins]


def _finish_wide(table: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Select, order and type the columns of a wide board and sort it by rank."""
    extra = [group for group in GROUPS[len(CORE_GROUPS) :] if (metrics["group"] == group).any()]
    columns = ["dataset", "model", "explainer", "n_samples", "n_failed", "rank", "rank_low", "rank_high", "tie_group"]
    columns += ["mean_rank", *(f"{group}_rank" for group in (*CORE_GROUPS, *extra))]
    columns += [f"{name}{end}" for name in metrics["metric"] for end in ("", "_ci_low", "_ci_high")]
    columns += ["beats_baselines", "seconds_per_image", "status", "info"]
    table = table.assign(_status=table["status"].map(STATUSES.index))
    table = (
        table.sort_values(["rank", "_status", "model", "explainer"], na_position="last")
        if "rank" in table
        else (table.sort_values(["_status", "model", "explainer"]))
    )
    return _typed(table.reindex(columns=columns), (*_INTEGERS, "rank", "rank_low", "rank_high"))


def _finish_long(table: pd.DataFrame, metrics: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """Select, order and type the columns of a long board and sort it by model, metric and rank."""
    table = table.merge(metrics, on="metric").assign(**{name: run[name] for name in RUN_COLUMNS})
    table["dataset_fingerprint"] = table["dataset"].map(run["dataset_fingerprint"])
    pairs = zip(table["dataset"], table["model"], strict=True)
    table["model_fingerprint"] = [run["model_fingerprint"].get(pair, "") for pair in pairs]
    table = table.sort_values(["model", "_order", "metric", "rank", "explainer"], na_position="last")
    return _typed(table[LONG_COLUMNS], _INTEGERS)


def _typed(table: pd.DataFrame, integers: tuple[str, ...]) -> pd.DataFrame:
    present = {name: "Int64" for name in integers if name in table}
    return table.astype(present).reset_index(drop=True)


def _plain(cell: object) -> object:
    """Keep a text on one line and from being run as a formula by a spreadsheet."""
    if not isinstance(cell, str):
        return cell
    text = " ".join("".join(c if c.isprintable() else " " for c in cell).split())
    return f"'{text}" if cell.startswith(("\t", "\r")) or text.startswith(("=", "+", "-", "@")) else text


def write_text(path: Path, text: str) -> Path:
    """Write a file in one step: whoever looks finds the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write(boards: Boards, folder: Path) -> list[Path]:
    """Write ``<dataset>.csv`` and ``<dataset>.long.csv`` for every data set and return their paths.

    Numbers have 10 significant digits, an undefined value is an empty cell, texts are one line and no formula.
    """
    paths = []
    for tables, ending in ((boards.wide, "csv"), (boards.long, "long.csv")):
        for dataset, table in tables.items():
            plain = table.rename(columns=_plain).map(_plain)
            path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9._=,-]+', '_', dataset)}.{ending}"
            paths.append(write_text(path, plain.to_csv(index=False, float_format="%.10g", lineterminator="\n")))
    return sorted(paths)


def summary(wide: pd.DataFrame) -> pd.DataFrame:
    """Return the few columns of a wide board that fit a terminal, as text.

    Parameters
    ----------
    wide : DataFrame
        One of ``Boards.wide``.
    """
    text = pd.DataFrame(
        {"rank": [_span(row) for row in wide[["rank", "rank_low", "rank_high"]].itertuples(index=False)]}
    )
    text["tie"] = [_number(value, 0) for value in wide["tie_group"]]
    if wide["model"].nunique() > 1:
        text["model"] = wide["model"]
    text["explainer"] = wide["explainer"]
    for name in [column for column in wide if column.endswith("_rank")]:
        text[name.removesuffix("_rank")] = [_number(value, 1) for value in wide[name]]
    text["beats"] = wide["beats_baselines"].str.replace(";", ", ")
    text["s/image"] = [_number(value, 4) for value in wide["seconds_per_image"]]
    text["status"] = wide["status"]
    return text


def _number(value: Any, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def _span(row: tuple[Any, ...]) -> str:
    return "" if pd.isna(row[0]) else "{} [{}-{}]".format(*row)
