"""Removal curves on models whose answer is known, against loops over single removals, and against Quantus."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import quantus
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.integrate import trapezoid
from scipy.special import softmax
from skimage.segmentation import slic
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import metrics
from explainer_bench import RequestError
from metrics import Metric, Samples
from metrics import curves as curves_module
from metrics.curves import pixel_ranks, removal_counts, superpixels
from metrics.perturbation import outputs, passes
from metrics.quantus_bridge import evaluate

from .conftest import Linear, per_patch

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


# what the classifier says of images with patches replaced, one at a time

Fill = Callable[[Tensor], Tensor]
FILLS: dict[str, Fill] = {
    "mean": lambda image: image.mean((1, 2), keepdim=True).expand_as(image),
    "zero": torch.zeros_like,
    "black": lambda image: image.min().expand_as(image),
    "black_pixel": lambda image: torch.full_like(image, -3.0),
    "blur": lambda image: gaussian_blur(image, [7, 7], [1.0, 1.0]),  # a 16th of 16 pixels
}


def said(samples: Samples, row: int, gone: np.ndarray, fill: Fill) -> np.ndarray:
    """Return the logits (K,) of one image whose pixels in `gone` (H, W) bool are replaced."""
    image = samples.inputs[row]
    perturbed = torch.where(torch.from_numpy(gone), fill(image), image)
    with torch.no_grad():
        return samples.model(perturbed[None])[0].double().numpy()


def every_patch(samples: Samples, row: int, fill: Fill, most: bool) -> np.ndarray:
    """Return the logits (17, K) after 0 ... 16 patches of 4 x 4 pixels have been replaced in turn."""
    relevance = per_patch(samples.maps)[row]
    gone = np.zeros((4, 4), dtype=bool)
    logits = [said(samples, row, gone.repeat(4, 0).repeat(4, 1), fill)]
    for patch in np.argsort(-relevance if most else relevance):
        gone.flat[patch] = True
        logits.append(said(samples, row, gone.repeat(4, 0).repeat(4, 1), fill))
    return np.stack(logits)


def area(curve: np.ndarray) -> float:
    """Trapezoid area over [0, 1] of equally distant points."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


BY_HAND: dict[str, tuple[str, str, Callable[[np.ndarray, np.ndarray], float]]] = {
    # name: (imputer, output, score of the MoRF and the LeRF curve)
    "srg": ("mean", "logit", lambda most, least: area(least) - area(most)),
    "morf_auc": ("mean", "logit", lambda most, least: area(most)),
    "lerf_auc": ("mean", "logit", lambda most, least: area(least)),
    "deletion_auc": ("zero", "probability", lambda most, least: area(most)),
    "insertion_auc": ("blur", "probability", lambda most, least: area(least[::-1])),
    "aopc": ("mean", "logit", lambda most, least: sum(most[0] - y for y in most) / 17),
    "pixel_flipping": ("black", "probability", lambda most, least: area(most[1:])),
    "region_perturbation": ("black", "probability", lambda most, least: sum(most[0] - y for y in most[1:]) / 16),
    "selectivity": ("black", "probability", lambda most, least: area(most)),
    # 1, 5, 10, 20 and 50 % of 16 patches are .16, .8, 1.6, 3.2 and 8
    "comprehensiveness": ("mean", "probability", lambda most, least: most[0] - most[[1, 1, 2, 3, 8]].mean()),
    "sufficiency": ("mean", "probability", lambda most, least: least[0] - least[[15, 15, 14, 13, 8]].mean()),
}


def at(steps: int, name: str, **params: object) -> Metric:
    """Return a metric, in so many steps if it goes by steps."""
    return metrics.get(name, **params, **({"steps": steps} if name in STEPWISE else {}))


STEPWISE = [name for name in BY_HAND if "steps" in metrics.get(name).params]


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_at_full_steps_are_those_of_a_loop_over_patches(make_samples: Make, name: str) -> None:
    imputer, output, score = BY_HAND[name]
    samples = make_samples(2)
    for row, found in enumerate(at(16, name)(samples).values):
        logits = [every_patch(samples, row, FILLS[imputer], most) for most in (True, False)]
        target = samples.targets[row]
        curves = [(y if output == "logit" else softmax(y, axis=1))[:, target] for y in logits]
        np.testing.assert_allclose(found, score(*curves), atol=1e-6)


@pytest.mark.parametrize("name", STEPWISE)
def test_fewer_steps_come_close(make_samples: Make, name: str) -> None:
    samples = make_samples()
    exact, coarse = (metrics.get(name, steps=steps, output="logit")(samples).values for steps in (16, 8))
    assert 0 < np.abs(exact - coarse).max() < 0.02


def test_interpolated_curve_runs_through_the_steps(make_samples: Make) -> None:
    """Where all patches tell the same, the curve is a straight line, however few its steps."""
    inputs, model = torch.ones(5, 3, 16, 16), Linear(torch.ones(4, 3, 16, 16))
    samples = make_samples(inputs=inputs, model=model, logits=model(inputs).double().numpy())
    for steps in (2, 3, 5, 16):
        scores = metrics.get("aopc", steps=steps, imputer="zero")(samples).values
        np.testing.assert_allclose(scores, 3 * 256 / 2, rtol=1e-12)
        scores = metrics.get("region_perturbation", steps=steps, imputer="zero", output="logit")(samples).values
        np.testing.assert_allclose(scores, 3 * 256 * 17 / 32, rtol=1e-12)


def test_a_curve_serves_every_metric(make_samples: Make) -> None:
    samples = make_samples()
    computed = lambda: passes(samples).computed  # noqa: E731
    metrics.get("lerf_auc[imputer=blur]")(samples)
    assert computed() == 5 * 16
    metrics.get("insertion_auc")(samples)
    assert computed() == 5 * 16
    metrics.get("deletion_auc")(samples)
    assert computed() == 2 * 5 * 16
    for name in ("aopc", "region_perturbation", "selectivity", "pixel_flipping", "comprehensiveness"):
        metrics.get(name, imputer="zero")(samples)
    assert computed() == 2 * 5 * 16
    metrics.get("road", imputer="mean")(samples)
    before = computed()
    for name in ("road_morf", "road_lerf"):
        metrics.get(name, imputer="mean")(samples)
    assert computed() == before


def test_insertion_is_the_removal_curve_read_backwards(make_samples: Make) -> None:
    samples = make_samples()
    inserted = metrics.get("insertion_auc")(samples).values
    np.testing.assert_array_equal(inserted, metrics.get("lerf_auc[imputer=blur,output=probability]")(samples).values)


# the better map never scores worse

EVIDENCE = arrays(np.float64, 16, elements=st.integers(-50, 50).map(float), unique=True)


def additive(evidence: np.ndarray, maps: np.ndarray, make_samples: Make) -> Samples:
    """Samples (N maps (N, 16) of one image) of a model that adds up what each patch tells."""
    weights = torch.zeros(4, 3, 16, 16, dtype=torch.float64)
    weights[1, 0] = torch.from_numpy(evidence.reshape(4, 4).repeat(4, 0).repeat(4, 1)) / 16 / 100
    n, model = len(maps), Linear(weights)
    inputs = torch.ones(n, 3, 16, 16, dtype=torch.float64)
    full = maps.reshape(n, 4, 4).repeat(4, 1).repeat(4, 2)
    targets = np.ones(n, dtype=int)
    return make_samples(n, model=model, inputs=inputs, maps=full, targets=targets, logits=model(inputs).numpy())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(evidence=EVIDENCE, order=st.permutations(range(16)))
@pytest.mark.parametrize("name", BY_HAND)
def test_a_swap_towards_the_truth_never_scores_worse(
    make_samples: Make, name: str, evidence: np.ndarray, order: list[int]
) -> None:
    """Sorting a ranking by swaps of neighbours ends at the true one, and the score improves all the way."""
    order = list(order)
    maps = [_ranked(order)]
    for end in range(15, 0, -1):
        for place in range(end):
            if evidence[order[place]] < evidence[order[place + 1]]:
                order[place : place + 2] = order[place + 1], order[place]
                maps.append(_ranked(order))
    metric = at(7, name, imputer="zero")
    scores = metric(additive(evidence, np.stack(maps), make_samples)).values
    gains = np.diff(scores) if metric.higher_is_better else -np.diff(scores)
    assert (gains >= -1e-12).all()


def _ranked(order: list[int]) -> np.ndarray:
    relevance = np.empty(16)
    relevance[order] = np.arange(16, 0, -1)
    return relevance


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(evidence=EVIDENCE, steps=st.integers(2, 20))
@pytest.mark.parametrize("name", ["srg", "morf_auc", "lerf_auc", "deletion_auc", "selectivity"])
def test_areas_of_an_additive_model_are_known(make_samples: Make, name: str, evidence: np.ndarray, steps: int) -> None:
    rng = np.random.default_rng(steps)
    maps = np.stack([evidence, rng.permutation(16).astype(float)])
    scores = metrics.get(name, steps=steps, imputer="zero", output="logit")(additive(evidence, maps, make_samples))
    counts = np.unique(np.floor(16 * np.arange(steps + 1) / steps + 0.5)).astype(int)
    for relevance, score in zip(maps, scores.values, strict=True):
        left = {sign: evidence.sum() - np.cumsum([0, *evidence[np.argsort(-sign * relevance)]]) for sign in (1, -1)}
        areas = {sign: trapezoid(curve[counts], counts / 16) / 100 for sign, curve in left.items()}
        expected = {"srg": areas[-1] - areas[1], "lerf_auc": areas[-1]}.get(name, areas[1])
        np.testing.assert_allclose(score, expected, atol=1e-9)


# accuracies


class Reads(nn.Module):
    """Predicts class 2 as long as enough of the pixels in some places are 1, else class 0."""

    def __init__(self, place: np.ndarray, enough: float = 0.5) -> None:
        super().__init__()
        self.place, self.enough = torch.from_numpy(place), enough

    def forward(self, inputs: Tensor) -> Tensor:
        seen = (inputs[:, 0, self.place] == 1).double().mean(1) >= self.enough
        return torch.stack([1 - seen.double(), 0 * seen, 3 * seen.double() - 1, 0 * seen], dim=1)


def reading(make_samples: Make, enough: float = 0.5, **changes: object) -> Samples:
    """Two maps of one image, of a model that reads its patch 6: one points there, the other anywhere else."""
    place = np.zeros((16, 16), dtype=bool)
    place[4:8, 8:12] = True
    maps = np.random.default_rng(0).random((2, 16, 16)) + 2 * np.stack([place, ~place])
    model, inputs = Reads(place, enough), torch.ones(2, 3, 16, 16)
    classes = np.full(2, 2)
    black = torch.zeros(3)
    changes = {"targets": classes, "labels": classes, **changes}
    return make_samples(2, model=model, inputs=inputs, maps=maps, black=black, logits=model(inputs).numpy(), **changes)


@pytest.mark.parametrize(("name", "right", "wrong"), [("road_morf", 0, 1), ("road_lerf", 1, 0), ("road", 1, -1)])
def test_road_is_how_often_the_target_is_predicted(make_samples: Make, name: str, right: float, wrong: float) -> None:
    """The best map and the worst one reach the bounds."""
    scores = metrics.get(name, imputer="zero")(reading(make_samples)).values
    np.testing.assert_array_equal(scores, [right, wrong])
    assert {right, wrong} == set(metrics.get(name).bounds)


def test_road_removes_tenths(make_samples: Make) -> None:
    """2, 3, 5, 6, 8, 10, 11, 13 and 14 of 16 patches: the third is gone from the second removal on, or in the last."""
    samples = reading(make_samples)
    relevance = np.arange(16.0)[::-1].copy()
    relevance[[6, 2]] = relevance[[2, 6]]
    maps = np.stack([relevance, -relevance]).reshape(2, 4, 4).repeat(4, 1).repeat(4, 2)
    samples = replace(samples, maps=maps)
    np.testing.assert_allclose(metrics.get("road_morf", imputer="zero")(samples).values, [1 / 9, 8 / 9])
    np.testing.assert_allclose(metrics.get("road_morf", imputer="zero", steps=2)(samples).values, [0, 1])


def test_road_of_a_target_that_is_not_predicted_is_zero(make_samples: Make) -> None:
    samples = reading(make_samples, targets=np.ones(2, dtype=int))
    assert metrics.get("road_lerf", imputer="zero")(samples).values.tolist() == [0, 0]


def test_chefers_areas_follow_the_pixels(make_samples: Make) -> None:
    """16 of 256 pixels decide, half of them suffice: 10 % erased are enough, and 90 % are not if they are kept."""
    samples = reading(make_samples)
    positive, negative = (metrics.get(f"{sign}_perturbation_auc")(samples).values for sign in ("positive", "negative"))
    np.testing.assert_array_equal(positive, [0, 1])
    np.testing.assert_array_equal(negative, [1, 0])


def test_chefers_areas_equal_a_loop_over_topk(make_samples: Make) -> None:
    samples = make_samples(labels=np.arange(5) % 4)
    for name, sign in (("positive_perturbation_auc", 1), ("negative_perturbation_auc", -1)):
        for row, found in enumerate(metrics.get(name)(samples).values):
            correct = []
            for tenth in range(1, 10):
                gone = torch.zeros(256, dtype=torch.bool)
                values = torch.from_numpy(sign * samples.maps[row]).flatten()
                gone[values.topk(int(256 * tenth / 10 + 0.5)).indices] = True
                logits = said(samples, row, gone.view(16, 16).numpy(), FILLS["black_pixel"])
                correct.append(float(logits.argmax() == samples.labels[row]))
            np.testing.assert_allclose(found, area(np.array(correct)))


def test_chefers_areas_need_true_labels_and_a_black(make_samples: Make) -> None:
    scores = metrics.get("positive_perturbation_auc")(make_samples(labels=None))
    assert scores.reasons == ["no true label"] * 5 and np.isnan(scores.values).all()
    with pytest.raises(RequestError, match="black"):
        metrics.get("positive_perturbation_auc")(make_samples(black=None))
    scores = metrics.get("negative_perturbation_auc")(reading(make_samples, labels=np.zeros(2, dtype=int)))
    np.testing.assert_array_equal(scores.values, [0, 1])


# pixels


@pytest.mark.parametrize("imputer", ["mean", "blur"])
def test_pixel_srg_equals_the_fidelity_of_the_authors_of_cdam(make_samples: Make, imputer: str) -> None:
    samples = make_samples(2)
    scores = metrics.get("pixel_srg", steps=8, imputer=imputer)(samples).values
    for row, found in enumerate(scores):
        curves = []
        for order in (np.argsort(samples.maps[row], axis=None), np.argsort(-samples.maps[row], axis=None)):
            curves.append([])
            for step in range(9):
                gone = np.zeros(256, dtype=bool)
                gone[order[: int(step / 8 * 256)]] = True
                logits = said(samples, row, gone.reshape(16, 16), FILLS[imputer])
                curves[-1].append(logits[samples.targets[row]])
        least, most = np.array(curves)
        np.testing.assert_allclose(found, trapezoid(least - most, np.linspace(0, 1, 9)), atol=1e-6)


def test_pixel_srg_of_an_additive_model_is_that_of_patches(make_samples: Make) -> None:
    """Every pixel of a patch tells the same: whichever goes first, the curve is the same straight line."""
    evidence = np.random.default_rng(0).standard_normal(16)
    samples = additive(evidence, np.stack([evidence, -evidence]), make_samples)
    of_pixels = metrics.get("pixel_srg", steps=16, imputer="zero")(samples).values
    np.testing.assert_allclose(of_pixels, metrics.get("srg", steps=16, imputer="zero")(samples).values, atol=1e-9)
    np.testing.assert_allclose(of_pixels[0], -of_pixels[1], atol=1e-9)


def test_pixels_that_tie_go_by_a_lottery_and_not_in_raster_order(make_samples: Make) -> None:
    maps = np.zeros((400, 16, 16))
    maps[:, :4, :4] = 1
    ranked = pixel_ranks(make_samples(400, maps=maps)).reshape(400, 16, 16)
    assert ranked[:, :4, :4].max() == 15
    assert np.abs(ranked[:, :4, :4].mean(0) - 7.5).max() < 4.5 * np.sqrt((16**2 - 1) / 12 / 400)


@pytest.mark.parametrize("name", ["pixel_srg", "positive_perturbation_auc", "irof"])
def test_masks_are_made_for_a_few_samples_at_a_time(
    make_samples: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, metric = make_samples(40), metrics.get(name)
    expected = metric(samples).values
    sizes = []
    removed = type(metric).removed
    monkeypatch.setattr(type(metric), "removed", lambda self, part: sizes.append(len(part)) or removed(self, part))
    np.testing.assert_allclose(metric(replace(samples, shared={})).values, expected, atol=1e-6)
    assert sum(sizes) == 40 and max(sizes) <= 16


# superpixels


def blocks(make_samples: Make, n: int = 3, **changes: object) -> Samples:
    """Images of 6 x 6 blocks of one colour each, 8 pixels wide, which SLIC finds, and maps that it cuts up."""
    rng = np.random.default_rng(5)
    colours = rng.standard_normal((n, 3, 6, 6)).repeat(8, 2).repeat(8, 3)
    inputs = torch.as_tensor(colours + 0.05 * rng.standard_normal(colours.shape), dtype=torch.float32)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with torch.no_grad():
        logits = model(inputs).double().numpy()
    maps, patch = rng.standard_normal((n, 48, 48)), (8, 8)
    roi = np.ones((n, 48, 48), dtype=bool)
    return make_samples(n, model=model, inputs=inputs, maps=maps, patch=patch, roi=roi, logits=logits, **changes)


def irof_curve(samples: Samples, row: int, segments: np.ndarray) -> np.ndarray:
    """Return the target's probability after 0 ... L superpixels are set to the image's mean colour."""
    means = np.array([samples.maps[row][segments == label].mean() for label in np.unique(segments)])
    gone = np.zeros(segments.shape, dtype=bool)
    logits = [said(samples, row, gone, FILLS["mean"])]
    for label in np.argsort(-means):
        gone |= segments == label
        logits.append(said(samples, row, gone, FILLS["mean"]))
    return softmax(np.stack(logits), axis=1)[:, samples.targets[row]]


def test_irof_equals_a_loop_over_superpixels(make_samples: Make) -> None:
    samples = blocks(make_samples)
    segments = superpixels(samples, 100)
    assert len(set(segments.max(axis=(1, 2)))) > 1  # images of different length in one batch
    curves = [irof_curve(samples, row, segments[row]) for row in range(3)]
    expected = [1 - area(curve) / curve[0] for curve in curves]
    np.testing.assert_allclose(metrics.get("irof")(samples).values, expected, atol=1e-6)
    assert passes(samples).computed == sum(len(curve) - 1 for curve in curves)


def test_irof_equals_quantus_up_to_its_ends(make_samples: Make) -> None:
    samples = blocks(make_samples)
    ours = metrics.get("irof")(samples).values

    def fill(arr: np.ndarray, mask: np.ndarray, **_: object) -> np.ndarray:
        return np.where(mask, mean, arr)

    for row in range(3):
        segments = superpixels(samples.take(np.array([row])), 100)[0]
        mean = samples.inputs[row].mean((1, 2))[None, :, None, None].numpy()
        theirs = quantus.IROF(perturb_func=fill, return_aggregate=False, disable_warnings=True)
        found = evaluate(theirs, samples, row, samples.model)
        curve = irof_curve(samples, row, segments)
        length = segments.max() + 1
        np.testing.assert_allclose(found, ours[row] * length + (1 + curve[1] / curve[0]) / 2, atol=1e-5)


def test_superpixels_are_found_once_for_all_explainers(make_samples: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(curves_module, "slic", lambda image, **kwargs: calls.append(1) or slic(image, **kwargs))
    samples = blocks(make_samples)
    metrics.get("irof")(samples)
    metrics.get("irof")(replace(samples, maps=-samples.maps))
    assert len(calls) == 3


def test_irof_of_one_superpixel_or_of_tied_ones_is_undefined(make_samples: Make) -> None:
    samples = blocks(make_samples)
    samples.inputs[1] = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))  # noise hangs together
    maps = samples.maps.copy()
    segments = superpixels(samples, 100)[2]
    for label in np.unique(segments):  # the same two values in every superpixel: equal means
        values = np.resize([1.0, -1.0], (segments == label).sum() // 2 * 2)
        maps[2][segments == label] = np.pad(values, (0, (segments == label).sum() % 2))
    scores = metrics.get("irof")(replace(samples, maps=maps))
    assert scores.reasons == ["", "one superpixel only", "all superpixels tie"]


def test_irof_reaches_its_bounds(make_samples: Make) -> None:
    """0 for a model that does not look, and nearly 1 if the first superpixel decides."""
    samples = blocks(make_samples, 1)
    weights = torch.zeros(4, 3, 48, 48)
    blind = replace(samples, model=Linear(weights), logits=np.zeros((1, 4)), shared={})
    np.testing.assert_allclose(metrics.get("irof")(blind).values, 0, atol=1e-12)
    segments = superpixels(samples, 100)[0]
    place = segments == 7
    sharp = Keeps(samples.inputs[0], place, int(samples.targets[0]))
    seeing = replace(samples, model=sharp, logits=sharp(samples.inputs).numpy(), shared={})
    best, worst = (metrics.get("irof")(replace(seeing, maps=sign * place[None].astype(float))) for sign in (1, -1))
    half = 0.5 / (segments.max() + 1)
    np.testing.assert_allclose([best.values[0], worst.values[0]], [1 - half, half], atol=1e-9)


class Keeps(nn.Module):
    """Sure of a class as long as the image shows the same in some place, else sure of the opposite."""

    def __init__(self, image: Tensor, place: np.ndarray, target: int) -> None:
        super().__init__()
        self.place, self.target = torch.from_numpy(place), target
        self.shown = image[:, self.place]

    def forward(self, inputs: Tensor) -> Tensor:
        same = (inputs[:, :, self.place] == self.shown).flatten(1).all(1)
        return (
            torch.nn.functional.one_hot(torch.full_like(same, self.target, dtype=torch.long), 4)
            * torch.where(same, 50.0, -50.0)[:, None].double()
        )


# Quantus, on real images and maps and on random ones


@pytest.fixture(params=["random", "real"])
def quantus_samples(request: pytest.FixtureRequest, make_samples: Make) -> Callable[[int, int], Samples]:
    """Samples of two images with 16 x 16 patches, for a number of channels and a side in pixels."""

    def make(channels: int, side: int) -> Samples:
        torch.manual_seed(0)
        layers = nn.Conv2d(channels, 8, 16, 16), nn.GELU(), nn.Flatten(), nn.Linear(8 * (side // 16) ** 2, 4)
        model = nn.Sequential(*layers).eval()
        rng = np.random.default_rng(4)
        inputs = torch.as_tensor(rng.standard_normal((2, channels, side, side)), dtype=torch.float32)
        tokens = rng.standard_normal((2, side // 16, side // 16))
        if request.param == "real":
            shared = request.getfixturevalue("shared")
            inputs = torch.stack([real_image(shared, name, channels, side) for name in ("catdog.png", "el2.png")])
            golden = np.load(shared / "golden/explainers_vit_tiny.npz")
            tokens = np.stack([golden[f"{case}/cdam"].reshape(14, 14) for case in ("catdog__243", "el2__340")])
            tokens = tokens[:, : side // 16, : side // 16]
        maps = tokens.astype(float).repeat(16, 1).repeat(16, 2)
        with torch.no_grad():
            logits = model(inputs).double().numpy()
        return make_samples(2, model=model, inputs=inputs, maps=maps, patch=(16, 16), logits=logits, roi=maps > 0)

    return make


def real_image(shared: Path, name: str, channels: int, side: int) -> Tensor:
    image = Image.open(shared / "data/imagenet_samples" / name).convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(image.resize((side, side)), np.float32).reshape(side, side, channels)
    return torch.from_numpy(pixels / 127.5 - 1).movedim(-1, 0)


@pytest.mark.parametrize(("channels", "side"), [(1, 224), (3, 96)])
@pytest.mark.parametrize("name", ["PixelFlipping", "RegionPerturbation", "Selectivity"])
def test_curves_equal_quantus(
    quantus_samples: Callable[[int, int], Samples], name: str, channels: int, side: int
) -> None:
    """Of RGB images Quantus's PixelFlipping cannot step by a patch at 224 pixels: 768 must divide 224 x 224."""
    samples = quantus_samples(channels, side)
    patches = (side // 16) ** 2
    sizes = {"patch_size": 16, "regions_evaluation": patches} if name == "RegionPerturbation" else {"patch_size": 16}
    sizes = {"features_in_step": channels * 256} if name == "PixelFlipping" else sizes
    of_quantus = {"PixelFlipping": "pixel_flipping", "RegionPerturbation": "region_perturbation"}
    metric = metrics.get(of_quantus.get(name, "selectivity"), steps=patches)
    scores = metric(samples).values
    seen = outputs(samples, metric.removal(samples))
    curve = metric.curves(samples, seen)[0]
    for row in range(2):
        theirs = np.ravel(evaluate(getattr(quantus, name)(disable_warnings=True, **sizes), samples, row, samples.model))
        if name == "RegionPerturbation":
            np.testing.assert_allclose(curve[row, 0] - curve[row, 1:], theirs, atol=1e-5)
            np.testing.assert_allclose(scores[row], theirs.mean(), atol=1e-5)
        else:
            np.testing.assert_allclose(curve[row, 1:], theirs, atol=1e-5)
            start = curve[row, :1] if name == "Selectivity" else []
            np.testing.assert_allclose(scores[row], area(np.concatenate([start, theirs])), atol=1e-5)


def test_area_of_pixel_flipping_is_that_of_quantus_over_its_width(
    quantus_samples: Callable[[int, int], Samples],
) -> None:
    samples = quantus_samples(1, 96)
    theirs = quantus.PixelFlipping(features_in_step=256, return_auc_per_sample=True, disable_warnings=True)
    expected = [evaluate(theirs, samples, row, samples.model) / 35 for row in range(2)]
    np.testing.assert_allclose(metrics.get("pixel_flipping", steps=36)(samples).values, expected, atol=1e-5)


# requests


@pytest.mark.parametrize("name", ["pixel_srg", "positive_perturbation_auc", "irof"])
def test_tokens_cannot_be_removed_by_the_pixel(name: str) -> None:
    with pytest.raises(RequestError, match="removes patches"):
        metrics.get(name, imputer="token_removal")


@pytest.mark.parametrize("name", ["road", "positive_perturbation_auc"])
def test_accuracies_have_no_logits(name: str) -> None:
    with pytest.raises(RequestError, match="accuracy"):
        metrics.get(name, output="logit")


def test_irof_breaks_ties_of_an_image_alone(make_samples: Make, subset: Callable) -> None:
    maps = np.zeros((6, 16, 16))
    maps[:, :4, :4] = 1
    rng = np.random.default_rng(0)
    coarse = torch.as_tensor(rng.random((6, 3, 4, 4))).repeat_interleave(4, 2).repeat_interleave(4, 3)
    samples = make_samples(6, maps=maps, inputs=(coarse + 0.01 * torch.as_tensor(rng.random((6, 3, 16, 16)))).float())
    metric = metrics.get("irof", n_segments=12)
    assert len(set(metric.sizes(samples).tolist())) > 1  # type: ignore[attr-defined]
    together = metric(samples).values
    alone = [metric(subset(samples, [row])).values[0] for row in range(6)]
    np.testing.assert_allclose(alone, together, atol=1e-6)
