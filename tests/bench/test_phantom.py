"""The phantoms: what is drawn, what each intervention changes, and what the two shipped models read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.filters import sobel

from bench import datasets, interventions, models, recipes
from bench.datasets.phantom import CANVAS, EFFUSION, NODULE, NORMAL, VISIBLE, Phantom
from bench.datasets.phantom_shortcut import PhantomShortcut
from explainer_bench import RequestError

N = 48
K = len(Phantom.class_names)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return Phantom(size=N)


@pytest.fixture(scope="module")
def items(phantom):
    return [phantom.draw(index) for index in range(N)]


def _others(phantom, **change):
    return [replace(phantom, **change).draw(index) for index in range(N)]


def _difference(one, other):
    return np.abs(one.image[..., 0].astype(int) - other.image[..., 0])


def _marker(item):
    return item.regions["marker"][NORMAL]


@pytest.mark.parametrize(("cls", "fingerprint"), [(Phantom, "16bcd3786466f87a"), (PhantomShortcut, "f629b42a185ba220")])
def test_same_everywhere(cls, fingerprint):
    assert cls(size=N).fingerprint == fingerprint


@pytest.mark.parametrize("cls", [Phantom, PhantomShortcut])
def test_does_not_depend_on_size_order_or_global_state(cls):
    few, more = cls(size=12), cls(size=15)
    np.random.seed(1)
    assert [s.digest for s in more.samples[:12]] == [s.digest for s in few.samples]
    assert [s.id for s in more.samples] == sorted(s.id for s in more.samples)
    last, first = (few.load(few.samples[index]).image for index in (11, 0))
    assert np.array_equal(first, cls(size=1).draw(0).image) and np.array_equal(last, cls(size=12).draw(11).image)


@pytest.mark.parametrize("change", [{"split": "val"}, {"split": "train"}, {"seed": 1}])
def test_other_split_or_seed_other_images(phantom, change):
    other = replace(phantom, size=12, **change)
    assert not {s.digest for s in other.samples} & {s.digest for s in replace(phantom, size=12).samples}


def test_labels_findings_and_regions(phantom, items):
    second = 0
    for sample, item in zip(phantom.samples, items, strict=True):
        assert item.image.shape == (CANVAS, CANVAS, 3) and item.image.dtype == np.uint8
        assert set(item.regions) == set(phantom.regions) and item.masks() is item.roi
        assert item.roi is item.regions["finding"] and NORMAL not in item.roi
        assert (sample.label == NORMAL and not item.roi) or sample.label in item.roi
        assert set(item.regions["marker"]) == set(range(K)) and _marker(item).sum() == 192
        assert all(mask.any() and not (mask & _marker(item)).any() for mask in item.roi.values())
        assert sum(item.roi.values(), np.zeros((CANVAS, CANVAS), int)).max() <= 1
        second += len(item.roi) == 2
    assert N / 12 < second < N / 2.5


def test_masks_are_what_a_finding_changes(phantom, items):
    for item, without in zip(items, _others(phantom, remove="finding"), strict=True):
        union = np.any([np.zeros((CANVAS, CANVAS), bool), *item.roi.values()], axis=0)
        assert np.array_equal(_difference(item, without) >= VISIBLE, union)
        assert not without.roi and np.array_equal(_marker(item), _marker(without))


def test_a_marker_is_all_that_its_removal_changes(phantom, items):
    for item, without in zip(items, _others(phantom, remove="marker"), strict=True):
        changed = _difference(item, without) > 0
        assert changed[_marker(item)].mean() > 0.5 and not changed[~_marker(item)].any()
        assert not without.regions["marker"] and set(without.roi) == set(item.roi)


def test_a_moved_finding_is_in_the_other_lung(phantom, items):
    for item, moved, without in zip(
        items, _others(phantom, move="finding"), _others(phantom, remove="finding"), strict=True
    ):
        assert set(moved.roi) == set(item.roi) and np.array_equal(_marker(moved), _marker(item))
        for label, mask in item.roi.items():
            sides = [np.argwhere(m)[:, 1].mean() < CANVAS / 2 for m in (mask, moved.roi[label])]
            assert sides[0] != sides[1]
        union = np.any([np.zeros((CANVAS, CANVAS), bool), *moved.roi.values()], axis=0)
        assert np.array_equal(_difference(moved, without) >= VISIBLE, union)


def test_a_moved_marker_is_the_same_letter_elsewhere(phantom, items):
    for item, moved in zip(items, _others(phantom, move="marker"), strict=True):
        assert not (_marker(item) & _marker(moved)).any()
        assert np.array_equal(item.image[_marker(item)], moved.image[_marker(moved)])
        assert not _difference(item, moved)[~_marker(item) & ~_marker(moved)].any()


def test_a_swapped_marker_is_another_letter_at_the_same_place(phantom, items):
    for item, swapped in zip(items, _others(phantom, swap="marker"), strict=True):
        changed = _difference(item, swapped) > 0
        assert changed[_marker(item)].mean() > 0.05 and not changed[~_marker(item)].any()
        assert np.array_equal(_marker(item), _marker(swapped))


def test_contrast_scales_the_findings(phantom, items):
    without, faint, strong = (_others(phantom, contrast=c) for c in (0, 0.5, 2))
    shown = [index for index, item in enumerate(items) if item.roi]
    change = [np.mean([_difference(o[i], without[i]).sum() for i in shown]) for o in (faint, items, strong)]
    assert change[0] * 1.5 < change[1] < change[2] / 1.5
    assert not any(item.roi for item in without)


def _letters(dataset) -> np.ndarray:
    """(n,) int: which of the letters each image shows, numbered as they come."""
    pictures = [item.image[_marker(item)][:, 0] > 128 for item in map(dataset.draw, range(dataset.size))]
    return np.unique([p.tobytes() for p in pictures], return_inverse=True)[1]


def test_the_letter_is_the_label_only_in_the_shortcut():
    labels = np.arange(128) % K
    counts = np.zeros((2, K, K), int)
    for table, cls in zip(counts, (Phantom, PhantomShortcut), strict=True):
        np.add.at(table, (_letters(cls(size=128)), labels), 1)
    assert counts[0].min() >= 2
    assert (np.sort(counts[1], axis=None)[-K:] == 32).all() and (counts[1] > 0).sum() == K


def test_without_agreement_the_findings_say_nothing_of_the_label():
    dataset = PhantomShortcut(agreement=0)
    shown = [np.isin(np.arange(K), list(dataset.draw(i).roi)) for i in range(128)]
    rates = np.array([np.mean(shown[label::K], axis=0) for label in range(K)])
    assert np.ptp(rates, axis=0).max() < 0.4 and rates[:, NODULE:].min() > 0.05
    assert all(i % K in PhantomShortcut().draw(i).roi or i % K == NORMAL for i in range(32))


def test_the_twins_share_their_anatomy(phantom, items):
    twin = PhantomShortcut(size=N)
    for index in range(8):
        masks = items[index].roi, twin.draw(index).roi
        assert index % K in masks[1] or index % K == NORMAL
        bare = [replace(d, remove="finding").draw(index) for d in (phantom, twin)]
        assert not _difference(*bare)[~_marker(bare[0])].any()


def test_findings_stand_anywhere_and_no_trivial_map_finds_them(phantom, items):
    masks = {i: item.roi[i % K] for i, item in enumerate(items) if i % K != NORMAL}
    total = np.sum(list(masks.values()), axis=0)
    axis = np.arange(CANVAS) - (CANVAS - 1) / 2
    bell = np.exp(-((axis / (CANVAS / 4)) ** 2) / 2)
    rows = {
        "center": lambda i: np.outer(bell, bell),
        "intensity": lambda i: items[i].image[..., 0].astype(float),
        "sobel": lambda i: sobel(items[i].image[..., 0].astype(float)),
        "prior": lambda i: total - masks[i],
    }
    for name, row in rows.items():
        hits = [mask[np.unravel_index(row(i).argmax(), mask.shape)] for i, mask in masks.items()]
        assert np.mean(hits) < 0.2, name
    assert total[:, : CANVAS // 2].sum() / total.sum() == pytest.approx(0.5, abs=0.15)
    assert {label: np.mean([m.mean() for i, m in masks.items() if i % K == label]) for label in (NODULE, EFFUSION)}[
        NODULE
    ] < 0.02


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("phantom[remove=findings]", "'finding' or 'marker'"),
        ("phantom[contrast=-1]", "greater than or equal to 0"),
        ("phantom[agreement=1]", "no parameter 'agreement'"),
        ("phantom_short", "Did you mean phantom_shortcut"),
    ],
)
def test_bad_request(spec, line):
    with pytest.raises(RequestError, match=line):
        datasets.get(spec)


@pytest.mark.parametrize(
    ("cls", "used", "other"), [(Phantom, "finding", "marker"), (PhantomShortcut, "marker", "finding")]
)
def test_the_shipped_models_use_what_they_say(cls, used, other):
    model = models.get(cls.shipped_model, cls.class_names)
    assert model.meta["evidence"] == used
    assert models.shipped()[cls.shipped_model].stat().st_size < 4_000_000
    table = interventions.table(cls(size=512), model).set_index("images")
    accuracy, chance = table["accuracy"], table["chance"].iloc[0]
    assert table["n"].eq(512).all() and accuracy["as they are"] > 0.9
    assert abs(accuracy[f"{used} removed"] - chance) < 0.1 and abs(accuracy[f"{used} removed"] - 1 / K) < 0.1
    for what in (f"{other} removed", f"{other} moved"):
        assert abs(accuracy[what] - accuracy["as they are"]) <= 0.02
    assert accuracy[f"{used} moved"] > 0.9
    assert (accuracy["marker swapped"] < 0.2) == (used == "marker")


@pytest.mark.parametrize("cls", [Phantom, PhantomShortcut])
def test_the_recipe_makes_the_shipped_model(cls):
    recipe, model = recipes.get(cls.name), models.get(cls.shipped_model)
    assert recipe.checkpoint_name == model.name and recipe.evidence == model.meta["evidence"]
    assert {**recipe.kwargs, "num_classes": K} == model.kwargs and recipe.architecture == model.architecture


def test_interventions_are_of_full_precision():
    """CUDA would round the inputs of convolutions to 10 bits."""
    model, seen = models.get(Phantom.shipped_model), []
    model.module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    interventions.table(Phantom(size=2), model)
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32
