"""Faithfulness on models whose answer is known, and against Quantus where it can express the same features."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import quantus
import torch
from scipy.integrate import trapezoid
from scipy.stats import pearsonr
from torch import Tensor, nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.curves import removal_counts
from metrics.quantus_bridge import evaluate

Make = Callable[..., Samples]


class Linear(nn.Module):
    """Logits that are weighted sums of the pixels: replacing a patch changes each by a known amount."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", inputs, self.weights)


def per_patch(values: np.ndarray, side: int = 4) -> np.ndarray:
    """Sum (N, H, W) over patches: (N, P)."""
    n, height, width = values.shape
    return values.reshape(n, height // side, side, width // side, side).sum((2, 4)).reshape(n, -1)


@pytest.fixture
def linear(make_samples: Make) -> tuple[Samples, np.ndarray]:
    """Samples of a linear model, and the true drop (N, H, W) of the target's logit when a pixel goes grey (0)."""
    weights = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    samples = make_samples(model=Linear(weights))
    inputs = samples.inputs.double()
    inputs -= inputs.mean((2, 3), keepdim=True)  # so that "mean" replaces by 0
    drops = (inputs * weights[samples.targets]).sum(1).numpy()
    return replace(samples, inputs=inputs), drops


def test_estimate_is_one_for_the_drops_themselves_and_minus_one_for_their_opposite(
    linear: tuple[Samples, np.ndarray],
) -> None:
    samples, drops = linear
    metric = metrics.get("faithfulness_estimate", imputer="mean")
    np.testing.assert_allclose(metric(replace(samples, maps=drops)).values, 1, atol=1e-9)
    np.testing.assert_allclose(metric(replace(samples, maps=-3 * drops + 5)).values, -1, atol=1e-9)


def test_estimate_is_the_correlation_of_patch_sums(linear: tuple[Samples, np.ndarray]) -> None:
    samples, drops = linear
    pairs = zip(per_patch(samples.maps), per_patch(drops), strict=True)
    expected = [pearsonr(relevance, drop).statistic for relevance, drop in pairs]
    scores = metrics.get("faithfulness_estimate[imputer=mean]")(samples)
    np.testing.assert_allclose(scores.values, expected, atol=1e-9)


def test_srg_of_a_linear_model_is_known_in_closed_form(linear: tuple[Samples, np.ndarray]) -> None:
    samples, drops = linear
    scores = metrics.get("srg", steps=16)(replace(samples, maps=drops)).values
    falling = -np.sort(-per_patch(drops), axis=1)
    most, least = (np.cumsum(order, axis=1) for order in (falling, falling[:, ::-1]))
    np.testing.assert_allclose(scores, (most - least)[:, :-1].sum(1) / 16, atol=1e-9)
    assert (scores > 0).all()


def test_srg_changes_sign_with_the_map(make_samples: Make) -> None:
    samples = make_samples()
    forward, backward = (metrics.get("srg")(replace(samples, maps=sign * samples.maps)).values for sign in (1, -1))
    np.testing.assert_allclose(forward, -backward, atol=1e-6)


def test_srg_equals_the_area_between_two_full_curves(make_samples: Make) -> None:
    samples = make_samples(2)
    scores = metrics.get("srg", steps=5)(samples).values
    relevance = per_patch(samples.maps)
    counts = np.array([0, 3, 6, 10, 13, 16])  # 16 s / 5 = 3.2, 6.4, 9.6, 12.8
    for row in range(2):
        least, most = (
            np.array([logit_without(samples, row, order[:count]) for count in counts])
            for order in (np.argsort(relevance[row]), np.argsort(-relevance[row]))
        )
        area = trapezoid(least - most, counts / 16)
        np.testing.assert_allclose(scores[row], area, atol=1e-6)


def logit_without(samples: Samples, row: int, patches: np.ndarray) -> float:
    image = samples.inputs[row].clone()
    grey = image.mean((1, 2), keepdim=True)
    for patch in patches:
        y, x = divmod(int(patch), 4)
        image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = grey
    with torch.no_grad():
        return float(samples.model(image[None])[0, samples.targets[row]])


def test_removal_counts_round_halves_up_without_duplicates() -> None:
    assert removal_counts(196, 28).tolist() == list(range(0, 197, 7))
    assert removal_counts(10, 4).tolist() == [0, 3, 5, 8, 10]
    assert removal_counts(4, 28).tolist() == [0, 1, 2, 3, 4]


class Counting(nn.Module):
    """Counts the images that go through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.images += len(inputs)
        return self.model(inputs)


def test_forward_passes_are_the_fewest_and_the_estimates_are_shared(make_samples: Make) -> None:
    samples = make_samples(3)
    model = Counting(samples.model)
    samples = replace(samples, model=model)
    metrics.get("srg", steps=8)(samples)
    assert model.images == 2 * (1 + 3 * 7)  # a probe, then the interior of either curve
    model.images = 0
    for sign in (1, -1):
        metrics.get("faithfulness_estimate")(replace(samples, maps=sign * samples.maps))
    assert model.images == 1 + 3 * 16


@pytest.mark.parametrize(
    ("channels", "side", "patch"), [(1, 16, (1, 16)), (1, 16, (4, 4)), (1, 8, (1, 1)), (3, 12, (4, 4))]
)
def test_estimate_equals_quantus_where_quantus_can_step_by_a_patch(
    make_samples: Make, channels: int, side: int, patch: tuple[int, int]
) -> None:
    """Maps constant over a patch: its pixels follow each other in Quantus's order, so a step is a patch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    rng = np.random.default_rng(2)
    tokens = rng.standard_normal((5, side // patch[0], side // patch[1]))
    samples = make_samples(
        model=model,
        inputs=torch.as_tensor(rng.standard_normal((5, channels, side, side)), dtype=torch.float32),
        maps=tokens.repeat(patch[0], 1).repeat(patch[1], 2),
        patch=patch,
    )
    theirs = quantus.FaithfulnessEstimate(features_in_step=channels * patch[0] * patch[1], disable_warnings=True)
    expected = [evaluate(theirs, samples, row, model) for row in range(5)]
    np.testing.assert_allclose(metrics.get("faithfulness_estimate")(samples).values, expected, atol=1e-5)


def test_patches_that_all_tie_are_undefined(make_samples: Make) -> None:
    samples = make_samples()
    maps = np.tile(np.arange(16.0).reshape(4, 4), (5, 4, 4))
    for name in ("srg", "faithfulness_estimate"):
        assert metrics.get(name)(replace(samples, maps=maps)).reasons == ["all patches tie"] * 5


def test_model_that_does_not_look_is_undefined_for_the_estimate(make_samples: Make) -> None:
    samples = make_samples(model=Linear(torch.zeros(4, 3, 16, 16)))
    scores = metrics.get("faithfulness_estimate")(samples)
    assert np.isnan(scores.values).all() and "no patch changes" in scores.reasons[0]


def test_image_of_one_patch_is_undefined_for_srg(make_samples: Make) -> None:
    samples = make_samples(patch=(16, 16))
    assert np.isnan(metrics.get("srg")(samples).values).all()


@pytest.mark.parametrize(
    ("spec", "words"), [("srg[imputer=maen]", "Did you mean mean"), ("srg[steps=1]", "steps"), ("srg[step=3]", "steps")]
)
def test_bad_parameters_are_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        metrics.get(spec)
