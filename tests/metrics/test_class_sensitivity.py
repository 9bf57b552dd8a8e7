"""Class sensitivity: which class is asked for, and what blind and opposite maps score."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from quantus.functions.similarity_func import ssim

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.quantus_bridge import evaluate

Make = Callable[..., Samples]
NAMES = "class_correlation", "random_logit"


@pytest.mark.parametrize("name", NAMES)
def test_class_blind_map_scores_one(make_samples: Make, name: str) -> None:
    samples = make_samples()
    blind = replace(samples, explain=lambda classes: samples.maps)
    np.testing.assert_allclose(metrics.get(name)(blind).values, 1)


def test_opposite_map_scores_minus_one_in_correlation_but_high_in_random_logit(make_samples: Make) -> None:
    samples = make_samples()
    opposite = replace(samples, explain=lambda classes: -samples.maps)
    np.testing.assert_allclose(metrics.get("class_correlation")(opposite).values, -1)
    assert (metrics.get("random_logit")(opposite).values > 0.5).all()


def test_correlation_is_pearson_and_ignores_offset_and_scale(make_samples: Make) -> None:
    samples = make_samples()
    other = np.random.default_rng(3).standard_normal(samples.maps.shape)
    scores = metrics.get("class_correlation")(replace(samples, explain=lambda classes: 3 * other + 7)).values
    pairs = zip(samples.maps, other, strict=True)
    np.testing.assert_allclose(scores, [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])


def test_correlation_asks_for_the_most_probable_other_class() -> None:
    logits = np.array([[5.0, 3, 4], [5, 3, 4], [1, 1, 1]])
    others = metrics.get("class_correlation").other_classes(logits, np.array([0, 2, 0]), np.zeros(3))
    assert others.tolist() == [[2], [0], [1]]


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_quantus_draws_exactly_the_class_that_is_predicted(make_samples: Make, classes: int) -> None:
    rng = np.random.default_rng(4)
    targets = rng.integers(classes, size=20)
    samples = make_samples(20, targets=targets, logits=rng.standard_normal((20, classes)))
    metric, asked = metrics.get("random_logit"), []

    def explain(inputs: np.ndarray, targets: np.ndarray, **_: object) -> np.ndarray:
        asked.append(targets.tolist())
        return inputs[:, :1]

    for row in range(20):
        evaluate(metric.build(samples, row), samples, row, samples.model, explain)  # type: ignore[attr-defined]
    assert asked == metric.other_classes(samples.logits, targets, samples.seeds).tolist()


def test_random_logit_is_the_similarity_of_flattened_maps(make_samples: Make) -> None:
    samples = make_samples()
    other = np.random.default_rng(3).standard_normal(samples.maps.shape)
    scores = metrics.get("random_logit")(replace(samples, explain=lambda classes: other)).values
    first, second = (
        values.reshape(5, -1) / np.abs(values).max(axis=(1, 2))[:, None] for values in (samples.maps, other)
    )
    np.testing.assert_allclose(scores, ssim(first, second, batched=True), rtol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "random_logit[engine=quantus]"])
@pytest.mark.parametrize("value", [0.0, 0.3, np.nan])
def test_constant_map_of_the_other_class_is_undefined_for_its_sample_alone(
    make_samples: Make, name: str, value: float
) -> None:
    samples = make_samples()
    expected = metrics.get(name)(samples).values
    assert samples.explain
    others = samples.explain(metrics.get(name).other_classes(samples.logits, samples.targets, samples.seeds)[:, 0])
    others[2] = value
    scores = metrics.get(name)(replace(samples, explain=lambda classes: others))
    assert "other class" in scores.reasons[2]
    np.testing.assert_allclose(np.delete(scores.values, 2), np.delete(expected, 2))


@pytest.mark.parametrize("name", NAMES)
def test_one_class_is_undefined(make_samples: Make, name: str) -> None:
    samples = make_samples(targets=np.zeros(5, dtype=int), logits=np.zeros((5, 1)))
    assert metrics.get(name)(samples).reasons == ["fewer than two classes"] * 5


@pytest.mark.parametrize("name", NAMES)
def test_no_explainer_is_one_clear_line(make_samples: Make, name: str) -> None:
    with pytest.raises(RequestError, match="maps of other classes"):
        metrics.get(name)(make_samples(explain=None))
