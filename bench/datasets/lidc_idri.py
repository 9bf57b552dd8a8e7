"""LIDC-IDRI: crops around lung nodules on CT, benign against malignant, with eight biomarkers."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from sklearn.model_selection import StratifiedKFold

from bench.datasets.base import Item, Masks, Sample
from bench.datasets.files import FileDataset, Found, deal
from bench.datasets.tables import numbers, table
from explainer_bench import RequestError

SIDE = 32  # voxels of 1 mm
MIDDLE = 16
WINDOW = (-1000, 400)  # HU
FOLDS = 5
SEED = 44
UNDECIDED = 3
BIOMARKERS = (
    "subtlety",
    "calcification",
    "margin",
    "lobulation",
    "spiculation",
    "diameter",
    "texture",
    "sphericity",
)
AXES = {"axial": 2, "coronal": 0, "sagittal": 1}  # of a volume (rows, columns, slices)


class LidcIdri(FileDataset):
    """Lung nodules that three or four radiologists rated, as 32 mm crops of chest CT.

    Read are crops that a short script makes of the DICOM archive with pylidc: see the how-to "Prepare LIDC-IDRI".
    It follows the study by Brocki, Binda and Chung (their released code): nodules with three or four annotations,
    resampled to 1 mm, 32 x 32 x 32 voxels around the centre of the consensus (level 0.5). An image is the middle
    slice, clipped to -1000 to 400 HU and mapped to 0 to 255, which quantises it to steps of 5.5 HU (1400 / 255).
    The study used float HU and, for testing, the mean of its model's outputs over the three views.

    Parameters
    ----------
    root : Path
        The folder of `nodules.csv` and `nodules`, or the one that contains it.
    split : {"train", "val", "test"}
        Test is the fold `fold`, val the one after it, train the other three.
    folds : {"patient", "nodule"}
        How the five folds are made: of whole patients, or as published, `StratifiedKFold` of scikit-learn
        over nodules, shuffled with seed 44, in the order of `nodules.csv`. The latter leaks: several nodules of
        one patient fall on both sides. It needs the published order, patients ascending.
    fold : int
        Which of the five, from 0.
    view : {"axial", "coronal", "sagittal"}
        The plane of the middle slice.
    """

    name = "lidc_idri"
    class_names = ("benign", "malignant")
    folder = "lidc-idri-nodules"
    required = ("nodules.csv", "nodules")
    decoding = ("view",)
    licence: ClassVar[str] = "CC BY 3.0"
    where: ClassVar[str] = (
        "https://www.cancerimagingarchive.net/collection/lidc-idri/ (DICOM), then the script in "
        "docs/how-to/prepare-lidc.md"
    )
    tree: ClassVar[str] = (
        "lidc-idri-nodules/ with nodules.csv (nodule,patient,malignancy and the eight biomarkers), nodules/NODULE.npy "
        "(int16 HU, 32 x 32 x 32 at 1 mm; rows, columns, slices) and nodules/NODULE_mask.npy (bool)"
    )
    counts: ClassVar[str] = (
        "854 nodules, as the accuracies printed in the study's code imply, of 1,018 CT scans; `data check` counts"
    )
    splitting: ClassVar[str] = (
        "five folds of whole patients, by the hash of the patient's name; `folds=nodule` are the published ones, which "
        "divide patients. The study had no val: it chose its checkpoint on the fold that it reports on"
    )
    labelling: ClassVar[str] = (
        "the median of the radiologists' malignancy ratings, 1 to 5: above 3 malignant, below 3 benign, 3 left out; "
        "opinions, not pathology"
    )
    roi_rule: ClassVar[str] = (
        "the slice of the consensus mask (half of the annotations or more), for either class: the nodule is what both "
        "are read from"
    )
    faults: ClassVar[str] = (
        'labels are ratings by eye; the nodule is always in the centre of the crop, so a map that says "centre" points '
        "at it; the published folds leak patients"
    )
    reference = "https://doi.org/10.1118/1.3528204"

    folds: Literal["patient", "nodule"] = "patient"
    fold: Annotated[int, Field(ge=0, lt=FOLDS)] = 0
    view: Literal["axial", "coronal", "sagittal"] = "axial"

    def find(self, folder: Path) -> list[Found]:
        """Return the nodules that the CSV file lists and whose median malignancy is not 3."""
        rows = self._rated
        found = [_found(folder, *row) for row in zip(rows["nodule"], rows["patient"], rows["label"], strict=True)]
        parts = ["test", "val", *["train"] * (FOLDS - 2)]
        return [
            replace(item, split=parts[(number - self.fold) % FOLDS])
            for item, number in zip(found, self._folds(rows), strict=True)
        ]

    def classes_of(self, found: Found) -> tuple[int, ...]:
        """Return both classes: the nodule is the evidence for either."""
        return (0, 1)

    def load(self, sample: Sample) -> Item:
        """Read the middle slice, (32, 32, 3) uint8, and that of the mask."""
        found: Found = sample.source
        low, high = WINDOW
        volume, mask = _volume(found.path, np.int16), _volume(found.masks[0][1], np.bool_)
        plane = np.take(volume, MIDDLE, AXES[self.view]).clip(low, high).astype(np.float64)
        grey = np.rint((plane - low) * 255 / (high - low)).astype(np.uint8)
        roi: Masks = dict.fromkeys(self.classes_of(found), np.take(mask, MIDDLE, AXES[self.view]))
        return Item(np.stack([grey] * 3, axis=2), {label: part for label, part in roi.items() if part.any()})

    @property
    def targets(self) -> pd.DataFrame:
        """The biomarkers of `samples`, float64, by id: means over annotations, as rated (diameter in mm)."""
        rows = self._rated.set_index("nodule")[list(BIOMARKERS)]
        return rows.loc[[sample.id for sample in self.samples]]

    @cached_property
    def _rated(self) -> pd.DataFrame:
        """The rows of the CSV file with a label, in its order."""
        path = self.home / "nodules.csv"
        rows = table(path, ("nodule", "patient", "malignancy", *BIOMARKERS), key="nodule")
        for name in BIOMARKERS:
            rows[name] = numbers(path, rows[name])
        medians = np.array([_median(path, row + 2, text) for row, text in enumerate(rows["malignancy"])])
        return rows.assign(label=(medians > UNDECIDED).astype(int))[medians != UNDECIDED]

    def _folds(self, rows: pd.DataFrame) -> list[int]:
        """The number of each nodule's fold, in which it is tested."""
        patients, labels = list(rows["patient"]), list(rows["label"])
        if self.folds == "patient":
            shares = {str(number): 1 / FOLDS for number in range(FOLDS)}
            return [int(part) for part in deal(patients, labels, SEED, shares)]
        if min(np.bincount(labels, minlength=2)) < FOLDS:
            raise RequestError(f"{self.home / 'nodules.csv'} has too few nodules of a class for {FOLDS} folds.")
        numbered = np.empty(len(labels), int)
        division = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED).split(labels, labels)
        for number, (_, held_out) in enumerate(division):
            numbered[held_out] = number
        return numbered.tolist()


def _found(folder: Path, nodule: str, patient: str, label: int) -> Found:
    crop, mask = (folder / "nodules" / f"{nodule}{ending}.npy" for ending in ("", "_mask"))
    return Found(nodule, label, crop, (("", mask),), group=patient)


def _median(path: Path, line: int, text: str) -> float:
    """The median of ratings such as "3 4 4 5"."""
    ratings = text.split()
    if not ratings or not set(ratings) <= set("12345"):
        raise RequestError(
            f"{path}, line {line}: malignancy is {text!r}, expected ratings from 1 to 5 with spaces between them, "
            "such as '3 4 4 5'; correct it."
        )
    return float(np.median([int(rating) for rating in ratings]))


def _volume(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """Read a crop, (32, 32, 32)."""
    try:
        volume = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise RequestError(f"{path} cannot be read as an array ({reason}): prepare this nodule again.") from error
    if volume.shape != (SIDE,) * 3 or volume.dtype != dtype:
        raise RequestError(
            f"{path} holds {volume.dtype} of shape {volume.shape}, expected {np.dtype(dtype)} of {(SIDE,) * 3}: "
            "prepare this nodule again."
        )
    return volume
