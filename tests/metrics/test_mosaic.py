"""Focus: Quantus's number, an independent one, what chance gives, and what is undefined."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.mosaic import positive_share

Make = Callable[..., Samples]

seeds = st.integers(0, 2**32 - 1)


def cells(seed: int, n: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Two own quarters of four per mosaic: (n, 4) in raster order, and as masks (n, side, side)."""
    own = np.random.default_rng(seed).permuted(np.tile([True, True, False, False], (n, 1)), axis=1)
    return own, own.reshape(n, 2, 2).repeat(side // 2, 1).repeat(side // 2, 2)


def with_maps(make_samples: Make, maps: np.ndarray, own: np.ndarray) -> Samples:
    """Samples whose mosaics get these maps (n, H, W)."""

    def reexplain(model: Any, images: torch.Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return maps[rows]

    samples = make_samples(len(maps))
    return replace(samples, reexplain=reexplain, mosaics=lambda: (samples.inputs, own))


def test_it_is_quantus_focus(make_samples: Make) -> None:
    own, masks = cells(0, 6)
    maps = np.random.default_rng(1).standard_normal((6, 16, 16))
    samples = with_maps(make_samples, maps, masks)
    focus = quantus.Focus(disable_warnings=True)
    expected = focus(
        model=samples.model,
        x_batch=samples.inputs.numpy(),
        y_batch=samples.targets,
        a_batch=maps[:, None],
        custom_batch=own.astype(int),
        channel_first=True,
    )
    np.testing.assert_allclose(metrics.get("focus")(samples).values, expected, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=st.floats(1e-300, 1e300), own=st.lists(st.booleans(), min_size=16, max_size=16))
def test_the_share_is_counted_pixel_by_pixel(seed: int, scale: float, own: list[bool]) -> None:
    attribution = np.random.default_rng(seed).standard_normal((4, 4))
    part = np.array(own).reshape(4, 4)
    inside = outside = 0.0
    for value, mine in zip(attribution.flat, own, strict=True):
        if value > 0:
            inside, outside = inside + value * mine, outside + value * (not mine)
    share = positive_share(attribution * scale, part)
    assert 0 <= share <= 1 and share == pytest.approx(inside / (inside + outside))
    assert share + positive_share(attribution, ~part) == pytest.approx(1)


def test_own_cells_alone_score_one_and_the_others_zero(make_samples: Make) -> None:
    _, own = cells(0, 6)
    noise = np.random.default_rng(1).random(own.shape)
    for part, score in ((own, 1), (~own, 0)):
        maps = np.where(part, noise, -noise)
        assert (metrics.get("focus")(with_maps(make_samples, maps, own)).values == score).all()


def test_chance_is_the_area_of_the_own_cells(make_samples: Make) -> None:
    n = 2000
    own = np.zeros((n, 16, 16), dtype=bool)
    own[:, :8, :8] = True  # one cell, as in the grid pointing game
    own[: n // 2, 8:, 8:] = True
    samples = with_maps(make_samples, np.random.default_rng(1).random((n, 16, 16)), own)
    level = metrics.get("focus").chance_level(samples)
    assert set(level.tolist()) == {0.25, 0.5}
    gap = metrics.get("focus")(samples).values - level
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n)


def test_undefined_with_a_reason_for_its_sample_alone(make_samples: Make) -> None:
    _, own = cells(0, 6)
    maps = np.random.default_rng(1).standard_normal(own.shape)
    expected = metrics.get("focus")(with_maps(make_samples, maps, own)).values
    own, broken = own.copy(), maps.copy()
    own[0] = False
    broken[1], broken[2], broken[3, 0, 0], broken[4] = -np.abs(maps[1]), 0.5, np.inf, 0
    samples = with_maps(make_samples, broken, own)
    scores = metrics.get("focus")(samples)
    assert scores.reasons[0] == "no mosaic of the target's class"
    assert all("map of the mosaic" in reason for reason in scores.reasons[1:5])
    assert np.isnan(scores.values[:5]).all() and scores.values[5] == expected[5]
    assert np.isnan(metrics.get("focus").chance_level(samples)).tolist() == [True] + [False] * 5


def test_mosaics_are_explained_once_for_the_target_and_nothing_else_is(make_samples: Make) -> None:
    _, own = cells(0, 5)
    own[2] = False  # has no mosaic: is not explained
    samples, asked = make_samples(5), []
    mosaics = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 16)

    def reexplain(model: Any, images: torch.Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        assert model is samples.model
        asked.append((images[:, 0, 0, 0].tolist(), targets.tolist(), rows.tolist()))
        return np.random.default_rng(0).random((5, 16, 16))[rows]

    metrics.get("focus")(replace(samples, reexplain=reexplain, mosaics=lambda: (mosaics, own)))
    assert asked == [([0, 1, 3, 4], samples.targets[[0, 1, 3, 4]].tolist(), [0, 1, 3, 4])]


@pytest.mark.parametrize("lacking", ["mosaics", "reexplain"])
def test_what_it_needs_is_said_in_one_line(make_samples: Make, lacking: str) -> None:
    with pytest.raises(RequestError, match=lacking):
        metrics.get("focus")(make_samples(**{lacking: None}))
