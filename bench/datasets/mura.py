"""MURA: musculoskeletal radiographs, normal or abnormal by study, grouped by patient."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from bench.datasets.chung2024 import Chung2024
from bench.datasets.files import TRAIN_VAL, Found, class_folders, dealt, images
from explainer_bench import RequestError

PARTS = ("XR_ELBOW", "XR_FINGER", "XR_FOREARM", "XR_HAND", "XR_HUMERUS", "XR_SHOULDER", "XR_WRIST")
_STUDY = re.compile(r"study\d+_(?P<label>negative|positive)")


class Mura(Chung2024):
    """The public radiographs of the upper extremity of MURA, version 1.1 (Rajpurkar et al., 2018).

    The published `valid` folder is our test split; `train` is dealt into train and val by patient. A patient may have
    several studies, of several body parts and both labels.

    Parameters
    ----------
    root : Path
        The folder `MURA-v1.1`, or the one that contains it.
    split : {"train", "val", "test"}
        Which part.
    annotations : Path, optional
        The folder of Chung et al.'s masks. With it the test split is exactly those annotated images that the name of
        the mask tells, and images are scaled to a shortest side of 256 pixels.
    seed : int
        Another seed, another validation split.
    """

    name = "mura"
    class_names = ("negative", "positive")
    folder = "MURA-v1.1"
    required = ("train", "valid")
    licence: ClassVar[str] = "Stanford's research use agreement, to be accepted there (from memory, not verified)"
    where: ClassVar[str] = "https://stanfordmlgroup.github.io/competitions/mura/"
    tree: ClassVar[str] = "MURA-v1.1/{train,valid}/XR_PART/patientNNNNN/studyM_{negative,positive}/imageK.png"
    counts: ClassVar[str] = (
        "40,561 images of 14,863 studies with the hidden test set; public: 36,808 images in train (from memory, not "
        "verified), 3,197 images of 783 patients in valid"
    )
    splitting: ClassVar[str] = (
        "the published valid folder is test; 15 % of train is val, seeded, by patient. The published test set is "
        "hidden, and the split of Chung et al. is not published; their annotated images are of valid"
    )
    labelling: ClassVar[str] = "by study, by radiologists: every image of an abnormal study is positive"
    roi_rule: ClassVar[str] = (
        "none without `annotations`; with them one rectangle each in positive images, drawn by a physician on the "
        "image resized and cropped to 224 x 224 pixels, for class 1; two are empty, so those images have none"
    )
    faults: ClassVar[str] = (
        "an image of a positive study need not show the abnormality; hardware and letters are burnt in; the archive "
        "holds macOS's ._ files. The annotation masks name patient, study and image but not the body part: 12 of the "
        "50 names, both empty masks among them, fit positive studies of several parts; those whose image number occurs "
        "in more than one are left out, since nobody can tell which image was annotated"
    )
    reference = "https://arxiv.org/abs/1712.06957"

    seed: Annotated[int, Field(ge=0)] = 0

    def listed(self, folder: Path) -> list[Found]:
        """Return every image."""
        train, test = (list(_images(path)) for _, path in class_folders(folder, self.required))
        return dealt(train, self.seed, TRAIN_VAL) + [replace(item, split="test") for item in test]

    def key(self, found: Found) -> str:
        """Return patient, study and image for the test split's images."""
        return "_".join(found.path.with_suffix("").parts[-3:]) if found.split == "test" else ""


def _images(folder: Path) -> Iterator[Found]:
    """The images of the train or the valid folder, in no split."""
    for part in _folders(folder):
        if part.name not in PARTS:
            raise RequestError(f"{part} is no body part: expected some of {', '.join(PARTS)}; move it elsewhere.")
        for study in (study for patient in _folders(part) for study in _folders(patient)):
            if not (match := _STUDY.fullmatch(study.name)):
                raise RequestError(f"{study} is not named study1_negative or study1_positive: rename or remove it.")
            patient = study.parent.name
            for file in images(study):
                stem = file.relative_to(folder.parent).with_suffix("").as_posix()
                yield Found(stem, int(match["label"] == "positive"), file, group=patient)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
