"""What is particular to single file data sets: published divisions, label rules, codes of masks, broken tables."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedKFold, train_test_split

from bench import api, datasets, suite
from bench.datasets import aptos2019, imagenet, isic2020, lidc_idri
from bench.datasets.base import Dataset, Sample
from bench.datasets.digits import Digits
from explainer_bench import RequestError
from tests.bench import layouts, layouts_b


def parts(name: str, root: Path, **params) -> dict[str, list[Sample]]:
    return {
        split: datasets.get(name, root=root, split=split, **params).samples
        for split in datasets.registry.find(name).splits
    }


def where(splits: dict[str, list[Sample]]) -> dict[str, str]:
    return {sample.id: split for split, samples in splits.items() for sample in samples}


def divided_groups(splits: dict[str, list[Sample]]) -> set[str]:
    """Groups that are in more than one split."""
    groups = [{sample.group for sample in samples} for samples in splits.values()]
    return (groups[0] & groups[1]) | (groups[0] & groups[2]) | (groups[1] & groups[2])


def read_all(name: str, root: Path, **params) -> None:
    for split in datasets.registry.find(name).splits:
        dataset = datasets.get(name, root=root, split=split, **params)
        for sample in dataset.samples:
            dataset.load(sample)


def refused(line: str, name: str, root: Path, **params) -> None:
    """Reading every sample ends in one line that says `line`."""
    with pytest.raises(RequestError, match=line) as error:
        read_all(name, root, **params)
    assert "\n" not in str(error.value)


def test_aptos_division_is_the_published_one():
    labels = (np.random.default_rng(0).random(3662) < 0.507).astype(int)
    names = np.array([f"train_images/{i}.png" for i in range(3662)])
    rest, test, y_rest, _ = train_test_split(names, labels, test_size=0.15, stratify=labels, random_state=42)
    train, val, _, _ = train_test_split(rest, y_rest, test_size=0.25, stratify=y_rest, random_state=42)
    ours = np.array(aptos2019.divided(labels.tolist()))
    for split, published in {"train": train, "val": val, "test": test}.items():
        assert set(names[ours == split]) == set(published)
    assert [len(train), len(val), len(test)] == [2334, 778, 550]


def test_aptos_grades_change_the_labels_and_not_the_division(tmp_path):
    root = layouts.make("aptos2019", tmp_path)
    binary, graded = parts("aptos2019", root), parts("aptos2019", root, grades=True)
    assert where(binary) == where(graded)
    grades = {sample.id: sample.label for samples in graded.values() for sample in samples}
    assert [grades[name] for name in sorted(grades)] == list(layouts_b.APTOS_GRADES)
    labels = {sample.id: sample.label for samples in binary.values() for sample in samples}
    assert labels == {name: int(grade > 0) for name, grade in grades.items()}
    assert "000003e3" in labels
    assert datasets.get("aptos2019").class_names == ("normal", "diabetic retinopathy")
    assert len(datasets.get("aptos2019[grades=true]").class_names) == 5


def test_isic_division_is_the_published_one_by_patient(tmp_path):
    splits = parts("isic2020", layouts.make("isic2020", tmp_path))
    assert divided_groups(splits) == set()
    patients = np.unique([sample.group for samples in splits.values() for sample in samples])
    rest, test = train_test_split(patients, test_size=0.20, random_state=42)
    train, val = train_test_split(rest, test_size=0.25, random_state=42)
    for split, published in {"train": train, "val": val, "test": test}.items():
        assert {sample.group for sample in splits[split]} == set(published)
    in_another_order = isic2020.divided(patients[::-1].tolist())
    assert all(in_another_order[sample.group] == split for split, part in splits.items() for sample in part)


def test_isic_takes_the_folder_of_the_isic_archive_too(tmp_path):
    root = layouts.make("isic2020", tmp_path)
    there = where(parts("isic2020", root))
    for path in (root / "train").iterdir():
        path.unlink()
    (root / "train").rmdir()
    (root / "jpeg" / "train").rename(root / "train")
    assert where(parts("isic2020", root)) == there
    (root / "train").rename(root / "somewhere")
    refused("neither jpeg/train nor train", "isic2020", root)


def test_mimic_keeps_certain_labels_of_front_views_that_all_tables_name(tmp_path):
    splits = parts("mimic_cxr", layouts.make("mimic_cxr", tmp_path))
    found = {sample.id: (split, sample.label, sample.group) for split, part in splits.items() for sample in part}
    expected = {
        ("10000032", 50414267, 0): ("train", 0),
        ("10000032", 53189527, 0): ("train", 1),
        ("10000764", 57375967, 0): ("val", 1),
        ("10000764", 57375967, 1): ("val", 1),
        ("10001038", 51223704, 0): ("test", 0),
        ("10001122", 53957785, 0): ("test", 1),
        ("10001176", 53186264, 0): ("val", 0),
    }
    assert found == {
        f"p10/p{subject}/s{study}/{study:x}-{i}": (split, label, subject)
        for (subject, study, i), (split, label) in expected.items()
    }
    assert divided_groups(splits) == set()


def test_mimic_reads_tables_gzipped_or_not(tmp_path):
    root = layouts.make("mimic_cxr", tmp_path)
    before = where(parts("mimic_cxr", root))
    for path in root.glob("*.csv.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    labels = root / "mimic-cxr-2.0.0-chexpert.csv"
    labels.with_name(f"{labels.name}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert where(parts("mimic_cxr", root)) == before


def lidc(root: Path, **params) -> list[dict[str, list[Sample]]]:
    return [parts("lidc_idri", root, fold=fold, **params) for fold in range(5)]


def test_lidc_folds_keep_patients_together_and_test_each_nodule_once(tmp_path):
    folds = lidc(layouts.make("lidc_idri", tmp_path))
    assert all(divided_groups(splits) == set() for splits in folds)
    tested = [sample.id for splits in folds for sample in splits["test"]]
    assert len(tested) == len(set(tested)) == 32
    for this, following in zip(folds, folds[1:] + folds[:1], strict=True):
        assert [s.id for s in this["val"]] == [s.id for s in following["test"]]


def test_lidc_published_folds_are_those_of_scikit_learn_and_divide_patients(tmp_path):
    root = layouts.make("lidc_idri", tmp_path)
    folds = lidc(root, folds="nodule")
    every = sorted((s for part in folds[0].values() for s in part), key=lambda s: s.id)  # the order of the CSV file
    labels = [sample.label for sample in every]
    division = StratifiedKFold(5, shuffle=True, random_state=44).split(labels, labels)
    for splits, (_, held_out) in zip(folds, division, strict=True):
        assert [s.id for s in splits["test"]] == [every[row].id for row in held_out]
    assert all(divided_groups(splits) for splits in folds)
    lines = (root / "nodules.csv").read_text().splitlines()
    (root / "nodules.csv").write_text("\n".join(lines[:6]))
    refused("too few nodules of a class for 5 folds", "lidc_idri", root, folds="nodule")


@pytest.mark.parametrize(
    ("ratings", "label"),
    [("3 3 4", None), ("2 3 3 4", None), ("3 3 4 5", 1), ("1 3 2 3", 0), ("5 5 1", 1), ("4 2", None)],
)
def test_lidc_label_is_the_median_malignancy(tmp_path, ratings, label):
    root = layouts.make("lidc_idri", tmp_path)
    table = root / "nodules.csv"
    header, first, *others = table.read_text().splitlines()
    name, patient, _, *values = first.split(",")
    table.write_text("\n".join([header, ",".join([name, patient, ratings, *values]), *others]))
    labels = {s.id: s.label for part in parts("lidc_idri", root).values() for s in part}
    assert labels.get(name) == label and len(labels) == 31 + (label is not None)


def test_lidc_fingerprint_follows_the_view(tmp_path):
    root = layouts.make("lidc_idri", tmp_path)
    views = [datasets.get("lidc_idri", root=root, view=view) for view in lidc_idri.AXES]
    assert len({tuple(sample.digest for sample in read.samples) for read in views}) == 1
    assert len({read.fingerprint for read in views}) == 3
    assert views[0].fingerprint == datasets.get("lidc_idri", root=root).fingerprint


def test_lidc_biomarkers_come_with_the_samples(tmp_path):
    dataset = datasets.get("lidc_idri", root=layouts.make("lidc_idri", tmp_path))
    targets = dataset.targets
    assert list(targets.index) == [sample.id for sample in dataset.samples]
    assert list(targets.columns) == [
        "subtlety", "calcification", "margin", "lobulation", "spiculation", "diameter", "texture", "sphericity",
    ]  # fmt: skip
    for name, row in targets.iterrows():
        patient, i = int(str(name)[10:14]), int(str(name)[-1])
        assert row.tolist() == [1.25 + (patient + 3 * i + k) % 5 for k in range(8)]


@pytest.mark.parametrize(("view", "axis"), [("axial", 2), ("coronal", 0), ("sagittal", 1)])
def test_lidc_image_is_the_middle_slice_in_the_lung_window(tmp_path, view, axis):
    root = layouts.make("lidc_idri", tmp_path)
    rng = np.random.default_rng(0)
    volume = rng.integers(-1300, 900, (32, 32, 32)).astype(np.int16)
    mask = rng.random((32, 32, 32)) < 0.5
    dataset = datasets.get("lidc_idri", root=root, view=view)
    sample = dataset.samples[0]
    np.save(sample.source.path, volume)
    np.save(sample.source.masks[0][1], mask)
    item = dataset.load(sample)
    hu = np.clip(volume.take(16, axis).astype(float), -1000, 400)
    assert item.image.shape == (32, 32, 3) and item.image.dtype == np.uint8
    assert np.abs(item.image * (1400 / 255) - 1000 - hu[..., None]).max() <= 1400 / 255 / 2 + 1e-9
    assert item.image.min() == 0 and item.image.max() == 255
    assert item.roi.keys() == {0, 1} and all((one == mask.take(16, axis)).all() for one in item.roi.values())


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("{}.npy", layouts_b.array(np.zeros((32, 32, 32), np.int16))[:500], r"1_0\.npy cannot be read as an array"),
        ("{}.npy", b"", r"1_0\.npy cannot be read as an array"),
        ("{}.npy", layouts_b.array(np.zeros((32, 32, 32))), r"1_0\.npy holds float64 .*expected int16"),
        (
            "{}_mask.npy",
            layouts_b.array(np.zeros((16, 16, 16), bool)),
            r"_mask\.npy holds bool of shape \(16, 16, 16\)",
        ),
        ("{}_mask.npy", layouts_b.array(np.array([{}, None])), r"_mask\.npy cannot be read as an array"),
        ("{}_mask.npy", None, r"_mask\.npy is missing"),
    ],
)
def test_lidc_names_the_broken_array(tmp_path, file, content, line):
    root = layouts.make("lidc_idri", tmp_path)
    path = root / "nodules" / file.format("LIDC-IDRI-0001_0")
    path.unlink() if content is None else path.write_bytes(content)
    refused(line, "lidc_idri", root)


def test_imagenet_classes_are_the_standard_ones():
    names = datasets.get("imagenet").class_names
    assert len(names) == len(set(names)) == 1000
    assert [names[i] for i in (0, 1, 243, 282, 340, 386)] == [
        "tench", "goldfish", "bull mastiff", "tiger cat", "zebra", "African elephant",
    ]  # fmt: skip
    assert names[134] == "crane (n02012849)" and list(imagenet.wnids()) == sorted(imagenet.wnids())


def test_imagenet_masks_are_numbers_of_classes(tmp_path):
    root = layouts.make("imagenet", tmp_path)
    dataset = datasets.get("imagenet", root=root)
    items = {sample.id: dataset.load(sample) for sample in dataset.samples}
    tench = items["n01440764/ILSVRC2012_val_00000001"].roi
    assert tench.keys() == {0} and tench[0].sum() == 100 and tench[0][10:20, 8:18].all()
    glasses = items["n04356056/ILSVRC2012_val_00000031"].roi  # annotated as the class that it is merged into
    assert glasses.keys() == {imagenet.wnids()[wnid] for wnid in ("n04355933", "n04356056")}
    assert layouts_b.number("n04355933") > 255
    assert sum(bool(item.roi) for item in items.values()) == 2
    masked = datasets.get("imagenet", root=root, masked=True)
    assert [sample.id for sample in masked.samples] == [name for name, item in items.items() if item.roi]


def test_imagenet_numbers_can_come_from_the_mask_folders(tmp_path):
    root = layouts.make("imagenet", tmp_path)
    (root / "ImageNetS919" / imagenet.CATEGORIES).unlink()
    refused(r"does not tell the 919 classes of ImageNet-S \(2 found\): put", "imagenet", root)
    for wnid in layouts_b.segmented():
        (root / "ImageNetS919" / "validation-segmentation" / wnid).mkdir(exist_ok=True)
    dataset = datasets.get("imagenet", root=root, masked=True)
    assert dataset.load(dataset.samples[0]).roi[0].sum() == 100


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (layouts_b.segmentation(size=(9, 8)), "00000001.png does not fit its image: the mask has 8 x 9 px"),
        (layouts_b.segmentation((0, 5, 0, 5, 950)), "holds the number 950, which is no class"),
        (b"x", "00000001.png cannot be read as an image"),
    ],
)
def test_imagenet_names_the_broken_mask(tmp_path, content, line):
    root = layouts.make("imagenet", tmp_path)
    (root / layouts.LAYOUTS["imagenet"]().mask).write_bytes(content)
    refused(line, "imagenet", root)


def test_imagenet_unknown_class_folder_and_split(tmp_path):
    root = layouts.make("imagenet", tmp_path)
    assert datasets.get("imagenet", root=root, split="val").samples == []
    (root / "val" / "cats").mkdir()
    refused("cats is no class: expected WordNet ids", "imagenet", root)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Two validation images in one folder: a tench and toilet tissue."""
    for row in (1, 2):
        path = tmp_path / "val" / f"ILSVRC2012_val_{row:08d}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(layouts.picture(row, "jpg"))
    return tmp_path


def solution(*lines: str) -> bytes:
    return layouts_b.rows("ImageId,PredictionString", *lines)


BOXES = ("ILSVRC2012_val_00000002,n15075141 1 2 3 4 n15075141 5 6 7 8 ", "ILSVRC2012_val_00000001,n01440764 1 2 3 4 ")


@pytest.mark.parametrize("files", [layouts_b.devkit(), {imagenet.SOLUTION: solution(*BOXES)}], ids=["devkit", "Kaggle"])
def test_imagenet_flat_folder_takes_its_labels_from_either_file(flat, files):
    for name, content in files.items():
        (flat / name).parent.mkdir(parents=True, exist_ok=True)
        (flat / name).write_bytes(content)
    samples = datasets.get("imagenet", root=flat).samples
    assert {sample.id: sample.label for sample in samples} == {
        "n01440764/ILSVRC2012_val_00000001": 0,
        "n15075141/ILSVRC2012_val_00000002": 999,
    }


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "has images without class folders and no labels"),
        ({imagenet.SOLUTION: solution(BOXES[0])}, "val_00000001.JPEG has no label"),
        (
            {imagenet.SOLUTION: solution("a,cat 1 2 3 4")},
            r"line 2: PredictionString is 'cat', .*'n\d+' \.\.\.; correct",
        ),
        ({imagenet.SOLUTION: solution(BOXES[0], BOXES[0])}, "lists ImageId .* more than once"),
        ({f"{imagenet.DEVKIT}/ILSVRC2012_validation_ground_truth.txt": b"2\n7\n"}, "line 2: no class has this number"),
        ({f"{imagenet.DEVKIT}/ILSVRC2012_validation_ground_truth.txt": b"2\n3\n"}, "line 2: no class has this number"),
        ({f"{imagenet.DEVKIT}/meta.mat": b"x"}, "meta.mat cannot be read"),
    ],
)
def test_imagenet_names_the_broken_labels(flat, files, line):
    kit = layouts_b.devkit() if any(str(imagenet.DEVKIT) in name for name in files) else {}
    for name, content in {**kit, **files}.items():
        (flat / name).parent.mkdir(parents=True, exist_ok=True)
        (flat / name).write_bytes(content)
    refused(line, "imagenet", flat)


def row(text: str, number: int, old: str, new: str) -> str:
    """Change one line of a table."""
    lines = text.splitlines()
    lines[number] = lines[number].replace(old, new, 1)
    return "\n".join(lines) + "\n"


BROKEN = {
    "aptos2019": ("train.csv", "diagnosis", "diagnoses", 4, ",1", ",7", "train.csv, line 5: diagnosis is '7'"),
    "isic2020": ("train.csv", "patient_id", "patient", 3, ",0", ",benign", "line 4: target is 'benign'"),
    "mimic_cxr": (
        "mimic-cxr-2.0.0-chexpert.csv",
        "No Finding",
        "Normal",
        1,
        "1.0",
        "yes",
        "line 2: No Finding is 'yes'",
    ),
    "lidc_idri": ("nodules.csv", "malignancy", "malign", 2, "2 1 3", "2;1;3", "line 3: malignancy is"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_tables_are_named(tmp_path, name):
    file, column, other, number, old, new, line = BROKEN[name]
    path = layouts.make(name, tmp_path) / file
    text = path.read_text()
    path.write_text(row(text, 0, column, other))
    refused(f"{file} has no column '{column}'.*Did you mean|{file} has no column '{column}'", name, tmp_path)
    path.write_text(text + text.splitlines()[1] + "\n")
    refused(f"{file} lists \\w+ '.*' more than once", name, tmp_path)
    path.write_text(row(text, 2, text.splitlines()[2].split(",")[0], ""))
    if name != "mimic_cxr":  # whose first column is not the key
        refused(f"{file}, line 3: the column '.*' is empty", name, tmp_path)
    path.write_text(text.splitlines()[0] + "\n")
    refused(f"{file} has a header and no rows", name, tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    refused(f"{file} cannot be read as a CSV file|has no column", name, tmp_path)
    path.write_text("")
    refused(f"{file} cannot be read as a CSV file", name, tmp_path)
    path.write_text(row(text, number, old, new))
    refused(line, name, tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], *(f"{line},x" for line in lines[1:])], "line 2: 3 fields under a header of 2"),
        (lambda lines: [lines[0], f"{lines[1]},x,y", *lines[2:]], "line 2: 4 fields under a header of 2"),
        (lambda lines: [*lines[:3], f"{lines[3]},x", *lines[4:]], "Expected 2 fields in line 4, saw 3"),
        (lambda lines: [*lines[:3], lines[3].partition(",")[0], *lines[4:]], "line 4: diagnosis is ''"),
    ],
)
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path, change, line):
    path = layouts.make("aptos2019", tmp_path) / "train.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    refused(f"train.csv.*{line}", "aptos2019", tmp_path)


@pytest.mark.parametrize(("name", "rows"), [("aptos2019", 2), ("aptos2019", 5), ("isic2020", 2), ("isic2020", 3)])
def test_a_table_too_small_to_divide_is_refused(tmp_path, name, rows):
    path = layouts.make(name, tmp_path) / "train.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:rows]) + "\n")
    refused("train.csv lists too few .* to divide: copy the whole file", name, tmp_path)


def test_broken_gzip_and_numbers_are_named(tmp_path):
    root = layouts.make("mimic_cxr", tmp_path / "a")
    path = root / "mimic-cxr-2.0.0-metadata.csv.gz"
    path.write_bytes(path.read_bytes()[:40])
    refused("metadata.csv.gz cannot be read as a CSV file", "mimic_cxr", root)
    whole = layouts.LAYOUTS["mimic_cxr"]().files[path.name]
    path.write_bytes(whole[:30] + b"xxxxxxxxxx" + whole[40:])
    refused("metadata.csv.gz cannot be read as a CSV file", "mimic_cxr", root)
    path.unlink()
    refused("has no mimic-cxr-2.0.0-metadata.csv, gzipped or not: found", "mimic_cxr", root)
    root = layouts.make("lidc_idri", tmp_path / "b")
    text = (root / "nodules.csv").read_text()
    (root / "nodules.csv").write_text(row(text, 3, text.splitlines()[3].rpartition(",")[2], "round"))
    refused("nodules.csv, line 4: .* is 'round', not a number", "lidc_idri", root)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("aptos2019", "train_images/000004e4.png"),
        ("isic2020", "jpeg/train/ISIC_0000004.jpg"),
        ("mimic_cxr", f"files/p10/p10001122/s53957785/{53957785:x}-0.jpg"),
    ],
)
def test_an_image_that_the_table_lists_and_nobody_copied(tmp_path, name, image):
    root = layouts.make(name, tmp_path)
    (root / image).unlink()
    refused(f"{Path(image).name} is missing", name, root)


def test_folder_names_its_own_classes(tmp_path):
    dataset = datasets.get("folder", root=layouts.make("folder", tmp_path))
    assert dataset.class_names == ("ants", "bees", "cats")
    with pytest.raises(RequestError, match="give --data-root"):
        _ = datasets.get("folder").class_names
    (tmp_path / "other" / "x").mkdir(parents=True)
    assert datasets.get("folder", root=tmp_path / "other").class_names == ("x",)
    refused("needs at least two class folders", "folder", tmp_path / "other")


def test_folder_without_masks(tmp_path):
    root = layouts.make("folder", tmp_path)
    (root / "masks").rename(root / "spots")
    assert datasets.get("folder", root=root, masks="spots").class_names == ("ants", "bees", "cats")
    assert datasets.get("folder", root=root, masks="").class_names == ("ants", "bees", "cats", "spots")
    (root / "spots").rename(tmp_path.parent / f"{tmp_path.name} spots")
    for masks, count in (("", 0), (str(tmp_path.parent / f"{tmp_path.name} spots"), 2)):
        found = [s for part in parts("folder", root, masks=masks).values() for s in part]
        assert len(found) == 33 and sum(bool(s.source.masks) for s in found) == count


def test_folder_takes_splits_that_are_there(tmp_path):
    root = layouts.make("folder", tmp_path / "a")
    sorted_by_hand = tmp_path / "b"
    for split, names in {"train": ("ants", "bees"), "test": ("bees", "ants")}.items():
        for name in names:
            path = sorted_by_hand / split / name / f"{split}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes((root / "ants" / "a 0.png").read_bytes())
    mask = sorted_by_hand / "masks" / "test" / "bees" / "test.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes(layouts.mask((0, 10, 0, 10)))
    splits = parts("folder", sorted_by_hand)
    assert where(splits) == {f"{s}/{name}/{s}": s for s in ("train", "test") for name in ("ants", "bees")}
    dataset = datasets.get("folder", root=sorted_by_hand)
    assert [dataset.load(sample).roi.keys() for sample in dataset.samples] == [set(), {1}]
    (sorted_by_hand / "wasps").mkdir()
    refused(r"holds both splits and other folders \(wasps\)", "folder", sorted_by_hand)


def test_folder_keeps_groups_together(tmp_path):
    root = layouts.make("folder", tmp_path)
    names = [f"ants/a {i}" for i in range(10)] + [f"bees/b {i}" for i in range(10)]
    lines = [f"{name},patient {i % 5}" for i, name in enumerate(names)]
    (root / "patients.csv").write_bytes(layouts_b.rows("image,group", *lines))
    for seed in range(5):
        splits = parts("folder", root, groups="patients.csv", seed=seed)
        assert divided_groups(splits) == set()
        assert len({sample.group for part in splits.values() for sample in part}) == 5 + 13
    assert any(divided_groups_of(parts("folder", root, seed=seed), lines) for seed in range(5))
    (root / "patients.csv").write_bytes(layouts_b.rows("image,group", "ants/a 0.png,1"))
    refused("patients.csv names the image 'ants/a 0.png', which is not there", "folder", root, groups="patients.csv")


def divided_groups_of(splits: dict[str, list[Sample]], lines: list[str]) -> bool:
    """Whether patients would be divided where nobody told of them."""
    there = where(splits)
    pairs = {(line.rpartition(",")[2], there[line.rpartition(",")[0]]) for line in lines}
    return len(pairs) > 5


def test_folder_refuses_a_group_in_two_splits(tmp_path):
    for split in ("train", "test"):
        for name in ("ants", "bees"):
            path = tmp_path / split / name / "1.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(layouts.picture(1))
    table = layouts_b.rows("image,group", "train/ants/1,anna", "test/bees/1,anna")
    (tmp_path / "groups.csv").write_bytes(table)
    refused("group 'anna' is in train and in test", "folder", tmp_path, groups="groups.csv")


@pytest.mark.parametrize(
    ("change", "params", "line"),
    [
        (lambda root: (root / "masks/ants/a 99.png").write_bytes(b"x"), {}, r"a 99\.png belongs to no image"),
        (lambda root: (root / "ants/a 1.png").write_bytes(b"x"), {}, "ants/a 1 is there with two endings"),
        (lambda root: None, {"masks": "spots"}, "spots is no folder of masks"),
        (
            lambda root: (root / "masks/ants/a 3.png").write_bytes(layouts.mask(size=(9, 9))),
            {},
            "does not fit its image",
        ),
        (lambda root: (root / "ants/a 2.png").write_bytes(b"x"), {}, r"a 2\.png cannot be read as an image"),
        (lambda root: None, {"groups": "nobody.csv"}, r"has no nobody\.csv, gzipped or not"),
    ],
)
def test_folder_names_what_is_broken(tmp_path, change, params, line):
    root = layouts.make("folder", tmp_path)
    change(root)
    refused(line, "folder", root, **params)


def test_a_folder_of_images_runs(tmp_path):
    digits = Digits(size=40)
    for sample in digits.samples:
        item, name = digits.load(sample), f"{sample.label}/{sample.source}.png"
        for path, pixels in ((name, item.image), (f"masks/{name}", item.roi[sample.label])):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / path)
    chosen = suite.load(
        "quickstart",
        datasets=["folder[split=train]"],
        explainers=["random", "center_gaussian"],
        metrics=["pointing_game"],
        samples=8,
    )
    boards = api.run(chosen, out=tmp_path / "out", data_root=tmp_path).report.boards.wide
    assert list(boards) == ["folder[split=train]"] and len(boards["folder[split=train]"]) == 2


def test_class_names_are_known_for_every_data_set():
    for name, cls in datasets.registry.classes.items():
        if name != "folder":
            names = cls().class_names
            assert len(names) == len(set(names)) >= 2 and isinstance(names, tuple)
    assert issubclass(lidc_idri.LidcIdri, Dataset)
