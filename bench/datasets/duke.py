"""Duke-Breast-Cancer-MRI as PNG slices: with and without tumour, grouped by patient."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.datasets.chung2024 import Chung2024
from bench.datasets.files import Found, class_folders, dealt, images
from explainer_bench import RequestError

FOLDERS = ("neg", "pos")
_SLICE = re.compile(r"\d+-\d+-(?P<patient>\d+)")  # series, DICOM instance, patient


class Duke(Chung2024):
    """Slices of pre-contrast breast MRI (Saha et al., 2018), made as the Mazurowski Lab's tutorial makes them.

    A slice is positive inside the tumour's three-dimensional box, negative more than five slices away from it. The
    patient is the last number of the file name, and no patient is divided between splits. (That it is the patient's
    shows in the annotation masks: those with the same last number are equal, as one box goes through all slices.)

    Parameters
    ----------
    root : Path
        The folder `png_out`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    annotations : Path, optional
        The folder of Chung et al.'s masks. With it the test split is exactly the annotated slices, and slices are
        scaled to 224 x 224 pixels.
    seed : int
        Another seed, another division.
    """

    name = "duke"
    class_names = ("negative", "positive")
    folder = "png_out"
    required = FOLDERS
    shortest_side = None
    licence: ClassVar[str] = "CC BY-NC 4.0 (from memory, not verified)"
    where: ClassVar[str] = (
        "https://doi.org/10.7937/TCIA.e3sv-re93 (DICOM), converted as in "
        "https://sites.duke.edu/mazurowski/2022/07/13/breast-mri-cancer-detect-tutorial-part1/"
    )
    tree: ClassVar[str] = "png_out/{neg,pos}/SERIES-SLICE-PATIENT.png, such as pos/1-087-351.png"
    counts: ClassVar[str] = (
        "922 patients (from memory, not verified); the tutorial stops at 2,600 slices of each class and patient 100, "
        "Chung et al. take patients 1 to 900 and as many positive as negative slices; their counts are not published"
    )
    splitting: ClassVar[str] = (
        "70, 15 and 15 % of the patients' slices, seeded; that of Chung et al. is not published. With `annotations` "
        "the annotated slices are the test split, and nothing else of their patients is in any"
    )
    labelling: ClassVar[str] = (
        "the folder: whether the slice lies in the tumour's box; within five slices of it, neither"
    )
    roi_rule: ClassVar[str] = (
        "none without `annotations`; with them one rectangle each in 50 positive slices, on the slice resized to "
        "224 x 224 pixels, for class 1"
    )
    faults: ClassVar[str] = (
        "labels follow from the position along the body, which a model can read off the anatomy; the 50 annotated "
        "slices are of fewer patients, and eight masks repeat another; ROIs are small (mean area .019)"
    )
    reference = "https://doi.org/10.1038/s41416-018-0185-8"

    seed: Annotated[int, Field(ge=0)] = 0

    def listed(self, folder: Path) -> list[Found]:
        """Return every slice."""
        found = [
            Found(f"{path.name}/{file.stem}", label, file, group=_patient(file))
            for label, path in class_folders(folder, FOLDERS)
            for file in images(path)
        ]
        return dealt(found, self.seed)

    def key(self, found: Found) -> str:
        """Return the file's name for positive slices."""
        return found.path.stem if found.label == 1 else ""


def _patient(file: Path) -> str:
    if not (match := _SLICE.fullmatch(file.stem)):
        raise RequestError(f"{file} is not named SERIES-SLICE-PATIENT.png, as in 1-087-351.png: rename or remove it.")
    return f"patient {int(match['patient'])}"
