"""Localization on tiny maps, against Quantus, and against the values of Chung et al.'s released code."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import metrics
from metrics import Samples
from metrics.localization import box_iou, rank_accuracy

Make = Callable[..., Samples]


def score(make_samples: Make, name: str, attribution: list[list[float]], roi: list[list[int]]) -> float:
    samples = make_samples(1, maps=np.array([attribution], dtype=float), roi=np.array([roi], dtype=bool))
    return metrics.get(name)(samples).values[0]


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
def test_pointing_game(make_samples: Make, attribution: list, roi: list, expected: float) -> None:
    assert score(make_samples, "pointing_game", attribution, roi) == expected


def test_mass_accuracy_counts_positive_relevance_only(make_samples: Make) -> None:
    roi = [[1, 0], [1, 0]]
    assert score(make_samples, "relevance_mass_accuracy", [[3, 1], [-7, -2]], roi) == pytest.approx(0.75)
    assert score(make_samples, "relevance_mass_accuracy", [[0, 1], [-7, -2]], roi) == 0


def test_mass_accuracy_without_positive_relevance_is_undefined(make_samples: Make) -> None:
    scores = metrics.get("relevance_mass_accuracy")(make_samples(maps=-np.random.default_rng(0).random((5, 16, 16))))
    assert scores.reasons == ["no positive attribution"] * 5


def test_rank_accuracy_counts_the_top_pixels_in_the_roi(make_samples: Make) -> None:
    assert score(make_samples, "relevance_rank_accuracy", [[4, 3], [2, 1]], [[1, 0], [1, 0]]) == 0.5
    assert score(make_samples, "relevance_rank_accuracy", [[4, 3], [2, 1]], [[1, 1], [1, 0]]) == 1


def test_rank_accuracy_of_ties_is_the_mean_over_their_orders() -> None:
    rng = np.random.default_rng(0)
    attribution = rng.integers(4, size=(8, 8)).astype(float)
    roi = rng.random((8, 8)) < 0.4
    broken = [rank_accuracy(attribution + 1e-3 * rng.random((8, 8)), roi) for _ in range(4000)]
    assert rank_accuracy(attribution, roi) == pytest.approx(np.mean(broken), abs=4 * np.std(broken) / 4000**0.5)


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


def test_both_iou_metrics_take_their_share(make_samples: Make) -> None:
    samples = make_samples()
    for name, percent in (("iou_top5", 5), ("iou_top10", 10), ("iou_top5[percent=20]", 20)):
        pairs = zip(samples.maps, samples.roi, strict=True)
        expected = [box_iou(attribution, roi, percent) for attribution, roi in pairs]
        np.testing.assert_array_equal(metrics.get(name)(samples).values, expected)


def test_all_negative_maps_are_scored(make_samples: Make) -> None:
    samples = make_samples()
    shifted = replace(samples, maps=samples.maps - 100)
    for name in ("pointing_game", "relevance_rank_accuracy", "iou_top5"):
        np.testing.assert_array_equal(metrics.get(name)(shifted).values, metrics.get(name)(samples).values)


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


def test_pointing_game_matches_the_authors(golden: list, make_samples: Make) -> None:
    maps, roi = (np.stack([entry[i] for entry in golden]) for i in (1, 2))
    samples = make_samples(len(golden), maps=maps, roi=roi)
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
