"""ISIC 2020: dermoscopic images of benign and malignant lesions, divided by patient."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from sklearn.model_selection import train_test_split

from bench.datasets.files import FileDataset, Found, contents
from bench.datasets.tables import coded, table
from explainer_bench import RequestError

PLACES = ("jpeg/train", "train")  # of the challenge on Kaggle, where `train` holds DICOM files, and of the ISIC archive
SEED = 42


class Isic2020(FileDataset):
    """The labelled dermoscopic images of the SIIM-ISIC 2020 melanoma challenge.

    The split is that of Goncalves et al., "A survey on attention mechanisms for medical applications" (IEEE
    Access 2022, their released code): the sorted patients are divided twice with scikit-learn's
    `train_test_split`, 20 % for test and then 25 % of the rest for val, seed 42, not stratified. No patient is
    on two sides.

    Parameters
    ----------
    root : Path
        The folder of `train.csv`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    """

    name = "isic2020"
    class_names = ("benign", "malignant")
    folder = "siim-isic-melanoma-classification"
    required = ("train.csv",)
    licence: ClassVar[str] = "CC BY-NC 4.0 (from memory, not verified)"
    where: ClassVar[str] = "https://challenge2020.isic-archive.com"
    tree: ClassVar[str] = (
        "siim-isic-melanoma-classification/ with train.csv (image_name,patient_id,target,...) and jpeg/train/NAME.jpg "
        "or train/NAME.jpg; the ISIC archive calls the CSV file ISIC_2020_Training_GroundTruth.csv: rename it"
    )
    counts: ClassVar[str] = (
        "33,126 images of more than 2,000 patients, about 1.8 % malignant (584; the share from memory, not verified)"
    )
    splitting: ClassVar[str] = "60, 20 and 20 % of the patients, seed 42: the division of the study"
    labelling: ClassVar[str] = "target in train.csv: 1 is malignant, confirmed by histopathology"
    roi_rule: ClassVar[str] = "none: the archive has no masks, so localization is undefined"
    faults: ClassVar[str] = (
        "accuracy says nothing at 1.8 % malignant; 425 images are duplicates of others (from memory, not verified); "
        "rulers, ink, hair and the size of the image go with the hospital and so with the label (from memory)"
    )
    reference = "https://doi.org/10.1038/s41597-021-00815-z"

    def find(self, folder: Path) -> list[Found]:
        """Return the images that the CSV file lists."""
        path = folder / "train.csv"
        rows = table(path, ("image_name", "patient_id", "target"), key="image_name")
        labels = coded(path, rows["target"], {"0": 0, "1": 1})
        try:
            part = divided(list(rows["patient_id"]))
        except ValueError as error:
            raise RequestError(f"{path} lists too few patients to divide: copy the whole file.") from error
        images = _images(folder)
        return [
            Found(name, label, images / f"{name}.jpg", group=patient, split=part[patient])
            for name, patient, label in zip(rows["image_name"], rows["patient_id"], labels, strict=True)
        ]


def _images(folder: Path) -> Path:
    for place in PLACES:
        if (folder / place).is_dir():
            return folder / place
    raise RequestError(f"{folder} has neither {PLACES[0]} nor {PLACES[1]} with the images: {contents(folder)}.")


def divided(patients: list[str]) -> dict[str, str]:
    """Return the published split of each patient, given the patient of each image."""
    rest, test = train_test_split(np.unique(patients), test_size=0.20, random_state=SEED)
    train, val = train_test_split(rest, test_size=0.25, random_state=SEED)
    parts = {"train": train, "val": val, "test": test}
    return {str(patient): split for split, members in parts.items() for patient in members}
