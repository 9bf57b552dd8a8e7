"""Data sets of image files in their public layout: what all of them do alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from bench.datasets.base import Dataset, Item, Masks, Sample
from explainer_bench import RequestError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}
TRAIN_VAL = {"train": 0.85, "val": 0.15}  # where the archive has a test part of its own


@dataclass(frozen=True)
class Found:
    """One image on disk.

    Parameters
    ----------
    id : str
        The same on every machine: its path below the data set's folder, without ending.
    label : int
        Its class.
    path : Path
        The image.
    masks : tuple of (str, Path)
        The masks with the region that each belongs to; several of one region are merged.
    group : str
        Patient or set of duplicates; the id where it is not known.
    split : str
        Its part.
    """

    id: str
    label: int
    path: Path
    masks: tuple[tuple[str, Path], ...] = ()
    group: str = ""
    split: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is read of it."""
        return self.path, *(path for _, path in self.masks)


class FileDataset(Dataset):
    """Base of the data sets that are read from files.

    A subclass states the constants and implements `find`.

    Parameters
    ----------
    root : Path
        The archive's folder, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    """

    folder: ClassVar[str] = ""  # the archive's own name
    above: ClassVar[int] = 127  # mask pixels brighter than this, of 255, are inside

    @property
    def required(self) -> tuple[str, ...]:
        """Files and folders below the archive's by which it is known: a plain class attribute, as `class_names`."""
        return ()

    def find(self, folder: Path) -> list[Found]:
        """Return every image of every split below the archive's `folder`.

        Raises
        ------
        RequestError
            Where the layout is not as `tree` says.
        """
        raise NotImplementedError

    def classes_of(self, found: Found) -> tuple[int, ...]:
        """Return the classes that an image's masks are evidence for: its own, by default."""
        return (found.label,)

    @cached_property
    def found(self) -> list[Found]:
        """Every image of every split, sorted by id."""
        found = sorted(self.find(self.home), key=lambda item: item.id)
        if not found:
            raise RequestError(f"{self.name}: no images under {self.home}. {self._help}")
        for one, other in pairwise(found):
            if one.id == other.id:
                raise RequestError(f"{one.path} and {other.path} are one sample by name: remove or rename one of them.")
        return found

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of `split`, sorted by id; each of their files is read once, for its digest."""
        mine = [item for item in self.found if item.split == self.split]
        return [Sample(item.id, item.label, item.group or item.id, digest(item.files), source=item) for item in mine]

    def load(self, sample: Sample) -> Item:
        """Read the image, as RGB, and its masks; a region without a pixel is left out."""
        found: Found = sample.source
        image = self.picture(found)
        regions = {name: self._region(found, name, image.size) for name in self.regions or ("",)}
        return Item(np.asarray(image), next(iter(regions.values())), regions if self.regions else {})

    def picture(self, found: Found) -> Image.Image:
        """Read an image as RGB, in the geometry of its masks."""
        return read(found.path, "RGB")

    def mask(self, paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
        """Read the masks of one region as one, (H, W) bool, for a picture of (width, height) `size`."""
        return merged(paths, size, self.above)

    def _region(self, found: Found, region: str, size: tuple[int, int]) -> Masks:
        paths = [path for name, path in found.masks if name == region]
        mask = self.mask(paths, size)
        return dict.fromkeys(self.classes_of(found), mask) if mask.any() else {}

    @property
    def home(self) -> Path:
        """The archive's folder: `root`, or below it."""
        if self.root is None:
            raise RequestError(f"{self.name} needs its data: give --data-root (root=...). {self._help}")
        below = [self.root / self.folder] if self.folder else []
        for folder in (self.root, *below):
            if all((folder / path).exists() for path in self.required or (".",)):
                return folder
        raise RequestError(f"{self.name}: {self._missing(below)}. {self._help}")

    def _missing(self, below: list[Path]) -> str:
        """What is not there: the folder itself, or the first of what must be in it."""
        assert self.root is not None
        folder = next((path for path in below if path.is_dir()), self.root)
        absent = [path for path in self.required if not (folder / path).exists()]
        lacking = f"{folder} has no {absent[0]}" if absent and folder.is_dir() else f"no data under {folder}"
        return f"{lacking}: {contents(folder)}"

    @property
    def _help(self) -> str:
        return f"Expected {self.tree}; get it from {self.where} (licence: {self.licence})."


def contents(folder: Path) -> str:
    """Say what there is in a folder, in a few words."""
    if not folder.is_dir():
        return "it is a file, not a folder" if folder.exists() else "there is no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return f"found {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "the folder is empty"


def images(folder: Path) -> list[Path]:
    """Return the images in a folder, sorted by name; hidden files and others are left out."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith("."))


def paired(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return for each image its mask: the file of the same name in another folder.

    Raises
    ------
    RequestError
        Where some are missing: how many, and the first.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if missing := [path for path in files if path.name not in there]:
        what = f"{len(missing)} of {len(files)} images have no mask" if files[1:] else "the image has no mask"
        raise RequestError(f"{what}, the first is {missing[0]}: expected {folder / missing[0].name}.")
    return [folder / path.name for path in files]


def class_folders(folder: Path, names: Sequence[str]) -> Iterator[tuple[int, Path]]:
    """Yield each class's index and folder.

    Raises
    ------
    RequestError
        Where one is missing, or there is another folder beside them.
    """
    there = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if missing := [name for name in names if name not in there]:
        raise RequestError(f"{folder} has no folder {missing[0]!r}: {contents(folder)}; expected {', '.join(names)}.")
    if unknown := sorted(there - set(names)):
        raise RequestError(f"{folder / unknown[0]} is no class: expected {', '.join(names)}; move it elsewhere.")
    yield from ((label, folder / name) for label, name in enumerate(names))


def read(path: Path, mode: str) -> Image.Image:
    """Read an image whole, in PIL `mode`.

    Raises
    ------
    RequestError
        Naming the file, where it is missing, truncated or no image, or holds more than 8 bits a pixel: PIL would clip
        them, and which values are black and white is the owner's decision.
    """
    try:
        with Image.open(path) as image:
            stored, converted = image.mode, image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else str(error).split(" <")[0].rstrip(".")
        raise RequestError(f"{path} cannot be read as an image ({reason}): replace the file.") from error
    if stored.startswith(("I", "F")):
        deep = f"{path} has more than 8 bits a pixel (mode {stored})"
        raise RequestError(f"{deep}: window it to 8 bits, 0 black and 255 white, and save it again.")
    return converted


def merged(paths: Iterable[Path], size: tuple[int, int], above: int = 127) -> np.ndarray:
    """Return the union (H, W) bool of mask files, for an image of (width, height) `size`.

    Raises
    ------
    RequestError
        Where a mask has another size than the image, or marks something, but nothing brighter than `above`.
    """
    union = np.zeros(size[::-1], bool)
    for path in paths:
        mask = read(path, "L")
        if mask.size != size:
            sizes = f"{mask.width} x {mask.height} px, its image {size[0]} x {size[1]} px"
            raise RequestError(f"{path} does not fit its image: the mask has {sizes}; replace one of the two files.")
        union |= _inside(path, np.asarray(mask), above)
    return union


def _inside(path: Path, mask: np.ndarray, above: int) -> np.ndarray:
    if 0 < mask.max() <= above:
        where = f"{path} marks nothing: its brightest pixel is {mask.max()}, and inside is what is above {above} of 255"
        raise RequestError(f"{where}; save it with 0 outside and 255 inside.")
    return mask > above


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the contents of files; those that have not changed since are not read again.

    Raises
    ------
    RequestError
        Where a file is missing.
    """
    try:
        stats = [path.stat() for path in files]
    except OSError as error:
        raise RequestError(f"{error.filename} is missing: copy the data set again.") from error
    return _digest(tuple(files), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=1 << 18)
def _digest(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def dealt(found: Sequence[Found], seed: int, shares: Mapping[str, float] = SHARES) -> list[Found]:
    """Return images with their split: whole groups are dealt, see `deal`; an image without a group is its own."""
    splits = deal([item.group or item.id for item in found], [item.label for item in found], seed, shares)
    return [replace(item, split=split) for item, split in zip(found, splits, strict=True)]


def deal(groups: Sequence[str], labels: Sequence[int], seed: int, shares: Mapping[str, float] = SHARES) -> list[str]:
    """Deal whole groups to splits, stratified by the class of each group's first image.

    The order of the groups follows from the hash of the seed and the group's name: independent of file order, machine
    and library. A group goes to the split that its middle image falls in.

    Parameters
    ----------
    groups, labels : sequence
        Of each image.
    seed : int
        Another seed, another division.
    shares : mapping
        Split names with their shares, which sum to 1.

    Returns
    -------
    list of str
        The split of each image.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    split = [""] * len(groups)
    for label in set(labels):
        mine = {group: rows for group, rows in members.items() if labels[rows[0]] == label}
        for group, part in _in_order({group: len(rows) for group, rows in mine.items()}, seed, shares).items():
            for row in mine[group]:
                split[row] = part
    return split


def _in_order(sizes: Mapping[str, int], seed: int, shares: Mapping[str, float]) -> dict[str, str]:
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    counts = np.array([sizes[group] for group in order])
    middle = (np.cumsum(counts) - counts / 2) / counts.sum()
    parts = np.searchsorted(np.cumsum(list(shares.values()))[:-1], middle)
    return {group: list(shares)[part] for group, part in zip(order, parts, strict=True)}
