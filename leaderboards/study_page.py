"""The page of a reproduced study: its tables and figures, in one file that needs nothing besides itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import pandas as pd

from explainer_bench import write_atomically


class Section(Protocol):
    """What stands under one heading."""

    @property
    def name(self) -> str:
        """Name of the table's CSV file."""

    @property
    def title(self) -> str:
        """The heading."""

    @property
    def text(self) -> str:
        """What to know in order to read it."""

    @property
    def table(self) -> pd.DataFrame | None:
        """The numbers."""

    @property
    def figures(self) -> Mapping[str, Path]:
        """PNG files by caption."""


def write(title: str, reference: str, sections: Sequence[Section], missing: Sequence[str], folder: Path) -> Path:
    """Write ``index.html`` and return its path.

    Parameters
    ----------
    title, reference : str
        Of the study.
    sections : sequence of Section
        In order.
    missing : sequence of str
        What was not there, one line each.
    folder : Path
        Where to write; created if need be.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [{"section": section, "rows": _rows(section.table), "figures": _embedded(section)} for section in sections]
    html = environment.get_template("study.html.j2").render(
        title=title, reference=reference, sections=shown, missing=missing
    )
    return write_atomically(Path(folder) / "index.html", html.encode())


def _rows(table: pd.DataFrame | None) -> list[list[dict[str, Any]]]:
    """Return the cells of a table as text, and whether each is a number."""
    if table is None:
        return []
    return [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]


def _cell(value: object) -> dict[str, Any]:
    if value is None or value is pd.NA or value != value:
        return {"text": "", "number": True}
    return {"text": f"{value:.3f}" if isinstance(value, float) else str(value), "number": not isinstance(value, str)}


def _embedded(section: Section) -> list[dict[str, str]]:
    return [
        {"caption": caption, "uri": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"}
        for caption, path in section.figures.items()
    ]
