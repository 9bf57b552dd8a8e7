"""Your own images: a folder for each class, and masks beside them if you have some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.datasets.files import FileDataset, Found, contents, dealt, images
from bench.datasets.tables import table
from explainer_bench import RequestError

SPLITS = ("train", "val", "test")


class Folder(FileDataset):
    """Images in a folder for each class: your own data.

    The classes are the folders' names, sorted. Where the folders `train`, `val` and `test` (or some of them) hold
    the classes, they are the splits; otherwise images are dealt, 70, 15 and 15 % of every class, in an order that
    follows from the hash of the seed and the group's name.

    A model must tell the same classes: train one (`explainer-bench train` with a recipe of your own). For a model of
    ImageNet's classes put the images in `val/WNID/` and take the data set `imagenet`.

    Parameters
    ----------
    root : Path
        The folder of the class folders.
    split : {"train", "val", "test"}
        Which part.
    masks : str
        A folder with the same tree as the images, `CLASS/NAME.png` or `test/CLASS/NAME.png`: below `root`, or
        anywhere; "" for none. An image without a mask has no ROI.
    groups : str
        A CSV file with the columns `image` (`CLASS/NAME`, as in the ids, without ending) and `group`, the patient
        say: below `root`, or anywhere. No group is divided between splits. An image that it does not name is a
        group of its own.
    seed : int
        Another seed, another division.
    """

    name = "folder"
    licence: ClassVar[str] = "yours"
    where: ClassVar[str] = "your own files"
    tree: ClassVar[str] = (
        "CLASS/*.png (or .jpg, .bmp, .tif), of 8 bits, or {train,val,test}/CLASS/*.png; optional masks/CLASS/NAME.png "
        "and a CSV file of groups"
    )
    counts: ClassVar[str] = "`data check` counts them"
    splitting: ClassVar[str] = (
        "the folders train, val and test, or 70, 15 and 15 % of every class; groups stay together"
    )
    labelling: ClassVar[str] = "the class folder"
    roi_rule: ClassVar[str] = "pixels of the mask brighter than 127 of 255, for the image's own class"
    reference = "none: the data are yours"
    faults: ClassVar[str] = "without a file of groups, images of one patient may be divided between splits"

    masks: str = "masks"
    groups: str = ""
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the class folders, sorted."""
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(sorted({path.name for top in self._tops for path in self._folders(top)}))

    @property
    def _tops(self) -> list[Path]:
        """The folders that hold the class folders: those of the splits, or the root."""
        splits = [self.home / split for split in SPLITS if (self.home / split).is_dir()]
        beside = [path.name for path in self._folders(self.home) if path.name not in SPLITS]
        if splits and beside:
            raise RequestError(
                f"{self.home} holds both splits and other folders ({beside[0]}): put every class below train, val or "
                "test, or none."
            )
        return splits or [self.home]

    def _folders(self, folder: Path) -> list[Path]:
        """The folders in one, without hidden ones and the masks."""
        below = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted(path for path in below if not self.masks or path != self.home / self.masks)

    def find(self, folder: Path) -> list[Found]:
        """Return every image, with its mask, group and split."""
        if len(self.class_names) < 2:
            raise RequestError(f"{folder} needs at least two class folders: {contents(folder)}.")
        found = [item for top in self._tops for item in self._below(top)]
        _check_ids(folder, found)
        grouped = self._grouped(self._masked(found))
        if self._tops != [folder]:
            _check_groups(grouped)
            return grouped
        return dealt(grouped, self.seed)

    def _below(self, top: Path) -> Iterator[Found]:
        split = "" if top == self.home else top.name
        for folder in self._folders(top):
            label = self.class_names.index(folder.name)
            for path in images(folder):
                name = path.relative_to(self.home).with_suffix("").as_posix()
                yield Found(name, label, path, split=split)

    def _masked(self, found: list[Found]) -> list[Found]:
        folder = self.home / self.masks
        if not self.masks or not folder.is_dir():
            if self.masks not in ("", Folder.masks):
                raise RequestError(f"{folder} is no folder of masks: correct `masks`, or leave it out.")
            return found
        paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.png"))}
        if lost := sorted(set(paths) - {item.id for item in found}):
            raise RequestError(f"{paths[lost[0]]} belongs to no image: expected {self.home / lost[0]}.png or .jpg.")
        return [replace(item, masks=(("", paths[item.id]),)) if item.id in paths else item for item in found]

    def _grouped(self, found: list[Found]) -> list[Found]:
        if not self.groups:
            return [replace(item, group=item.id) for item in found]
        path = self.home / self.groups
        rows = table(path, ("image", "group"), key="image")
        group = dict(zip(rows["image"], rows["group"], strict=True))
        if lost := sorted(set(group) - {item.id for item in found}):
            raise RequestError(f"{path} names the image {lost[0]!r}, which is not there: images are named CLASS/NAME.")
        return [replace(item, group=group.get(item.id, "") or item.id) for item in found]


def _check_ids(folder: Path, found: list[Found]) -> None:
    twice = [name for name, count in Counter(item.id for item in found).items() if count > 1]
    if twice:
        raise RequestError(f"{folder / twice[0]} is there with two endings: rename one of the two images.")


def _check_groups(found: list[Found]) -> None:
    """Refuse a group that the folders divide between splits."""
    where: dict[str, str] = {}
    for item in found:
        if where.setdefault(item.group, item.split) != item.split:
            raise RequestError(
                f"group {item.group!r} is in {where[item.group]} and in {item.split}: move its images to one of them."
            )
