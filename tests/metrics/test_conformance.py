"""What every metric promises, for whatever metrics there are."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import metrics
from explainer_bench import RequestError
from metrics import Metric, Samples
from metrics.base import GROUPS

Make = Callable[..., Samples]
Subset = Callable[[Samples, list[int]], Samples]


@pytest.fixture(params=metrics.registry.names())
def metric(request: pytest.FixtureRequest) -> Metric:
    return metrics.get(request.param)


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = VisionTransformer(**size).eval().double()  # its tokens are almost alike: rounding would tell them apart
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model


def removes_tokens(metric: Metric) -> bool:
    return getattr(metric, "imputer", "") == "token_removal"


@pytest.fixture
def classifier(metric: Metric, classifier: torch.nn.Module) -> torch.nn.Module:
    return small_vit() if removes_tokens(metric) else classifier


@pytest.fixture
def hooked(metric: Metric, hooked: torch.nn.Module) -> torch.nn.Module:
    if not removes_tokens(metric):
        return hooked
    vit = small_vit()
    vit.blocks[0].attn.register_forward_hook(
        lambda module, inputs, output: output.register_hook(lambda grad: None) and None
    )
    return vit


def test_states_its_constants(metric: Metric) -> None:
    assert metric.group in GROUPS
    assert metric.sign_policy in {"signed", "positive", "absolute"}
    assert metric.reference and metric.version and metric.__doc__
    assert metric.formula and metric.rewards and metric.fooled_by
    assert metric.bounds[0] < metric.bounds[1]


def test_scores_are_float64_within_bounds(metric: Metric, make_samples: Make) -> None:
    scores = metric(make_samples(8))
    assert scores.values.shape == (8,) and scores.values.dtype == np.float64
    assert scores.reasons == [""] * 8
    low, high = metric.bounds
    assert (scores.values >= low - 1e-9).all() and (scores.values <= high + 1e-9).all()


def test_score_does_not_depend_on_the_other_samples(metric: Metric, make_samples: Make, subset: Subset) -> None:
    samples = make_samples(5)
    together = metric(samples).values
    alone = [metric(subset(samples, [row])).values[0] for row in range(5)]
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_allclose(metric(subset(samples, order)).values, together[order], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_score_does_not_depend_on_the_batch_size(metric: Metric, make_samples: Make, batch_size: int) -> None:
    expected = metric(make_samples()).values
    np.testing.assert_allclose(metric(make_samples(batch_size=batch_size)).values, expected, atol=1e-6)


def test_repeats_exactly_from_cached_results(metric: Metric, make_samples: Make) -> None:
    samples = make_samples()
    np.testing.assert_array_equal(metric(samples).values, metric(samples).values)


def test_undefined_samples_are_nan_with_a_reason_and_leave_the_others_alone(metric: Metric, make_samples: Make) -> None:
    samples = make_samples(5)
    expected = metric(samples).values
    maps = samples.maps.copy()
    maps[1], maps[3, 2, 2] = 0.7, np.nan
    scores = metric(replace(samples, maps=maps, shared={}))
    assert scores.reasons[1] == "constant map" or not metric.undefined_on_constant
    assert scores.reasons[3] == "map is not finite"
    assert [bool(reason) for reason in scores.reasons] == np.isnan(scores.values).tolist()
    np.testing.assert_allclose(scores.values[[0, 2, 4]], expected[[0, 2, 4]], atol=1e-6)


def test_empty_roi_is_nan_where_a_roi_is_needed(metric: Metric, make_samples: Make) -> None:
    roi = make_samples().roi.copy()
    roi[2] = False
    scores = metric(make_samples(roi=roi))
    assert (scores.reasons[2] == "empty ROI") == metric.needs_roi
    assert np.isnan(scores.values[2]) == metric.needs_roi


def test_scoring_leaves_inputs_and_generators_as_they_were(metric: Metric, make_samples: Make) -> None:
    samples = make_samples()
    fields = "inputs", "targets", "maps", "roi", "logits", "seeds"
    before = {name: copy.deepcopy(getattr(samples, name)) for name in fields}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    metric(samples)
    for name in fields:
        np.testing.assert_array_equal(getattr(samples, name), before[name])
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.is_grad_enabled()


def test_scale_of_the_map_does_not_matter(metric: Metric, make_samples: Make) -> None:
    if not metric.scale_invariant:
        pytest.skip(f"{metric.name} depends on the scale of the map, by definition")
    samples = make_samples()
    explain, again = samples.explain, samples.reexplain
    assert explain and again
    scaled = replace(
        samples,
        maps=samples.maps * 64,
        explain=lambda classes: explain(classes) * 64,
        reexplain=lambda *args: again(*args) * 64,
    )
    np.testing.assert_allclose(metric(scaled).values, metric(samples).values, rtol=1e-5)


def test_other_classes_are_classes_besides_the_target(metric: Metric, make_samples: Make) -> None:
    samples = make_samples(40)
    others = metric.other_classes(samples.logits, samples.targets, samples.seeds)
    assert others.shape[0] == 40 and others.dtype.kind == "i"
    assert ((others >= 0) & (others < samples.logits.shape[1]) & (others != samples.targets[:, None])).all()
    single = metric.other_classes(samples.logits[:, :1], samples.targets * 0, samples.seeds)
    assert single.shape == (40, 0)


def test_only_other_classes_maps_are_asked_for(metric: Metric, make_samples: Make) -> None:
    samples = make_samples(8)
    others = metric.other_classes(samples.logits, samples.targets, samples.seeds)
    explain = samples.explain
    assert explain

    def stored(classes: np.ndarray) -> np.ndarray:
        assert all(c == t or c in o for c, t, o in zip(classes, samples.targets, others, strict=True))
        return explain(classes)

    metric(replace(samples, explain=stored))


def test_chance_level_has_one_value_per_sample(metric: Metric, make_samples: Make) -> None:
    level = metric.chance_level(make_samples())
    assert level.shape == (5,)
    known = level[np.isfinite(level)]
    assert ((known >= metric.bounds[0]) & (known <= metric.bounds[1])).all()


def test_chance_level_is_the_mean_score_of_random_maps(metric: Metric, make_samples: Make) -> None:
    n = 60 if metric.expensive else 400
    rng = np.random.default_rng(0)
    maps = rng.random((2, n, *make_samples().maps.shape[1:]))
    samples = make_samples(n, maps=maps[0], explain=lambda classes: maps[1])
    level = metric.chance_level(samples)
    if np.isnan(level).any():
        pytest.skip(f"{metric.name} states no chance level")
    gap = metric(samples).values - level
    assert abs(gap.mean()) <= 4 * gap.std() / np.sqrt(n) + 1e-12


def test_scores_under_no_grad_with_a_model_that_needs_gradients(
    metric: Metric, make_samples: Make, hooked: torch.nn.Module
) -> None:
    samples = make_samples(3, model=hooked.requires_grad_(False))
    expected = metric(samples).values
    with torch.no_grad():
        scores = metric(replace(samples, shared={}))
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)
    assert np.isfinite(scores.values).all()


def test_unknown_parameter_is_one_clear_line(metric: Metric) -> None:
    with pytest.raises(RequestError, match="nonsense"):
        metrics.get(metric.name, nonsense=1)
