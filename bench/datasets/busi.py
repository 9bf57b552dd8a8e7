"""BUSI: breast ultrasound with lesion masks, near-duplicates kept together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field
from scipy.ndimage import gaussian_filter
from scipy.sparse.csgraph import connected_components

from bench.datasets.files import FileDataset, Found, class_folders, dealt, merged, read
from explainer_bench import RequestError

FOLDER = "Dataset_BUSI_with_GT"
THUMBNAIL = 32
NORMAL = 2

# Two thumbnails are aligned by the middle of one, WINDOW pixels wide, and what of the other fits it best.
WINDOW = 20
SHIFT = 3  # pixels, up and down, left and right
SCALES = (0.8, 0.87, 0.93, 1.0, 1.07, 1.15, 1.25)
FINE = 3.0  # standard deviation in pixels of the blur that is taken off: depth and shadow make unrelated images alike

# The same lesion (or scene) from a little beside, which aligned correlation sees no better than unrelated cysts; found
# by eye among the pairs just below the threshold.
KNOWN = (
    ("benign/benign (397)", "benign/benign (410)"),
    ("malignant/malignant (1)", "malignant/malignant (132)"),
    ("malignant/malignant (132)", "malignant/malignant (133)"),
    ("malignant/malignant (93)", "malignant/malignant (94)"),
    ("malignant/malignant (95)", "malignant/malignant (96)"),
    ("malignant/malignant (98)", "malignant/malignant (99)"),
    ("normal/normal (9)", "normal/normal (10)"),
)

_IMAGE = re.compile(r"(?P<stem>.+ \(\d+\))\.png", re.IGNORECASE)


class Busi(FileDataset):
    """The 780 breast ultrasound images of Al-Dhabyani et al. (2020): benign, malignant, normal.

    The ROI is the lesion, and it is the evidence for either lesion class; normal images have none. Several
    masks of one image are merged. The archive holds near-duplicates, shifted and rescaled ones too, and some of
    them are filed in two classes: images whose thumbnails correlate, as they are or aligned, are one group, as are
    seven pairs found by eye. No group is divided between splits.

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
        and shadow) begin to mix in; at 0.88 chains of unrelated images join. At 0.90 there are 286 pairs. A pair
        joined wrongly costs nothing but freedom in the split, one missed leaks.
    aligned : float
        The same for aligned thumbnails: without what a blur keeps, the middle of one against the other scaled by
        0.8 to 1.25 and shifted by up to a tenth of its side, at its best. Seen in the archive: down to 0.80 all
        pairs are one lesion or scene; below, unrelated cysts mix in, and at 0.66 they chain 59 images. At 0.72 it
        adds 30 pairs, about a third of them such cysts. All in all 780 images are 542 groups, the largest of 19.
    """

    name = "busi"
    version = "2"
    class_names = ("benign", "malignant", "normal")
    folder = FOLDER
    required = class_names
    licence: ClassVar[str] = "free for research with citation (Data in Brief 28:104863); its authors name no licence"
    where: ClassVar[str] = "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset"
    tree: ClassVar[str] = f"{FOLDER}/{{benign,malignant,normal}}/ with CLASS (i).png, CLASS (i)_mask.png, _mask_1.png"
    counts: ClassVar[str] = "780 images: 437 benign, 210 malignant, 133 normal"
    splitting: ClassVar[str] = "about 70, 15 and 15 % of every class, by groups of near-duplicates; none is published"
    labelling: ClassVar[str] = "the class folder"
    roi_rule: ClassVar[str] = "the union of an image's lesion masks, for either lesion class; normal images have none"
    faults: ClassVar[str] = (
        "eight images of the classes malignant and normal are filed as benign, too: malignant (145) is benign (433) to "
        "the pixel; by eye malignant (51) shows what benign (42) and (131) show, (52) benign (85) and (164), (77) "
        "benign (333), (93) benign (399), (94) benign (406), normal (1) benign (269), (34) benign (437). There are "
        "many near-duplicates; patients are not named, so other views of one lesion, which no correlation finds, may "
        "still be divided. "
        "Calipers are burnt into many images"
    )
    reference = "https://doi.org/10.1016/j.dib.2019.104863"

    seed: Annotated[int, Field(ge=0)] = 0
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.90
    aligned: Annotated[float, Field(gt=0, le=1)] = 0.72

    def find(self, folder: Path) -> list[Found]:
        """Return every image; every file is read once, to group and to check it."""
        found = [item for label, path in class_folders(folder, self.class_names) for item in _images(path, label)]
        found.sort(key=lambda item: item.id)
        thumbnails = _thumbnails(found)
        alike = (correlations(thumbnails) >= self.threshold) | (aligned(thumbnails) >= self.aligned)
        groups = _groups([item.id for item in found], alike)
        return dealt([replace(item, group=group) for item, group in zip(found, groups, strict=True)], self.seed)

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
    flat = _normalised(thumbnails.astype(np.float64))
    return flat @ flat.T


def _normalised(images: np.ndarray) -> np.ndarray:
    """Flatten images (N, H, W) to (N, H * W), of mean 0 and length 1."""
    flat = images.reshape(len(images), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)


def aligned(thumbnails: np.ndarray) -> np.ndarray:
    """Pearson correlation (N, N) of the fine structure of thumbnails (N, 32, 32) uint8, at the best alignment."""
    return _aligned(thumbnails.tobytes(), len(thumbnails))


@lru_cache(maxsize=4)
def _aligned(content: bytes, count: int) -> np.ndarray:
    thumbnails = np.frombuffer(content, np.uint8).reshape(count, THUMBNAIL, THUMBNAIL).astype(np.float32)
    fine = thumbnails - gaussian_filter(thumbnails, (0, FINE, FINE))
    middle = _normalised(next(_windows(fine, 0)))
    best = np.zeros((count, count), np.float32)
    for scale in SCALES:
        side = (round(THUMBNAIL * scale),) * 2
        scaled = [np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR)) for image in fine]
        for window in _windows(np.stack(scaled), SHIFT):
            np.maximum(best, middle @ _normalised(window).T, out=best)
    return np.maximum(best, best.T)


def _windows(images: np.ndarray, shift: int) -> Iterator[np.ndarray]:
    """Cut squares (N, WINDOW, WINDOW) out of the middle of images, and beside it by up to `shift` pixels."""
    middle = (images.shape[1] - WINDOW) // 2
    shift = min(shift, middle)
    starts = range(middle - shift, middle + shift + 1)
    for top, left in product(starts, starts):
        yield images[:, top : top + WINDOW, left : left + WINDOW]


def _groups(ids: list[str], alike: np.ndarray) -> list[str]:
    """Name each image's set of near-duplicates after the first id in it."""
    row = {name: number for number, name in enumerate(ids)}
    for pair in KNOWN:
        if row.keys() >= set(pair):
            alike[row[pair[0]], row[pair[1]]] = True
    _, component = connected_components(alike, directed=False)
    first: dict[int, str] = {}
    for name, number in zip(ids, component, strict=True):
        first.setdefault(number, name)
    return [first[number] for number in component]
