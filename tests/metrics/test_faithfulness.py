"""Faithfulness on models whose answer is known, and against Quantus where it can express the same features."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import quantus
import torch
from scipy.stats import pearsonr
from torch import nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.quantus_bridge import evaluate

from .conftest import Linear, per_patch

Make = Callable[..., Samples]


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
    assert metrics.get("faithfulness_estimate")(replace(samples, maps=maps)).reasons == ["all patches tie"] * 5


def test_model_that_does_not_look_is_undefined_for_the_estimate(make_samples: Make) -> None:
    samples = make_samples(model=Linear(torch.zeros(4, 3, 16, 16)))
    scores = metrics.get("faithfulness_estimate")(samples)
    assert np.isnan(scores.values).all() and "no patch changes" in scores.reasons[0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [("faithfulness_estimate[imputer=maen]", "Did you mean mean"), ("faithfulness_estimate[imputr=mean]", "imputer")],
)
def test_bad_parameters_are_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        metrics.get(spec)
