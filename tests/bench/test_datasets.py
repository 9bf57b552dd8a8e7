"""Data sets: what is drawn or read, and one clear line for whatever cannot be."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import datasets
from bench.datasets import base, busi
from bench.datasets.digits import Digits, originals
from explainer_bench import RequestError

SIDE = 48


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(size=40)


def test_digits_are_the_same_everywhere(digits):
    assert digits.fingerprint == "bd35ce1967d7536b"


def test_digits_do_not_depend_on_size_or_global_state(digits):
    np.random.seed(1)
    longer = Digits(size=43)
    assert [s.digest for s in longer.samples[:40]] == [s.digest for s in digits.samples]
    assert [s.id for s in longer.samples] == sorted(s.id for s in longer.samples)


@pytest.mark.parametrize("change", [{"split": "val"}, {"split": "train"}, {"seed": 1}])
def test_digits_other_split_or_seed_other_images(digits, change):
    other = replace(digits, **change)
    assert not {s.digest for s in other.samples} & {s.digest for s in digits.samples}


def test_digits_splits_share_no_original():
    pixels = {s: {d.tobytes() for digit in pool for d in digit} for s, pool in originals().items()}
    assert sum(len(digit) for pool in originals().values() for digit in pool) == 1797
    assert not pixels["train"] & pixels["test"] and not pixels["train"] & pixels["val"]
    assert not pixels["val"] & pixels["test"]
    assert all(len(digit) >= 5 for pool in originals().values() for digit in pool)


def test_digits_rois_are_separate_boxes_around_each_class(digits):
    counts = set()
    for sample in digits.samples:
        item = digits.load(sample)
        assert item.image.shape == (64, 64, 3) and item.image.dtype == np.uint8
        assert sample.label in item.roi and sample.label == int(sample.id[-6:]) % 10
        counts.add(len(item.roi))
        assert sum(item.roi.values(), np.zeros((64, 64), int)).max() == 1
        for mask in item.roi.values():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert mask.sum() == len(rows) * len(columns) and 12 <= len(rows) <= 20
    assert counts == {2, 3, 4}


def test_digits_stand_anywhere_and_are_not_the_only_bright_thing(digits):
    where = np.zeros((64, 64))
    inside, outside = [], []
    for item in map(digits.load, digits.samples):
        union = np.any(list(item.roi.values()), axis=0)
        where += union
        inside.append((item.image.max(2)[union] > 130).mean())
        outside.append((item.image.max(2)[~union] > 130).sum() / (item.image.max(2) > 130).sum())
    thirds = where[:63, :63].reshape(3, 21, 3, 21).sum((1, 3))
    assert thirds.min() > 0.3 * thirds.max()
    assert np.mean(outside) > 0.4 and np.mean(inside) > 0.2


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("digits[split=tets]", "'train', 'val' or 'test'"),
        ("digits[size=0]", "greater than 0"),
        ("digits[sise=3]", "Did you mean size"),
        ("digit", "Did you mean digits"),
    ],
)
def test_digits_bad_request(spec, line):
    with pytest.raises(RequestError, match=line):
        datasets.get(spec)


def _texture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 10)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((SIDE, SIDE + 8), Image.Resampling.BICUBIC))


def _mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((SIDE + 8, SIDE), np.uint8)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = 255
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 12 images in the public layout, with what is odd in the archive."""
    folder = tmp_path / busi.FOLDER
    for label, name in enumerate(busi.Busi.class_names):
        (folder / name).mkdir(parents=True)
        for i in range(1, 13):
            stem = folder / name / f"{name} ({i})"
            Image.fromarray(_texture(100 * label + i)).save(f"{stem}.png")
            Image.fromarray(_mask() if label == busi.NORMAL else _mask((10, 20, 5, 25))).save(f"{stem}_mask.png")
    benign, malignant = folder / "benign", folder / "malignant"
    Image.fromarray(_texture(1)).convert("RGB").save(benign / "benign (1).png")
    Image.fromarray(_mask((30, 40, 30, 44))).convert("RGBA").save(benign / "benign (1)_mask_1.png")
    Image.fromarray(_mask((10, 20, 5, 25))).convert("1").save(benign / "benign (2)_mask.png")
    Image.fromarray(_mask((10, 20, 5, 25))).convert("RGB").save(benign / "benign (3)_mask.png")
    Image.fromarray(_mask((10, 20, 5, 25))).convert("P").save(benign / "benign (4)_mask.png")
    noisy = np.clip(_texture(1).astype(int) + np.random.default_rng(0).integers(-9, 10, (SIDE + 8, SIDE)), 0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(malignant / "malignant (12).png")
    (folder / "notes.txt").write_text("ignored")
    return tmp_path


def _all(root: Path, **params) -> dict[str, list[base.Sample]]:
    return {split: datasets.get("busi", root=root, split=split, **params).samples for split in base.Dataset.splits}


def test_busi_reads_the_public_layout(root):
    splits = _all(root)
    ids = [sample.id for samples in splits.values() for sample in samples]
    assert len(ids) == len(set(ids)) == 36
    assert all([s.id for s in samples] == sorted(s.id for s in samples) for samples in splits.values())
    for split, samples in splits.items():
        dataset = datasets.get("busi", root=root / busi.FOLDER, split=split)
        assert [s.digest for s in dataset.samples] == [s.digest for s in samples]
        for sample in samples:
            item = dataset.load(sample)
            assert item.image.shape == (SIDE + 8, SIDE, 3) and item.image.dtype == np.uint8
            assert set(item.roi) == (set() if sample.label == busi.NORMAL else {0, 1})
            for mask in item.roi.values():
                assert mask.dtype == bool and mask.sum() == (340 if sample.id == "benign/benign (1)" else 200)


def test_busi_keeps_near_duplicates_together(root):
    for seed in range(8):
        where = {s.id: (split, s.group) for split, part in _all(root, seed=seed).items() for s in part}
        assert where["benign/benign (1)"] == where["malignant/malignant (12)"]
        assert where["benign/benign (1)"][1] == "benign/benign (1)"
        assert where["benign/benign (2)"][1] == "benign/benign (2)"


def test_busi_keeps_shifted_and_rescaled_near_duplicates_together(root):
    texture = Image.fromarray(_texture(3))
    moved = texture.resize((SIDE, SIDE + 8), Image.Resampling.BICUBIC, box=(5, 3, SIDE - 3, SIDE + 1))
    moved.save(root / busi.FOLDER / "malignant" / "malignant (11).png")
    groups = {s.id: s.group for part in _all(root).values() for s in part}
    assert groups["malignant/malignant (11)"] == groups["benign/benign (3)"] == "benign/benign (3)"
    plain = {s.id: s.group for part in _all(root, aligned=1).values() for s in part}
    assert plain["malignant/malignant (11)"] != plain["benign/benign (3)"]
    assert len(set(groups.values())) == 33 and len(set(plain.values())) == 34  # normal (9) and (10) are KNOWN


def test_busi_alignment_is_symmetric_and_finds_an_image_in_itself():
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (3, busi.THUMBNAIL, busi.THUMBNAIL)).astype(np.uint8)
    thumbnails[2] = np.roll(thumbnails[0], (2, -3), axis=(0, 1))
    found = busi.aligned(thumbnails)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-5)
    assert found[0, 2] > 0.95 and found[0, 1] < 0.4
    assert not busi.aligned(np.full_like(thumbnails, 7)).any()


def test_busi_pairs_known_by_eye_are_joined_where_they_are_there():
    ids = ["malignant/malignant (1)", "malignant/malignant (132)", "malignant/malignant (133)", "normal/normal (9)"]
    groups = busi._groups(ids, np.eye(4, dtype=bool))
    assert groups == [ids[0]] * 3 + [ids[3]]


def test_busi_split_is_stratified_and_follows_the_seed(root):
    splits = _all(root)
    for label in range(3):
        counts = [sum(s.label == label for s in splits[split]) for split in ("train", "val", "test")]
        assert counts[0] in (8, 9) and min(counts) >= 1
    ids = [{s.id for s in _all(root, seed=seed)["test"]} for seed in (0, 0, 1, 2)]
    assert ids[0] == ids[1] and (ids[0] != ids[2] or ids[0] != ids[3])


def test_busi_fingerprint_follows_the_contents(root):
    before = {split: datasets.get("busi", root=root, split=split).fingerprint for split in base.Dataset.splits}
    victim = root / busi.FOLDER / "normal" / "normal (5)_mask.png"
    Image.fromarray(_mask((0, 1, 0, 1))).save(victim)
    after = {split: datasets.get("busi", root=root, split=split).fingerprint for split in base.Dataset.splits}
    assert sum(before[split] != after[split] for split in before) == 1


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_busi_names_the_unreadable_file(root, content):
    victim = root / busi.FOLDER / "malignant" / "malignant (7).png"
    victim.write_bytes(victim.read_bytes()[:200] if content is None else content)
    with pytest.raises(RequestError, match=r"malignant \(7\)\.png cannot be read as an image") as error:
        _all(root)
    assert "\n" not in str(error.value)


def test_busi_names_the_mask_of_another_size_and_counts_the_rest(root):
    for i in (3, 4):
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / busi.FOLDER / "benign" / f"benign ({i})_mask.png")
    line = r"benign \(3\)_mask\.png does not fit its image: the mask has 9 x 9 px, .*1 more"
    with pytest.raises(RequestError, match=line):
        _all(root)


def test_busi_missing_mask(root):
    (root / busi.FOLDER / "benign" / "benign (5)_mask.png").unlink()
    with pytest.raises(RequestError, match=r"benign \(5\)\.png has no mask"):
        _all(root)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (None, "give --data-root"),
        (lambda path: path / "nowhere", "no such folder"),
        (lambda path: path, "the folder is empty"),
        (lambda path: (path / "cats").mkdir() or path, "found cats"),
        (lambda path: (path / "file").write_text("x") and path / "file", "a file, not a folder"),
    ],
)
def test_busi_wrong_root_says_what_is_expected(tmp_path, make, found):
    with pytest.raises(RequestError, match=found) as error:
        _ = datasets.get("busi", root=make and make(tmp_path)).samples
    for part in ("Dataset_BUSI_with_GT/{benign,malignant,normal}", "https://", "licence"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


MISSED = [  # near-duplicates that plain correlation of thumbnails does not find
    ("benign/benign (253)", "benign/benign (213)"),
    ("benign/benign (246)", "benign/benign (221)"),
    ("malignant/malignant (77)", "malignant/malignant (78)"),
    ("benign/benign (333)", "malignant/malignant (78)"),
    ("malignant/malignant (86)", "malignant/malignant (85)"),
    ("malignant/malignant (95)", "malignant/malignant (97)"),
    ("benign/benign (300)", "benign/benign (240)"),
    ("malignant/malignant (69)", "malignant/malignant (70)"),
]


def test_busi_real_archive(shared):
    splits = _all(shared / "data")
    assert [sum(s.label == label for part in splits.values() for s in part) for label in range(3)] == [437, 210, 133]
    group = {s.id: s.group for part in splits.values() for s in part}
    assert group["benign/benign (433)"] == group["malignant/malignant (145)"]
    assert len(set(group.values())) == 542 and max(Counter(group.values()).values()) == 19
    for one, other in (*MISSED, *busi.KNOWN):
        assert group[one] == group[other], (one, other)
    parts = [{s.group for s in part} for part in splits.values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    for label in range(3):
        share = sum(s.label == label for s in splits["test"]) / (437, 210, 133)[label]
        assert 0.12 < share < 0.18


def test_check_counts_every_split_and_class(root):
    table, errors = base.check(datasets.get("busi", root=root))
    assert errors == [] and table["images"].sum() == 36 and len(table) == 9
    lesions = table[table["class"] != "normal"]
    assert (lesions["with_roi"] == lesions["images"]).all() and (lesions["roi_area"] > 0.05).all()
    assert table[table["class"] == "normal"]["with_roi"].sum() == 0


def test_check_lists_samples_that_cannot_be_read(digits, monkeypatch):
    def load(self, sample):
        if sample.source % 10 == 0:
            raise RequestError(f"{sample.id} is broken.")
        return self.draw(sample.source)

    monkeypatch.setattr(Digits, "load", load)
    table, errors = base.check(Digits(size=20))
    assert len(errors) == 6 and "test/000000 is broken." in errors
    assert table[table["class"] == "0"]["with_roi"].sum() == 0
