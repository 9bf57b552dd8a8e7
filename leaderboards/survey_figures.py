"""Figures of the survey of attention mechanisms (Goncalves et al. 2022), as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from captum.attr import visualization
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from leaderboards.study_figures import write

Kinds = Mapping[str, tuple[str, bool]]
_SHARES = (1, 10, 50, 100)
_COLOURS = ("#4477aa", "#ee6677", "#66ccee", "#aa3377", "#228833", "#ccbb44", "#222222")  # Tol's, for the colour-blind
_MARKERS = ("o", "s", "D")
_CHANCE = "0.4"


class Column(NamedTuple):
    """The maps (N, H, W) of one method for one model."""

    model: str
    method: str
    maps: np.ndarray


def _of_models(table: pd.DataFrame, kinds: Kinds) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """Yield each model's rows by share, with places that keep intervals apart, and how it is drawn in every figure."""
    backbones = list(dict.fromkeys(backbone for backbone, _ in kinds.values()))
    for number, (name, (backbone, pretrained)) in enumerate(kinds.items()):
        rows = table[table["model"] == name].sort_values("fraction")
        shift = 0.09 * (number - (len(kinds) - 1) / 2)
        style = {
            "color": _COLOURS[number],
            "marker": _MARKERS[backbones.index(backbone)],
            "linestyle": "-" if pretrained else "--",
            "label": name if pretrained else f"{name}, from scratch",
        }
        yield rows.assign(x=rows["fraction"].map(_SHARES.index) + shift), style


def _draw(axes: Axes, rows: pd.DataFrame, style: Mapping[str, Any], column: str) -> None:
    axes.plot(rows["x"], rows[column], markersize=4.5, linewidth=1.2, **style)
    if f"{column}_low" in rows:
        axes.vlines(rows["x"], rows[f"{column}_low"], rows[f"{column}_high"], color=style["color"], linewidth=1)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(_SHARES)), [str(share) for share in _SHARES])
    axes.set_xlim(-0.45, len(_SHARES) - 0.55)
    axes.set_xlabel("% of the training images")
    axes.grid(alpha=0.3)


def accuracy(table: pd.DataFrame, kinds: Kinds, path: Path) -> Path:
    """Draw published accuracy, ours, and our balanced accuracy and AUROC by the share of the training images.

    Parameters
    ----------
    table : DataFrame
        ``model, fraction, published, accuracy, balanced_accuracy, auroc``, with ``_low`` and ``_high``, and
        ``majority``.
    kinds : mapping
        Of every model its backbone, and whether it began from ImageNet weights.
    path : Path
        The PNG file.
    """
    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = {"published": "accuracy, published", "accuracy": "accuracy, ours"}
    panels |= {"balanced_accuracy": "balanced accuracy, ours", "auroc": "AUROC, ours"}
    cells = figure.subplots(1, len(panels))
    cells[1].sharey(cells[0])
    cells[3].sharey(cells[2])
    majority = float(table["majority"].iloc[0])
    for axes, (column, title) in zip(cells, panels.items(), strict=True):
        level = majority if column in ("published", "accuracy") else 0.5
        axes.axhline(level, color=_CHANCE, linestyle=":", label="always the more frequent class")
        for rows, style in _of_models(table, kinds):
            _draw(axes, rows, style, column)
        _finish(axes, title)
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return write(figure, path)


def explanations(table: pd.DataFrame, kinds: Kinds, path: Path) -> Path:
    """Draw, for every method, srg over the best trivial row by the share of the training images.

    Parameters
    ----------
    table : DataFrame
        ``model, fraction, explainer, over_trivial, over_trivial_low, over_trivial_high``.
    kinds, path
        As for `accuracy`.
    """
    methods = list(table["explainer"].unique())
    figure = Figure(figsize=(2.7 * len(methods) + 2.5, 4), layout="constrained")
    cells = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(cells, methods, strict=True):
        axes.axhline(0, color=_CHANCE, linestyle=":", label="best trivial row")
        for rows, style in _of_models(table[table["explainer"] == method], kinds):
            _draw(axes, rows, style, "over_trivial")
        _finish(axes, method)
    cells[0].set_ylabel("srg over the best trivial row")
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return write(figure, path)


def grid(rows: Sequence[str], images: Sequence[np.ndarray], columns: Sequence[Column], path: Path) -> Path:
    """Draw images with the maps of every model, a column each, and every method, below one another; as the study did.

    Parameters
    ----------
    rows : sequence of str
        What stands before each image.
    images : sequence of ndarray
        (H, W, 3) uint8.
    columns : sequence of Column
        One map per image each, those of a model one after another; what is not in the first model's row is named.
    path : Path
        The PNG file.
    """
    by_model = {model: list(group) for model, group in groupby(columns, key=lambda column: column.model)}
    methods = [column.method for column in max(by_model.values(), key=len)]
    size = 1.75 * (len(by_model) + 1) + 0.3, 1.75 * len(images) * len(methods) + 0.4
    layout = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    figure = Figure(figsize=size, layout=layout)
    space = figure.add_gridspec(len(images) * len(methods), len(by_model) + 1)
    for i, image in enumerate(images):
        first = i * len(methods)
        _cell(figure, space[first, 0], "image" if i == 0 else "", rows[i]).imshow(image)
        for place, (model, of_model) in enumerate(by_model.items(), start=1):
            for line, (column, usual) in enumerate(zip(of_model, methods, strict=False)):
                own = f"{model}, {column.method}" if column.method != usual else ""
                title = own or (model if i == line == 0 else "")
                axes = _cell(figure, space[first + line, place], title, usual if place == 1 else "")
                _blend(figure, axes, image, column.maps[i])
    return write(figure, path)


def _cell(figure: Figure, place: SubplotSpec, title: str, label: str) -> Axes:
    axes = figure.add_subplot(place)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    return axes


def _blend(figure: Figure, axes: Axes, image: np.ndarray, values: np.ndarray) -> None:
    if not np.any(values):  # captum cannot scale it
        axes.imshow(image.mean(2), cmap="gray")
        axes.set_xlabel("zero everywhere", fontsize=7)
        return
    visualization.visualize_image_attr(
        values[..., None] / np.abs(values).max(),  # it scales maps itself, but warns of small ones
        image,
        "blended_heat_map",
        sign="all",
        plt_fig_axis=(figure, axes),
        cmap="bwr",
        alpha_overlay=0.5,
        use_pyplot=False,
    )
