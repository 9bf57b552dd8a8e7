"""Every data set of files: its fixture in the real layout is read, every broken version of it is one clear line."""

import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import datasets
from bench.datasets import chung2024
from bench.datasets.base import Dataset, Sample
from bench.models import preprocessing
from explainer_bench import RequestError, RequestWarning
from tests.bench import layouts
from tests.bench.layouts import ANNOTATIONS, LAYOUTS, mask

NAMES = sorted(LAYOUTS)
TABLE = {name: make() for name, make in LAYOUTS.items()}
MASKED = [name for name in NAMES if TABLE[name].mask]
FACTS = ("licence", "where", "tree", "counts", "splitting", "labelling", "roi_rule", "faults", "reference")


def dataset(name: str, root: Path, **params) -> Dataset:
    return datasets.get(name, **layouts.params(name, root), **params)


def everything(name: str, root: Path, **params) -> dict[str, list[Sample]]:
    return {split: dataset(name, root, split=split, **params).samples for split in layouts.SPLITS}


def facts(splits: dict[str, list[Sample]]) -> dict[str, list[tuple]]:
    return {split: [(s.id, s.label, s.group, s.digest) for s in samples] for split, samples in splits.items()}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """Every fixture, not to be changed."""
    return {name: layouts.make(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def test_every_file_data_set_has_a_fixture():
    embedded = {name for name, cls in datasets.registry.classes.items() if cls.where == "embedded"}
    assert set(datasets.registry.names()) - embedded - {"busi"} == set(NAMES)


def test_reads_its_layout(name, roots):
    splits, expected = everything(name, roots[name]), TABLE[name]
    every = [sample for samples in splits.values() for sample in samples]
    counts = Counter(sample.label for sample in every)
    classes = len(dataset(name, roots[name]).class_names)
    assert tuple(counts[label] for label in range(classes)) == expected.images
    assert len({sample.group for sample in every}) == expected.groups
    assert len({sample.id for sample in every}) == len(every)
    for split, count in expected.splits.items():
        assert len(splits[split]) == count
    assert all(samples == sorted(samples, key=lambda sample: sample.id) for samples in splits.values())


def test_loads_every_sample(name, roots):
    read = dataset(name, roots[name])
    for split, samples in everything(name, roots[name]).items():
        for sample in samples:
            item = replace(read, split=split).load(sample)
            assert item.image.dtype == np.uint8 and item.image.ndim == 3 and item.image.shape[2] == 3
            assert set(item.regions) == set(read.regions)
            for masks in (item.roi, *item.regions.values()):
                for region in masks.values():
                    assert region.dtype == bool and region.shape == item.image.shape[:2] and region.any()


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name].roi])
def test_roi_is_where_it_was_drawn(name, roots):
    wanted, areas = TABLE[name].roi
    every = {s.id: (split, s) for split, samples in everything(name, roots[name]).items() for s in samples}
    split, sample = every[wanted]
    roi = dataset(name, roots[name], split=split).load(sample).roi
    assert {label: int(region.sum()) for label, region in roi.items()} == areas


def test_does_not_depend_on_the_order_of_files_or_on_the_machine(name, roots, tmp_path):
    elsewhere = layouts.make(name, tmp_path / "elsewhere", reverse=True)
    assert facts(everything(name, elsewhere)) == facts(everything(name, roots[name]))


def test_splits_share_no_group(name, roots):
    groups = [{s.group for s in samples} for samples in everything(name, roots[name]).values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize("name", [n for n in NAMES if any(f.name == "seed" for f in fields(datasets.registry.find(n)))])
def test_another_seed_divides_otherwise(name, roots):
    seeds = [facts(everything(name, roots[name], seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert seeds[0] == seeds[1] and any(other != seeds[0] for other in seeds[2:])
    wholes = [sorted(row for samples in divided.values() for row in samples) for divided in seeds]
    assert all(whole == wholes[0] for whole in wholes)


def test_fingerprint_follows_every_byte(name, tmp_path):
    root, expected = layouts.make(name, tmp_path), TABLE[name]
    before = {split: dataset(name, root, split=split).fingerprint for split in layouts.SPLITS}
    for file in filter(None, (expected.image, expected.mask)):
        (root / file).write_bytes((root / file).read_bytes() + b"x")
        after = {split: dataset(name, root, split=split).fingerprint for split in layouts.SPLITS}
        assert sum(before[split] != after[split] for split in before) == 1
        before = after


def test_states_what_it_is(name, command):
    cls = datasets.registry.find(name)
    for fact in FACTS:
        assert isinstance(getattr(cls, fact), str) and (getattr(cls, fact) or (name, fact) == ("folder", "reference"))
    outcome = command("data", "describe", name)
    assert outcome.code == 0 and cls.where in outcome.out and cls.licence in outcome.out


def check(command, name: str, root: Path):
    """Run ``data check``: it must fail with one line on standard error."""
    more = ",".join(f"{k}={v}" for k, v in layouts.params(name, root).items() if k != "root")
    outcome = command("data", "check", f"{name}[{more}]" if more else name, "--data-root", root)
    assert outcome.code in (1, 2) and "Traceback" not in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    return outcome


def test_check_reads_it(name, roots, command):
    more = ",".join(f"{k}={v}" for k, v in layouts.params(name, roots[name]).items() if k != "root")
    outcome = command("data", "check", f"{name}[{more}]" if more else name, "--data-root", roots[name])
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("make", [lambda path: path / "nowhere", lambda path: path, lambda path: path / "other"])
def test_wrong_root(name, command, tmp_path, make):
    (tmp_path / "other" / "things").mkdir(parents=True)
    (tmp_path / "other" / "things" / "notes.txt").write_text("x")
    err = check(command, name, make(tmp_path)).err
    assert datasets.registry.find(name).where in err or name == "folder"


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name].class_folder])
def test_missing_folder(name, command, tmp_path):
    root, folder = layouts.make(name, tmp_path), TABLE[name].class_folder
    shutil.rmtree(root / folder)
    assert Path(folder).name in check(command, name, root).err


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name].class_folder and TABLE[name].closed])
def test_unknown_class_folder(name, command, tmp_path):
    root = layouts.make(name, tmp_path)
    stray = (root / TABLE[name].class_folder).with_name("cats")
    stray.mkdir()
    assert f"{stray} is no class" in check(command, name, root).err


def damaged(command, name: str, root: Path, content: bytes) -> None:
    file = root / TABLE[name].image
    file.write_bytes(content)
    assert f"{file} cannot be read" in check(command, name, root).err


def test_truncated_image(name, command, tmp_path):
    content = TABLE[name].files[TABLE[name].image]
    damaged(command, name, layouts.make(name, tmp_path), content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_no_image(command, tmp_path, content):
    damaged(command, "kvasir", layouts.make("kvasir", tmp_path), content)


@pytest.mark.parametrize("name", MASKED)
def test_mask_of_another_size(name, command, tmp_path):
    root = layouts.make(name, tmp_path)
    file = root / TABLE[name].mask
    file.write_bytes(mask((0, 4, 0, 4), size=(9, 8), mode="RGB", kind="jpg" if file.suffix == ".jpg" else "png"))
    err = check(command, name, root).err
    assert f"{file} does not fit its image: the mask has 8 x 9 px" in err


@pytest.mark.parametrize("name", ["covid_qu_ex", "kvasir_seg"])
def test_missing_mask(name, command, tmp_path):
    root = layouts.make(name, tmp_path)
    (root / TABLE[name].mask).unlink()
    err = check(command, name, root).err
    assert "1 of " in err and f"expected {root / TABLE[name].mask}" in err


@pytest.mark.parametrize(("kind", "dtype"), [("png", "uint16"), ("tif", "int32"), ("tif", "float32")])
def test_an_image_of_more_than_eight_bits_is_refused(kind, dtype, command, tmp_path):
    root = layouts.make("folder", tmp_path)
    (root / "ants" / "a 0.png").unlink()
    file = root / "ants" / f"a 0.{kind}"
    Image.fromarray(np.arange(4096).reshape(64, 64).astype(dtype)).save(file)
    err = check(command, "folder", root).err
    assert f"{file} has more than 8 bits a pixel" in err and "window it to 8 bits" in err


@pytest.mark.parametrize("name", ["covid_qu_ex", "folder"])
@pytest.mark.parametrize("top", [1, 127])
def test_a_mask_whose_marks_are_below_the_threshold_is_refused(name, top, command, tmp_path):
    root = layouts.make(name, tmp_path)
    file = root / TABLE[name].mask
    coded = np.where(np.asarray(Image.open(file).convert("L")) > 127, top, 0)
    Image.fromarray(coded.astype(np.uint8)).save(file)
    err = check(command, name, root).err
    assert f"{file} marks nothing: its brightest pixel is {top}, and inside is what is above 127" in err
    Image.fromarray(coded.astype(np.uint16)).save(file)
    assert f"{file} has more than 8 bits a pixel" in check(command, name, root).err


def test_two_files_of_one_name(tmp_path, command):
    root = layouts.make("kvasir", tmp_path)
    file = root / TABLE["kvasir"].image
    shutil.copy(file, file.with_suffix(".jpeg"))
    assert "are one sample by name" in check(command, "kvasir", root).err


def test_covid_qu_ex_never_reads_a_mask_as_an_image(roots):
    for part, count in (("infection", 18), ("lung", 9)):
        every = everything("covid_qu_ex", roots["covid_qu_ex"], part=part)
        paths = [s.source.path for samples in every.values() for s in samples]
        assert len(paths) == count and {path.parent.name for path in paths} == {"images"}


def test_covid_qu_ex_regions(roots):
    read = dataset("covid_qu_ex", roots["covid_qu_ex"])
    for sample in read.samples:
        item = read.load(sample)
        assert item.masks("lung").keys() == {sample.label} and item.masks("lung")[sample.label].sum() == 900
        assert item.roi is item.masks("infection") and set(item.roi) == ({0} if sample.label == 0 else set())
    lung = dataset("covid_qu_ex", roots["covid_qu_ex"], part="lung")
    assert all(lung.load(s).roi == {} and lung.load(s).masks("lung") for s in lung.samples)


def test_kvasir_seg_without_normal_images_holds_polyps_only(roots):
    samples = [
        s for split in layouts.SPLITS for s in datasets.get("kvasir_seg", root=roots["kvasir_seg"], split=split).samples
    ]
    assert len(samples) == 6 and {s.label for s in samples} == {1}


def test_kvasir_tasks(roots):
    read = dataset("kvasir", roots["kvasir"], task="finding")
    assert read.class_names == ("normal", "finding")
    every = [s for samples in everything("kvasir", roots["kvasir"], task="finding").values() for s in samples]
    assert Counter(s.label for s in every) == {0: 21, 1: 21}
    assert all((s.label == 0) == s.id.startswith("normal-") for s in every)
    eight = {s.id: split for split, samples in everything("kvasir", roots["kvasir"]).items() for s in samples}
    assert all(
        eight[s.id] == split
        for split, sub in everything("kvasir", roots["kvasir"], task="finding").items()
        for s in sub
    )


def test_cp_child_parts(roots):
    a, b = (facts(everything("cp_child", roots["cp_child"], part=part)) for part in "AB")
    assert [len(samples) for samples in a.values()] == [14, 2, 8]
    assert {row[3] for samples in a.values() for row in samples}.isdisjoint(row[3] for s in b.values() for row in s)


@pytest.mark.parametrize("file", ["png_out/pos/slice 7.png", "png_out/pos/1-087.png"])
def test_duke_names_tell_the_patient(tmp_path, command, file):
    root = layouts.make("duke", tmp_path)
    shutil.copy(root / TABLE["duke"].image, root / file)
    assert f"{root / file} is not named SERIES-SLICE-PATIENT.png" in check(command, "duke", root).err


def test_duke_groups_by_patient(roots):
    groups = {s.id: s.group for samples in everything("duke", roots["duke"]).values() for s in samples}
    assert groups["pos/1-087-7"] == groups["neg/1-140-7"] == "patient 7"


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("train/XR_FOOT/patient00001/study1_positive", "no body part"),
        ("train/XR_HAND/patient00009/study1", "not named"),
    ],
)
def test_mura_unknown_folder(tmp_path, command, folder, line):
    root = layouts.make("mura", tmp_path)
    (root / "MURA-v1.1" / folder).mkdir(parents=True)
    assert line in check(command, "mura", root).err


ANNOTATED = sorted(chung2024.MASKS)
LABELLED = {"kvasir": {"task": "finding"}}


@pytest.fixture(scope="module")
def annotated(roots) -> dict[str, dict[str, list[Sample]]]:
    """The samples of the four, with annotations; `mura` has one mask whose name fits two images."""
    with pytest.warns(RequestWarning, match="1 of 3 annotations are left out, the first is patient11326"):
        return {
            name: everything(name, roots[name], annotations=roots[name] / ANNOTATIONS, **LABELLED.get(name, {}))
            for name in ANNOTATED
        }


@pytest.mark.parametrize("name", ANNOTATED)
def test_annotated_images_are_the_test_split(name, roots, annotated):
    masks = chung2024.masks(roots[name] / ANNOTATIONS, name)
    splits = annotated[name]
    read = dataset(name, roots[name])
    assert sorted(read.key(s.source) for s in splits["test"]) == sorted(key for key, _ in masks if "11326" not in key)
    assert {s.label for s in splits["test"]} == {1}
    groups = [{s.group for s in samples} for samples in splits.values()]
    assert groups[0] and sum(map(len, groups)) == len(set().union(*groups))
    plain = {
        s.id: split
        for split, samples in everything(name, roots[name], **LABELLED.get(name, {})).items()
        for s in samples
    }
    assert all(plain[s.id] == split for split in ("train", "val") for s in splits[split])


@pytest.mark.filterwarnings("ignore:mura. 1 of 3")
@pytest.mark.parametrize("name", ANNOTATED)
def test_annotations_reach_the_study_s_input_unchanged(name, roots, annotated):
    masks = dict(chung2024.masks(roots[name] / ANNOTATIONS, name))
    variant = preprocessing.find("chung2024_resize" if name in ("cp_child", "duke") else "chung2024_crop")
    read = dataset(name, roots[name], annotations=roots[name] / ANNOTATIONS)
    plain = dataset(name, roots[name])
    empty = 0
    for sample in annotated[name]["test"]:
        item, original = read.load(sample), plain.load(replace(sample, source=replace(sample.source, masks=())))
        assert np.array_equal(variant.resize(item.image), variant.resize(original.image))
        label = sample.source.label
        wanted = masks[read.key(sample.source)]
        empty += not wanted.any()
        assert set(item.roi) == ({label} if wanted.any() else set())
        assert all(np.array_equal(variant.preprocess_roi(region), wanted) for region in item.roi.values())
    assert empty == (name in ("cp_child", "mura"))


def test_kvasir_annotates_the_image_s_own_class_of_eight(roots):
    read = dataset("kvasir", roots["kvasir"], annotations=roots["kvasir"] / ANNOTATIONS)
    assert [(s.label, set(read.load(s).roi)) for s in read.samples] == [(2, {2}), (6, {6})]


@pytest.mark.parametrize("name", ANNOTATED)
def test_annotation_without_its_image(name, tmp_path):
    root = layouts.make(name, tmp_path)
    folder = root / ANNOTATIONS / chung2024.MASKS[name]
    for stray in ("zebra", "aardvark"):
        shutil.copy(next(folder.iterdir()), folder / f"{stray}.png")
    with pytest.raises(
        RequestError, match=r"2 of \d annotated images are not under .*, the first is aardvark"
    ) as error:
        _ = dataset(name, root, annotations=root / ANNOTATIONS).samples
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::explainer_bench.RequestWarning")
@pytest.mark.parametrize("name", ANNOTATED)
def test_fingerprint_follows_the_annotations_and_not_where_they_lie(name, roots, tmp_path):
    shutil.copytree(roots[name] / ANNOTATIONS, tmp_path / "elsewhere")
    places = [None, roots[name] / ANNOTATIONS, tmp_path / "elsewhere"]
    without, one, other = (dataset(name, roots[name], split="train", annotations=place) for place in places)
    for read in (without, one, other):
        read.samples = one.samples  # the same files, read in another geometry
    assert without.fingerprint != one.fingerprint == other.fingerprint


def test_annotations_that_are_not_there(roots, tmp_path):
    with pytest.raises(RequestError, match=r"no annotations in .*duke: there is no such folder.*https://github\.com"):
        _ = dataset("duke", roots["duke"], annotations=tmp_path / "x").samples
    (tmp_path / "duke").mkdir()
    with pytest.raises(RequestError, match="the folder is empty"):
        chung2024.masks(tmp_path, "duke")
    (tmp_path / "duke" / "1-087-351.png").write_bytes(mask(size=(9, 9)))
    with pytest.raises(RequestError, match="the mask has 9 x 9 px"):
        chung2024.masks(tmp_path, "duke")


@pytest.mark.parametrize(
    ("name", "empty", "full", "area", "distinct"),
    [("cp_child", 0, 0, 0.431, 50), ("duke", 0, 0, 0.019, 42), ("kvasir", 0, 1, 0.588, 50), ("mura", 2, 0, 0.128, 49)],
)
def test_real_annotations(shared, name, empty, full, area, distinct):
    masks = chung2024.masks(shared / "data" / "attention_maps_masks", name)
    assert len(masks) == 50 and [key for key, _ in masks] == sorted(key for key, _ in masks)
    pixels = np.stack([region for _, region in masks])
    assert pixels.shape == (50, 224, 224) and pixels.dtype == bool
    assert (~pixels.any((1, 2))).sum() == empty and pixels.all((1, 2)).sum() == full
    assert pixels.mean() == pytest.approx(area, abs=5e-4)
    assert len({region.tobytes() for region in pixels}) == distinct


def real_paths(name: str, stem: str) -> str:
    """Where an annotated image lies in its archive, as far as its name tells."""
    if name == "mura":
        patient, number, sign, image = stem.split("_")
        return f"MURA-v1.1/valid/XR_WRIST/{patient}/{number}_{sign}/{image}.png"
    folder = {"cp_child": "CP-CHILD/CP-CHILD-A/Test/Polyp", "duke": "png_out/pos", "kvasir": "kvasir-dataset-v2/polyps"}
    return f"{folder[name]}/{stem}.{'png' if name == 'duke' else 'jpg'}"


@pytest.mark.parametrize("name", ANNOTATED)
def test_real_names_find_their_images(shared, name, tmp_path):
    root, annotations = layouts.make(name, tmp_path), shared / "data" / "attention_maps_masks"
    if name == "cp_child":
        shutil.rmtree(root / "CP-CHILD/CP-CHILD-A/Test/Polyp")
    for stem, _ in chung2024.masks(annotations, name):
        path = root / real_paths(name, stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(layouts.picture(0, "jpg" if path.suffix == ".jpg" else "png"))
    if name == "mura":
        shutil.rmtree(root / "MURA-v1.1/valid/XR_SHOULDER")
        shutil.rmtree(root / "MURA-v1.1/valid/XR_ELBOW")
    if name == "kvasir":  # the fixture files its own under the class that it says
        (root / real_paths(name, layouts.KVASIR["esophagitis"])).unlink()
    read = dataset(name, root, annotations=annotations)
    assert len(read.samples) == 50
    with_roi = sum(bool(read.load(sample).roi) for sample in read.samples)
    assert with_roi == (48 if name == "mura" else 50)
    if name == "duke":  # equal masks are those of one patient
        by_group = Counter((s.group, read.load(s).roi[1].tobytes()) for s in read.samples)
        assert len({group for group, _ in by_group}) == len(by_group) == 42
