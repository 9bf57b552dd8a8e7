"""Kvasir v2: endoscopic images of the gastrointestinal tract in eight classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bench.datasets.chung2024 import Chung2024
from bench.datasets.files import Found, class_folders, dealt, images

CLASSES = (
    "dyed-lifted-polyps",
    "dyed-resection-margins",
    "esophagitis",
    "normal-cecum",
    "normal-pylorus",
    "normal-z-line",
    "polyps",
    "ulcerative-colitis",
)
NORMAL = ("normal-cecum", "normal-pylorus", "normal-z-line")
FINDINGS = ("esophagitis", "polyps", "ulcerative-colitis")


class Kvasir(Chung2024):
    """The 8,000 endoscopic images of Kvasir, version 2 (Pogorelov et al., 2017).

    Chung et al. (2024) train a binary classifier on Kvasir and explain its class 1 in 50 annotated images; which
    folders make up their two classes is not published. `task="finding"` is our reading: class 1 holds the three
    pathological findings, class 0 the three normal landmarks, and the two folders of dyed polyps are left out.

    Parameters
    ----------
    root : Path
        The folder `kvasir-dataset-v2`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    annotations : Path, optional
        The folder of Chung et al.'s masks. With it the test split is exactly the annotated images, from whichever
        folder, and images are scaled to a shortest side of 256 pixels.
    task : {"classes", "finding"}
        The eight classes, or finding against normal.
    seed : int
        Another seed, another division.
    """

    name = "kvasir"
    folder = "kvasir-dataset-v2"
    required = CLASSES[:1]
    licence: ClassVar[str] = "research and education only, with citation (from memory, not verified)"
    where: ClassVar[str] = "https://datasets.simula.no/kvasir/"
    tree: ClassVar[str] = f"kvasir-dataset-v2/{{{','.join(CLASSES)}}}/UUID.jpg"
    counts: ClassVar[str] = "8,000 images, 1,000 of each class (from memory, not verified)"
    splitting: ClassVar[str] = (
        "70, 15 and 15 % of every class, seeded; none is published, nor is that of Chung et al. With `annotations` the "
        "annotated images are the test split, and the others that would be in it are left out"
    )
    labelling: ClassVar[str] = "the class folder, sorted by endoscopists"
    roi_rule: ClassVar[str] = (
        "none without `annotations`; with them one rectangle each in 50 images, drawn by a physician on the image "
        "resized and cropped to 224 x 224 pixels (one covers the whole image), for class 1 of the task finding, for "
        "the image's own class of the eight"
    )
    faults: ClassVar[str] = (
        "patients and videos are not named, so images of one may be divided, and near-duplicates occur (from memory, "
        "not verified); a green box with the endoscope's position is burnt into some images (from memory, not "
        "verified). Chung et al. cut the black margin off wide images, how is not published: here they are cropped at "
        "the centre, so their masks may be displaced sideways"
    )
    reference = "https://doi.org/10.1145/3083187.3083212"

    task: Literal["classes", "finding"] = "classes"
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The eight folders, or normal and finding."""
        return ("normal", "finding") if self.task == "finding" else CLASSES

    def listed(self, folder: Path) -> list[Found]:
        """Return every image; those of no class of the task are in no split."""
        found = [
            Found(f"{path.name}/{file.stem}", label, file)
            for label, path in class_folders(folder, CLASSES)
            for file in images(path)
        ]
        return [self._with_label(item) for item in dealt(found, self.seed)]

    def _with_label(self, found: Found) -> Found:
        name = CLASSES[found.label]
        if self.task == "classes":
            return found
        return replace(found, label=int(name in FINDINGS), split=found.split if name in (*FINDINGS, *NORMAL) else "")

    def annotated_label(self, found: Found) -> int:
        """Return 1 (finding), or the image's own class of the eight."""
        return 1 if self.task == "finding" else found.label
