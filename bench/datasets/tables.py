"""CSV files that come with data sets, read with one clear line for whatever is wrong with them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bench.datasets.files import contents
from explainer_bench import RequestError, did_you_mean


def table(path: Path, columns: Sequence[str], key: str = "") -> pd.DataFrame:
    """Read some columns of a CSV file, or of the same file gzipped, as stripped text: no id is taken for a number.

    Parameters
    ----------
    path : Path
        The file without ``.gz``.
    columns : sequence of str
        Those that are needed; others are ignored.
    key : str, optional
        The column whose values must be there and differ.

    Raises
    ------
    RequestError
        Naming the file, where it is missing, unreadable or empty, lacks a column, repeats a key, or has a row that is
        longer than the header.
    """
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    if not path.is_file():
        raise RequestError(f"{path.parent} has no {path.stem}, gzipped or not: {contents(path.parent)}.")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise RequestError(f"{path} cannot be read as a CSV file ({reason}): replace the file.") from error
    _check_width(path, frame)
    frame.columns = frame.columns.str.strip()
    for column in columns:
        if column not in frame:
            hint = did_you_mean(column, list(frame.columns))
            raise RequestError(f"{path} has no column {column!r}; the header must name it.{hint}")
    frame = frame[list(columns)].apply(lambda texts: texts.str.strip())
    if frame.empty:
        raise RequestError(f"{path} has a header and no rows: copy the file again.")
    if key:
        _check_key(path, frame[key])
    return frame


def _check_width(path: Path, frame: pd.DataFrame) -> None:
    """Refuse rows longer than the header: where the first is, pandas shifts all and makes an index of the rest."""
    if not isinstance(frame.index, pd.RangeIndex):
        fields, width = frame.shape[1] + frame.index.nlevels, frame.shape[1]
        raise RequestError(
            f"{path}, line 2: {fields} fields under a header of {width}; quote texts with commas, or name every column."
        )


def _check_key(path: Path, texts: pd.Series) -> None:
    if (texts == "").any():
        line = int((texts == "").to_numpy().argmax()) + 2
        raise RequestError(f"{path}, line {line}: the column {texts.name!r} is empty; fill it in or remove the line.")
    if texts.duplicated().any():
        twice = texts[texts.duplicated()].iloc[0]
        raise RequestError(f"{path} lists {texts.name} {twice!r} more than once: remove the lines that are too many.")


def coded(path: Path, texts: pd.Series, codes: Mapping[str, int]) -> list[int]:
    """Return the number of each text of a column.

    Raises
    ------
    RequestError
        Naming file, line and text, where one is none of `codes`.
    """
    if not (known := texts.isin(list(codes))).all():
        row = int((~known).to_numpy().argmax())
        expected = ", ".join(repr(code) for code in list(codes)[:10]) + (" ..." if len(codes) > 10 else "")
        raise RequestError(
            f"{path}, line {row + 2}: {texts.name} is {texts.iloc[row]!r}, expected one of {expected}; correct it."
        )
    return [codes[text] for text in texts]


def numbers(path: Path, texts: pd.Series) -> pd.Series:
    """Return a column as float64.

    Raises
    ------
    RequestError
        Naming file, line and text, where one is no finite number.
    """
    values = pd.to_numeric(texts, errors="coerce")
    wrong = values.isna() | values.abs().eq(float("inf"))
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise RequestError(f"{path}, line {row + 2}: {texts.name} is {texts.iloc[row]!r}, not a number; correct it.")
    return values.astype("float64")
