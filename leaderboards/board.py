"""From scores to boards: one wide and one long table per data set, and their CSV files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from explainer_bench import RequestError, write_atomically
from leaderboards import statistics
from leaderboards.aggregate import CORE_GROUPS, build_model

# in the order of the columns: what looks right stands beside what is right
GROUPS = (*CORE_GROUPS[:2], "plausibility", *CORE_GROUPS[2:], "robustness", "randomization", "axiomatic")
STATUSES = ("ok", "incomplete", "failed", "unsupported")
RUN_COLUMNS = ("seed", "device", "precision", "quantus", "torch", "explainer_bench", "git", "utc")
_SHORT = {  # for a terminal; `mean_rank` is no group's
    "mean": "mean",
    "faithfulness": "faithful",
    "localization": "localiz.",
    "compactness": "compact",
    "class_sensitivity": "class s.",
    "robustness": "robust",
    "randomization": "randomiz.",
    "axiomatic": "axioms",
}
_LONG = (
    "dataset, dataset_fingerprint, model, model_fingerprint, explainer, explainer_version, params, metric, "
    "metric_version, group, higher_is_better, n, n_failed, mean, std, ci_low, ci_high, chance, rank, rank_low, "
    "rank_high, tie_group, seconds_per_image, seed, device, precision, quantus, torch, explainer_bench, git, utc, "
    "status, info"
)
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
    metrics : DataFrame
        The table of metrics as given, in the order of the columns.
    """

    wide: dict[str, pd.DataFrame]
    long: dict[str, pd.DataFrame]
    trivial: frozenset[str]
    metrics: pd.DataFrame


def build(
    scores: pd.DataFrame,
    metrics: pd.DataFrame,
    explainers: pd.DataFrame,
    run: Mapping[str, Any],
    n_boot: int = 10_000,
    seed: int = 0,
) -> Boards:
    """Aggregate per-sample scores into boards with paired uncertainty.

    Explainers are ranked within each data set x model. An explainer without a cell that others have is listed below
    the others, without a mean rank. An undefined score counts as the worst that any explainer has on its sample; a
    sample on which a metric is undefined for all stays out.

    Parameters
    ----------
    scores : DataFrame
        One row per sample x explainer x metric, of finished cells only: ``dataset, model, explainer, metric, sample,
        group`` (samples that are resampled together), ``value`` (NaN = undefined), ``reason, chance``.
    metrics : DataFrame
        One row per metric: ``metric, metric_version, group, higher_is_better``; the page also shows a
        ``description`` if there is one.
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
            tables.append(build_model(ours, metrics, rows_of_model.sort_values("explainer"), n_boot, rng))
        wide[str(dataset)] = _finish_wide(pd.concat([table[0] for table in tables]), metrics)
        long[str(dataset)] = _finish_long(pd.concat([table[1] for table in tables]), metrics, run)
    trivial = frozenset(explainers.loc[explainers["trivial"].astype(bool), "explainer"])
    return Boards(wide, long, trivial, metrics.drop(columns="_order"))


def _check(scores: pd.DataFrame, metrics: pd.DataFrame, explainers: pd.DataFrame, run: Mapping[str, Any]) -> None:
    for name, table in (("scores", scores), ("metrics", metrics), ("explainers", explainers)):
        if missing := sorted(set(_NEEDED[name].split(", ")) - set(table.columns)):
            raise RequestError(f"the table of {name} lacks {', '.join(missing)}: add the missing columns.")
    if missing := sorted({*RUN_COLUMNS, "dataset_fingerprint", "model_fingerprint"} - set(run)):
        raise RequestError(f"the description of the run lacks {', '.join(missing)}: add them.")
    for what, column, known in (("group", metrics["group"], GROUPS), ("status", explainers["status"], STATUSES)):
        if odd := sorted(set(column) - set(known)):
            raise RequestError(f"unknown {what} {odd[0]!r}: use one of {', '.join(known)}.")
    keys = ["dataset", "model", "explainer"]
    for columns, table in ((keys, explainers), (["metric"], metrics)):
        known_rows = set(table[columns].itertuples(index=False, name=None))
        found = set(scores[columns].drop_duplicates().itertuples(index=False, name=None))
        if strangers := sorted(found - known_rows):
            raise RequestError(f"scores of {' / '.join(strangers[0])}, which is in no table of {columns[-1]}s: add it.")
    if scores.duplicated([*keys, "metric", "sample"]).any():
        first = scores[scores.duplicated([*keys, "metric", "sample"])].iloc[0]
        raise RequestError(f"sample {first['sample']} of {first['explainer']} has two {first['metric']}: keep one.")


def _finish_wide(table: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Select, order and type the columns of a wide board and sort it by rank."""
    extra = [group for group in GROUPS if group not in CORE_GROUPS and (metrics["group"] == group).any()]
    columns = ["dataset", "model", "explainer", "n_samples", "n_failed", "rank", "rank_low", "rank_high", "tie_group"]
    columns += ["mean_rank", *(f"{group}_rank" for group in (*CORE_GROUPS, *extra))]
    columns += [f"{name}{end}" for name in metrics["metric"] for end in ("", "_ci_low", "_ci_high")]
    columns += ["beats_baselines", "seconds_per_image", "status", "info"]
    table = table.reindex(columns=[*columns, "_status"]).assign(_status=table["status"].map(STATUSES.index))
    table = table.sort_values(["rank", "_status", "model", "explainer"], na_position="last")
    return _typed(table[columns], (*_INTEGERS, "rank", "rank_low", "rank_high"))


def _finish_long(table: pd.DataFrame, metrics: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """Select, order and type the columns of a long board and sort it by model, metric and rank."""
    table = table.merge(metrics, on="metric").assign(**{name: run[name] for name in RUN_COLUMNS})
    table["dataset_fingerprint"] = table["dataset"].map(run["dataset_fingerprint"])
    pairs = zip(table["dataset"], table["model"], strict=True)
    table["model_fingerprint"] = [run["model_fingerprint"].get(pair, "") for pair in pairs]
    table = table.sort_values(["model", "_order", "metric", "rank", "explainer"], na_position="last")
    return _typed(table[_LONG.split(", ")], _INTEGERS)


def _typed(table: pd.DataFrame, integers: tuple[str, ...]) -> pd.DataFrame:
    present = {name: "Int64" for name in integers if name in table}
    return table.astype(present).reset_index(drop=True)


def _plain(cell: object) -> object:
    """Keep a text on one line and from being run as a formula by a spreadsheet."""
    if not isinstance(cell, str):
        return cell
    text = " ".join("".join(c if c.isprintable() else " " for c in cell).split())
    return f"'{text}" if cell.startswith(("\t", "\r")) or text.startswith(("=", "+", "-", "@")) else text


def csv_name(dataset: str, ending: str) -> str:
    """Return the file name of a board: ``<dataset>.csv`` or ``<dataset>.long.csv``, safe on every system."""
    return f"{re.sub(r'[^A-Za-z0-9._=,-]+', '_', dataset)}.{ending}"


def write(boards: Boards, folder: Path) -> list[Path]:
    """Write ``<dataset>.csv`` and ``<dataset>.long.csv`` for every data set and return their paths.

    Numbers have 10 significant digits, an undefined value is an empty cell, texts are one line and no formula.
    """
    paths = []
    for tables, ending in ((boards.wide, "csv"), (boards.long, "long.csv")):
        for dataset, table in tables.items():
            plain = table.rename(columns=_plain).map(_plain)
            path = Path(folder) / csv_name(dataset, ending)
            text = plain.to_csv(index=False, float_format="%.10g", lineterminator="\n")
            paths.append(write_atomically(path, text.encode()))
    return sorted(paths)


def summary(wide: pd.DataFrame, trivial: frozenset[str]) -> pd.DataFrame:
    """Return the few columns of a wide board that fit a terminal, as text.

    Parameters
    ----------
    wide : DataFrame
        One of ``Boards.wide``.
    trivial : set of str
        ``Boards.trivial``.
    """
    text = pd.DataFrame(
        {"rank": [_span(row) for row in wide[["rank", "rank_low", "rank_high"]].itertuples(index=False)]}
    )
    text["tie"] = [_number(value, 0) for value in wide["tie_group"]]
    if wide["model"].nunique() > 1:
        text["model"] = wide["model"]
    text["explainer"] = wide["explainer"]
    for name in [column for column in wide.columns.astype(str) if column.endswith("_rank") and wide[column].any()]:
        text[_SHORT.get(name.removesuffix("_rank"), name)] = [_number(value, 1) for value in wide[name]]
    beaten = wide["beats_baselines"].str.split(";")
    unbeaten = [sorted(trivial - set(names)) for names in beaten]
    rows = zip(wide["explainer"], wide["rank"], unbeaten, strict=True)
    text["does not beat"] = [
        "(trivial)" if name in trivial else "" if pd.isna(rank) else _unbeaten(names, len(trivial))
        for name, rank, names in rows
    ]
    text["s/image"] = [_number(value, 4) for value in wide["seconds_per_image"]]
    return text if (wide["status"] == "ok").all() else text.assign(status=wide["status"])


def _unbeaten(names: list[str], trivial: int) -> str:
    return "any" if len(names) == trivial > 1 else ", ".join(names) or "none: it beats all"


def _number(value: Any, digits: int) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def _span(row: tuple[Any, ...]) -> str:
    return "" if pd.isna(row[0]) else "{} [{}-{}]".format(*row)
