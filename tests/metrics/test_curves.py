"""Removal curves on models whose answer is known, against loops over single removals, and against Quantus."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import Tensor, nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.curves import removal_counts

from .conftest import per_patch

Make = Callable[..., Samples]


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
    assert model.images == 1 + 3 * 2 * 7  # a probe, then the interior of either curve
    metrics.get("srg", steps=8)(replace(samples, maps=-samples.maps))  # the same curves, exchanged
    assert model.images == 1 + 3 * 2 * 7
    for sign in (1, -1):
        metrics.get("faithfulness_estimate")(replace(samples, maps=sign * samples.maps))
    assert model.images == 1 + 3 * 2 * 7 + 3 * 16


def test_patches_that_all_tie_are_undefined(make_samples: Make) -> None:
    samples = make_samples()
    maps = np.tile(np.arange(16.0).reshape(4, 4), (5, 4, 4))
    assert metrics.get("srg")(replace(samples, maps=maps)).reasons == ["all patches tie"] * 5


def test_image_of_one_patch_is_undefined_for_srg(make_samples: Make) -> None:
    samples = make_samples(patch=(16, 16))
    assert np.isnan(metrics.get("srg")(samples).values).all()


@pytest.mark.parametrize(
    ("spec", "words"), [("srg[imputer=maen]", "Did you mean mean"), ("srg[steps=1]", "steps"), ("srg[step=3]", "steps")]
)
def test_bad_parameters_are_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        metrics.get(spec)
