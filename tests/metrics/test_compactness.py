"""Compactness on maps whose answer is known, and against Quantus."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import metrics
from metrics import Samples
from metrics.maps import MapMetric, QuantusMapMetric

Make = Callable[..., Samples]
NAMES = [
    name for name, cls in metrics.registry.classes.items() if issubclass(cls, MapMetric) and cls.group == "compactness"
]
BY_QUANTUS = [name for name in NAMES if issubclass(metrics.registry.classes[name], QuantusMapMetric)]
SPECS = [*NAMES, "effective_complexity[scale=minmax]", "cdam_compactness[rule=notebook]"]


@pytest.fixture
def maps() -> np.ndarray:
    """One pixel; half of the pixels alike, the others zero; a negative extreme."""
    maps = np.zeros((3, 16, 16))
    maps[0, 3, 3] = -2
    maps[1, :8] = 0.5
    maps[2, 0, :4] = -10, 0.5, 0.50001, -0.4
    return maps


def test_sparseness(make_samples: Make, maps: np.ndarray) -> None:
    scores = metrics.get("sparseness")(make_samples(3, maps=maps)).values
    np.testing.assert_allclose(scores[:2], [255 / 256, 0.5], atol=1e-4)


def test_complexity(make_samples: Make, maps: np.ndarray) -> None:
    scores = metrics.get("complexity")(make_samples(3, maps=maps)).values
    np.testing.assert_allclose(scores[:2], [0, np.log(128)], atol=1e-9)


def test_cdam_compactness_compares_with_the_largest_magnitude(make_samples: Make, maps: np.ndarray) -> None:
    scores = metrics.get("cdam_compactness")(make_samples(3, maps=maps)).values
    np.testing.assert_allclose(scores, [255 / 256, 128 / 256, 254 / 256])


def test_cdam_compactness_of_the_notebook_compares_with_the_largest_value(make_samples: Make, maps: np.ndarray) -> None:
    scores = metrics.get("cdam_compactness", rule="notebook")(make_samples(3, maps=maps)).values
    np.testing.assert_allclose(scores, [0, 128 / 256, 252 / 256])  # 0.05 * 0.50001: all four stand out


def test_the_two_rules_agree_where_the_extreme_is_positive(make_samples: Make) -> None:
    samples = make_samples()
    positive = replace(samples, maps=np.abs(samples.maps))
    library, notebook = (
        metrics.get("cdam_compactness", rule=rule)(positive).values for rule in ("library", "notebook")
    )
    np.testing.assert_array_equal(library, notebook)


def test_effective_complexity_counts_what_exceeds_a_tenth(make_samples: Make, maps: np.ndarray) -> None:
    samples = make_samples(3, maps=maps)
    np.testing.assert_allclose(metrics.get("effective_complexity")(samples).values, [1 / 256, 128 / 256, 1 / 256])
    signed = metrics.get("effective_complexity", scale="minmax")(samples).values
    np.testing.assert_allclose(signed, [255 / 256, 128 / 256, 255 / 256])


def test_effective_complexity_is_the_rest_of_cdam_compactness(make_samples: Make) -> None:
    samples = make_samples()
    rest = 1 - metrics.get("effective_complexity", eps=0.05)(samples).values
    np.testing.assert_allclose(metrics.get("cdam_compactness")(samples).values, rest)


@pytest.mark.parametrize("unit", ["pixel", "token"])
@pytest.mark.parametrize("spec", [*BY_QUANTUS, "effective_complexity[scale=minmax]"])
def test_quantus_gives_the_same(make_samples: Make, spec: str, unit: str) -> None:
    samples = make_samples(8)
    tokens = np.random.default_rng(0).standard_normal((8, 4, 4)).repeat(4, 1).repeat(4, 2)
    for each in (samples, make_samples(8, maps=tokens)):
        fast, full = (metrics.get(spec, engine=engine, unit=unit)(each).values for engine in ("fast", "quantus"))
        np.testing.assert_allclose(fast, full, atol=1e-5)
        assert np.isfinite(full).all()


@pytest.mark.parametrize("spec", BY_QUANTUS)
def test_quantus_gives_the_same_on_gradients_of_a_model(make_samples: Make, spec: str) -> None:
    samples = make_samples(4)
    again: Any = samples.reexplain
    real = replace(samples, maps=again(samples.model, samples.inputs, samples.targets, np.arange(4)))
    fast, full = (metrics.get(spec, engine=engine)(real).values for engine in ("fast", "quantus"))
    np.testing.assert_allclose(fast, full, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_tokens_score_as_their_pixels_but_for_the_entropy_of_a_patch(make_samples: Make, spec: str) -> None:
    tokens = np.random.default_rng(0).standard_normal((8, 4, 4)).repeat(4, 1).repeat(4, 2)
    samples = make_samples(8, maps=tokens)
    pixel, token = (metrics.get(spec, unit=unit)(samples).values for unit in ("pixel", "token"))
    np.testing.assert_allclose(pixel - token, np.log(16) if spec == "complexity" else 0, atol=1e-6)
    whole = metrics.get(spec)(replace(samples, patch=(1, 1))).values  # not seen to be tokens
    np.testing.assert_allclose(pixel, whole, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_a_constant_or_broken_map_is_nan_with_a_reason(make_samples: Make, spec: str) -> None:
    samples = make_samples(3)
    maps = samples.maps.copy()
    maps[0], maps[1, 0, 0] = -2, np.nan
    for unit in ("pixel", "token"):
        scores = metrics.get(spec, unit=unit)(replace(samples, maps=maps))
        assert scores.reasons == ["constant map", "map is not finite", ""]
        assert scores.values[2] == metrics.get(spec, unit=unit)(samples).values[2]


signed = arrays(np.float64, (2, 16, 16), elements=st.integers(-4, 4).map(float))


@settings(max_examples=40, deadline=None)
@given(values=signed, power=st.integers(-30, 30))
def test_scores_are_in_range_and_blind_to_scale_order_and_place(values: np.ndarray, power: int) -> None:
    samples = Samples(**{**EMPTY, "maps": values})
    moved = np.random.default_rng(0).permuted(values[::-1].reshape(2, -1), axis=1).reshape(values.shape)
    for spec in SPECS:
        metric = metrics.get(spec)
        scores, reasons = metric(samples)
        assert np.isnan(scores).tolist() == [bool(reason) for reason in reasons]
        known = scores[np.isfinite(scores)]
        assert ((known >= metric.bounds[0]) & (known <= min(metric.bounds[1], np.log(256) + 1e-9))).all()
        other = metric(replace(samples, maps=moved * 2.0**power)).values[::-1]
        np.testing.assert_allclose(other, scores, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(values=signed, share=st.floats(0, 1))
def test_moving_mass_from_a_small_pixel_to_a_large_one_is_more_compact(values: np.ndarray, share: float) -> None:
    size = np.abs(values).reshape(2, -1)
    order = np.argsort(size, axis=1)
    for row, (low, high) in zip(size, order[:, [100, -1]], strict=True):
        row[high] += share * row[low]
        row[low] *= 1 - share
    before, after = (Samples(**{**EMPTY, "maps": maps.reshape(values.shape)}) for maps in (np.abs(values), size))
    for name in NAMES:
        metric = metrics.get(name)
        gain = (metric(after).values - metric(before).values) * (1 if metric.higher_is_better else -1)
        assert (gain[np.isfinite(gain)] >= -1e-9).all(), name


def _empty() -> dict[str, Any]:
    import torch

    shape = 2, 16, 16
    zeros = np.zeros(2, dtype=int)
    return {
        "model": torch.nn.Identity(),
        "inputs": torch.zeros(2, 3, 16, 16),
        "targets": zeros,
        "roi": np.zeros(shape, dtype=bool),
        "logits": np.zeros((2, 2)),
        "seeds": zeros.astype(np.uint32),
        "patch": (4, 4),
    }


EMPTY = _empty()
