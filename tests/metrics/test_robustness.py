"""Robustness: Quantus on the very same noisy copies, closed forms, and who scores well."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.quantus_bridge import evaluate
from metrics.reexplaining import noisy
from metrics.robustness import changes

from .conftest import input_x_gradient

Make = Callable[..., Samples]
SENSITIVITY = "max_sensitivity", "avg_sensitivity"
STABILITY = "relative_input_stability", "relative_output_stability"
NAMES = *SENSITIVITY, "local_lipschitz", *STABILITY
IMAGES = "catdog.png", "el2.png", "balls.jpg"


def explained(samples: Samples, explain: Callable[..., np.ndarray] = input_x_gradient) -> Samples:
    """The samples with that explainer's own maps."""
    maps = explain(samples.model, samples.inputs, samples.targets, np.arange(len(samples)))
    return replace(samples, maps=maps, reexplain=explain)


class Precise(nn.Module):
    """A model that computes in float64: what is compared is the metric, not how batches round."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs.double())


@pytest.fixture(params=["random", "real"])
def samples(request: pytest.FixtureRequest, make_samples: Make, classifier: nn.Module) -> Samples:
    """Random images, and real ones at the small model's size; with the maps of input times gradient."""
    if request.param == "random":
        return explained(make_samples(4, model=Precise(classifier).eval()))
    folder: Path = request.getfixturevalue("shared") / "data/imagenet_samples"
    images = [np.asarray(Image.open(folder / name).convert("RGB").resize((16, 16)), np.float32) for name in IMAGES]
    inputs = torch.from_numpy(np.stack(images) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
    return explained(make_samples(len(images), inputs=inputs, model=Precise(classifier).eval()))


def in_quantus(name: str, samples: Samples, row: int, **params: Any) -> float:
    """Quantus's score of one sample, on our noisy copies, with the same explainer."""
    ours = metrics.get(name)
    copies = iter(noisy(samples, row, ours.noise, ours.radius, ours.draws).numpy())
    given: list[np.ndarray] = []

    def perturb(arr: np.ndarray, **_: Any) -> np.ndarray:
        given.append(next(copies))
        return given[-1].reshape(arr.shape).copy()

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        return input_x_gradient(model, torch.as_tensor(inputs), targets, np.zeros(1, int))[:, None]

    reference = getattr(quantus, "".join(map(str.title, name.split("_"))), None) or quantus.LocalLipschitzEstimate
    built = reference(perturb_func=perturb, nr_samples=ours.draws, disable_warnings=True, **params)
    score = evaluate(built, samples, row, samples.model, explain)
    assert len(given) == ours.draws
    return float(score)


@pytest.mark.parametrize("name", NAMES)
def test_same_copies_score_as_in_quantus(samples: Samples, name: str) -> None:
    params = {"return_nan_when_prediction_changes": False} if name in STABILITY else {}
    with torch.no_grad():
        outputs = samples.model(samples.inputs)
    copies = [noisy(samples, row, "uniform", 0.2, 10) for row in range(len(samples))]
    with torch.no_grad():
        same = [(samples.model(c).argmax(1) == o.argmax()).all() for c, o in zip(copies, outputs, strict=True)]
    found = metrics.get(name)(samples).values
    rows = [row for row in range(len(samples)) if name not in STABILITY or same[row]]
    assert rows
    for row in rows:
        expected = in_quantus(name, samples, row, **params)
        assert found[row] == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_komorowski_variant_is_that_of_quantus(samples: Samples) -> None:
    spec = "avg_sensitivity[draws=3,radius=0.33]"
    found = metrics.get(spec)(samples).values
    copies = torch.stack([noisy(samples, row, "uniform", 0.33, 3) for row in range(len(samples))])
    for row in range(len(samples)):
        maps = input_x_gradient(samples.model, copies[row], samples.targets[[row] * 3], np.zeros(3))
        own = samples.maps[row]
        expected = np.mean([np.linalg.norm(each - own) / np.linalg.norm(own) for each in maps])
        assert found[row] == pytest.approx(expected, abs=1e-5)
    assert 0.3 < float((copies - samples.inputs[:, None]).abs().amax()) <= 0.33 + 1e-6


class Flips(nn.Module):
    """Predicts class 1 exactly where the first value exceeds a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, inputs: Tensor) -> Tensor:
        first = inputs[:, 0, 0, 0]
        return torch.stack([torch.full_like(first, self.threshold), first], dim=1)


def steep(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A map of ones but for the first pixel, which grows steeply with the image's first value."""
    maps = np.ones((len(images), *images.shape[2:]))
    maps[:, 0, 0] = np.exp(10 * (images[:, 0, 0, 0].double().numpy() - 1))
    return maps + np.eye(16)


def flipping(make_samples: Make, threshold: float, seed: int = 0) -> Samples:
    """One sample, all ones."""
    changed = {"inputs": torch.ones(1, 3, 16, 16), "model": Flips(threshold), "targets": np.zeros(1, dtype=int)}
    return explained(make_samples(1, **changed, logits=np.ones((1, 2)), seeds=np.array([seed])), steep)


@pytest.mark.parametrize("name", STABILITY)
def test_copies_of_another_class_do_not_count(make_samples: Make, name: str) -> None:
    samples = flipping(make_samples, threshold=1.05)
    copies = noisy(samples, 0, "uniform", 0.2, 10)
    change = (copies - samples.inputs).double().numpy().reshape(10, -1)
    kept = change[:, 0] <= 0.05
    other = np.linalg.norm(change, axis=1) if "input" in name else np.abs(change[:, 0])
    ratios = np.abs(np.expm1(10 * change[:, 0])) / 2 / other
    assert ratios[kept].max() < 0.9 * ratios[~kept].max()
    assert metrics.get(name)(samples).values[0] == pytest.approx(ratios[kept].max(), rel=1e-4)


@pytest.mark.parametrize("name", STABILITY)
def test_nothing_is_left_where_every_copy_changes_class(make_samples: Make, name: str) -> None:
    reasons = []
    for seed in range(20):
        samples = flipping(make_samples, threshold=1, seed=seed)
        flips = bool(noisy(samples, 0, "uniform", 0.2, 1)[0, 0, 0, 0] > 1)
        scores = metrics.get(name, draws=1)(samples)
        assert np.isnan(scores.values[0]) == flips
        reasons.append(scores.reasons[0])
    assert set(reasons) == {"", "every noisy copy has another predicted class"}


@pytest.mark.parametrize("name", NAMES)
def test_map_that_does_not_look_at_the_image_scores_best(make_samples: Make, name: str) -> None:
    fixed = np.random.default_rng(0).random((16, 16)) + 0.5
    samples = explained(make_samples(), lambda model, images, targets, rows: np.stack([fixed] * len(images)))
    metric = metrics.get(name)
    assert (metric(samples).values == metric.bounds[0]).all() and not metric.higher_is_better


@pytest.mark.parametrize("name", NAMES)
def test_map_that_is_anew_each_time_scores_worse_than_a_smooth_one(make_samples: Make, name: str) -> None:
    rng = np.random.default_rng(0)

    def noise(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return rng.random((len(images), 16, 16)) + 0.1

    def smooth(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return 10 + images.double().mean(1).numpy()

    scores = [metrics.get(name)(explained(make_samples(), explain)).values for explain in (noise, smooth)]
    assert (scores[0] > 2 * scores[1]).all()


@pytest.mark.parametrize("name", SENSITIVITY)
def test_sensitivity_of_the_image_itself(make_samples: Make, name: str) -> None:
    """The map is the mean colour: its change is that of the noise, known in closed form."""
    samples = explained(make_samples(3), lambda model, images, targets, rows: images.double().mean(1).numpy())
    noise = np.stack([(noisy(samples, r, "uniform", 0.2, 10) - samples.inputs[r]).double().mean(1) for r in range(3)])
    ratio = np.linalg.norm(noise, axis=(2, 3)) / np.linalg.norm(samples.maps, axis=(1, 2))[:, None]
    expected = ratio.max(1) if name.startswith("max") else ratio.mean(1)
    np.testing.assert_allclose(metrics.get(name)(samples).values, expected, rtol=1e-5)


@given(size=st.floats(0.05, 1), draws=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_noise_is_symmetric_and_as_large_as_stated(size: float, draws: int) -> None:
    seeds = np.array([7, 8], dtype=np.uint32)
    samples = _bare(torch.zeros(2, 3, 24, 24), seeds)
    uniform, normal = (noisy(samples, 1, kind, size, draws).double().numpy() for kind in ("uniform", "gaussian"))
    assert np.abs(uniform).max() <= size * (1 + 1e-6)
    for values, deviation in ((uniform, size / np.sqrt(3)), (normal, size)):
        assert values.shape == (draws, 3, 24, 24)
        assert abs(values.mean()) < 5 * deviation / np.sqrt(values.size)
        assert values.std() == pytest.approx(deviation, rel=0.1)


def _bare(inputs: Tensor, seeds: np.ndarray) -> Samples:
    n = len(inputs)
    maps = np.zeros((n, *inputs.shape[2:]))
    return Samples(nn.Identity(), inputs, np.zeros(n, int), maps, maps > 0, np.zeros((n, 2)), seeds, (4, 4))


def test_draws_differ_between_samples_and_copies_and_repeat(make_samples: Make) -> None:
    samples = make_samples(2, inputs=torch.zeros(2, 3, 16, 16))
    copies = torch.cat([noisy(samples, row, "uniform", 0.2, 5) for row in range(2)]).flatten(1)
    assert len(torch.unique(copies, dim=0)) == 10
    assert torch.equal(copies[5:], noisy(samples, 1, "uniform", 0.2, 5).flatten(1))
    more = noisy(samples, 0, "uniform", 0.2, 9).flatten(1)
    assert torch.equal(more[:5], copies[:5])


def test_more_draws_never_lower_a_maximum(make_samples: Make) -> None:
    samples = explained(make_samples())
    for name in ("max_sensitivity", "local_lipschitz", *STABILITY):
        scores = [metrics.get(name, draws=draws)(samples).values for draws in (1, 4, 12)]
        for fewer, most in pairwise(scores):
            assert (np.nan_to_num(fewer, nan=-np.inf) <= most + 1e-6 * np.abs(most)).all()


@pytest.mark.parametrize("name", NAMES)
def test_all_explainers_see_the_same_copies(make_samples: Make, name: str) -> None:
    seen: list[Tensor] = []

    def record(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        seen.append(images.clone())
        return input_x_gradient(model, images, targets, rows)

    samples = make_samples(2, reexplain=record)
    for factor in (1, -3):
        metrics.get(name)(replace(samples, maps=samples.maps * factor))
    assert len(seen) == 4 and torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))


def test_metrics_of_the_same_noise_share_their_explanations_and_explainers_their_logits(make_samples: Make) -> None:
    explanations, passes = [], []

    def count(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        explanations.append(len(images))
        return images.double().mean(1).numpy()

    samples = make_samples(3, reexplain=count)
    handle = samples.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    for name in NAMES:
        metrics.get(name)(samples)
    assert sum(explanations) == 3 * 10 * 2  # uniform, and normal for the Lipschitz estimate
    first, other = sum(passes), replace(samples, maps=2 * samples.maps)
    for name in STABILITY:
        metrics.get(name)(other)
    handle.remove()
    assert sum(explanations) == 3 * 10 * 3
    assert sum(passes) == first == 3 * 11 + 1  # one to see whether the model needs gradients


def test_each_copy_is_explained_for_its_samples_class(make_samples: Make) -> None:
    samples = make_samples(4)

    def check(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        np.testing.assert_array_equal(targets, samples.targets[rows])
        assert float((images - samples.inputs[rows]).abs().max()) <= 0.2 + 1e-6
        return images.double().mean(1).numpy()

    metrics.get("max_sensitivity")(replace(samples, reexplain=check))


@pytest.mark.parametrize("name", NAMES)
def test_no_explainer_is_one_clear_line(make_samples: Make, name: str) -> None:
    with pytest.raises(RequestError, match="reexplain"):
        metrics.get(name)(make_samples(reexplain=None))


def test_zeros_count_as_a_millionth() -> None:
    image, copies = np.zeros((1, 1, 2)), np.full((1, 1, 1, 2), 0.1)
    attribution, maps = np.array([[0.0, 2.0]]), np.array([[[1e-6, 1.0]]])
    found = changes(image, copies, attribution, maps)[:, 0]
    scaled = np.hypot(1e-6, 0)
    expected = [np.hypot(1e-6, 1), np.hypot(1, 0.5), scaled, 0.1 * np.sqrt(2), 1e5 * np.sqrt(2)]
    np.testing.assert_allclose(found, expected)


def test_lipschitz_takes_a_zero_map_for_what_it_is(make_samples: Make) -> None:
    samples = make_samples(3, reexplain=lambda model, images, targets, rows: np.zeros((len(images), 16, 16)))
    scores = metrics.get("local_lipschitz")(samples)
    assert np.isfinite(scores.values).all() and (scores.values > 0).all()
    np.testing.assert_allclose(metrics.get("max_sensitivity")(samples).values, 1)
