"""Trivial rows against their definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters.superpixels import superpixels
from explainer_bench import RequestError

MODEL = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(height: int, width: int) -> Tensor:
    """Return two images of plain patches with a little noise."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(2, 3, height // 16, width // 16, generator=generator).repeat_interleave(16, 2)
    return patches.repeat_interleave(16, 3) + 0.01 * torch.rand(2, 3, height, width, generator=generator)


def explain(spec: str, inputs: Tensor, **kwargs: int) -> np.ndarray:
    return adapters.get(spec).explain(MODEL, inputs, [0, 1], **kwargs).numpy()


@pytest.mark.parametrize("area", [0.04, 0.25, 0.6, 1.0])
def test_the_square_is_central_and_covers_its_share(area: float) -> None:
    square = explain(f"center_square[area={area}]", torch.rand(2, 3, 100, 100))[0]
    assert set(np.unique(square)) <= {0, 1}
    assert square.mean() == pytest.approx(area, abs=0.02)
    assert (square == square[::-1]).all() and (square == square.T).all()
    rows, columns = np.nonzero(square)
    assert square[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_the_square_keeps_the_proportions_of_the_image() -> None:
    inside = explain("center_square[area=0.25]", torch.rand(2, 3, 40, 80))[1]
    assert inside.any(1).sum() == 20 and inside.any(0).sum() == 40


@pytest.mark.parametrize("area", [0, 1.1])
def test_the_square_covers_some_of_the_image_and_not_more(area: float) -> None:
    with pytest.raises(RequestError, match="area"):
        adapters.get("center_square", area=area)


@pytest.mark.parametrize("window", [2, 3, 6, 7])
def test_the_variance_is_that_of_the_grey_pixels_around(window: int) -> None:
    inputs = images(16, 32)
    grey = np.pad(inputs[1].double().mean(0).numpy(), ((window - 1) // 2, window // 2), mode="edge")
    expected = [[grey[y : y + window, x : x + window].var() for x in range(32)] for y in range(16)]
    np.testing.assert_allclose(explain(f"edges_variance[window={window}]", inputs)[1], expected, rtol=1e-5, atol=1e-9)


def test_each_superpixel_has_one_random_value() -> None:
    inputs = images(64, 48)
    first, again = explain("superpixel_random", inputs), explain("superpixel_random", inputs, seed=1)
    for image, values in zip(inputs, first, strict=True):
        segments = superpixels(image.permute(1, 2, 0).double().numpy())
        assert segments.max() > 0
        per_segment = [np.unique(values[segments == number]) for number in range(segments.max() + 1)]
        assert all(len(each) == 1 for each in per_segment)
        assert len(np.unique(per_segment)) == len(per_segment)
        assert values.min() >= 0 and values.max() < 1
    assert not np.array_equal(first, again)
