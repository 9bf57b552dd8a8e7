"""BUSI: breast ultrasound with lesion masks, near-duplicates kept together."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field
from scipy.sparse.csgraph import connected_components

from bench.datasets.files import FileDataset, Found, class_folders, deal, merged, read
from explainer_bench import RequestError

FOLDER = "Dataset_BUSI_with_GT"
THUMBNAIL = 32
NORMAL = 2

_IMAGE = re.compile(r"(?P<stem>.+ \(\d+\))\.png", re.IGNORECASE)


class Busi(FileDataset):
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
    folder = FOLDER
    required = class_names
    licence: ClassVar[str] = "free for research with citation (Data in Brief 28:104863); its authors name no licence"
    where: ClassVar[str] = "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset"
    tree: ClassVar[str] = f"{FOLDER}/{{benign,malignant,normal}}/ with CLASS (i).png, CLASS (i)_mask.png, _mask_1.png"
    counts: ClassVar[str] = "780 images: 437 benign, 210 malignant, 133 normal"
    splitting: ClassVar[str] = "70, 15 and 15 % of every class, near-duplicates kept together; none is published"
    labelling: ClassVar[str] = "the class folder"
    roi_rule: ClassVar[str] = "the union of an image's lesion masks, for either lesion class; normal images have none"
    faults: ClassVar[str] = (
        "one image is filed in two classes (benign (433) is malignant (145)); there are many near-duplicates; calipers "
        "are burnt into many images; patients are not named"
    )
    reference = "https://doi.org/10.1016/j.dib.2019.104863"

    seed: Annotated[int, Field(ge=0)] = 0
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.90

    def find(self, folder: Path) -> list[Found]:
        """Return every image; every file is read once, to group and to check it."""
        found = [item for label, path in class_folders(folder, self.class_names) for item in _images(path, label)]
        found.sort(key=lambda item: item.id)
        groups = _groups(found, _thumbnails(found), self.threshold)
        parts = deal(groups, [item.label for item in found], self.seed)
        triples = zip(found, groups, parts, strict=True)
        return [replace(item, group=group, split=part) for item, group, part in triples]

    def classes_of(self, found: Found) -> tuple[int, ...]:
        """Return both lesion classes: the lesion is the evidence for either."""
        return () if found.label == NORMAL else (0, 1)


def _images(folder: Path, label: int) -> list[Found]:
    """The images of one class with their masks."""
    names = sorted(path.name for path in folder.iterdir())
    masks: dict[str, list[Path]] = {}
    for name in names:
        stem, mark, _ = name.partition("_mask")
        if mark and name.lower().endswith(".png"):
            masks.setdefault(stem, []).append(folder / name)
    stems = [(name, match["stem"]) for name in names if (match := _IMAGE.fullmatch(name))]
    return [
        Found(f"{folder.name}/{stem}", label, folder / name, tuple(("", path) for path in masks.get(stem, ())))
        for name, stem in stems
    ]


@lru_cache(maxsize=4096)
def _thumbnail(found: Found, stamp: tuple[Any, ...]) -> np.ndarray:
    """Read and check one sample; its thumbnail (32, 32) uint8. `stamp` tells one state of the files from another."""
    image = read(found.path, "RGB")
    if not found.masks and found.label != NORMAL:
        raise RequestError(f"{found.path} has no mask: expected {found.path.stem}_mask.png beside it.")
    merged((path for _, path in found.masks), image.size)
    return np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _thumbnails(found: list[Found]) -> np.ndarray:
    """Read every sample; the first unusable one is named, with the count of the others."""
    thumbnails, errors = [], []
    for item in found:
        try:
            stats = [path.stat() for path in item.files]
            thumbnails.append(_thumbnail(item, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)))
        except RequestError as error:
            errors.append(str(error))
    if errors:
        more = f" ({len(errors) - 1} more samples are unusable.)" if errors[1:] else ""
        raise RequestError(errors[0] + more)
    return np.stack(thumbnails)


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
