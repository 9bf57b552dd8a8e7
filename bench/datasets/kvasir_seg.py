"""Kvasir-SEG: polyps with masks; together with Kvasir's normal images a classification task with regions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.datasets.files import FileDataset, Found, class_folders, dealt, images, paired
from bench.datasets.kvasir import CLASSES, NORMAL, Kvasir


class KvasirSeg(FileDataset):
    """The 1,000 polyp images of Kvasir-SEG (Jha et al., 2020) with their masks, and normal images beside them.

    The archive holds polyps only, so there is nothing to classify in it alone. With `normal`, the three normal classes
    of Kvasir version 2, the same hospitals' images, are the class normal; without, that class is empty, which is enough
    to explain a model trained elsewhere.

    Parameters
    ----------
    root : Path
        The folder `Kvasir-SEG`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    normal : Path, optional
        The folder `kvasir-dataset-v2`, or the one that contains it.
    seed : int
        Another seed, another division.
    """

    name = "kvasir_seg"
    class_names = ("normal", "polyp")
    folder = "Kvasir-SEG"
    required = ("images", "masks")
    licence: ClassVar[str] = "research and education only, with citation (from memory, not verified)"
    where: ClassVar[str] = "https://datasets.simula.no/kvasir-seg/"
    tree: ClassVar[str] = "Kvasir-SEG/{images,masks}/ID.jpg (beside kavsir_bboxes.json, which is not read)"
    counts: ClassVar[str] = (
        "1,000 images of polyps; with `normal` also the 3,000 of normal cecum, pylorus and z-line (from memory, not "
        "verified)"
    )
    splitting: ClassVar[str] = "70, 15 and 15 % of every class, seeded; none is published with the archive"
    labelling: ClassVar[str] = "images of Kvasir-SEG show a polyp; normal images come from Kvasir's folders"
    roi_rule: ClassVar[str] = (
        "the union of an image's polyps, drawn by a physician, for class polyp: mask pixels brighter than 127 of 255, "
        "since the masks are JPEG files; normal images have none"
    )
    faults: ClassVar[str] = (
        "patients and videos are not named, so images of one may be divided; the polyps are of one place of the gut "
        "and the normal images of three, so place gives the class away to some degree; Kvasir-SEG's images are of "
        "Kvasir's class polyps under other names (from memory, not verified): do not test on the one what was trained "
        "on the other"
    )
    reference = "https://doi.org/10.1007/978-3-030-37734-2_37"

    normal: Path | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    def find(self, folder: Path) -> list[Found]:
        """Return the polyps with their masks and, if there are, the normal images."""
        files = images(folder / "images")
        masks = paired(files, folder / "masks")
        found = [Found(f"images/{f.stem}", 1, f, (("", m),)) for f, m in zip(files, masks, strict=True)]
        found += self._normal()
        return dealt(found, self.seed)

    def _normal(self) -> list[Found]:
        if self.normal is None:
            return []
        folders = class_folders(Kvasir(root=self.normal).home, CLASSES)
        paths = [path for _, path in folders if path.name in NORMAL]
        return [Found(f"{path.name}/{file.stem}", 0, file) for path in paths for file in images(path)]
