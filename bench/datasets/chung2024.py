"""The four data sets of Chung et al. (iMIMIC 2024), with the regions that physicians marked in 50 images of each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from bench.datasets.files import FileDataset, Found, contents, images, merged
from explainer_bench import RequestError, RequestWarning

# Their folders of masks.
MASKS = {"cp_child": "cpchild", "duke": "duke", "kvasir": "kvasir", "mura": "mura"}
HELP = (
    f"Expected {{{','.join(MASKS.values())}}}/*.png, 50 masks each; get them from "
    "https://github.com/ugent-korea/attention_maps, data/224_mask_annot_from_dr (licence: MIT)."
)
SIDE = 224  # of the masks
ABOVE = 0  # what is not black is inside


class Chung2024(FileDataset):
    """Base of the four: with `annotations` the annotated images are the test split.

    The masks were drawn on what the models of the study see: 224 x 224 pixels, cut out of the centre of the image whose
    shortest side was scaled to 256, or the whole image squashed (`shortest_side` None). With annotations `load` scales
    the image like that, uncut, and puts the mask where it belongs: the study's preprocessing then gives exactly the
    study's input and mask, any other its own input and the same place. A subclass implements `listed` and, where the
    file name is not enough, `key`.

    Parameters
    ----------
    annotations : Path, optional
        The folder that holds ``cpchild``, ``duke``, ``kvasir`` and ``mura``, of 50 masks each. With it the test split
        is exactly the annotated images, and train and val hold nothing of their groups.
    """

    above = ABOVE
    decoding = ("annotations",)
    shortest_side: ClassVar[int | None] = 256

    annotations: Path | None = None

    def listed(self, folder: Path) -> list[Found]:
        """Return every image below the archive's `folder`, in the split that it has without annotations."""
        raise NotImplementedError

    def key(self, found: Found) -> str:
        """Return the name of an image's mask, without ending; empty where an image cannot have one."""
        return found.path.stem

    def annotated_label(self, found: Found) -> int:
        """Return the class of an annotated image: the study explains class 1 in all of them."""
        return 1

    def find(self, folder: Path) -> list[Found]:
        """Return every image; with annotations those of the test split with their masks."""
        listed = self.listed(folder)
        if self.annotations is None:
            return [item for item in listed if item.split]
        test = self._annotated(listed, mask_files(self.annotations, self.name))
        taken = {item.group or item.id for item in test}
        return test + [
            item for item in listed if item.split in ("train", "val") and (item.group or item.id) not in taken
        ]

    def _annotated(self, listed: list[Found], masks: dict[str, Path]) -> list[Found]:
        """Return the images that one mask each belongs to."""
        candidates: dict[str, list[Found]] = {name: [] for name in masks}
        for item in listed:
            candidates.get(self.key(item), []).append(item)
        if missing := [name for name, items in candidates.items() if not items]:
            raise RequestError(
                f"{self.name}: {len(missing)} of {len(masks)} annotated images are not under {self.home}, the first is "
                f"{missing[0]}: copy them there, or remove their masks from {self.annotations}."
            )
        if unclear := [name for name, items in candidates.items() if items[1:]]:
            some = f"{len(unclear)} of {len(masks)} annotations are left out, the first is {unclear[0]}"
            warnings.warn(f"{self.name}: {some}: its name fits several images.", RequestWarning, stacklevel=2)
        return [
            replace(items[0], masks=(("", masks[name]),), label=self.annotated_label(items[0]), split="test")
            for name, items in candidates.items()
            if name not in unclear
        ]

    def picture(self, found: Found) -> Image.Image:
        """Read an image as RGB; with annotations scale it as the study did."""
        image = super().picture(found)
        return image if self.annotations is None else image.resize(self._scaled(image), Image.Resampling.BILINEAR)

    def _scaled(self, image: Image.Image) -> tuple[int, int]:
        """Width and height in the study, before the centre is cut out; rounded down as in torchvision."""
        if self.shortest_side is None:
            return SIDE, SIDE
        return tuple(self.shortest_side * side // min(image.size) for side in image.size)  # type: ignore[return-value]

    def mask(self, paths: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
        """Read an annotation as (H, W) bool, empty around the centre on which it was drawn."""
        if not paths:
            return super().mask(paths, size)
        whole = np.zeros(size[::-1], bool)
        top, left = (round((side - SIDE) / 2) for side in whole.shape)
        whole[top : top + SIDE, left : left + SIDE] = merged(paths, (SIDE, SIDE), self.above)
        return whole


def mask_files(annotations: Path, name: str) -> dict[str, Path]:
    """Return the mask files of a data set by the name of their image, sorted.

    Raises
    ------
    RequestError
        Where there are none.
    """
    folder = annotations / MASKS[name]
    if found := images(folder) if folder.is_dir() else []:
        return {path.stem: path for path in found}
    where = folder if folder.is_dir() else annotations
    raise RequestError(f"{name}: no annotations in {folder}: {contents(where)}. {HELP}")


def masks(annotations: Path, name: str) -> list[tuple[str, np.ndarray]]:
    """Read the annotations of a data set alone, for what needs no images.

    Parameters
    ----------
    annotations : Path
        The folder that holds ``cpchild``, ``duke``, ``kvasir`` and ``mura``.
    name : {"cp_child", "duke", "kvasir", "mura"}
        The data set.

    Returns
    -------
    list of (str, ndarray)
        The name of each image and its mask (224, 224) bool, sorted by name; two of MURA's are empty.

    Raises
    ------
    RequestError
        Where there are none, or one cannot be read or has another size.
    """
    return [(key, merged([path], (SIDE, SIDE), ABOVE)) for key, path in mask_files(annotations, name).items()]
