"""One self-contained web page: sortable boards with their uncertainty, and a grid of pictures."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from explainer_bench import write_atomically
from leaderboards import figures
from leaderboards.board import RUN_COLUMNS, Boards, csv_name

GROUPS = {
    "faithfulness": "Does the map name what the model used? Perturbing what it marks must change the output.",
    "localization": "Does the map lie on the region of interest? A model may be right for another reason.",
    "plausibility": "Does the map lie where a person would look? That need not be what the model uses.",
    "compactness": "Is the evidence concentrated in few places? A map can be compact and wrong.",
    "class_sensitivity": "Does the map change with the class it explains? A class-blind map cannot explain one.",
    "robustness": "Does the map stay when the input changes imperceptibly?",
    "randomization": "Does the map change when the model's weights are destroyed?",
    "axiomatic": "Does the map keep the rules that it should follow by construction?",
}


@cache
def _library() -> str:
    """DataTables as bundled by itables, its licences included: gzip, base64."""
    source = resources.files("itables").joinpath("html/dt_bundle.js").read_bytes()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()


def _text(value: Any, digits: int = 3) -> str:
    """Write a number for people: three significant digits, no exponent where it is avoidable."""
    if pd.isna(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        decimals = digits - 1 - int(np.floor(np.log10(abs(value)))) if value else digits - 1
        return f"{value:.{min(max(decimals, 0), digits)}f}"
    return f"{value:.1e}"


def _bar(low: Any, high: Any, value: Any, floor: float, ceiling: float) -> dict[str, str] | None:
    """Place an interval and its centre on a bar from `floor` to `ceiling`, in percent."""
    if pd.isna(low) or pd.isna(high) or ceiling <= floor:
        return None
    left, right, mark = (100 * (float(v) - floor) / (ceiling - floor) for v in (low, high, value))
    return {"left": f"{left:.1f}", "width": f"{max(right - left, 1):.1f}", "mark": f"{mark:.1f}"}


def _metric_cells(board: pd.DataFrame, long: pd.DataFrame, metric: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return one cell per row of the board, with its interval on the scale that the column shares."""
    name = metric["metric"]
    facts = long[long["metric"] == name].set_index("explainer")
    low, high = board[f"{name}_ci_low"], board[f"{name}_ci_high"]
    worst = "-1e300" if metric["higher_is_better"] else "1e300"
    cells = []
    for explainer, value, start, end in zip(board["explainer"], board[name], low, high, strict=True):
        fact = facts.loc[explainer]
        title = f"{name} of {explainer}: "
        if pd.isna(value):
            title += "undefined or not scored"
        else:
            title += f"mean {_text(value, 4)}, 95 % interval {_text(start, 4)} to {_text(end, 4)}, n = {fact['n']}, "
            title += f"rank {fact['rank']:g} ({fact['rank_low']:g} to {fact['rank_high']:g})"
        bar = _bar(start, end, value, low.min(), high.max())
        sort = worst if pd.isna(value) else repr(float(value))
        top = not pd.isna(value) and fact["tie_group"] == 1
        cells.append({"text": _text(value), "sort": sort, "title": title, "bar": bar, "top": top})
    return cells


def _beats(row: pd.Series, trivial: list[str]) -> dict[str, Any]:
    """Say which trivial rows a row beats, out of those it could."""
    names = [name for name in str(row["beats_baselines"]).split(";") if name]
    rivals = [name for name in trivial if name != row["explainer"]]
    return {"names": names, "rivals": len(rivals), "not": [name for name in rivals if name not in names]}


def _ranked_groups(board: pd.DataFrame) -> list[str]:
    return [group for group in GROUPS if f"{group}_rank" in board]


def _rows(board: pd.DataFrame, long: pd.DataFrame, boards: Boards) -> list[dict[str, Any]]:
    trivial = sorted(name for name in board.loc[board["n_samples"] > 0, "explainer"] if name in boards.trivial)
    metrics = boards.metrics.to_dict("records")
    columns = [_metric_cells(board, long, metric) for metric in metrics]
    ranks = [f"{name}_rank" for name in _ranked_groups(board)]
    last = board["rank"].max()
    rows = []
    for position in range(len(board)):
        row = board.iloc[position]
        ranked = not pd.isna(row["rank"])
        bar = _bar(row["rank_low"], row["rank_high"], row["rank"], 1, last) if ranked else None
        view = {"row": row, "ranked": ranked, "trivial": row["explainer"] in boards.trivial, "position": position}
        view |= {"bar": bar, "beats": _beats(row, trivial), "cells": [column[position] for column in columns]}
        view |= {"groups": [row[name] for name in ranks], "seconds": _text(row["seconds_per_image"], 2)}
        rows.append(view)
    return rows


def _tiles(picture: Mapping[str, Any], order: list[str], trivial: frozenset[str]) -> list[dict[str, Any]]:
    """Render one sample: the image, its regions, and the maps in the order of the board."""
    pixels, roi = picture["image"], picture["roi"]
    thumbnail = figures.image(pixels)
    tiles: list[dict[str, Any]] = [{"name": "image", "thumbnail": thumbnail, "kind": "given"}]
    if roi is not None and roi.any():
        name = ": ".join(filter(None, ["region of interest", picture.get("region", "")]))
        tiles.append({"name": name, "thumbnail": figures.outline(thumbnail, roi), "kind": "given"})
    for name, region in picture.get("others", {}).items():
        if region.any():
            tiles.append({"name": name, "thumbnail": figures.outline(thumbnail, region), "kind": "given"})
    for name in sorted(picture["maps"], key=lambda name: (order.index(name) if name in order else len(order), name)):
        signed = bool(picture["signed"].get(name, False))
        drawn = figures.heat_map(pixels, np.asarray(picture["maps"][name]), signed)
        drawn = None if drawn is None else figures.outline(drawn, roi)
        tiles.append({"name": name, "thumbnail": drawn, "kind": "signed" if signed else "unsigned"})
    uris = ["" if tile["thumbnail"] is None else figures.data_uri(tile["thumbnail"]) for tile in tiles]
    return [tile | {"uri": uri, "trivial": tile["name"] in trivial} for tile, uri in zip(tiles, uris, strict=True)]


def _sections(boards: Boards, pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one section per data set x model."""
    sections: list[dict[str, Any]] = []
    for dataset, wide in boards.wide.items():
        for model in sorted(wide["model"].unique()):
            board = wide[wide["model"] == model]
            long = boards.long[dataset][boards.long[dataset]["model"] == model]
            shown = [dict(p) for p in pictures if (p["dataset"], p["model"]) == (dataset, model)]
            order = board["explainer"].tolist()
            section = {"dataset": dataset, "model": model, "rows": _rows(board, long, boards), "id": len(sections)}
            section |= {"pictures": [p | {"tiles": _tiles(p, order, boards.trivial)} for p in shown]}
            section |= {"facts": long.iloc[0], "samples": board["n_samples"].max(), "csv": csv_name(dataset, "csv")}
            section |= {"long_csv": csv_name(dataset, "long.csv")}
            section |= {"groups": _ranked_groups(board)}
            section |= {"region": shown[0].get("region", "") if shown else ""}
            section |= {"proven": bool(shown and shown[0].get("proven"))}
            sections.append(section)
    return sections


def _metric_groups(metrics: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the metrics by group, in the order of the columns."""
    metrics = metrics if "description" in metrics else metrics.assign(description="")
    groups = metrics.groupby("group", sort=False)
    return [{"name": n, "meaning": GROUPS[str(n)], "metrics": rows.to_dict("records")} for n, rows in groups]


def write(boards: Boards, pictures: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write ``index.html``, which needs nothing besides itself, and return its path.

    Parameters
    ----------
    boards : Boards
        What `leaderboards.build` returned.
    pictures : sequence of mapping
        One per sample to show: ``dataset, model, sample, title, image`` (H, W, 3) uint8, ``roi`` (H, W) bool or None,
        ``maps`` {explainer: (H, W) float}, ``signed`` {explainer: bool}. Where the data set names its regions also
        ``region``, the ROI's name, ``others`` {name: (H, W) bool}, and ``proven``: that the model uses the ROI.
    folder : Path
        Where to write; created if need be.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = lambda name: Markup("<wbr>").join(_parts(name))
    environment.filters["number"] = _text
    html = environment.get_template("index.html.j2").render(
        sections=_sections(boards, pictures),
        metric_groups=_metric_groups(boards.metrics),
        run_columns=RUN_COLUMNS,
        library=_library(),
        gradients={"signed": figures.gradient(True), "unsigned": figures.gradient(False)},
    )
    return write_atomically(Path(folder) / "index.html", html.encode())


def _parts(name: str) -> list[str]:
    """Split a name where a line may break: after each underscore."""
    *heads, tail = name.split("_")
    return [*(f"{head}_" for head in heads), tail]
