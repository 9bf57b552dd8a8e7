"""The store: one file per cell, named by a hash of all that determines it, written atomically; exists means done."""

from __future__ import annotations

import hashlib
import io
import json
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from explainer_bench import Component, RequestError, write_atomically


def key(*parts: Any) -> str:
    """Return a hash of `parts` (anything JSON can hold) in 24 hex digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def identity(component: Component) -> dict[str, Any]:
    """Return everything of a component that can change a result."""
    return {
        "name": component.name,
        "version": component.version,
        "params": component.params,
        "source": component.source_hash(),
    }


class Store:
    """Cells under one folder.

    Parameters
    ----------
    root : Path
        The folder of the run.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> Store:
        """Create the folder, and make sure that it can be written to before anything is computed.

        Raises
        ------
        RequestError
            If it cannot.
        """
        try:
            write_atomically(self.root / ".writable", b"").unlink()
        except OSError as error:
            raise RequestError(f"cannot write to {self.root} ({error.strerror}): name another folder.") from error
        return self

    def path(self, kind: str, *names: str, key: str) -> str:
        """Return the cell's path relative to the root, without an ending."""
        safe = [re.sub(r"^\.|[^\w.=,\[\]-]+", "_", name) for name in names]
        return "/".join([kind, *safe, key])

    def exists(self, cell: str, ending: str) -> bool:
        """Whether the cell is done."""
        return (self.root / f"{cell}.{ending}").exists()

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run."""
        write_atomically(self.root / name, content)

    def write_table(self, cell: str, table: pd.DataFrame) -> None:
        """Write a table as Parquet."""
        self.write(f"{cell}.parquet", table.to_parquet(None, index=False))
        self.forget_failure(cell)

    def read_table(self, cell: str) -> pd.DataFrame:
        """Read a table."""
        return pd.read_parquet(self.root / f"{cell}.parquet")

    def write_arrays(self, cell: str, **arrays: np.ndarray) -> None:
        """Write named arrays."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        self.write(f"{cell}.npz", buffer.getvalue())
        self.forget_failure(cell)

    def read_arrays(self, cell: str) -> dict[str, np.ndarray]:
        """Read named arrays."""
        with np.load(self.root / f"{cell}.npz", allow_pickle=False) as file:
            return dict(file)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file called `name`."""
        self.write(name, (json.dumps(content, indent=1, sort_keys=True, default=str) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file called `name`."""
        return json.loads((self.root / name).read_text())

    def fail(self, cell: str, error: Exception) -> None:
        """Record why a cell could not be computed, apart from the results; an older result goes."""
        self.drop([cell])
        line = " ".join(f"{type(error).__name__}: {error}".split())
        self.write_json(
            f"failures/{cell}.json", {"error": line, "traceback": "".join(traceback.format_exception(error))}
        )

    def drop(self, cells: Iterable[str]) -> None:
        """Remove the results of cells."""
        for cell in cells:
            for ending in ("parquet", "npz"):
                (self.root / f"{cell}.{ending}").unlink(missing_ok=True)

    def failure(self, cell: str) -> str:
        """Return the recorded error of a cell in one line, or ""."""
        path = self.root / f"failures/{cell}.json"
        return json.loads(path.read_text())["error"] if path.exists() else ""

    def forget_failure(self, cell: str) -> None:
        """Drop the failure record of a cell that has now been computed."""
        (self.root / f"failures/{cell}.json").unlink(missing_ok=True)
