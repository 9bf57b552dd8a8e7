"""APTOS 2019: fundus photographs graded for diabetic retinopathy, with the split of the attention survey."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from sklearn.model_selection import train_test_split

from bench.datasets.files import FileDataset, Found
from bench.datasets.tables import coded, table
from explainer_bench import RequestError

GRADES = ("no DR", "mild", "moderate", "severe", "proliferative DR")
BINARY = ("normal", "diabetic retinopathy")
SEED = 42


class Aptos2019(FileDataset):
    """The labelled fundus photographs of the APTOS 2019 Blindness Detection challenge.

    Split and label are those of Goncalves et al., "A survey on attention mechanisms for medical applications"
    (IEEE Access 2022, their released code): grade above 0 against grade 0, and two stratified divisions with
    scikit-learn's `train_test_split`, 85 % and then 75 % for training, seed 42, in the order of the CSV file.

    Parameters
    ----------
    root : Path
        The folder of `train.csv` and `train_images`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    grades : bool
        The five grades instead of the two classes of the study; the division stays the same.
    """

    name = "aptos2019"
    folder = "aptos2019-blindness-detection"
    required = ("train.csv", "train_images")
    licence: ClassVar[str] = "the rules of the Kaggle competition, to be accepted there (from memory, not verified)"
    where: ClassVar[str] = "https://www.kaggle.com/c/aptos2019-blindness-detection"
    tree: ClassVar[str] = "aptos2019-blindness-detection/ with train.csv (id_code,diagnosis) and train_images/ID.png"
    counts: ClassVar[str] = (
        "3,662 images with a label; by grade 1,805, 370, 999, 193 and 295 (from memory, not verified). The challenge's "
        "own test images have no public label and are not read"
    )
    splitting: ClassVar[str] = (
        "63.75 % train, 21.25 % val, 15 % test, stratified, seed 42: the division of the study. The archive does not "
        "name patients, so both eyes of one may be divided"
    )
    labelling: ClassVar[str] = (
        "diagnosis in train.csv: 0 is normal, 1 to 4 diabetic retinopathy; `grades` keeps all five"
    )
    roi_rule: ClassVar[str] = "none: the archive has no masks, so localization is undefined"
    faults: ClassVar[str] = (
        "patients are not named; some photographs are there twice, a few with different grades (from memory, not "
        "verified); image size and crop differ by camera and go with the grade, a known shortcut (from memory)"
    )
    reference = "https://doi.org/10.1109/ACCESS.2022.3206449"

    grades: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Normal and diabetic retinopathy; with `grades` no DR, mild, moderate, severe and proliferative DR."""
        return GRADES if self.grades else BINARY

    def find(self, folder: Path) -> list[Found]:
        """Return the images that the CSV file lists."""
        path = folder / "train.csv"
        rows = table(path, ("id_code", "diagnosis"), key="id_code")
        grades = coded(path, rows["diagnosis"], {str(grade): grade for grade in range(len(GRADES))})
        ids = list(rows["id_code"])
        binary = [int(grade > 0) for grade in grades]
        try:
            parts = divided(binary)
        except ValueError as error:
            raise RequestError(f"{path} lists too few images of a class to divide: copy the whole file.") from error
        labels = grades if self.grades else binary
        images = folder / "train_images"
        return [
            Found(name, label, images / f"{name}.png", split=part)
            for name, label, part in zip(ids, labels, parts, strict=True)
        ]


def divided(labels: list[int]) -> list[str]:
    """Return the published split of each image, given the binary labels in the order of the CSV file."""
    rest, test = train_test_split(np.arange(len(labels)), train_size=0.85, stratify=labels, random_state=SEED)
    train, val = train_test_split(rest, train_size=0.75, stratify=np.array(labels)[rest], random_state=SEED)
    parts = np.empty(len(labels), dtype=object)
    for name, rows in {"train": train, "val": val, "test": test}.items():
        parts[rows] = name
    return parts.tolist()
