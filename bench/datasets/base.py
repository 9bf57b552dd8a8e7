"""The contract of a data set: sorted, fingerprinted samples with regions of interest and groups."""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd

from explainer_bench import Component, RequestError


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


Masks = Mapping[int, np.ndarray]  # per class with a region its mask (H, W) bool


class Item(NamedTuple):
    """A sample that was read: RGB image (H, W, 3) uint8, its ROI, and all regions that the data set names."""

    image: np.ndarray
    roi: Masks
    regions: Mapping[str, Masks] = MappingProxyType({})

    def masks(self, region: str = "") -> Masks:
        """Return the masks of a named region, or of the ROI; none where the image does not have it."""
        return self.regions.get(region, {}) if region else self.roi


class Dataset(Component):
    """Base of all data sets. The plain strings make its page in the documentation."""

    regions: ClassVar[tuple[str, ...]] = ()  # names of its regions, where there are several; the first is the ROI
    licence: ClassVar[str] = ""
    where: ClassVar[str] = ""  # where to get it; "embedded" where nothing is needed
    tree: ClassVar[str] = ""  # the layout expected under the root
    counts: ClassVar[str] = ""  # how many images there are, by class
    splitting: ClassVar[str] = ""  # what goes to which split, and what is kept together
    labelling: ClassVar[str] = ""  # where the label comes from
    roi_rule: ClassVar[str] = ""  # where the ROI comes from, and what it is
    faults: ClassVar[str] = ""  # what is known to be wrong with it

    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    decoding: ClassVar[tuple[str, ...]] = ()  # parameters that decide what `load` makes of the bytes in the digest

    root: Path | None = None
    split: Literal["train", "val", "test"] = "test"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label: a plain class attribute, unless parameters or files decide them."""
        raise NotImplementedError

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
        """SHA-256 over ids, labels, groups, contents and what decides how they are read, in 16 hex digits."""
        lines = [f"{s.id}\t{s.label}\t{s.group}\t{s.digest}" for s in self.samples]
        changed = {
            name: getattr(self, name) for name in self.decoding if getattr(self, name) != getattr(type(self), name)
        }
        lines += [f"{name}={'given' if isinstance(value, Path) else value}" for name, value in changed.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def facts(cls: type[Dataset]) -> dict[str, str]:
    """Return what a data set says of itself, by heading: for its page and for `data describe`."""
    names = inspect.getattr_static(cls, "class_names")
    said = {
        "classes": (inspect.getdoc(names) or "").rstrip(".") if isinstance(names, property) else ", ".join(names),
        "regions": ", ".join(cls.regions),
        "licence": cls.licence,
        "where": cls.where,
        "tree": cls.tree,
        "counts": cls.counts,
        "splits": cls.splitting,
        "labels": cls.labelling,
        "ROI": cls.roi_rule,
        "known faults": cls.faults,
        "reference": cls.reference,
    }
    return {heading: text for heading, text in said.items() if text}


class Check(NamedTuple):
    """What `check` found: counts per split and class, and one line for each sample that cannot be used."""

    table: pd.DataFrame
    errors: list[str]


def check(dataset: Dataset) -> Check:
    """Read every sample of every split and count.

    Parameters
    ----------
    dataset : Dataset
        Its ``split`` does not matter.

    Returns
    -------
    Check
        The table has the columns split, class, images, groups, with_roi (images where this class has a ROI),
        roi_area (its mean share of the image, 0 to 1, NaN without ROI) and fingerprint (of the split).

    Raises
    ------
    RequestError
        Where the data set as a whole cannot be used: a wrong root, or files that no sample could be made of.
    """
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for split in dataset.splits:
        part = replace(dataset, split=split)  # type: ignore[arg-type]
        areas = {sample.id: _roi_areas(part, sample, errors) for sample in part.samples}
        rows += _counts(part, areas)
    return Check(pd.DataFrame(rows), errors)


def _roi_areas(dataset: Dataset, sample: Sample, errors: list[str]) -> dict[int, float]:
    """Share of the image that each class's ROI covers; appends to `errors` where the sample is unreadable."""
    try:
        return {label: float(mask.mean()) for label, mask in dataset.load(sample).roi.items()}
    except RequestError as error:
        errors.append(str(error))
        return {}


def _counts(dataset: Dataset, areas: dict[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    """The rows of one split."""
    fingerprint, samples = dataset.fingerprint, defaultdict(list)
    for sample in dataset.samples:
        samples[sample.label].append(sample)
    for label, name in enumerate(dataset.class_names):
        covered = [areas[sample.id][label] for sample in samples[label] if label in areas[sample.id]]
        yield {
            "split": dataset.split,
            "class": name,
            "images": len(samples[label]),
            "groups": len({sample.group for sample in samples[label]}),
            "with_roi": len(covered),
            "roi_area": float(np.mean(covered)) if covered else np.nan,
            "fingerprint": fingerprint,
        }
