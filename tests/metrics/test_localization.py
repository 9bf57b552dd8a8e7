"""Localization on tiny maps, against Quantus, scikit-learn and brute force, and the values of Chung et al.'s code."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.localization import RoiMetric, bounding_boxes, box_iou, likely_boxes, mean_box_iou
from metrics.maps import QuantusMapMetric, hypergeometric

Make = Callable[..., Samples]
NAMES = [name for name, cls in metrics.registry.classes.items() if issubclass(cls, RoiMetric)]
BY_QUANTUS = [name for name in NAMES if issubclass(metrics.registry.classes[name], QuantusMapMetric)]
WITH_CHANCE = [name for name in NAMES if name != "iou_best_threshold"]
MASS = ["relevance_mass_accuracy", "energy_pointing_game", "attribution_localisation"]
SIDE, PATCH = 16, 4


def samples_of(maps: np.ndarray, roi: np.ndarray, patch: int = PATCH) -> Samples:
    """Samples of a model that nobody asks; `roi` (H, W) serves all maps."""
    n, height, width = maps.shape
    return Samples(
        model=torch.nn.Identity(),
        inputs=torch.zeros(n, 3, height, width),
        targets=np.zeros(n, dtype=int),
        maps=np.asarray(maps, dtype=float),
        roi=np.broadcast_to(np.asarray(roi, dtype=bool), maps.shape).copy(),
        logits=np.zeros((n, 2)),
        seeds=np.arange(n, dtype=np.uint32),
        patch=(patch, patch),
    )


def score(name: str, attribution: Any, roi: Any, **params: Any) -> float:
    maps = np.array([attribution], dtype=float)
    return metrics.get(name, **params)(samples_of(maps, np.array(roi), patch=1)).values[0]


def lesion(top: int = 3, bottom: int = 9, left: int = 5, right: int = 12) -> np.ndarray:
    """A rectangle with a bite, so that its box differs."""
    roi = np.zeros((SIDE, SIDE), dtype=bool)
    roi[top:bottom, left:right] = True
    roi[top, left] = False
    return roi


@pytest.mark.parametrize(
    ("attribution", "roi", "expected"),
    [
        ([[0, 3], [1, 2]], [[0, 1], [0, 0]], 1),
        ([[0, 3], [1, 2]], [[0, 0], [0, 1]], 0),
        ([[3, 3], [1, 2]], [[0, 1], [0, 0]], 1),  # any of the tied maxima
        ([[-4, 3], [1, 2]], [[1, 0], [0, 0]], 0),  # signed: the largest magnitude does not count
        ([[-4, 3], [1, 2]], [[1, 1], [1, 1]], 1),
    ],
)
def test_pointing_game(attribution: list, roi: list, expected: float) -> None:
    assert score("pointing_game", attribution, roi) == expected


def test_pointing_game_by_expected_hits() -> None:
    assert score("pointing_game", [[3, 3], [1, 3]], [[0, 1], [0, 0]], ties="expected") == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", MASS)
def test_mass_accuracy_counts_positive_relevance_only(name: str) -> None:
    roi = [[1, 0], [1, 0]]
    assert score(name, [[3, 1], [-7, -2]], roi) == pytest.approx(0.75)
    assert score(name, [[0, 1], [-7, -2]], roi) == 0


@pytest.mark.parametrize("name", MASS)
def test_mass_accuracy_without_positive_relevance_is_undefined(name: str) -> None:
    scores = metrics.get(name)(samples_of(-np.random.default_rng(0).random((5, SIDE, SIDE)), lesion()))
    assert scores.reasons == ["no positive attribution"] * 5


def test_rank_accuracy_counts_the_top_pixels_in_the_roi() -> None:
    assert score("relevance_rank_accuracy", [[4, 3], [2, 1]], [[1, 0], [1, 0]]) == 0.5
    assert score("relevance_rank_accuracy", [[4, 3], [2, 1]], [[1, 1], [1, 0]]) == 1


def test_top_k_and_pixel_iou_count_their_share_of_the_pixels() -> None:
    attribution, roi = np.arange(100.0).reshape(10, 10), np.zeros((10, 10), dtype=bool)
    roi.ravel()[95:] = roi.ravel()[:5] = True
    assert score("iou_top10", attribution, roi) == pytest.approx(5 / 15)
    assert score("iou_top5", attribution, roi) == pytest.approx(5 / 10)
    assert score("top_k_intersection", attribution, roi, percent=20) == pytest.approx(5 / 20)


@pytest.mark.parametrize("spec", ["relevance_rank_accuracy", "iou_top10", "top_k_intersection[percent=20]"])
@pytest.mark.parametrize("tokens", [False, True])
def test_ties_score_the_mean_over_their_orders(spec: str, tokens: bool) -> None:
    rng = np.random.default_rng(0)
    attribution = rng.integers(4, size=(SIDE, SIDE)).astype(float)
    if tokens:
        attribution = np.kron(rng.integers(4, size=(4, 4)), np.ones((PATCH, PATCH)))
    broken = attribution + 1e-3 * rng.random((4000, SIDE, SIDE))
    scores = metrics.get(spec)(samples_of(broken, lesion())).values
    tied = metrics.get(spec)(samples_of(attribution[None], lesion())).values[0]
    assert tied == pytest.approx(scores.mean(), abs=4 * scores.std() / 4000**0.5)


def test_upsampled_tokens_score_as_pixels_that_tie() -> None:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((6, 4, 4)).repeat(PATCH, 1).repeat(PATCH, 2)
    short, long = samples_of(maps, lesion()), samples_of(maps, lesion(), patch=1)
    for name in NAMES:
        np.testing.assert_allclose(metrics.get(name)(short).values, metrics.get(name)(long).values, atol=1e-12)


def test_box_spans_scattered_top_pixels() -> None:
    attribution, roi = np.zeros((10, 10)), np.zeros((10, 10), dtype=bool)
    attribution[2, 3] = attribution[5, 7] = attribution[4, 4] = 1
    roi[2:6, 3:5] = True
    assert box_iou(attribution, roi, 2) == pytest.approx(8 / 20)


def test_top_holds_the_pixel_at_the_threshold_and_its_ties() -> None:
    attribution = np.arange(100.0).reshape(10, 10)
    assert box_iou(attribution, attribution >= 94, 5) == 1
    tied = np.minimum(attribution, 90)
    assert box_iou(tied, attribution >= 90, 5) == 1


@pytest.mark.parametrize(("spec", "percent"), [("rect_iou_top5", 5), ("rect_iou_top10", 10)])
def test_both_rectangles_take_their_share(make_samples: Make, spec: str, percent: float) -> None:
    samples = make_samples()
    expected = [box_iou(*pair, percent) for pair in zip(samples.maps, samples.roi, strict=True)]
    np.testing.assert_array_equal(metrics.get(spec)(samples).values, expected)


def test_all_negative_maps_are_scored(make_samples: Make) -> None:
    samples = make_samples()
    shifted = replace(samples, maps=samples.maps - 100)
    for name in NAMES:
        if name not in MASS:
            np.testing.assert_allclose(metrics.get(name)(shifted).values, metrics.get(name)(samples).values, atol=1e-9)


def kinds_of_maps() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    full = rng.standard_normal((SIDE, SIDE))
    return {
        "full": full,
        "float32": full.astype(np.float32).astype(float),
        "tokens": rng.standard_normal((4, 4)).repeat(PATCH, 0).repeat(PATCH, 1),
        "few values": rng.integers(-3, 4, size=(SIDE, SIDE)).astype(float),
        "inexact ties": rng.integers(1, 9, size=(SIDE, SIDE)) / 7,
        "last bit": np.nextafter(1.0, 1.0 + rng.integers(0, 2, size=(SIDE, SIDE))),
        "signed zeros": rng.choice([-0.0, 0.0, 1.0, -1.0], size=(SIDE, SIDE)),
        "binary": lesion(2, 6, 3, 14).astype(float),
    }


@pytest.mark.parametrize("kind", kinds_of_maps())
def test_curves_are_those_of_scikit_learn_and_brute_force(kind: str) -> None:
    attribution, roi = kinds_of_maps()[kind], lesion()
    samples = samples_of(attribution[None], roi)
    value = {name: metrics.get(name)(samples).values[0] for name in NAMES}
    assert value["auc"] == pytest.approx(roc_auc_score(roi.ravel(), attribution.ravel()), abs=1e-12)
    assert value["average_precision"] == pytest.approx(
        average_precision_score(roi.ravel(), attribution.ravel()), abs=1e-12
    )
    tops = [attribution >= threshold for threshold in np.unique(attribution)]
    assert value["iou_best_threshold"] == pytest.approx(max((t & roi).sum() / (t | roi).sum() for t in tops), abs=1e-12)


@pytest.mark.parametrize("kind", kinds_of_maps())
def test_segmentation_scores_are_those_of_the_authors(kind: str) -> None:
    """Pixel accuracy, mean IoU and AP as in imagenet_seg_eval.py, on one image."""
    attribution, roi = kinds_of_maps()[kind], lesion()
    samples = samples_of(attribution[None], roi)
    scaled = (attribution - attribution.min()) / np.ptp(attribution)
    front = scaled > scaled.mean()
    ious = [(front & roi).sum() / (front | roi).sum(), (~front & ~roi).sum() / (~front | ~roi).sum()]
    channels = np.rint(np.stack([1 - scaled, scaled]) * 2**40)  # equal scores of the two channels tie
    expected = average_precision_score(np.stack([~roi, roi]).ravel(), channels.ravel())
    assert metrics.get("segmentation_pixel_accuracy")(samples).values[0] == pytest.approx((front == roi).mean())
    assert metrics.get("segmentation_miou")(samples).values[0] == pytest.approx(np.mean(ious))
    assert metrics.get("segmentation_map")(samples).values[0] == pytest.approx(expected, abs=1e-12)


def test_tokens_of_a_roi_are_those_covered_by_half_or_else_the_most_covered() -> None:
    roi = np.zeros((3, SIDE, SIDE), dtype=bool)
    roi[0, :2, :4] = True  # half of one token
    roi[0, 4:8, 4:5] = True  # a quarter of another
    roi[1, 0, 0] = roi[1, 4:6, 4] = True  # one and two pixels
    samples = replace(samples_of(np.random.default_rng(0).random((3, SIDE, SIDE)), lesion()), roi=roi)
    view = metrics.get("auc", unit="token").view(samples)  # type: ignore[attr-defined]
    assert [np.argwhere(each).tolist() for each in view.roi] == [[[0, 0]], [[1, 1]], []]
    np.testing.assert_allclose(view.maps, samples.maps.reshape(3, 4, 4, 4, 4).mean(axis=(2, 4)))
    assert metrics.get("auc", unit="token")(samples).reasons == ["", "", "empty ROI"]


def test_box_is_the_rectangle_around_all_parts() -> None:
    roi = np.zeros((2, 6, 7), dtype=bool)
    roi[0, 1, 5] = roi[0, 3, 2] = True
    expected = np.zeros_like(roi)
    expected[0, 1:4, 2:6] = True
    np.testing.assert_array_equal(bounding_boxes(roi), expected)


def test_strata_part_the_images_by_the_size_of_their_roi() -> None:
    rois = np.zeros((4, SIDE, SIDE), dtype=bool)
    for roi, size in zip(rois, (12, 13, 63, 64), strict=True):
        roi.ravel()[:size] = True
    samples = replace(samples_of(np.random.default_rng(0).random((4, SIDE, SIDE)), lesion()), roi=rois)
    defined = {size: metrics.get("auc", roi_size=size)(samples) for size in ("small", "medium", "large")}
    rows = [np.flatnonzero(np.isfinite(scores.values)).tolist() for scores in defined.values()]
    assert rows == [[0], [1, 2], [3]]
    assert defined["small"].reasons == ["", *["ROI is not small"] * 3]
    np.testing.assert_array_equal(defined["large"].values[3], metrics.get("auc")(samples).values[3])


OPTIONS: list[dict[str, Any]] = [{}, {"unit": "token"}, {"region": "box"}, {"unit": "token", "region": "box"}]


ROIS = {"some": lesion(), "most": lesion(0, 15, 2, 16), "few": lesion(6, 8, 6, 8)}
CHANCES = list(zip(["some", "most", "few", "some"], OPTIONS, strict=True))


@pytest.fixture(scope="module")
def random_maps() -> dict[str, Samples]:
    """10,000 random maps for each ROI."""
    maps = np.random.default_rng(7).random((10_000, SIDE, SIDE))
    return {name: samples_of(maps, roi) for name, roi in ROIS.items()}


@pytest.mark.parametrize(("roi", "options"), CHANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_chance_level_is_the_mean_of_many_random_maps(
    random_maps: dict[str, Samples], name: str, roi: str, options: dict[str, Any]
) -> None:
    samples, metric = random_maps[roi], metrics.get(name, **options)
    level = metric.chance_level(samples)
    if name == "iou_best_threshold":
        assert np.isnan(level).all()
        return
    gap = metric(samples).values - level
    assert abs(gap.mean()) <= 4 * gap.std() / len(gap) ** 0.5 + 1e-12


@pytest.mark.parametrize("name", WITH_CHANCE)
def test_corrected_scores_are_zero_by_chance_and_one_at_best(name: str) -> None:
    samples = samples_of(np.random.default_rng(0).random((50, SIDE, SIDE)), lesion())
    plain, corrected = metrics.get(name), metrics.get(name, corrected=True)
    level = plain.chance_level(samples)
    np.testing.assert_allclose(corrected(samples).values, (plain(samples).values - level) / (1 - level))
    np.testing.assert_array_equal(corrected.chance_level(samples), 0)
    assert corrected.bounds[0] < 0 and corrected.bounds[1] == 1
    assert plain.bounds == (0, 1)


def test_no_correction_without_a_chance_level() -> None:
    with pytest.raises(RequestError, match="chance level"):
        metrics.get("iou_best_threshold", corrected=True)


@pytest.mark.parametrize(("total", "marked", "drawn"), [(50, 7, 20), (50176, 9000, 2509), (9, 9, 4), (9, 3, 9)])
def test_hypergeometric_is_scipys(total: int, marked: int, drawn: int) -> None:
    count, probability = hypergeometric(total, marked, drawn)
    np.testing.assert_allclose(probability, stats.hypergeom(total, marked, drawn).pmf(count), rtol=1e-6, atol=1e-12)


def test_likely_boxes_hold_the_probability_and_few_are_too_many() -> None:
    sizes = likely_boxes(12, 9, 5)
    assert sizes
    assert sum(p * (13 - h) * (10 - w) for h, w, p in sizes) == pytest.approx(1, abs=1e-8)
    assert np.isnan(mean_box_iou(np.ones((224, 224), dtype=bool), 3))
    assert mean_box_iou(np.ones((224, 224), dtype=bool), 2509) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_empty_full_and_constant_are_nan_with_a_reason(name: str) -> None:
    maps = np.random.default_rng(0).random((5, SIDE, SIDE))
    roi = np.stack([lesion()] * 5)
    roi[0], roi[1], maps[2], maps[3, 0, 0] = False, True, 0.3, np.nan
    samples = replace(samples_of(maps, lesion()), roi=roi)
    expected = metrics.get(name)(samples_of(maps[4:], lesion())).values[0]
    for options in ({}, {"corrected": True}) if name in WITH_CHANCE else ({},):
        scores = metrics.get(name, **options)(samples)
        whole = options or name in ("auc", "segmentation_miou")
        reasons = ["empty ROI", "ROI covers the whole image" if whole else "", "constant map", "map is not finite", ""]
        assert scores.reasons == reasons
        assert np.isnan(scores.values).tolist() == [bool(reason) for reason in reasons]
        if not options:
            assert scores.values[4] == expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_perfect_and_worst_maps_reach_the_bounds(name: str, options: dict[str, Any]) -> None:
    roi = np.zeros((SIDE, SIDE), dtype=bool)
    roi[4:12, 4:8] = True  # whole tokens, 12.5 % of the image
    maps = np.stack([roi, ~roi]).astype(float)
    spec = {"percent": 12.5} if "top" in name and name[0] == "i" else {"percent": 12} if "rect" in name else {}
    best, worst = metrics.get(name, **spec, **options)(samples_of(maps, roi)).values
    assert best == pytest.approx(1, abs=1e-12)
    if name in ("average_precision", "iou_best_threshold"):
        assert worst == pytest.approx(roi.mean())
    elif name == "segmentation_map":
        assert worst == pytest.approx(0.5)
    elif "rect" in name:
        assert worst == pytest.approx(roi.mean())  # the rectangle around the rest is the image
    else:
        assert worst == 0


small_maps = arrays(np.float64, (2, 8, 8), elements=st.integers(-6, 6).map(float))
masks = arrays(np.bool_, (8, 8))


@settings(max_examples=40, deadline=None)
@given(maps=small_maps, roi=masks, unit=st.sampled_from(["pixel", "token"]), region=st.sampled_from(["mask", "box"]))
def test_scores_are_in_range_or_nan_with_a_reason(maps: np.ndarray, roi: np.ndarray, unit: str, region: str) -> None:
    samples = samples_of(maps, roi)
    for name in NAMES:
        values, reasons = metrics.get(name, unit=unit, region=region)(samples)
        assert np.isnan(values).tolist() == [bool(reason) for reason in reasons]
        known = values[np.isfinite(values)]
        assert ((known >= 0) & (known <= 1)).all()


@settings(max_examples=30, deadline=None)
@given(maps=small_maps, roi=masks, factor=st.floats(0.01, 100))
def test_scale_and_order_do_not_matter(maps: np.ndarray, roi: np.ndarray, factor: float) -> None:
    samples, scaled = samples_of(maps, roi), samples_of(maps[::-1] * factor, roi)
    for name in NAMES:
        if name in ("segmentation_pixel_accuracy", "segmentation_miou"):
            scaled_by = replace(scaled, maps=maps[::-1] * 2.0 ** round(np.log2(factor)))  # a value at the mean stays
        else:
            scaled_by = scaled
        np.testing.assert_allclose(
            metrics.get(name)(scaled_by).values[::-1], metrics.get(name)(samples).values, atol=1e-9
        )


@settings(max_examples=40, deadline=None)
@given(maps=small_maps, roi=masks, start=st.integers(0, 63), end=st.integers(0, 63))
def test_swapping_a_larger_value_into_the_roi_never_hurts(
    maps: np.ndarray, roi: np.ndarray, start: int, end: int
) -> None:
    better = maps.reshape(2, -1).copy()
    outer, inner = (start, end) if roi.ravel()[end] else (end, start)
    if roi.ravel()[outer] or not roi.ravel()[inner]:
        return
    pair = np.sort(better[:, [outer, inner]], axis=1)
    better[:, outer], better[:, inner] = pair[:, 0], pair[:, 1]
    # a rectangle may grow, and average precision may fall where a hit leaves a large tie for a worse one
    for name in set(NAMES) - {"rect_iou_top5", "rect_iou_top10", "average_precision", "segmentation_map"}:
        before, after = (metrics.get(name)(samples_of(m.reshape(2, 8, 8), roi)).values for m in (maps, better))
        known = np.isfinite(before)
        assert (after[known] >= before[known] - 1e-12).all(), name


def test_average_precision_may_fall_for_a_better_map() -> None:
    """As scikit-learn defines it: the reason why it is left out above."""
    worst, roi = np.zeros((8, 8)), np.zeros((8, 8), dtype=bool)
    worst[1, 1], roi[1, 1] = -1, True
    better = np.zeros((8, 8))
    better[0, 0] = -1
    scores = metrics.get("segmentation_map")(samples_of(np.stack([worst, better]), roi)).values
    expected = []
    for attribution in (worst, better):
        scaled = (attribution + 1).ravel()
        labels = np.concatenate([~roi.ravel(), roi.ravel()])
        expected.append(average_precision_score(labels, np.concatenate([1 - scaled, scaled])))
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    assert scores[1] < scores[0]


@pytest.fixture(scope="module")
def real(shared: Path) -> Samples:
    """Gradients and last-layer attention of a real model on real images, signed pixels and unsigned tokens."""
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(shared / "data/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"))
    paths = sorted((shared / "data/imagenet_samples").glob("*.*"))[:3]
    images = [Image.open(path).convert("RGB").resize((224, 224)) for path in paths]
    inputs = torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    inputs.requires_grad_()
    model(inputs).max(1).values.sum().backward()
    assert inputs.grad is not None
    gradient = (inputs.grad * inputs).sum(1).detach().double().numpy()
    with torch.no_grad():
        tokens = model.forward_features(inputs)[:, 1:].norm(dim=-1).reshape(3, 14, 14).double().numpy()
    maps = np.concatenate([gradient, tokens.repeat(16, 1).repeat(16, 2)])
    roi = np.zeros((224, 224), dtype=bool)
    roi[60:150, 40:170] = True
    return samples_of(maps, roi, patch=16)


# Quantus cuts ties as its sorting falls: there it is right only without them
CUTS_TIES = {"relevance_rank_accuracy", "top_k_intersection"}


@pytest.mark.parametrize("name", BY_QUANTUS)
def test_quantus_gives_the_same_on_real_maps(real: Samples, name: str) -> None:
    samples = real.take(np.arange(3)) if name in CUTS_TIES else real
    fast, full = (metrics.get(name, engine=engine)(samples).values for engine in ("fast", "quantus"))
    assert np.isfinite(full).all()
    np.testing.assert_allclose(fast, full, atol=1e-5 if name not in CUTS_TIES else 2e-3)
    if name in CUTS_TIES:  # gradients in float32 tie now and then
        pixels = samples.maps[0].size
        jitter = np.random.default_rng(0).permutation(pixels).reshape(224, 224) * 1e-12 * np.ptp(samples.maps)
        samples = samples_of(samples.maps + jitter / pixels, samples.roi[0], patch=16)
        fast, full = (metrics.get(name, engine=engine)(samples).values for engine in ("fast", "quantus"))
        np.testing.assert_allclose(fast, full, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", BY_QUANTUS)
def test_quantus_gives_the_same_on_random_maps(name: str, options: dict[str, Any]) -> None:
    samples = samples_of(np.random.default_rng(0).standard_normal((10, SIDE, SIDE)), lesion())
    fast, full = (metrics.get(name, engine=engine, **options)(samples).values for engine in ("fast", "quantus"))
    assert np.isfinite(full).all()
    np.testing.assert_allclose(fast, full, atol=1e-5)


def test_default_k_is_close_to_quantus_at_its_resolution() -> None:
    metric = metrics.get("top_k_intersection")
    samples = samples_of(np.random.default_rng(0).random((1, 224, 224)), np.ones((224, 224)), patch=16)
    assert metric.quantus_params(samples, 0) == {"k": 1004}  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    samples = samples_of(np.random.default_rng(0).standard_normal((7, SIDE, SIDE)), lesion())
    before = torch.get_num_threads()
    expected = {name: metrics.get(name)(replace(samples)).values for name in NAMES}
    try:
        torch.set_num_threads(threads)
        for name in NAMES:
            np.testing.assert_array_equal(metrics.get(name)(replace(samples)).values, expected[name])
    finally:
        torch.set_num_threads(before)


def golden_maps(index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    tokens = np.kron(rng.random((14, 14)), np.ones((16, 16)))
    y, x = np.mgrid[:224, :224]
    smooth = np.zeros((224, 224))
    for _ in range(3):
        cy, cx = rng.uniform(0, 224, 2)
        s, weight = rng.uniform(10, 50), rng.uniform(0.3, 1)
        smooth += weight * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s**2))
    return {"tokens": tokens, "smooth": smooth}


@pytest.fixture(scope="module")
def golden(shared: Path) -> list[tuple[dict[str, str], np.ndarray, np.ndarray]]:
    """Each row of the reference values with its map and mask."""

    def read() -> Iterator[tuple[dict[str, str], np.ndarray, np.ndarray]]:
        with (shared / "golden/localization_chung2024.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                mask = next((shared / "data/attention_maps_masks" / row["dataset"]).rglob(row["mask"]))
                yield row, golden_maps(int(row["index"]))[row["map"]], np.array(Image.open(mask).convert("L")) > 0

    return list(read())


def test_pointing_game_matches_the_authors(golden: list) -> None:
    maps, roi = (np.stack([entry[i] for entry in golden]) for i in (1, 2))
    samples = replace(samples_of(maps, roi[0], patch=16), roi=roi)
    expected = np.array([float(row["pointing_game"]) for row, _, _ in golden])
    expected[~roi.any(axis=(1, 2))] = np.nan  # the authors give 0 for their two empty masks
    np.testing.assert_array_equal(metrics.get("pointing_game")(samples).values, expected)


@pytest.mark.parametrize("percent", [5, 10, 20, 40])
def test_box_iou_matches_the_authors(golden: list, percent: int) -> None:
    """Their code writes 1 into the map where it reaches the threshold, then 0 where it is below it.

    On maps in [0, 1], as they use, that is our definition; where the threshold exceeds 1, it empties the map.
    """
    above_one = 0
    for row, attribution, roi in golden:
        expected = float(row[f"iou_top{percent}"])
        if np.sort(attribution, axis=None)[::-1][int(224 * 224 * percent / 100)] > 1:
            above_one += 1
            assert expected == 0
        else:
            assert box_iou(attribution, roi, percent) == pytest.approx(expected, abs=1e-6)
    assert len(golden) == 400 and above_one <= 20
