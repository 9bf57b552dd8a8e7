"""Fixtures of more file data sets; see `layouts`."""

from __future__ import annotations

import gzip
import io

import numpy as np
import scipy.io

from bench.datasets import imagenet as imagenet_module
from bench.datasets.lidc_idri import BIOMARKERS
from tests.bench.layouts import Layout, encode, layout, mask, picture


def rows(*lines: str) -> bytes:
    """Return a CSV file of these lines."""
    return ("\n".join(lines) + "\n").encode()


def array(values: np.ndarray) -> bytes:
    """Return a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


APTOS_GRADES = (0, 2, 0, 1, 4, 0, 0, 2, 3, 0, 2, 0, 1, 2, 0, 4, 0, 2, 2, 2)


@layout
def aptos2019() -> Layout:
    """Ids that look like numbers; images without a label, which are the challenge's own test set."""
    ids = [f"{i:06d}e{i}" for i in range(len(APTOS_GRADES))]
    files = {"train.csv": rows("id_code,diagnosis", *(f"{i},{g}" for i, g in zip(ids, APTOS_GRADES, strict=True)))}
    files |= {f"train_images/{name}.png": picture(i) for i, name in enumerate(ids)}
    files |= {"test.csv": rows("id_code", "0005cfc8afb6"), "test_images/0005cfc8afb6.png": picture(99)}
    return Layout(
        files,
        images=(8, 12),
        groups=20,
        image=f"train_images/{ids[4]}.png",
        class_folder="train_images",
        closed=False,
        splits={"train": 12, "val": 5, "test": 3},
    )


@layout
def isic2020() -> Layout:
    """As on Kaggle: JPEG beside DICOM folders, columns that are not needed, empty cells; two images per patient."""
    header = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
    lines, files = [header], {"train/ISIC_0000000.dcm": b"x", "test.csv": rows("image_name,patient_id", "a,b")}
    for i in range(40):
        target = int(i % 9 == 0)
        kind = "malignant" if target else "benign"
        lines.append(f"ISIC_{i:07d},IP_{7 * (i // 2) % 20:07d},male,45,,unknown,{kind},{target}")
        files[f"jpeg/train/ISIC_{i:07d}.jpg"] = picture(i, "jpg")
    files["train.csv"] = rows(*lines)
    return Layout(
        files,
        images=(35, 5),
        groups=20,
        image="jpeg/train/ISIC_0000004.jpg",
        class_folder="jpeg/train",
        closed=False,
        splits={"train": 24, "val": 8, "test": 8},
    )


# Of each study its number, views, findings (No Finding, Pleural Effusion) and split.
MIMIC_STUDIES = [
    (10000032, 50414267, ("AP", "LATERAL"), ("1.0", ""), "train"),
    (10000032, 53189527, ("AP",), ("", "1.0"), "train"),
    (10000764, 57375967, ("AP", "AP"), ("", "1.0"), "validate"),
    (10000898, 50771383, ("PA",), ("1.0", ""), "train"),
    (10000935, 50578979, ("AP",), ("", "-1.0"), "test"),
    (10000935, 51178377, ("AP",), ("", "0.0"), "test"),
    (10000980, 50985099, ("AP",), ("1.0", "1.0"), "test"),
    (10001038, 51223704, ("AP",), ("1.0", ""), "test"),
    (10001122, 53957785, ("AP",), ("", "1.0"), "test"),
    (10001176, 53186264, ("AP",), ("1.0", ""), "validate"),
    (11000011, 51029426, ("",), ("1.0", ""), "train"),
]


@layout
def mimic_cxr() -> Layout:
    """Tables gzipped or not; other views, uncertain and contradictory studies, images that a table lacks."""
    metadata, parts, files = (
        ["dicom_id,subject_id,study_id,ViewPosition,Rows"],
        ["dicom_id,study_id,subject_id,split"],
        {},
    )
    labels = ["subject_id,study_id,Atelectasis,No Finding,Pleural Effusion"]
    for subject, study, views, findings, split in MIMIC_STUDIES:
        labels.append(f"{subject},{study},,{','.join(findings)}")
        for i, view in enumerate(views):
            name = f"{study:x}-{i}"
            metadata.append(f"{name},{subject},{study},{view},2544")
            parts.append(f"{name},{study},{subject},{split}")
            file = f"files/p{str(subject)[:2]}/p{subject}/s{study}/{name}.jpg"
            files[file] = picture(study + i, "jpg", mode="L")
    metadata += ["unlabelled-0,10000032,1,AP,9", "undivided-0,10000032,50414267,AP,9"]
    parts.append("unlabelled-0,1,10000032,train")
    files["mimic-cxr-2.0.0-metadata.csv.gz"] = gzip.compress(rows(*metadata), mtime=0)
    files["mimic-cxr-2.0.0-chexpert.csv"] = rows(*labels)
    files["mimic-cxr-2.0.0-split.csv.gz"] = gzip.compress(rows(*parts), mtime=0)
    return Layout(
        files,
        images=(3, 4),
        groups=5,
        image=f"files/p10/p10001122/s53957785/{53957785:x}-0.jpg",
        class_folder="files",
        closed=False,
        splits={"train": 2, "val": 3, "test": 2},
    )


@layout
def lidc_idri() -> Layout:
    """What the script of the how-to writes: three nodules of each patient, one of them undecided for every third."""
    lines, files = [",".join(("nodule", "patient", "malignancy", *BIOMARKERS))], {}
    for patient in range(1, 13):
        for i in range(3):
            malignancy = "3 3 3" if i == 2 and patient % 3 == 0 else "4 5 4 3" if (patient + i) % 2 else "2 1 3"
            name = f"LIDC-IDRI-{patient:04d}_{i}"
            values = [f"{1 + (patient + 3 * i + k) % 5 + 0.25}" for k in range(len(BIOMARKERS))]
            lines.append(",".join([name, f"LIDC-IDRI-{patient:04d}", malignancy, *values]))
            ball = np.indices((32, 32, 32)) - np.array([16, 16, 14 + i]).reshape(3, 1, 1, 1)
            nodule = (ball**2).sum(0) <= (3 + i) ** 2
            noise = np.random.default_rng(10 * patient + i).integers(-40, 40, nodule.shape)
            files[f"nodules/{name}.npy"] = array((np.where(nodule, 50, -850) + noise).astype(np.int16))
            files[f"nodules/{name}_mask.npy"] = array(nodule)
    files["nodules.csv"] = rows(*lines)
    return Layout(
        files,
        images=(16, 16),
        groups=12,
        image="nodules/LIDC-IDRI-0004_1.npy",
        class_folder="nodules",
        closed=False,
        roi=("LIDC-IDRI-0001_2", {0: 81, 1: 81}),
    )


def segmentation(*boxes: tuple[int, int, int, int, int], size: tuple[int, int] = (40, 48)) -> bytes:
    """Return a mask in the code of ImageNet-S: boxes (top, bottom, left, right, number of the class)."""
    numbers = np.zeros(size, np.int64)
    for top, bottom, left, right, number in boxes:
        numbers[top:bottom, left:right] = number
    return encode(np.stack([numbers % 256, numbers // 256, 0 * numbers], axis=2).astype(np.uint8))


def segmented() -> list[str]:
    """Return 919 WordNet ids as in the file of ImageNet-S, with the merged classes left out, not sorted."""
    kept = [wnid for wnid in imagenet_module.wnids() if wnid not in imagenet_module.SAME]
    special = {"n01440764", "n04355933", "n15075141"}
    others = [wnid for wnid in kept if wnid not in special][: 919 - len(special)]
    return [*special, *others][::-1]


def number(wnid: str) -> int:
    """Return the number that ImageNet-S gives to a class of `segmented`."""
    return sorted(segmented()).index(wnid) + 1


@layout
def imagenet() -> Layout:
    """Five class folders of the thousand, masks of ImageNet-S for some, one of a merged class."""
    files: dict[str, bytes] = {}
    for i, wnid in enumerate(("n01440764", "n01443537", "n04355933", "n04356056", "n15075141")):
        for k in range(3):
            file = f"val/{wnid}/ILSVRC2012_val_{10 * i + k + 1:08d}.JPEG"
            files[file] = picture(10 * i + k, "jpg", mode="L" if k == 2 else "RGB")
        files[f"train/{wnid}/{wnid}_{i}.JPEG"] = picture(100 + i, "jpg")
    masks = "ImageNetS919/validation-segmentation"
    tench = (10, 20, 8, 18, number("n01440764"))
    glasses = (30, 36, 10, 20, number("n04355933"))
    files[f"{masks}/n01440764/ILSVRC2012_val_00000001.png"] = segmentation(tench, (30, 40, 0, 48, 1000))
    files[f"{masks}/n04355933/ILSVRC2012_val_00000031.png"] = segmentation(glasses)
    files["ImageNetS919/ImageNetS_categories_im919.txt"] = "\n".join(segmented()).encode()
    counts = [0] * 1000
    for wnid in ("n01440764", "n01443537", "n04355933", "n04356056", "n15075141"):
        counts[imagenet_module.wnids()[wnid]] = 4
    return Layout(
        files,
        images=tuple(counts),
        groups=20,
        image="val/n01440764/ILSVRC2012_val_00000002.JPEG",
        class_folder="val",
        closed=False,
        mask=f"{masks}/n01440764/ILSVRC2012_val_00000001.png",
        roi=("n01440764/ILSVRC2012_val_00000001", {0: 100}),
        splits={"train": 5, "test": 15},
    )


def devkit() -> dict[str, bytes]:
    """Return the development kit's files for two images: its numbers are in another order than the labels."""
    meta = io.BytesIO()
    kinds = np.zeros(3, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")])
    for row, wnid in enumerate(("n15075141", "n01440764", "n00001740")):
        kinds[row] = (row + 1, wnid, 0)
    scipy.io.savemat(meta, {"synsets": kinds})
    folder = "ILSVRC2012_devkit_t12/data"
    return {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n"}


@layout
def folder() -> Layout:
    """Three classes of several formats, masks for some images, a hidden folder."""
    files = {".cache/x.png": b"x", "cats/notes.txt": b"x"}
    for label, name in enumerate(("ants", "bees", "cats")):
        for i in range(10 + label):
            kind = ("png", "jpg")[i % 2]
            files[f"{name}/{name[0]} {i}.{kind}"] = picture(100 * label + i, kind)
    files["masks/ants/a 3.png"] = mask((10, 20, 5, 25))
    files["masks/bees/b 4.png"] = mask((10, 20, 5, 15), mode="RGBA")
    return Layout(
        files,
        images=(10, 11, 12),
        groups=33,
        image="bees/b 4.png",
        mask="masks/bees/b 4.png",
        roi=("bees/b 4", {1: 100}),
    )
