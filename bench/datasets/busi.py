"""BUSI: breast ultrasound with lesion masks, near-duplicates kept together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field
from scipy.sparse.csgraph import connected_components

from bench.datasets.base import Dataset, Item, Sample
from explainer_bench import RequestError

FOLDER = "Dataset_BUSI_with_GT"
THUMBNAIL = 32
NORMAL = 2

_IMAGE = re.compile(r"(?P<stem>.+ \(\d+\))\.png", re.IGNORECASE)


class Found(NamedTuple):
    """One image on disk: its class, its path and those of its masks."""

    label: int
    path: Path
    masks: tuple[Path, ...]

    @property
    def id(self) -> str:
        """``class/stem``, the same on every machine."""
        return f"{self.path.parent.name}/{self.path.stem}"


class Busi(Dataset):
    """The 780 breast ultrasound images of Al-Dhabyani et al. (2020): benign, malignant, normal.

    The ROI is the lesion, and it is the evidence for either lesion class; normal images have none. Several
    masks of one image are merged. The archive holds near-duplicates (and one image filed in two classes):
    images whose thumbnails correlate are one group, and no group is divided between splits.

    Groups go to train, val and test in shares of 70, 15 and 15 %, class by class, in an order that follows
    from the hash of the seed and the group's first id: independent of file order, machine and library.

    Parameters
    ----------
    root : Path
        The folder `Dataset_BUSI_with_GT`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    seed : int
        Another seed, another division.
    threshold : float
        Correlation of two 32 x 32 grey thumbnails from which on the images are near-duplicates. Seen in the
        archive: down to 0.93 nearly every pair is the same lesion; below 0.92 unrelated pairs (similar depth
        and shadow) begin to mix in; at 0.904 there are still pairs of one lesion rescaled. At 0.90 the 286
        pairs join 780 images into 569 groups, the largest of 18; at 0.88 chains of unrelated images join.
        A pair joined wrongly costs nothing but freedom in the split, one missed leaks.
    """

    name = "busi"
    version = "1"
    class_names = ("benign", "malignant", "normal")
    licence: ClassVar[str] = "free for research with citation (Data in Brief 28:104863); its authors name no licence"
    where: ClassVar[str] = "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset"
    tree: ClassVar[str] = f"{FOLDER}/{{benign,malignant,normal}}/ with CLASS (i).png, CLASS (i)_mask.png, _mask_1.png"
    reference = "https://doi.org/10.1016/j.dib.2019.104863"

    seed: Annotated[int, Field(ge=0)] = 0
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.90

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of `split`, sorted by id; every file of the data set is read once to group and to check it."""
        found = self._find()
        facts = _facts(found)
        groups = _groups(found, np.stack([thumbnail for _, thumbnail in facts]), self.threshold)
        split = _split(found, groups, self.seed)
        rows = [row for row in range(len(found)) if split[row] == self.split]
        return [Sample(found[r].id, found[r].label, groups[r], facts[r][0], source=found[r]) for r in rows]

    def load(self, sample: Sample) -> Item:
        """Read the image, as RGB, and the union of its masks."""
        found: Found = sample.source
        image, mask = _read(found)
        roi = {} if found.label == NORMAL or not mask.any() else {0: mask, 1: mask}
        return Item(np.asarray(image.convert("RGB")), roi)

    def _find(self) -> list[Found]:
        """Every image under the root, sorted by id."""
        folder = self._folder()
        found = [item for label, name in enumerate(self.class_names) for item in _images(folder / name, label)]
        return sorted(found, key=lambda item: item.id)

    def _folder(self) -> Path:
        help_line = f"Expected {self.tree}; get it from {self.where} (licence: {self.licence})."
        if self.root is None:
            raise RequestError(f"busi needs its data: give --data-root (root=...). {help_line}")
        for folder in (self.root, self.root / FOLDER):
            if all(any(_images(folder / name, 0)) for name in self.class_names):
                return folder
        raise RequestError(f"busi: no BUSI images under {self.root}: {_contents(self.root)}. {help_line}")


def _contents(root: Path) -> str:
    """What there is instead, in a few words."""
    if not root.is_dir():
        return "it is a file, not a folder" if root.exists() else "there is no such folder"
    names = sorted(path.name for path in root.iterdir())
    return f"found {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "the folder is empty"


def _images(folder: Path, label: int) -> list[Found]:
    """The images of one class with their masks; the folder may be missing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    masks: dict[str, list[Path]] = {}
    for name in names:
        stem, mark, _ = name.partition("_mask")
        if mark and name.lower().endswith(".png"):
            masks.setdefault(stem, []).append(folder / name)
    stems = [(name, match["stem"]) for name in names if (match := _IMAGE.fullmatch(name))]
    return [Found(label, folder / name, tuple(masks.get(stem, ()))) for name, stem in stems]


def _open(path: Path, mode: str) -> Image.Image:
    """Read an image whole, in PIL `mode`."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).split(" <")[0].rstrip(".")
        raise RequestError(f"{path} cannot be read as an image ({reason}): replace the file.") from error


def _read(found: Found) -> tuple[Image.Image, np.ndarray]:
    """Return the grey or colour image and the union of its masks, (H, W) bool."""
    image = _open(found.path, "RGB")
    if not found.masks and found.label != NORMAL:
        raise RequestError(f"{found.path} has no mask: expected {found.path.stem}_mask.png beside it.")
    merged = np.zeros((image.height, image.width), bool)
    for path in found.masks:
        mask = _open(path, "L")
        if mask.size != image.size:
            sizes = f"{mask.width} x {mask.height} px, its image {image.width} x {image.height} px"
            raise RequestError(f"{path} does not fit its image: the mask has {sizes}; replace one of the two files.")
        merged |= np.asarray(mask) > 127
    return image, merged


@lru_cache(maxsize=4096)
def _fact(found: Found, stamp: tuple[Any, ...]) -> tuple[str, np.ndarray]:
    """Digest of the files of one sample, and its thumbnail (32, 32) uint8; `stamp` tells one state from another."""
    image, _ = _read(found)
    digest = hashlib.sha256()
    for path in (found.path, *found.masks):
        digest.update(path.read_bytes())
    return digest.hexdigest(), np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _facts(found: list[Found]) -> list[tuple[str, np.ndarray]]:
    """Read every sample; the first unusable one is named, with the count of the others."""
    facts, errors = [], []
    for item in found:
        try:
            stats = [path.stat() for path in (item.path, *item.masks)]
            facts.append(_fact(item, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)))
        except RequestError as error:
            errors.append(str(error))
    if errors:
        more = f" ({len(errors) - 1} more samples are unusable.)" if errors[1:] else ""
        raise RequestError(errors[0] + more)
    return facts


def correlations(thumbnails: np.ndarray) -> np.ndarray:
    """Pearson correlation (N, N) of thumbnails (N, H, W); a constant one correlates with nothing."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    return flat @ flat.T


def _groups(found: list[Found], thumbnails: np.ndarray, threshold: float) -> list[str]:
    """Name each image's set of near-duplicates after the first id in it."""
    _, component = connected_components(correlations(thumbnails) >= threshold, directed=False)
    first: dict[int, str] = {}
    for item, number in zip(found, component, strict=True):
        first.setdefault(number, item.id)
    return [first[number] for number in component]


def _split(found: list[Found], groups: list[str], seed: int) -> list[str]:
    """Deal whole groups to the splits, stratified by the class of their first image."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    split = [""] * len(found)
    for label in {item.label for item in found}:
        mine = {group: rows for group, rows in members.items() if found[rows[0]].label == label}
        for group, part in _deal(mine, seed).items():
            for row in mine[group]:
                split[row] = part
    return split


def _deal(members: dict[str, list[int]], seed: int) -> dict[str, str]:
    """Send each group, in hashed order, to the split that its middle image falls in."""
    order = sorted(members, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    sizes = np.array([len(members[group]) for group in order])
    middle = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    parts: Iterable[int] = np.searchsorted([0.70, 0.85], middle)
    return {group: ("train", "val", "test")[part] for group, part in zip(order, parts, strict=True)}
