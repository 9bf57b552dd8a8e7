"""What takes the place of removed features."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from quantus.functions.perturb_func import noisy_linear_imputation

from explainer_bench import RequestError
from metrics import Samples
from metrics.imputers import NAMES, STATIC, impute_road, known, road_noise

Make = Callable[..., Samples]
SHARED = Path(__file__).resolve().parents[3] / "shared"


def solved_densely(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Solve the definition, written out pixel by pixel: image (C, H, W), mask (H, W)."""
    places = [tuple(place) for place in np.argwhere(mask)]
    number = {place: index for index, place in enumerate(places)}
    left, right = np.zeros((len(places),) * 2), np.zeros((len(places), len(image)))
    for (y, x), row in number.items():
        for dy, dx in np.ndindex(3, 3):
            weight = {1: 1 / 6, 2: 1 / 12}.get(abs(dy - 1) + abs(dx - 1), 0)
            near = y + dy - 1, x + dx - 1
            if not weight or not (0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]):
                continue
            left[row, row] += weight
            if near in number:
                left[row, number[near]] -= weight
            else:
                right[row] += weight * image[:, near[0], near[1]]
    result = image.copy()
    result[:, mask] = np.linalg.solve(left, right).T
    return result


def patch_mask(rng: np.random.Generator, side: int, patch: int, share: float) -> np.ndarray:
    grid = rng.permutation((side // patch) ** 2) < share * (side // patch) ** 2
    return grid.reshape(side // patch, -1).repeat(patch, 0).repeat(patch, 1)


def road(image: np.ndarray, mask: np.ndarray, **kwargs: float) -> np.ndarray:
    """Impute one image without noise."""
    images = torch.as_tensor(image)[None]
    return impute_road(images, torch.as_tensor(mask)[None, None], torch.zeros_like(images), **kwargs)[0].numpy()


@pytest.mark.parametrize("size", [(16, 16), (15, 20), (5, 33), (3, 4)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_road_solves_its_equations(size: tuple[int, int], share: float) -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.standard_normal((3, *size)), rng.random(size) < share
    mask.flat[[0, -1]] = True, False
    np.testing.assert_allclose(road(image, mask), solved_densely(image, mask), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(3, 24), st.integers(3, 24), st.floats(0, 1))
def test_road_solves_its_equations_for_any_mask(seed: int, height: int, width: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    image, mask = rng.standard_normal((2, height, width)), rng.random((height, width)) < share
    mask.flat[rng.integers(mask.size)] = False
    np.testing.assert_allclose(road(image, mask), solved_densely(image, mask), atol=2e-6)


@pytest.mark.parametrize("kind", ["patches", "pixels"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_road_is_that_of_quantus_on_one_channel(kind: str, share: float) -> None:
    rng = np.random.default_rng(1)
    image = rng.standard_normal((1, 96, 96)).cumsum(1).cumsum(2) / 50
    mask = patch_mask(rng, 96, 16, share) if kind == "patches" else rng.random((96, 96)) < share
    expected = noisy_linear_imputation(image, np.flatnonzero(mask), noise=0)
    assert np.abs(road(image, mask) - expected).max() <= 1e-5


def test_road_adds_noise_as_quantus_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    image, mask = rng.standard_normal((1, 16, 16)), rng.random((16, 16)) < 0.5
    noise = rng.standard_normal((1, 16, 16))
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "randn", lambda *shape: noise[:, mask].reshape(shape))
        expected = noisy_linear_imputation(image, np.flatnonzero(mask))
    ours = impute_road(torch.as_tensor(image)[None], torch.as_tensor(mask)[None, None], torch.as_tensor(noise)[None])
    np.testing.assert_allclose(ours[0].numpy(), expected, atol=1e-6)


def test_road_on_a_real_image() -> None:
    files = sorted(SHARED.glob("data/**/*.png"))[:1]
    if not files:
        pytest.skip("needs the images of ../shared/data")
    image = np.asarray(Image.open(files[0]).convert("L").resize((96, 96)), dtype=float)[None] / 51 - 2.5
    mask = patch_mask(np.random.default_rng(3), 96, 16, 0.7)
    expected = noisy_linear_imputation(image, np.flatnonzero(mask), noise=0)
    assert np.abs(road(image, mask) - expected).max() <= 1e-5


def test_road_leaves_what_is_there_and_reproduces_a_plane() -> None:
    rng = np.random.default_rng(4)
    plane = np.add.outer(np.arange(32.0), 2 * np.arange(32.0))[None]
    mask = rng.random((32, 32)) < 0.6
    mask[[0, -1]] = mask[:, [0, -1]] = False  # at the border the neighbours are not balanced
    np.testing.assert_allclose(road(plane, mask), plane, atol=1e-4)
    image = rng.standard_normal((3, 32, 32))
    np.testing.assert_array_equal(road(image, mask)[:, ~mask], image[:, ~mask])
    np.testing.assert_array_equal(road(image, mask & False), image)


def test_road_of_nothing_left_is_the_mean_colour() -> None:
    image = np.random.default_rng(5).standard_normal((3, 32, 32))
    everything = np.ones((32, 32), dtype=bool)
    np.testing.assert_allclose(road(image, everything), image.mean((1, 2), keepdims=True) + 0 * image, atol=1e-12)


def test_road_of_one_image_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(6)
    images, noise = (torch.as_tensor(rng.standard_normal((5, 3, 32, 32)), dtype=torch.float32) for _ in range(2))
    images[1] *= 1000
    images[2] = 0.3
    mask = torch.as_tensor(rng.random((5, 1, 32, 32)) < np.array([0.1, 1, 0.5, 0, 0.9])[:, None, None, None])
    together = impute_road(images, mask, noise)
    assert together.dtype == torch.float32 and torch.isfinite(together).all()
    for row in range(5):
        alone = impute_road(images[[row]], mask[[row]], noise[[row]])
        assert torch.equal(alone[0], together[row])


def test_road_noise_is_of_each_sample_alone(make_samples: Make, subset: Callable) -> None:
    samples = make_samples(4)
    noise = road_noise(samples)
    assert noise.shape == samples.inputs.shape and noise.dtype == samples.inputs.dtype
    assert torch.equal(road_noise(subset(samples, [2]))[0], noise[2])
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert not torch.equal(noise[0], noise[1])


def test_fills_have_the_right_values(make_samples: Make) -> None:
    inputs = torch.tensor([[[[0.0, 1], [2, 3]], [[4, 5], [6, 7]]], [[[-9, 0], [0, 1]], [[8, 8], [8, 8]]]])
    samples = make_samples(2, inputs=inputs, black=torch.tensor([-2.0, -3.0]))
    assert STATIC["mean"](samples).squeeze().tolist() == [[1.5, 5.5], [-2, 8]]
    assert STATIC["black"](samples).squeeze().tolist() == [0, -9]
    assert STATIC["zero"](samples).squeeze().tolist() == 0
    assert STATIC["black_pixel"](samples).squeeze().tolist() == [-2, -3]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fills_are_of_each_image_alone_in_its_own_dtype(name: str, dtype: torch.dtype, make_samples: Make) -> None:
    samples = make_samples(4)
    samples = replace(samples, inputs=samples.inputs.to(dtype))
    together = STATIC[name](samples).expand_as(samples.inputs)
    assert together.dtype == dtype and together.device == samples.inputs.device
    assert torch.isfinite(together).all()
    for row in range(4):
        alone = STATIC[name](samples.take(np.array([row]))).expand(1, *samples.inputs.shape[1:])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)


def test_blur_is_close_to_that_of_pil(make_samples: Make) -> None:
    rng = np.random.default_rng(7)
    tiles = rng.integers(0, 256, (14, 14, 3)).astype(np.uint8)
    picture = Image.fromarray(tiles).resize((224, 224), Image.Resampling.BICUBIC)
    expected = np.asarray(picture.filter(ImageFilter.GaussianBlur(14)), dtype=float)
    inputs = torch.as_tensor(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    ours = STATIC["blur"](make_samples(1, inputs=inputs))[0].permute(1, 2, 0).double().numpy()
    gap = np.abs(ours - expected)
    assert gap[42:-42, 42:-42].max() < 6  # of 255: PIL's is made of boxes, and rounds
    assert gap.mean() < 3 and gap.max() < 40  # at the border PIL repeats the last pixel, ours mirrors the image
    assert np.abs(np.asarray(picture) - expected).mean() > 20


def test_blur_of_a_small_or_oblong_image(make_samples: Make) -> None:
    for height, width in [(16, 16), (16, 48), (8, 32), (4, 4)]:
        image = torch.zeros(1, 1, height, width)
        image[..., height // 2, width // 2] = 1
        blurred = STATIC["blur"](make_samples(1, inputs=image))
        assert blurred.shape == image.shape and blurred.sum() == pytest.approx(1, abs=0.05)
        assert blurred.amax() < 1
    torch.testing.assert_close(
        STATIC["blur"](make_samples(1, inputs=torch.full((1, 3, 16, 16), 0.4))).mean(), torch.tensor(0.4)
    )


def test_a_missing_black_pixel_and_unknown_names_are_refused(make_samples: Make) -> None:
    with pytest.raises(RequestError, match=r"needs `Samples\.black`"):
        STATIC["black_pixel"](make_samples(black=None))
    with pytest.raises(RequestError, match="Did you mean mean"):
        known("maen")
    assert [known(name) for name in NAMES] == list(NAMES)


def test_road_is_as_exact_where_the_model_runs_in_bf16() -> None:
    rng = np.random.default_rng(8)
    image, mask = (
        torch.as_tensor(rng.standard_normal((1, 3, 32, 32))),
        torch.as_tensor(rng.random((1, 1, 32, 32)) < 0.7),
    )
    expected = impute_road(image, mask, image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(impute_road(image, mask, image), expected)
