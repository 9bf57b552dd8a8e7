"""Augmentation: each image by its own draws, no further than the recipe says."""

import numpy as np
import pytest
import torch

from bench.recipes import Augment
from bench.training.augmentation import _DRAWS, draws, vary

IDS = [f"train/{i}" for i in range(200)]
EVERYTHING = Augment(
    flip=True,
    rotate=10,
    quarter_turns=True,
    zoom=0.1,
    shift=0.1,
    crop=(0.5, 1),
    contrast=0.2,
    brightness=20,
    channels=True,
)


def pictures(n=6, height=24, width=24):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, height, width)).astype(np.uint8))


def ramp(n):
    """From 0 at the left edge to 255 at the right one."""
    return torch.linspace(0, 255, 64).to(torch.uint8).expand(n, 3, 64, 64).contiguous()


def drawn(n=1, **given):
    """Draws that change nothing, but for what is given."""
    return np.stack([np.full(n, given.get(name, 0.0 if name == "quarter" else 0.5)) for name in _DRAWS], axis=1)


def test_an_image_does_not_depend_on_its_batch():
    images, uniform = pictures(), draws(IDS[:6], 3, 2)
    whole = vary(images, EVERYTHING, uniform)
    assert torch.equal(whole[4:5], vary(images[4:5], EVERYTHING, draws(IDS[4:5], 3, 2)))
    for other in (draws(IDS[:6], 4, 2), draws(IDS[:6], 3, 3), draws(IDS[6:12], 3, 2)):
        assert not np.isclose(uniform, other).any()


def test_nothing_changes_nothing():
    images = pictures()
    assert torch.equal(vary(images, Augment(), draws(IDS[:6], 0, 0)), images)


def test_draws_are_uniform():
    uniform = draws(IDS, 0, 1)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (
        np.abs(uniform.mean(0) - 0.5).max() < 0.1 and np.abs(np.corrcoef(uniform.T) - np.eye(len(_DRAWS))).max() < 0.3
    )


def test_flips_half_of_the_images():
    images = pictures(200, 8, 8)
    varied = vary(images, Augment(flip=True), draws(IDS, 0, 1)).round().to(torch.uint8)
    same = (varied == images).flatten(1).all(1)
    flipped = (varied == images.flip(3)).flatten(1).all(1)
    assert (same ^ flipped).all() and 70 < int(flipped.sum()) < 130


def test_quarter_turns_are_exact():
    images = pictures(1)
    turned = [vary(images, Augment(quarter_turns=True), drawn(quarter=q / 4)).round().to(torch.uint8) for q in range(4)]
    wanted = [torch.rot90(images, k, (2, 3)) for k in range(4)]
    assert all(any(torch.equal(image, other) for other in wanted) for image in turned)
    assert len({image.numpy().tobytes() for image in turned}) == 4


def test_shift_is_a_share_of_the_side():
    right = vary(ramp(1), Augment(shift=(0.125, 0)), drawn(right=1.0))
    assert torch.allclose(right[..., :56], ramp(1)[..., 8:].float(), atol=1)
    assert (right[..., 57:] == 0).all()
    reflected = vary(ramp(1), Augment(shift=(0.125, 0), outside="reflect"), drawn(right=1.0))
    assert (reflected[..., 57:] > 200).all()
    still = vary(ramp(1), Augment(shift=(0, 0.125)), drawn(right=1.0, down=0.5))
    assert torch.allclose(still, ramp(1).float(), atol=1e-2)


def test_zoom_magnifies_about_the_centre():
    near = vary(ramp(1), Augment(zoom=0.25), drawn(zoom=1.0))
    assert near.max() - near.min() == pytest.approx(255 * 63 / 64 / 1.25, abs=3)
    assert near.mean() == pytest.approx(127.5, abs=1)


def test_rotation_keeps_shapes_in_images_that_are_not_square():
    image = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    image[..., 18:22, 30:50] = 255  # a bar of 20 x 4 in the centre
    turned = vary(image, Augment(rotate=90), drawn(rotate=1.0))
    rows, columns = np.nonzero((turned[0, 0] > 127).numpy())
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 4)


def test_crops_take_a_part():
    uniform = draws(IDS, 0, 1)
    part = vary(ramp(200), Augment(crop=(0.25, 0.25)), uniform)
    spread = (part.amax((1, 2, 3)) - part.amin((1, 2, 3))).numpy() / 255
    assert spread.min() > 0.25**0.5 * (3 / 4) ** 0.5 - 0.05 and spread.max() < 0.25**0.5 * (4 / 3) ** 0.5 + 0.02
    assert part.min() >= 0 and np.ptp(part.mean((1, 2, 3)).numpy()) > 100
    whole = vary(ramp(1), Augment(crop=(1, 1)), drawn())
    assert torch.allclose(whole, ramp(1).float(), atol=0.1)


def test_contrast_and_brightness_stay_in_range():
    brighter = vary(torch.full((1, 3, 4, 4), 100, dtype=torch.uint8), Augment(brightness=25), drawn(brightness=1.0))
    steeper = vary(torch.full((1, 3, 4, 4), 100, dtype=torch.uint8), Augment(contrast=0.2), drawn(contrast=0.0))
    assert (brighter == 125).all() and (steeper == 80).all()
    varied = vary(pictures(200), Augment(contrast=1, brightness=255), draws(IDS, 0, 1))
    assert varied.min() == 0 and varied.max() == 255


def test_channels_come_in_every_order():
    images = pictures(200, 4, 4)
    varied = vary(images, Augment(channels=True), draws(IDS, 0, 1))
    assert torch.equal(varied.sort(1).values, images.sort(1).values)
    first = [next(c for c in range(3) if torch.equal(new[0], old[c])) for new, old in zip(varied, images, strict=True)]
    assert min(np.bincount(first, minlength=3)) > 40
