"""The contract of a data set: sorted, fingerprinted samples with regions of interest and groups."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from explainer_bench import Component


@dataclass(frozen=True)
class Sample:
    """One image, not yet read.

    Parameters
    ----------
    id : str
        Unique in the data set and stable over machines (a relative path, say).
    label : int
        Index into ``Dataset.class_names``.
    group : str
        What splits and bootstraps must keep together: the patient, or a set of near-duplicates.
    digest : str
        SHA-256 of the bytes that `Dataset.load` reads.
    source : object
        Whatever `Dataset.load` needs to read it.
    """

    id: str
    label: int
    group: str
    digest: str
    source: Any = None


class Item(NamedTuple):
    """A sample that was read: RGB image (H, W, 3) uint8, and per class with a ROI its mask (H, W) bool."""

    image: np.ndarray
    roi: dict[int, np.ndarray]


class Dataset(Component):
    """Base of all data sets."""

    class_names: ClassVar[tuple[str, ...]] = ()
    licence: ClassVar[str] = ""
    where: ClassVar[str] = ""  # where to get it; "embedded" where nothing is needed
    tree: ClassVar[str] = ""  # the layout expected under the root

    root: Path | None = None
    split: str = "test"

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of `split`, sorted by id.

        Raises
        ------
        RequestError
            Where the root is missing or is not laid out as `tree` says: what was found, where to get it.
        """
        raise NotImplementedError

    def load(self, sample: Sample) -> Item:
        """Read one sample.

        Raises
        ------
        RequestError
            Naming the file, where it is unreadable or its mask has another size.
        """
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, labels, groups and contents, in 16 hex digits."""
        lines = [f"{s.id}\t{s.label}\t{s.group}\t{s.digest}" for s in self.samples]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
