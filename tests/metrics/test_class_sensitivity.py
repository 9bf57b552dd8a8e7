"""Class sensitivity: which class is asked for, what blind and opposite maps score, and slow references."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantus.functions.similarity_func import ssim
from scipy.ndimage import uniform_filter
from scipy.stats import spearmanr

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.class_sensitivity import map_ssim
from metrics.perturbation import passes, rivals
from metrics.quantus_bridge import evaluate

Make = Callable[..., Samples]
COMPARING = "class_correlation", "random_logit"
SPEARMAN = "class_correlation[similarity=spearman]"
LEAST = "class_correlation[other=least]"
ALL = *COMPARING, SPEARMAN, LEAST

sides = st.integers(3, 20)
seeds = st.integers(0, 2**32 - 1)


def maps_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("name", ALL)
def test_class_blind_map_scores_one(make_samples: Make, name: str) -> None:
    samples = make_samples()
    blind = replace(samples, explain=lambda classes: samples.maps)
    np.testing.assert_allclose(metrics.get(name)(blind).values, 1)


@pytest.mark.parametrize("name", ALL)
def test_blind_but_for_the_scale_scores_one(make_samples: Make, name: str) -> None:
    samples = make_samples()
    np.testing.assert_allclose(metrics.get(name)(replace(samples, explain=lambda _: 7 * samples.maps)).values, 1)


def test_opposite_map_is_dissimilar(make_samples: Make) -> None:
    samples = make_samples()
    opposite = replace(samples, explain=lambda classes: -samples.maps)
    for name in ("class_correlation", SPEARMAN):
        np.testing.assert_allclose(metrics.get(name)(opposite).values, -1)
    assert (metrics.get("random_logit")(opposite).values < -0.3).all()


def test_correlation_is_pearson_and_ignores_offset_and_scale(make_samples: Make) -> None:
    samples = make_samples()
    other = maps_of(3, *samples.maps.shape)
    scores = metrics.get("class_correlation")(replace(samples, explain=lambda classes: 3 * other + 7)).values
    pairs = zip(samples.maps, other, strict=True)
    np.testing.assert_allclose(scores, [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])


@pytest.mark.parametrize("decimals", [0, 9])
def test_rank_correlation_is_scipys_and_ignores_monotonic_change(make_samples: Make, decimals: int) -> None:
    samples = make_samples(maps=maps_of(2, 5, 16, 16).round(decimals))  # rounded to integers, most pixels tie
    other = maps_of(3, *samples.maps.shape).round(decimals)
    scores = metrics.get(SPEARMAN)(replace(samples, explain=lambda classes: np.exp(other))).values
    pairs = zip(samples.maps, other, strict=True)
    np.testing.assert_allclose(scores, [spearmanr(a.ravel(), b.ravel()).statistic for a, b in pairs])


def test_correlation_asks_for_the_most_or_the_least_probable_other_class() -> None:
    logits, targets = np.array([[5.0, 3, 4], [5, 3, 4], [1, 1, 1], [0, 1, 2]]), np.array([0, 2, 0, 0])
    for other, expected in (("second", [2, 0, 1, 2]), ("least", [1, 1, 1, 1])):
        metric = metrics.get("class_correlation", other=other)
        assert metric.other_classes(logits, targets, np.zeros(4)).ravel().tolist() == expected
        assert metric.other_classes(logits[:, :1], targets * 0, np.zeros(4)).shape == (4, 0)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_random_logit_takes_the_class_that_quantus_draws(make_samples: Make, classes: int) -> None:
    import quantus

    rng = np.random.default_rng(4)
    targets = rng.integers(classes, size=20)
    samples = make_samples(20, targets=targets, logits=rng.standard_normal((20, classes)))
    asked = []

    def explain(inputs: np.ndarray, targets: np.ndarray, **_: object) -> np.ndarray:
        asked.append(targets.tolist())
        return inputs[:, :1]

    for row, seed in enumerate(samples.seeds):
        metric = quantus.RandomLogit(num_classes=classes, seed=int(seed), disable_warnings=True)
        evaluate(metric, samples, row, samples.model, explain)
    assert asked == metrics.get("random_logit").other_classes(samples.logits, targets, samples.seeds).tolist()


def slow_ssim(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Wang et al. 2004, window by window, on the pair brought to [0, 1]; sample variances."""
    pair = [values / np.abs(values).max() for values in (a, b)]
    low, high = min(map(np.min, pair)), max(map(np.max, pair))
    x, y = [(values - low) / (high - low) for values in pair]
    c1, c2, scores = 0.01**2, 0.03**2, []
    for i in range(a.shape[0] - window + 1):
        for j in range(a.shape[1] - window + 1):
            u, v = [values[i : i + window, j : j + window].ravel() for values in (x, y)]
            covariance = np.cov(u, v)
            mean = (2 * u.mean() * v.mean() + c1) / (u.mean() ** 2 + v.mean() ** 2 + c1)
            scores.append(mean * (2 * covariance[0, 1] + c2) / (np.trace(covariance) + c2))
    return float(np.mean(scores))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, height=sides, width=sides, wanted=st.sampled_from([3, 5, 9, 33]))
def test_ssim_is_that_of_square_windows_on_a_common_range(seed: int, height: int, width: int, wanted: int) -> None:
    a, b = maps_of(seed, 2, height, width)
    odd = [width_ for width_ in range(3, wanted + 1, 2) if width_ <= min(height, width)]
    score = map_ssim(a, b, wanted)
    assert -1 <= score <= 1
    assert score == pytest.approx(slow_ssim(a, b, max(odd)), abs=1e-9)
    assert score == pytest.approx(map_ssim(b, a, wanted)) == pytest.approx(map_ssim(64 * a, b / 64, wanted))
    assert map_ssim(a, a, wanted) == pytest.approx(1)


def test_random_logit_scores_the_windows_of_two_patches(make_samples: Make) -> None:
    samples = make_samples()
    other = maps_of(3, *samples.maps.shape)
    scores = metrics.get("random_logit")(replace(samples, explain=lambda classes: other)).values
    expected = [slow_ssim(a, b, 9) for a, b in zip(samples.maps, other, strict=True)]
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_quantus_calls_opposite_structure_similar_and_we_do_not(make_samples: Make) -> None:
    """Its one-dimensional windows see runs of a row only, and its means change sign with the map."""
    samples = make_samples()
    smooth = np.stack([uniform_filter(values, 5) for values in samples.maps]) + 0.02
    flat = (smooth / np.abs(smooth).max(axis=(1, 2), keepdims=True)).reshape(5, -1)
    ours = metrics.get("random_logit")(replace(samples, maps=smooth, explain=lambda classes: -smooth)).values
    assert (np.array(ssim(flat, -flat, batched=True)) > 0).all() and (ours < -0.3).all()
    # stripes along rows: each run of 7 pixels is constant but where a row ends, so that nothing but the mean is seen
    rows = np.repeat(np.arange(28.0) % 2, 28).reshape(1, 28, 28) + 1
    shifted = 3 - rows
    assert ssim(rows.reshape(1, -1), shifted.reshape(1, -1), batched=True)[0] > 0.3
    assert map_ssim(rows[0], shifted[0], 9) < -0.3


@pytest.mark.parametrize("tokens", [False, True])
def test_random_maps_are_dissimilar_at_any_resolution(tokens: bool) -> None:
    values = maps_of(0, 20, 8, 8).repeat(16, 1).repeat(16, 2) if tokens else maps_of(0, 20, 128, 128)
    pairs = list(zip(values[::2], values[1::2], strict=True))
    assert abs(np.mean([map_ssim(*pair, 33) for pair in pairs])) < 0.1
    narrow = np.mean([map_ssim(*pair, 7) for pair in pairs])
    assert (narrow > 0.3) if tokens else (abs(narrow) < 0.1)  # the usual window sees within tokens


@pytest.mark.parametrize("name", ALL)
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


@pytest.mark.parametrize("name", ALL)
def test_one_class_is_undefined(make_samples: Make, name: str) -> None:
    samples = make_samples(targets=np.zeros(5, dtype=int), logits=np.zeros((5, 1)))
    assert metrics.get(name)(samples).reasons == ["fewer than two classes"] * 5


@pytest.mark.parametrize("name", ALL)
def test_no_explainer_is_one_clear_line(make_samples: Make, name: str) -> None:
    with pytest.raises(RequestError, match="maps of other classes"):
        metrics.get(name)(make_samples(explain=None))


@pytest.mark.parametrize(("image", "classes"), [("catdog", (243, 282)), ("el2", (340, 386))])
def test_real_maps_of_two_classes(shared: Path, image: str, classes: tuple[int, int]) -> None:
    with np.load(shared / "golden/explainers_vit_tiny.npz") as stored:
        maps = {key: np.array(stored[key], dtype=float) for key in stored.files if key.startswith(image)}

    def score(method: str) -> float:
        a, b = (maps[f"{image}__{c}/{method}"].reshape(14, 14).repeat(16, 0).repeat(16, 1) for c in classes)
        return map_ssim(a, b, 33)

    for blind in ("raw_attention_last", "rollout_start0"):
        assert score(blind) == pytest.approx(1)
    for method in ("transformer_attribution_start0", "gae", "gradcam_attention"):
        assert 0 < score(method) < 0.95


def two_objects(n: int, seed: int = 0, classes: int = 4) -> dict[str, object]:
    """Boxes of different sizes for the classes 0 and 1 on the left and on the right; target 0, class 1 the rival."""
    rng = np.random.default_rng(seed)
    rois = np.zeros((n, classes, 16, 16), dtype=bool)
    for row in range(n):
        rois[row, 0, 2 : rng.integers(3, 15), 1 : rng.integers(2, 8)] = True
        rois[row, 1, 2 : rng.integers(3, 15), 9 : rng.integers(10, 16)] = True
    logits = np.tile([0.0, 1.0, *[2.0] * (classes - 2)], (n, 1))
    return {
        "targets": np.zeros(n, dtype=int),
        "logits": logits,
        "roi": rois[:, 0],
        "roi_of": lambda c: rois[np.arange(n), c],
    }


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(1e-6, 1e6))
def test_pointing_is_one_on_the_own_object_and_zero_on_the_other(seed: int, scale: float) -> None:
    scene = two_objects(6, seed)
    own, other = scene["roi"], scene["roi_of"](np.ones(6, dtype=int))  # type: ignore[operator]
    metric, noise = metrics.get("class_pointing"), maps_of(seed, 6, 16, 16)
    assert (metric(bare(maps=own - 0.5 * other, **scene)).values == 1).all()
    assert (metric(bare(maps=other - 0.5 * own, **scene)).values == 0).all()
    positive = np.maximum(noise, 0)
    mass = [(positive * part).sum((1, 2)) for part in (own, other)]
    scores = metric(bare(maps=scale * noise, **scene)).values
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(scores, mass[0] / (mass[0] + mass[1]))


def bare(maps: np.ndarray, **scene: object) -> Samples:
    """Samples whose model is not asked."""
    n = len(maps)
    inputs, numbers = torch.zeros(n, 3, *maps.shape[1:]), np.arange(n).astype(np.uint32)
    return Samples(torch.nn.Identity(), inputs, maps=maps, seeds=numbers, patch=(4, 4), **scene)  # type: ignore[arg-type]


def test_pointing_by_chance_is_the_share_of_the_area() -> None:
    n = 3000
    scene = two_objects(n)
    samples = bare(maps=np.random.default_rng(5).random((n, 16, 16)), **scene)
    metric = metrics.get("class_pointing")
    gap = metric(samples).values - metric.chance_level(samples)
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n) and np.ptp(metric.chance_level(samples)) > 0.5


def test_the_rival_object_is_the_most_probable_class_that_has_one() -> None:
    rois = np.zeros((3, 5, 16, 16), dtype=bool)
    rois[:, 0, :4], rois[:, 1, 4:6], rois[:, 2, 8:12] = True, True, True
    rois[1, 2] = False  # has none: the next one
    rois[2, 2] = rois[2, 0]  # none of its own
    maps = np.zeros((3, 16, 16))
    maps[:, :4], maps[:, 4:6], maps[:, 8:12] = 1, 2, 3
    asked: list[int] = []

    def roi_of(classes: np.ndarray) -> np.ndarray:
        asked.append(int(classes[0]))
        return rois[np.arange(3), classes]

    scene = {"targets": np.zeros(3, dtype=int), "logits": np.tile([9.0, 2, 5, 7, 1], (3, 1)), "roi": rois[:, 0]}
    samples = bare(maps=maps, roi_of=roi_of, **scene)
    metric = metrics.get("class_pointing")
    np.testing.assert_allclose(metric(samples).values, [4 / (4 + 12), 4 / (4 + 4), 4 / (4 + 4)])
    np.testing.assert_allclose(metric.chance_level(samples), [1 / 2, 2 / 3, 2 / 3])
    assert asked == [3, 2, 1]  # each once, not once more per explainer, and not the last
    metric(replace(samples, maps=-maps + 5))
    assert asked == [3, 2, 1]


def test_pixels_of_both_objects_do_not_count() -> None:
    rois = np.zeros((1, 2, 16, 16), dtype=bool)
    rois[0, 0, :6], rois[0, 1, 4:12] = True, True
    maps = np.ones((1, 16, 16))
    maps[0, 4:6], maps[0, 0, 0] = 100, 2
    scene = {"targets": np.zeros(1, dtype=int), "logits": np.array([[1.0, 0.0]]), "roi": rois[:, 0]}
    samples = bare(maps=maps, roi_of=lambda classes: rois[np.arange(1), classes], **scene)
    assert metrics.get("class_pointing")(samples).values[0] == pytest.approx(65 / (65 + 96))


def test_pointing_is_undefined_with_a_reason() -> None:
    rois = np.zeros((5, 3, 16, 16), dtype=bool)
    rois[:, 0, 4:8], rois[:, 1, 8:10] = True, True
    rois[0, 1] = False
    rois[1, 1] = rois[1, 0]
    rois[2, 1] = True
    rois[3, 0] = False
    maps = np.random.default_rng(0).random((5, 16, 16))
    maps[4, 4:10] *= -1
    scene = {"targets": np.zeros(5, dtype=int), "logits": np.zeros((5, 3)), "roi": rois[:, 0]}
    samples = bare(maps=maps, roi_of=lambda classes: rois[np.arange(5), classes], **scene)
    metric = metrics.get("class_pointing")
    assert metric(samples).reasons == [
        "no other class has a ROI of its own",
        "no other class has a ROI of its own",
        "the other class's ROI covers the target's",
        "empty ROI",
        "no positive attribution in either ROI",
    ]
    assert np.isnan(metric.chance_level(samples)).tolist() == [True] * 4 + [False]
    with pytest.raises(RequestError, match="roi_of"):
        metric(replace(samples, roi_of=None, shared={}))


def drops_by_hand(samples: Samples, steps: int) -> np.ndarray:
    """Replace the most relevant patches one image at a time, pixel by pixel, and ask the model."""
    areas = []
    for row, (image, target) in enumerate(zip(samples.inputs, samples.targets, strict=True)):
        blocks = samples.maps[row].reshape(4, 4, 4, 4).sum((1, 3)).ravel()
        order = np.argsort(-blocks)
        rival = int(rivals(samples.logits[[row]], samples.targets[[row]])[0])
        counts = sorted({int(np.floor(16 * s / steps + 0.5)) for s in range(steps + 1)})[:-1]
        drops = []
        for count in counts:
            changed = image.clone()
            for patch in order[:count]:
                i, j = divmod(int(patch), 4)
                changed[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = image.mean((1, 2))[:, None, None]
            with torch.no_grad():
                logits = samples.model(changed[None])[0].double().numpy()
            margin = samples.logits[row, target] - samples.logits[row, rival]
            drops.append(margin - (logits[target] - logits[rival]))
        widths = np.diff(counts) / 16
        areas.append(float(np.sum(widths * (np.array(drops[1:]) + drops[:-1]) / 2)))
    return np.array(areas)


@pytest.mark.parametrize("steps", [2, 5, 16, 28])
def test_contrastive_is_the_area_of_the_difference_of_two_drops(make_samples: Make, steps: int) -> None:
    samples = make_samples()
    scores = metrics.get("contrastive_faithfulness", steps=steps)(samples).values
    np.testing.assert_allclose(scores, drops_by_hand(samples, steps), atol=1e-5)


@pytest.mark.parametrize("spec", ["", "[steps=7]", "[imputer=zero]"])
def test_contrastive_costs_nothing_beside_srg(make_samples: Make, spec: str) -> None:
    samples = make_samples()
    metrics.get(f"srg{spec}")(samples)
    before = passes(samples).computed
    assert before and np.isfinite(metrics.get(f"contrastive_faithfulness{spec}")(samples).values).all()
    assert passes(samples).computed == before


class Halves(torch.nn.Module):
    """Class 0 is the brightness of the left half, class 1 that of the right half, class 2 never is."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        left, right = inputs.chunk(2, dim=3)
        sums = torch.stack([left.sum((1, 2, 3)), right.sum((1, 2, 3))], dim=1) / 100
        return torch.cat([sums, sums.new_full((len(sums), 1), -99)], dim=1)


def test_contrastive_tells_the_own_evidence_from_the_rivals(make_samples: Make) -> None:
    rng = np.random.default_rng(0)
    inputs = torch.as_tensor(rng.random((40, 3, 16, 16)), dtype=torch.float32) + 0.2
    logits = Halves()(inputs).double().numpy()
    left = np.zeros((40, 16, 16))
    left[:, :, :8] = 1
    given_ = {"model": Halves().eval(), "inputs": inputs, "logits": logits, "targets": np.zeros(40, dtype=int)}
    noise = 0.01 * rng.random(left.shape)
    metric = metrics.get("contrastive_faithfulness[imputer=zero]")
    own = metric(make_samples(40, maps=left + noise, **given_)).values
    rival = metric(make_samples(40, maps=-left + noise, **given_)).values
    blind = metric(make_samples(40, maps=rng.random(left.shape), **given_)).values
    assert (own > 0).all() and (rival < 0).all()
    # both halves are of one brightness on average: a random map takes from both alike
    assert abs(blind.mean()) < 4 * blind.std() / np.sqrt(40) and own.min() > blind.max()


def test_contrastive_needs_two_classes(make_samples: Make) -> None:
    samples = make_samples(targets=np.zeros(5, dtype=int), logits=np.zeros((5, 1)))
    assert metrics.get("contrastive_faithfulness")(samples).reasons == ["fewer than two classes"] * 5
    with pytest.raises(RequestError, match="output"):
        metrics.get("contrastive_faithfulness[output=probability]")
