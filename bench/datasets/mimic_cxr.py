"""MIMIC-CXR-JPG: chest radiographs from the front, no finding against pleural effusion."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pandas as pd

from bench.datasets.files import FileDataset, Found
from bench.datasets.tables import coded, table

TABLES = "mimic-cxr-2.0.0"
NORMAL, EFFUSION = "No Finding", "Pleural Effusion"
SAID = {"": 0, "0.0": 0, "1.0": 1, "-1.0": 0, "0": 0, "1": 1, "-1": 0}  # only a certain yes counts
SPLITS = {"train": 0, "validate": 1, "test": 2}


class MimicCxr(FileDataset):
    """Antero-posterior radiographs of MIMIC-CXR-JPG, labelled normal or pleural effusion by their reports.

    Goncalves et al., "A survey on attention mechanisms for medical applications" (IEEE Access 2022), used such
    images from folders of their own, which they did not release; their choice of images and their division are
    therefore not known. Here are all images whose view is AP and whose study is labelled certainly with one of
    the two, in the division that comes with the archive. Only images that all three tables name are read.

    Parameters
    ----------
    root : Path
        The folder of `files` and the three tables, or the one that contains it.
    split : {"train", "val", "test"}
        Which part; the archive calls val "validate".
    """

    name = "mimic_cxr"
    class_names = ("normal", "pleural effusion")
    folder = "mimic-cxr-jpg"
    required = ("files",)
    licence: ClassVar[str] = (
        "PhysioNet's for credentialed health data (name from memory, not verified), after training and signature"
    )
    where: ClassVar[str] = "https://physionet.org/content/mimic-cxr-jpg/"
    tree: ClassVar[str] = (
        f"mimic-cxr-jpg/ with files/p10/p10000032/s50414267/DICOM_ID.jpg and {TABLES}-metadata.csv, "
        f"{TABLES}-chexpert.csv, {TABLES}-split.csv (or .csv.gz)"
    )
    counts: ClassVar[str] = "377,110 images of 227,827 studies in all views; how many remain here `data check` counts"
    splitting: ClassVar[str] = "the archive's own train, validate and test, by subject"
    labelling: ClassVar[str] = (
        f"CheXpert's reading of the report: {EFFUSION} == 1 against {NORMAL} == 1; uncertain (-1) and unmentioned "
        "findings do not count, studies with both or neither are left out"
    )
    roi_rule: ClassVar[str] = "none: the archive has no masks, so localization is undefined"
    faults: ClassVar[str] = (
        "labels come from reports by rule, not from images; AP images are mostly of bedridden patients, so tubes "
        "and posture go with the finding; laterality letters and other text are burnt in (the last two from memory)"
    )
    reference = "https://doi.org/10.13026/jsn5-t979"

    def find(self, folder: Path) -> list[Found]:
        """Return the AP images of the studies with one of the two labels."""
        images = (
            _front(folder).merge(_labelled(folder), on=["subject_id", "study_id"]).merge(_parts(folder), on="dicom_id")
        )
        return [_found(folder, *row) for row in images[list(_COLUMNS)].itertuples(index=False, name=None)]


_COLUMNS = ("subject_id", "study_id", "dicom_id", "label", "part")


def _found(folder: Path, subject: str, study: str, dicom: str, label: int, part: int) -> Found:
    name = f"p{subject[:2]}/p{subject}/s{study}/{dicom}"
    split = ("train", "val", "test")[part]
    return Found(name, label, folder / "files" / f"{name}.jpg", group=subject, split=split)


def _front(folder: Path) -> pd.DataFrame:
    """The AP images."""
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    images = table(folder / f"{TABLES}-metadata.csv", columns, key="dicom_id")
    return images[images["ViewPosition"] == "AP"]


def _labelled(folder: Path) -> pd.DataFrame:
    """The studies that are certainly of one class, with its label."""
    path = folder / f"{TABLES}-chexpert.csv"
    studies = table(path, ("subject_id", "study_id", NORMAL, EFFUSION), key="study_id")
    normal, effusion = (pd.Series(coded(path, studies[finding], SAID)) for finding in (NORMAL, EFFUSION))
    return studies.assign(label=effusion)[normal != effusion]


def _parts(folder: Path) -> pd.DataFrame:
    """Which split each image belongs to."""
    path = folder / f"{TABLES}-split.csv"
    images = table(path, ("dicom_id", "split"), key="dicom_id")
    return images.assign(part=coded(path, images["split"], SPLITS))
