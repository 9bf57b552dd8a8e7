"""Tiny fixtures of the file data sets, each in the real layout with what is odd in the real archive.

`make("kvasir", tmp_path)` writes one and returns the folder to give as ``--data-root``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # top, bottom, left, right

SPLITS = ("train", "val", "test")
ANNOTATIONS = "224_mask_annot_from_dr"


@dataclass(frozen=True)
class Layout:
    """A fixture, and what must come of it.

    Parameters
    ----------
    files : mapping
        Paths below the root and their contents.
    images : tuple of int
        Images per class, all splits together.
    groups : int
        Distinct groups, all splits together.
    image : str
        An image, to be damaged.
    class_folder : str
        The folder of one class, to be removed, and to stand beside an unknown one; empty where there is none.
    closed : bool
        An unknown folder beside `class_folder` is an error.
    mask : str
        A mask of one image, to be changed, resized and removed; empty where there is none.
    roi : tuple of (str, mapping)
        The id of a sample with its ROI's pixels by class.
    splits : mapping
        Images per published split; empty where ours are dealt.
    params : mapping
        Parameters of the data set beside the root; ``{root}`` in them stands for it.
    """

    files: Mapping[str, bytes]
    images: tuple[int, ...]
    groups: int
    image: str
    class_folder: str = ""
    closed: bool = True
    mask: str = ""
    roi: tuple[str, Mapping[int, int]] | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


LAYOUTS: dict[str, Callable[[], Layout]] = {}


def layout(function: Callable[[], Layout]) -> Callable[[], Layout]:
    """Register a fixture under the name of its data set."""
    LAYOUTS[function.__name__] = function
    return function


def make(name: str, root: Path, reverse: bool = False) -> Path:
    """Write the fixture of a data set below `root`, its files in reverse order if asked; return `root`."""
    files = list(LAYOUTS[name]().files.items())
    for path, content in reversed(files) if reverse else files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def params(name: str, root: Path) -> dict[str, object]:
    """Return the parameters that read the fixture at `root`."""
    return {"root": root, **{k: v.format(root=root) for k, v in LAYOUTS[name]().params.items()}}


def encode(pixels: np.ndarray, kind: str = "png", mode: str = "") -> bytes:
    """Return an image file's bytes; `mode` converts first, as in the archives whose masks are RGB."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "jpeg" if kind == "jpg" else kind)
    return buffer.getvalue()


def picture(seed: int, kind: str = "png", size: tuple[int, int] = (40, 48), mode: str = "RGB") -> bytes:
    """Return a smooth random image of (height, width) `size`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    return encode(np.asarray(image.convert(mode)), kind)


def mask(*boxes: Box, size: tuple[int, int] = (40, 48), kind: str = "png", mode: str = "", value: int = 255) -> bytes:
    """Return a mask of (height, width) `size` with filled boxes; all zero without."""
    pixels = np.zeros(size, np.uint8)
    for top, bottom, left, right in boxes:
        pixels[top:bottom, left:right] = value
    return encode(pixels, kind, mode)


@layout
def covid_qu_ex() -> Layout:
    """Two trees; masks beside the images; infection masks of all classes, all zero but for COVID-19."""
    names = {"COVID-19": "covid_{}", "Non-COVID": "non_COVID ({})", "Normal": "Normal ({})"}
    files: dict[str, bytes] = {"Infection Segmentation Data/.DS_Store": b"x", "readme.txt": b"x"}
    number = 0
    for tree, count in (("Infection", 2), ("Lung", 1)):
        top = f"{tree} Segmentation Data/{tree} Segmentation Data"
        for split in ("Train", "Val", "Test"):
            for name, pattern in names.items():
                for _ in range(count):
                    number += 1
                    folder, file = f"{top}/{split}/{name}", pattern.format(number) + ".png"
                    infection = [(10, 20, 8, 16)] if name == "COVID-19" else []
                    files[f"{folder}/images/{file}"] = picture(number, mode="L")
                    files[f"{folder}/lung masks/{file}"] = mask((5, 35, 5, 20), (5, 35, 28, 43))
                    if tree == "Infection":
                        files[f"{folder}/infection masks/{file}"] = mask(*infection, mode="RGB")
    files[f"{top}/Train/.DS_Store"] = b"x"
    top = "Infection Segmentation Data/Infection Segmentation Data"
    return Layout(
        files,
        images=(6, 6, 6),
        groups=18,
        image=f"{top}/Val/Normal/images/Normal (11).png",
        class_folder=f"{top}/Test/Non-COVID",
        mask=f"{top}/Test/COVID-19/infection masks/covid_13.png",
        roi=("Test/COVID-19/covid_13", {0: 80}),
        splits={"train": 6, "val": 6, "test": 6},
    )


KVASIR = {  # the names that Chung et al. annotated are such as these
    "dyed-lifted-polyps": "0a7bdce4-ac0d-44ef-93ee-92dae8fe0b81",
    "dyed-resection-margins": "1a5a2d0e-0e5b-4b9e-8a5f-7d9f2f6f1c22",
    "esophagitis": "048a155b-7de4-4235-9c7e-e90010093276",
    "normal-cecum": "2f0e4a5c-9d7f-4b57-9a53-3d3f5c0b8a11",
    "normal-pylorus": "3b1c6d7e-1f2a-4c3d-8e4f-5a6b7c8d9e0f",
    "normal-z-line": "4c2d7e8f-2a3b-4d4e-9f5a-6b7c8d9e0f1a",
    "polyps": "17e2a780-7946-4cd5-8400-492d08b3ccea",
    "ulcerative-colitis": "5d3e8f9a-3b4c-4e5f-8a6b-7c8d9e0f1a2b",
}


def _kvasir() -> dict[str, bytes]:
    files = {"kvasir-dataset-v2/.DS_Store": b"x"}
    for label, (name, stem) in enumerate(KVASIR.items()):
        for i in range(7):
            size = (64, 115) if i == 3 else (58, 72)
            file = f"{stem[:-1]}{int(stem[-1], 16) + i & 15:x}.{'JPG' if i == 2 else 'jpg'}"
            files[f"kvasir-dataset-v2/{name}/{file}"] = picture(100 * label + i, "jpg", size)
    return files


@layout
def kvasir() -> Layout:
    """Eight balanced folders of JPEG files of two proportions, some endings in capitals."""
    masks = {KVASIR["esophagitis"]: mask((20, 200, 30, 210), size=(224, 224), mode="RGB", value=38)}
    masks[KVASIR["polyps"]] = mask((0, 224, 0, 224), size=(224, 224), mode="RGB", value=38)
    files = _kvasir() | {f"{ANNOTATIONS}/kvasir/{stem}.png": content for stem, content in masks.items()}
    image = f"kvasir-dataset-v2/polyps/{KVASIR['polyps']}.jpg"
    return Layout(files, images=(7,) * 8, groups=56, image=image, class_folder="kvasir-dataset-v2/normal-cecum")


@layout
def kvasir_seg() -> Layout:
    """JPEG images and JPEG masks, whose grey levels are therefore not only 0 and 255; normal images from Kvasir."""
    files, boxes = dict(_kvasir()), {}
    for i in range(6):
        stem, size = f"cju0qkwl35piu0993l0dewei{i}", (50 + i, 60)
        polyps = [(10, 30, 12, 40)] + [(35, 45, 45, 55)] * (i == 0)
        files[f"Kvasir-SEG/images/{stem}.jpg"] = picture(i, "jpg", size)
        files[f"Kvasir-SEG/masks/{stem}.jpg"] = mask(*polyps, size=size, kind="jpg", mode="RGB")
        box = [{"label": "polyp", "xmin": x, "ymin": y, "xmax": r, "ymax": b} for y, b, x, r in polyps]
        boxes[stem] = {"height": size[0], "width": size[1], "bbox": box}
    files["Kvasir-SEG/kavsir_bboxes.json"] = json.dumps(boxes).encode()
    return Layout(
        files,
        images=(21, 6),
        groups=27,
        image="Kvasir-SEG/images/cju0qkwl35piu0993l0dewei3.jpg",
        class_folder="Kvasir-SEG/masks",
        closed=False,
        mask="Kvasir-SEG/masks/cju0qkwl35piu0993l0dewei0.jpg",
        roi=("images/cju0qkwl35piu0993l0dewei0", {1: 660}),
        params={"normal": "{root}"},
    )


@layout
def cp_child() -> Layout:
    """Two parts with a published test split; the same file names in every folder of a class."""
    files = {"CP-CHILD/CP-CHILD-A/Train/Thumbs.db": b"x"}
    for p, part in enumerate("AB"):
        for s, split in enumerate(("Train", "Test")):
            for c, name in enumerate(("Non-Polyp", "Polyp")):
                for i in range(1, 9 - 4 * s):
                    file = f"CP-CHILD/CP-CHILD-{part}/{split}/{name}/{c} ({i}).jpg"
                    files[file] = picture(1000 * p + 100 * s + 10 * c + i, "jpg", (64, 64))
    for i, boxes in enumerate([[(50, 150, 60, 160)], []], 1):
        files[f"{ANNOTATIONS}/cpchild/1 ({i}).png"] = mask(*boxes, size=(224, 224), mode="RGB", value=38)
    folder = "CP-CHILD/CP-CHILD-A/Train"
    image, name = f"{folder}/Polyp/1 (3).jpg", f"{folder}/Polyp"
    return Layout(files, images=(12, 12), groups=24, image=image, class_folder=name)


@layout
def duke() -> Layout:
    """Slices named series-slice-patient, several of each patient, of both classes."""
    files = {"png_out/.DS_Store": b"x"}
    for patient in (7, 42, 248, 351, 562, 704, 742, 762, 811, 874):
        for name, slices in (("pos", (87, 88)), ("neg", (5, 140))):
            for i in slices:
                seed = 1000 * patient + i
                files[f"png_out/{name}/1-{i:03d}-{patient}.png"] = picture(seed, size=(64, 64), mode="L")
    for patient in (351, 562):
        boxes = mask((100, 120, 40, 70), size=(224, 224), mode="RGB", value=38)
        files[f"{ANNOTATIONS}/duke/1-087-{patient}.png"] = boxes
    return Layout(files, images=(20, 20), groups=10, image="png_out/pos/1-088-42.png", class_folder="png_out/neg")


@layout
def mura() -> Layout:
    """Grey images of varying size, patients with several studies, parts and labels, and macOS's ._ files."""
    studies = {
        "train": {
            "XR_WRIST": ["00001/study1_positive", "00002/study1_negative", "00003/study1_positive"],
            "XR_HAND": ["00001/study1_negative", "00004/study1_negative", "00005/study1_positive"],
            "XR_ELBOW": [f"{i:05d}/study1_{'negative' if i % 2 else 'positive'}" for i in range(6, 16)],
        },
        "valid": {
            "XR_WRIST": ["11186/study1_positive", "11186/study2_positive", "11213/study1_negative"],
            "XR_SHOULDER": ["11326/study1_positive", "11186/study1_positive"],
            "XR_ELBOW": ["11326/study1_positive", "11342/study1_positive"],
        },
    }
    files = {"MURA-v1.1/train_image_paths.csv": b"x", "MURA-v1.1/.DS_Store": b"x"}
    for split, parts in studies.items():
        for part, names in parts.items():
            for name in names:
                for i in (1, 2):
                    folder, seed = f"MURA-v1.1/{split}/{part}/patient{name}", len(files)
                    size = (70 + seed % 7, 50 + seed % 5)
                    files[f"{folder}/image{i}.png"] = picture(seed, size=size, mode="RGB" if i == 1 else "L")
                files[f"{folder}/._image1.png"] = b"x"
    boxes = {"11186_study2_positive_image1": [(30, 90, 40, 80)], "11342_study1_positive_image1": []}
    boxes["11326_study1_positive_image1"] = [(30, 90, 40, 80)]
    for name, box in boxes.items():
        files[f"{ANNOTATIONS}/mura/patient{name}.png"] = mask(*box, size=(224, 224), mode="RGB", value=38)
    image = "MURA-v1.1/valid/XR_WRIST/patient11186/study2_positive/image2.png"
    return Layout(files, images=(18, 28), groups=19, image=image, class_folder="MURA-v1.1/valid")


from tests.bench import layouts_b  # noqa: E402, F401  (its makers register themselves)
