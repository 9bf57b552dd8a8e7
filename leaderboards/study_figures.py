"""Figures of the source studies, as PNG files: box plots by class, grids of pictures, pairs of scores."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from explainer_bench import write_atomically
from leaderboards.figures import SIGNED, UNSIGNED, strengths

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Tol's, for the colour-blind
_INNER = (0.1, 99.9)  # percentiles of token scores that a pair plot shows


class Picture(NamedTuple):
    """One cell of a grid.

    Parameters
    ----------
    image : ndarray
        (H, W, 3) uint8.
    map : ndarray, optional
        (H, W) or a grid of tokens, drawn over the image.
    signed : bool
        Whether negative values are evidence against.
    title : str
        What stands above it.
    """

    image: np.ndarray
    map: np.ndarray | None = None
    signed: bool = False
    title: str = ""


def write(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and return its path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return write_atomically(path, buffer.getvalue())


def boxes(values: pd.DataFrame, labels: Mapping[str, str], path: Path) -> Path:
    """Draw box plots: a panel per metric, a row per explainer, a box per class; whiskers at 1.5 interquartile ranges.

    Parameters
    ----------
    values : DataFrame
        ``metric, explainer, class, value``.
    labels : mapping
        What explainers and metrics are called; explainers from top to bottom in this order.
    path : Path
        Where to write.
    """
    explainers = [name for name in labels if name in set(values["explainer"])]
    classes, metrics = list(dict.fromkeys(values["class"])), list(dict.fromkeys(values["metric"]))
    size = 2.2 + 3.6 * len(metrics), 1.3 + 0.24 * len(explainers) * max(2, len(classes))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        rows = values[(values["metric"] == metric) & np.isfinite(values["value"])]
        _boxes_of(axes, rows, explainers, classes)
        axes.set_xlabel(labels.get(metric, metric))
    panels[0].set_yticks(range(len(explainers)), [labels[name] for name in explainers])
    panels[0].set_ylim(len(explainers) - 0.5, -0.5)
    key = [Patch(facecolor=_colour(row), label=name) for row, name in enumerate(classes)]
    figure.legend(handles=key, loc="outside upper center", ncols=len(classes), frameon=False)
    return write(figure, path)


def _boxes_of(axes: Axes, rows: pd.DataFrame, explainers: Sequence[str], classes: Sequence[str]) -> None:
    height = 0.8 / len(classes)
    for number, name in enumerate(classes):
        of_class = rows[rows["class"] == name]
        drawn = [of_class.loc[of_class["explainer"] == explainer, "value"].to_numpy() for explainer in explainers]
        places = np.arange(len(explainers)) + height * (number - (len(classes) - 1) / 2)
        parts = axes.boxplot(
            drawn,
            positions=places,
            widths=0.85 * height,
            orientation="horizontal",
            manage_ticks=False,
            patch_artist=True,
            medianprops={"color": "black"},
            flierprops={"markersize": 2, "marker": "."},
        )
        for box in parts["boxes"]:
            box.set(facecolor=_colour(number), linewidth=0.6)
    axes.axvline(0, color="grey", linewidth=0.6, zorder=0)
    axes.grid(axis="x", alpha=0.3)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def grid(rows: Mapping[str, Sequence[Picture]], columns: Sequence[str], path: Path) -> Path:
    """Draw pictures in rows and columns, each map at full strength by itself.

    Parameters
    ----------
    rows : mapping
        The pictures of each row by its name; as many as there are columns.
    columns : sequence of str
        What stands above the first row.
    path : Path
        Where to write.
    """
    figure = Figure(figsize=(0.6 + 1.75 * len(columns), 0.5 + 1.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for cell, picture in zip(line, pictures, strict=True):
            _draw(cell, picture)
        line[0].set_ylabel(name, fontsize=9)
    for cell, name in zip(axes[0], columns, strict=True):
        cell.set_title("\n".join(filter(None, [name, cell.get_title()])), fontsize=9)
    kinds = {p.signed for pictures in rows.values() for p in pictures if p.map is not None}
    for signed in sorted(kinds):
        _key(figure, axes, signed)
    return write(figure, path)


def _draw(axes: Axes, picture: Picture) -> None:
    height, width = picture.image.shape[:2]
    extent = (0.0, float(width), float(height), 0.0)
    axes.set(xticks=[], yticks=[])
    axes.set_title(picture.title, fontsize=8)
    if picture.map is None:
        axes.imshow(picture.image, extent=extent)
        return
    axes.imshow(picture.image.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=extent)
    if not np.isfinite(picture.map).all():
        axes.text(0.5, 0.5, "no map", transform=axes.transAxes, ha="center", color="red")
        return
    colours = _colours(picture.map.astype(float), picture.signed)
    axes.imshow(colours, extent=extent, interpolation="nearest")


def _colours(values: np.ndarray, signed: bool) -> np.ndarray:
    """(h, w) -> (h, w, 4): strong values cover the image, weak ones let it through."""
    strength = strengths(values if signed else values - values.min())
    colours = matplotlib.colormaps[SIGNED](0.5 + strength / 2) if signed else matplotlib.colormaps[UNSIGNED](strength)
    colours[..., 3] = np.abs(strength) ** 0.5 * 0.9 if signed else 0.65
    return colours


def _key(figure: Figure, axes: Any, signed: bool) -> None:
    norm = matplotlib.colors.Normalize(-1 if signed else 0, 1)
    scale = ScalarMappable(norm, SIGNED if signed else UNSIGNED)
    bar = figure.colorbar(scale, ax=axes, location="right", shrink=0.5, aspect=25, pad=0.01)
    bar.set_ticks([-1, 0, 1] if signed else [0, 1], labels=["against", "0", "for"] if signed else ["least", "most"])
    bar.ax.tick_params(labelsize=8)


def pairs(values: Mapping[str, np.ndarray], correlations: Mapping[tuple[str, str], float], path: Path) -> Path:
    """Draw every pair of variables: densities below the diagonal, histograms on it, Pearson's r above.

    Parameters
    ----------
    values : mapping
        (N,) float64 by name, the same N for all.
    correlations : mapping
        Pearson's r by pair of names, in the order of `values`.
    path : Path
        Where to write.
    """
    names = list(values)
    figure = Figure(figsize=(2.1 * len(names) + 0.8, 2.0 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(names), sharex="col", squeeze=False)
    ranges = {name: _range(values[name]) for name in names}
    for row, of_row in enumerate(names):
        for column, of_column in enumerate(names):
            cell = axes[row, column]
            if row == column:
                cell.hist(values[of_row], bins=60, range=ranges[of_row], color=COLOURS[0], log=True)
            elif row > column:
                _density(cell, [values[of_column], values[of_row]], [ranges[of_column], ranges[of_row]])
            else:
                _correlation(cell, correlations[of_row, of_column])
            cell.tick_params(labelsize=7)
            cell.yaxis.set_minor_formatter(NullFormatter())
            cell.xaxis.set_major_locator(MaxNLocator(4))
            if row == len(names) - 1:
                cell.set_xlabel(of_column)
        axes[row, 0].set_ylabel(of_row if row else f"{of_row}\n(count)")
    return write(figure, path)


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, _INNER)
    return (float(low), float(high)) if high > low else (float(low) - 1, float(low) + 1)


def _density(axes: Axes, pair: Sequence[np.ndarray], limits: Sequence[tuple[float, float]]) -> None:
    (left, right), (bottom, top) = limits
    inside = (pair[0] >= left) & (pair[0] <= right) & (pair[1] >= bottom) & (pair[1] <= top)
    extent = (left, right, bottom, top)
    axes.hexbin(pair[0][inside], pair[1][inside], gridsize=40, bins="log", mincnt=1, cmap="viridis", extent=extent)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _correlation(axes: Axes, value: float) -> None:
    axes.set(yticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False)
    axes.text(0.5, 0.5, f"r = {value:.2f}", transform=axes.transAxes, ha="center", va="center", fontsize=13)
