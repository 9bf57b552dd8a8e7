"""CP-CHILD: colonoscopy images of children, with and without polyps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bench.datasets.chung2024 import Chung2024
from bench.datasets.files import TRAIN_VAL, Found, class_folders, dealt, images

FOLDERS = ("Non-Polyp", "Polyp")


class CpChild(Chung2024):
    """The colonoscopy images of CP-CHILD (Wang et al., 2020), part A or B.

    Parameters
    ----------
    root : Path
        The folder that holds `CP-CHILD-A` and `CP-CHILD-B`, or the one above it.
    split : {"train", "val", "test"}
        Which part; `val` is dealt from the published training images.
    annotations : Path, optional
        The folder of Chung et al.'s masks. With it the test split is exactly the annotated images, and images are
        scaled to 224 x 224 pixels.
    part : {"A", "B"}
        Which of the two sets; they come from different endoscopes.
    seed : int
        Another seed, another validation split.
    """

    name = "cp_child"
    class_names = ("non-polyp", "polyp")
    folder = "CP-CHILD"
    shortest_side = None
    licence: ClassVar[str] = "CC BY 4.0 (from memory, not verified)"
    where: ClassVar[str] = "https://figshare.com/articles/dataset/CP-CHILD_zip/12554042"
    tree: ClassVar[str] = "CP-CHILD/CP-CHILD-{A,B}/{Train,Test}/{Non-Polyp,Polyp}/*.jpg"
    counts: ClassVar[str] = (
        "8,000 images in part A and 1,500 in part B; of both, Train holds 1,100 with polyps and 7,000 without, Test "
        "300 and 1,100 (as ColonINST lists them), 200 of the 300 in part A (from memory, not verified)"
    )
    splitting: ClassVar[str] = (
        "the published Test folder is test; 15 % of Train is val, seeded. The split of Chung et al. is not published"
    )
    labelling: ClassVar[str] = "the class folder"
    roi_rule: ClassVar[str] = (
        "none without `annotations`; with them one rectangle each in 50 images of polyps, drawn by a physician on the "
        "image resized to 224 x 224 pixels, for class 1"
    )
    faults: ClassVar[str] = (
        "patients are not named, so images of one may be divided, and file names repeat in other folders. Which folder "
        "the 50 annotated images come from is not published: they are looked for in Test/Polyp of `part`, since their "
        "numbers end at 199 and part A has 200 polyps there (from memory, not verified)"
    )
    reference = "https://doi.org/10.1186/s12880-020-00482-3"

    part: Literal["A", "B"] = "A"
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def required(self) -> tuple[str, ...]:
        """The part's folder."""
        return (f"CP-CHILD-{self.part}",)

    def listed(self, folder: Path) -> list[Found]:
        """Return every image of the part."""
        found = [
            Found(f"{split.name}/{path.name}/{file.stem}", label, file, split=split.name.lower())
            for _, split in class_folders(folder / self.required[0], ("Train", "Test"))
            for label, path in class_folders(split, FOLDERS)
            for file in images(path)
        ]
        train = [item for item in found if item.split == "train"]
        return dealt(train, self.seed, TRAIN_VAL) + [item for item in found if item.split == "test"]

    def key(self, found: Found) -> str:
        """Return the file's name for the polyps of the test folder."""
        return found.path.stem if found.split == "test" and found.label == 1 else ""
