"""ImageNet: the validation folder, with the masks of ImageNet-S where they are there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io

from bench.datasets.base import Masks
from bench.datasets.files import FileDataset, Found, contents, images, read
from bench.datasets.tables import coded, table
from explainer_bench import RequestError

SOLUTION = "LOC_val_solution.csv"
DEVKIT = Path("ILSVRC2012_devkit_t12", "data")
SEGMENTED = Path("ImageNetS919")
CATEGORIES = "ImageNetS_categories_im919.txt"
N_SEGMENTED = 919
OTHER, IGNORED = 0, 1000  # pixels that ImageNet-S gives to no class
# Classes that ImageNet-S counts as one: the first is annotated as the second.
SAME = {
    "n04356056": "n04355933",
    "n04493381": "n02808440",
    "n03642806": "n03832673",
    "n04008634": "n03773504",
    "n03887697": "n15075141",
}


@cache
def _info() -> Any:
    from timm.data import ImageNetInfo  # seconds, which listing the data sets need not wait for

    return ImageNetInfo()


@cache
def wnids() -> dict[str, int]:
    """Return the 1000 WordNet ids in the order of the labels, which is their alphabetical one."""
    return {wnid: label for label, wnid in enumerate(_info().label_names())}


@cache
def names() -> tuple[str, ...]:
    """Return each class's first name; a name that two classes share comes with its WordNet id."""
    first = [text.partition(",")[0] for text in _info().label_descriptions()]
    return tuple(
        name if first.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(first, wnids(), strict=True)
    )


class Imagenet(FileDataset):
    """The validation images of ILSVRC 2012 in 1000 classes; its labels for the test images are not public.

    Folders named by WordNet id are read (`val/n01440764/*.JPEG`, any subset of the classes), or all images in one
    folder (`val/ILSVRC2012_val_00000001.JPEG`) together with the labels of Kaggle (`LOC_val_solution.csv`) or of
    the development kit. The ROI is the object's mask where ImageNet-S annotates the image.

    Parameters
    ----------
    root : Path
        The folder of `val`, or the one that contains it as `imagenet`.
    split : {"train", "test"}
        The validation folder is the test split; `train/WNID/*.JPEG` is read where it is there.
    masked : bool
        Only images that have a mask.
    """

    name = "imagenet"
    splits = ("train", "test")
    folder = "imagenet"
    required = ("val",)
    licence: ClassVar[str] = (
        "ImageNet: non-commercial research and education, after registration (from memory, not verified); ImageNet-S: "
        "see its repository"
    )
    where: ClassVar[str] = "https://image-net.org/challenges/LSVRC/2012/ and https://github.com/LUSSeg/ImageNet-S"
    tree: ClassVar[str] = (
        f"imagenet/ with val/WNID/*.JPEG, or val/ILSVRC2012_val_*.JPEG and {SOLUTION} or {DEVKIT}/; optional: "
        f"train/WNID/*.JPEG, {SEGMENTED}/validation-segmentation/WNID/*.png and {SEGMENTED}/{CATEGORIES}"
    )
    counts: ClassVar[str] = "50,000 validation images, 50 of each class; ImageNet-S has masks for 12,419 of them"
    splitting: ClassVar[str] = "test is the validation folder, train the training folder; there is no val"
    labelling: ClassVar[str] = (
        "the class folder or the label file; labels are the alphabetical order of the WordNet ids"
    )
    roi_rule: ClassVar[str] = (
        "ImageNet-S: the pixels of each class in the image (red + 256 green is the number of the class, counted from 1 "
        "in alphabetical order; 0 is anything else, 1000 is ignored); images without annotation have none"
    )
    faults: ClassVar[str] = (
        "one label for each image though many show several classes; classes that overlap (sunglass and sunglasses, "
        "maillot twice); ImageNet-S merges five pairs of classes, whose masks count for both; a few images are CMYK or "
        "PNG inside (the last from memory, not verified)"
    )
    reference = "https://doi.org/10.1007/s11263-015-0816-y"

    masked: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """The first name of each of the 1000 synsets, in the order of their WordNet ids."""
        return names()

    def find(self, folder: Path) -> list[Found]:
        """Return the images of both folders with their masks."""
        val = _of_folders(folder / "val", "test") if _subfolders(folder / "val") else _of_labels(folder)
        train = _of_folders(folder / "train", "train") if (folder / "train").is_dir() else iter(())
        masks = {path.stem: path for path in (folder / SEGMENTED / "validation-segmentation").glob("*/*.png")}
        found = [_with_mask(item, masks) for item in [*val, *train]]
        return [item for item in found if item.masks or not self.masked]

    def _region(self, found: Found, region: str, size: tuple[int, int]) -> Masks:
        if not found.masks:
            return {}
        ((_, path),) = found.masks
        pixels = read(path, "RGB")
        if pixels.size != size:
            sizes = f"{pixels.width} x {pixels.height} px, its image {size[0]} x {size[1]} px"
            raise RequestError(f"{path} does not fit its image: the mask has {sizes}; replace one of the two files.")
        red, green, _ = np.moveaxis(np.asarray(pixels).astype(np.int64), 2, 0)
        ids = red + 256 * green
        return {label: ids == number for number in np.unique(ids).tolist() for label in self._classes(path, number)}

    def _classes(self, path: Path, number: int) -> list[int]:
        """The labels that a number in a mask stands for."""
        if number in (OTHER, IGNORED):
            return []
        if number > len(self._segmented):
            raise RequestError(f"{path} holds the number {number}, which is no class of ImageNet-S; replace the file.")
        wnid = self._segmented[number - 1]
        return [wnids()[one] for one in sorted({wnid, *(merged for merged, into in SAME.items() if into == wnid)})]

    @cached_property
    def _segmented(self) -> list[str]:
        """The WordNet ids of ImageNet-S, whose order numbers them."""
        folder = self.home / SEGMENTED
        listed = [path for path in (folder / CATEGORIES, self.home / CATEGORIES) if path.is_file()]
        if listed:
            there = listed[0].read_text().split()
        else:
            there = [path.name for path in _subfolders(folder / "validation-segmentation")]
        if len(there) != N_SEGMENTED or not set(there) <= set(wnids()):
            raise RequestError(
                f"{folder} does not tell the {N_SEGMENTED} classes of ImageNet-S ({len(there)} found): put "
                f"{CATEGORIES} of its repository (data/categories) there."
            )
        return sorted(there)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _of_folders(folder: Path, split: str) -> Iterator[Found]:
    for below in _subfolders(folder):
        if below.name not in wnids():
            raise RequestError(f"{below} is no class: expected WordNet ids such as n01440764; move it elsewhere.")
        for path in images(below):
            yield Found(f"{below.name}/{path.stem}", wnids()[below.name], path, split=split)


def _of_labels(folder: Path) -> Iterator[Found]:
    """The images of one folder, which a label file names."""
    labels = _solution(folder / SOLUTION) if (folder / SOLUTION).exists() else _devkit(folder)
    order = list(wnids())
    for path in images(folder / "val"):
        if path.stem not in labels:
            raise RequestError(f"{path} has no label: the label file does not name it; move it elsewhere.")
        label = labels[path.stem]
        yield Found(f"{order[label]}/{path.stem}", label, path, split="test")


def _solution(path: Path) -> dict[str, int]:
    """Kaggle's file: the WordNet id and a box for each object, of which an image has one class."""
    rows = table(path, ("ImageId", "PredictionString"), key="ImageId")
    first = rows["PredictionString"].str.partition(" ")[0].rename("PredictionString")
    return dict(zip(rows["ImageId"], coded(path, first, wnids()), strict=True))


def _devkit(folder: Path) -> dict[str, int]:
    """The development kit's files: a number for each image, which is not the label, and what each number means."""
    truth, meta = folder / DEVKIT / "ILSVRC2012_validation_ground_truth.txt", folder / DEVKIT / "meta.mat"
    if not (truth.is_file() and meta.is_file()):
        raise RequestError(
            f"{folder} has images without class folders and no labels for them: put {SOLUTION} or {DEVKIT}/ with "
            f"{meta.name} and {truth.name} there; {contents(folder)}."
        )
    label = _meaning(meta)
    numbered = [label.get(int(number)) if number.isdigit() else None for number in truth.read_text().split()]
    if None in numbered:
        line = numbered.index(None) + 1
        raise RequestError(f"{truth}, line {line}: no class has this number in {meta.name}; copy the kit again.")
    return {f"ILSVRC2012_val_{row:08d}": int(one) for row, one in enumerate(numbered, 1) if one is not None}


def _meaning(path: Path) -> dict[int, int | None]:
    """What each number of the development kit stands for; None for what is no class of the 1000."""
    try:
        rows: Any = np.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): wnids().get(str(row["WNID"])) for row in rows}
    except (OSError, ValueError, LookupError, TypeError, scipy.io.matlab.MatReadError) as error:
        raise RequestError(f"{path} cannot be read as the classes of ILSVRC 2012: copy the kit again.") from error


def _with_mask(found: Found, masks: dict[str, Path]) -> Found:
    path = masks.get(found.path.stem)
    return found if path is None else Found(found.id, found.label, found.path, (("", path),), split=found.split)
