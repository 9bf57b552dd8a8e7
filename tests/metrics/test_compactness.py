"""Compactness on maps whose answer is known."""

from collections.abc import Callable

import numpy as np
import pytest

import metrics
from metrics import Samples

Make = Callable[..., Samples]


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
