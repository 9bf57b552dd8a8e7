"""The pictures of `goncalves2022`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from captum.attr import visualization
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from explainer_bench import write_atomically

_LINE = {True: "-", False: "--"}
_CHANCE = "0.4"


class Column(NamedTuple):
    """The maps (N, H, W) of one method for one model."""

    model: str
    method: str
    maps: np.ndarray


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return write_atomically(path, buffer.getvalue())


def _colours(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return dict(zip(names, matplotlib.colormaps["Dark2"].colors, strict=False))  # type: ignore[attr-defined]


def _of_models(table: pd.DataFrame, pretrained: Mapping[str, bool]) -> Iterator[tuple[pd.DataFrame, dict[str, object]]]:
    """Yield each model's rows by share, and how it is drawn: the same in every figure; dashed where not pretrained."""
    colours = _colours(list(pretrained))
    for i, name in enumerate(pretrained):
        rows = table[table["model"] == name].sort_values("fraction")
        label = name if pretrained[name] else f"{name}, from scratch"
        style = {"color": colours[name], "label": label, "linestyle": _LINE[pretrained[name]], "marker": "o"}
        shift = 1.04 ** (i - (len(pretrained) - 1) / 2)  # so that intervals do not hide each other
        yield rows.assign(x=rows["fraction"] * shift), {**style, "markersize": 4, "linewidth": 1.3}


def _shares(axes: Axes) -> None:
    ticks = [1, 10, 50, 100]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("% of the training images")
    axes.grid(alpha=0.3)


def _draw(axes: Axes, rows: pd.DataFrame, style: dict[str, object], column: str) -> None:
    axes.plot(rows["x"], rows[column], **style)  # type: ignore[arg-type]
    if f"{column}_low" in rows:
        axes.vlines(rows["x"], rows[f"{column}_low"], rows[f"{column}_high"], color=style["color"], linewidth=1)  # type: ignore[arg-type]


def accuracy(table: pd.DataFrame, pretrained: Mapping[str, bool], path: Path) -> Path:
    """Draw published accuracy, ours, and our balanced accuracy and AUROC over the share of the training images.

    Parameters
    ----------
    table : DataFrame
        ``model, fraction, published, accuracy, balanced_accuracy, auroc``, with ``_low`` and ``_high``, and
        ``majority``.
    pretrained : mapping
        Every model, and whether it began from ImageNet weights.
    path : Path
        The PNG file.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = {"published": "accuracy, published", "accuracy": "accuracy, ours"}
    panels |= {"balanced_accuracy": "balanced accuracy, ours", "auroc": "AUROC, ours"}
    grid = figure.subplots(1, len(panels), sharey=True)
    majority = float(table["majority"].iloc[0])
    for axes, (column, title) in zip(grid, panels.items(), strict=True):
        level = 0.5 if column in ("balanced_accuracy", "auroc") else majority
        axes.axhline(level, color=_CHANCE, linestyle=":", label="always the more frequent class")
        for rows, style in _of_models(table, pretrained):
            _draw(axes, rows, style, column)
        axes.set_title(title, fontsize=10)
        _shares(axes)
    figure.legend(*grid[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return _save(figure, path)


def explanations(table: pd.DataFrame, pretrained: Mapping[str, bool], path: Path) -> Path:
    """Draw, for every method, srg over the best trivial row by the share of the training images.

    Parameters
    ----------
    table : DataFrame
        ``model, fraction, explainer, over_trivial, over_trivial_low, over_trivial_high``.
    pretrained, path
        As for `accuracy`.
    """
    methods = list(table["explainer"].unique())
    figure = Figure(figsize=(3 * len(methods) + 2, 3.8), layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, len(methods), sharey=True))
    for axes, method in zip(grid, methods, strict=True):
        axes.axhline(0, color=_CHANCE, linestyle=":", label="best trivial row")
        for rows, style in _of_models(table[table["explainer"] == method], pretrained):
            _draw(axes, rows, style, "over_trivial")
        axes.set_title(method, fontsize=10)
        _shares(axes)
    grid[0].set_ylabel("srg over the best trivial row")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return _save(figure, path)


def grid(rows: Sequence[str], images: Sequence[np.ndarray], columns: Sequence[Column], path: Path) -> Path:
    """Draw images, a row each, with the maps of every model and method blended over them, as the study did.

    Parameters
    ----------
    rows : sequence of str
        What stands before each row.
    images : sequence of ndarray
        (H, W, 3) uint8.
    columns : sequence of Column
        One map per image each, those of a model one after another.
    path : Path
        The PNG file.
    """
    count = len(columns) + 1
    layout = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    figure = Figure(figsize=(1.55 * count + 0.3, 1.6 * len(images) + 0.75), layout=layout)
    cells = figure.subplots(len(images), count, squeeze=False)
    for i, image in enumerate(images):
        cells[i, 0].imshow(image)
        cells[i, 0].set_ylabel(rows[i], fontsize=9)
        for axes, column in zip(cells[i, 1:], columns, strict=True):
            _blend(figure, axes, image, column.maps[i])
        for axes in cells[i]:
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(cells[0], _titles(columns), strict=True):
        axes.set_title(title, fontsize=8.5)
    return _save(figure, path)


def _titles(columns: Sequence[Column]) -> list[str]:
    """Name the model over its first column only."""
    titles = ["image"]
    for model, group in groupby(columns, key=lambda column: column.model):
        titles += [f"{model if i == 0 else ''}\n{column.method}" for i, column in enumerate(group)]
    return titles


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
