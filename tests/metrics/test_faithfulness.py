"""Faithfulness on models whose answer is known, and against slow computations straight from the definitions."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import nnls
from scipy.stats import pearsonr, spearmanr
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.faithfulness import (
    BoxSensitivity,
    DropCorrelation,
    SensitivityN,
    each_alone,
    random_boxes,
    random_subsets,
    squares,
    subset_size,
)

from .conftest import Linear, per_patch

Make = Callable[..., Samples]
Known = tuple[Samples, np.ndarray]

CORRELATIONS = [
    "faithfulness_estimate[imputer=mean]",
    "faithfulness_estimate[imputer=mean,similarity=spearman]",
    "faithfulness_correlation",
    "faithfulness_correlation[subset=0.5,runs=20]",
    "faithfulness_correlation_pixels[imputer=mean]",
    "sensitivity_n",
    "box_sensitivity[imputer=mean]",
]
SIGNED = [*CORRELATIONS, "saco[output=logit]", "saco[output=logit,groups=4]"]
PATCHWISE = [spec for spec in [*SIGNED, "infidelity", "infidelity_raw"] if "pixels" not in spec and "box" not in spec]
NOT_OF_THE_MAP = [*CORRELATIONS, "infidelity", "infidelity_raw"]
slow = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Products(nn.Module):
    """Two logits of a grey image that are not additive: products of what neighbouring patches show."""

    def forward(self, inputs: Tensor) -> Tensor:
        seen = nn.functional.avg_pool2d(inputs.double(), 2).flatten(1)
        first = (seen * seen.roll(1, 1)).sum(1) + seen[:, 0]
        return torch.stack([first, -first.tanh()], dim=1)


def grey(maps: np.ndarray, seed: int = 0) -> Samples:
    """Samples of 8 x 8 grey pixels in 16 patches, with the given maps."""
    rng = np.random.default_rng(seed)
    inputs = torch.as_tensor(rng.standard_normal((len(maps), 1, 8, 8)))
    return Samples(
        model=Products(),
        inputs=inputs,
        targets=np.zeros(len(maps), dtype=int),
        maps=maps,
        roi=np.zeros(maps.shape, dtype=bool),
        logits=Products()(inputs).numpy(),
        seeds=rng.integers(2**32, size=len(maps)).astype(np.uint32),
        patch=(2, 2),
    )


def of_tokens(tokens: np.ndarray) -> np.ndarray:
    return tokens.astype(float).repeat(2, 1).repeat(2, 2)


def target_logit(samples: Samples, row: int, image: Tensor) -> float:
    with torch.no_grad():
        return float(samples.model(image[None])[0, samples.targets[row]])


def replaced(samples: Samples, row: int, mask: np.ndarray, fill: Tensor) -> Tensor:
    return torch.where(torch.as_tensor(mask), fill, samples.inputs[row])


def patch_mask(samples: Samples, patches: np.ndarray) -> np.ndarray:
    """Return (H, W) bool of a mask of patches (P,)."""
    down, across = samples.patch
    grid = np.array(samples.inputs.shape[2:]) // samples.patch
    return patches.reshape(grid).repeat(down, 0).repeat(across, 1)


def grey_fill(samples: Samples, row: int) -> Tensor:
    return samples.inputs[row].mean((1, 2), keepdim=True)


@pytest.mark.parametrize("spec", SIGNED)
def test_drops_themselves_score_one_and_their_opposite_minus_one(linear: Known, spec: str) -> None:
    samples, drops = linear
    metric = metrics.get(spec)
    np.testing.assert_allclose(metric(replace(samples, maps=3 * drops)).values, 1, atol=1e-9)
    np.testing.assert_allclose(metric(replace(samples, maps=-drops)).values, -1, atol=1e-9)


@pytest.mark.parametrize("spec", CORRELATIONS)
def test_correlations_do_not_see_a_constant_added_to_the_map(linear: Known, spec: str) -> None:
    samples, drops = linear
    np.testing.assert_allclose(metrics.get(spec)(replace(samples, maps=drops - 5)).values, 1, atol=1e-9)


def test_infidelity_of_a_linear_model_is_known_in_closed_form(linear: Known) -> None:
    samples, drops = linear
    best, raw = metrics.get("infidelity"), metrics.get("infidelity_raw")
    together = per_patch(drops) @ squares((4, 4), 3).T
    worst = (together**2).mean(axis=1)
    np.testing.assert_allclose(best(replace(samples, maps=3 * drops)).values, 0, atol=1e-9)
    np.testing.assert_allclose(best(replace(samples, maps=-drops)).values, worst, rtol=1e-9)
    np.testing.assert_allclose(raw(replace(samples, maps=drops)).values, 0, atol=1e-9)
    np.testing.assert_allclose(raw(replace(samples, maps=3 * drops)).values, 4 * worst, rtol=1e-9)
    np.testing.assert_allclose(raw(replace(samples, maps=-drops)).values, 4 * worst, rtol=1e-9)


@pytest.mark.parametrize("largest", [1, 2, 9])
def test_infidelity_equals_loops_over_all_squares(make_samples: Make, largest: int) -> None:
    samples = make_samples(2)
    drops, inside = [[], []], [[], []]
    for row in range(2):
        whole = target_logit(samples, row, samples.inputs[row])
        for side in range(1, min(largest, 4) + 1):
            for top in range(0, 16 - 4 * side + 1, 4):
                for left in range(0, 16 - 4 * side + 1, 4):
                    mask = np.zeros((16, 16), dtype=bool)
                    mask[top : top + 4 * side, left : left + 4 * side] = True
                    image = replaced(samples, row, mask, grey_fill(samples, row))
                    drops[row].append(whole - target_logit(samples, row, image))
                    inside[row].append(samples.maps[row][mask].sum())
    raw = [np.mean((np.array(a) - d) ** 2) for a, d in zip(inside, drops, strict=True)]
    best = [nnls(np.array(a)[:, None], np.array(d))[1] ** 2 / len(d) for a, d in zip(inside, drops, strict=True)]
    np.testing.assert_allclose(metrics.get("infidelity_raw", largest=largest)(samples).values, raw, rtol=1e-5)
    np.testing.assert_allclose(metrics.get("infidelity", largest=largest)(samples).values, best, rtol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "faithfulness_estimate[imputer=zero,similarity=spearman]",
        "faithfulness_correlation[imputer=zero,runs=20]",
        "faithfulness_correlation[imputer=zero,runs=20,output=probability]",
        "faithfulness_correlation_pixels[imputer=zero,subset=40,runs=20]",
        "sensitivity_n[imputer=zero,sizes=3,runs=15]",
        "box_sensitivity[imputer=zero,sides=2,boxes=15]",
    ],
)
def test_correlations_equal_a_slow_computation_on_the_same_removals(make_samples: Make, spec: str) -> None:
    samples, metric = make_samples(3), metrics.get(spec)
    assert isinstance(metric, DropCorrelation)
    correlation = spearmanr if metric.similarity == "spearman" else pearsonr
    expected = []
    for row in range(3):
        removed = metric.removed(samples.take(np.array([row])))[0]
        pairs = []
        for features in removed:
            mask = features.reshape(16, 16) if features.size == 256 else patch_mask(samples, features)
            with torch.no_grad():
                logits = samples.model(replaced(samples, row, mask, torch.zeros(()))[None])[0].double()
            outputs = logits.softmax(0) if metric.output == "probability" else logits
            pairs.append((samples.maps[row][mask].sum(), -float(outputs[samples.targets[row]])))
        parts = np.split(np.array(pairs), metric.kinds(samples))
        expected.append(np.mean([correlation(*part.T).statistic for part in parts]))
    np.testing.assert_allclose(metric(samples).values, expected, atol=1e-5)


SACO_GROUPS = {
    2: [range(8), range(8, 16)],
    5: [range(3), range(3, 6), range(6, 9), range(9, 12), range(13, 16)],
    10: [[0], [1], [3], [5], [6], [8], [10], [11], [13], [15]],
    99: [[place] for place in range(16)],
}


@pytest.mark.parametrize("groups", SACO_GROUPS)
def test_saco_equals_the_algorithm_of_the_paper(make_samples: Make, groups: int) -> None:
    samples = make_samples(4)
    expected = []
    for row in range(4):
        order = np.argsort(-per_patch(samples.maps)[row])
        members = [order[list(places)] for places in SACO_GROUPS[groups]]
        masks = [patch_mask(samples, np.isin(np.arange(16), member)) for member in members]
        salience = [samples.maps[row][mask].sum() for mask in masks]
        chances = []
        for mask in masks:
            with torch.no_grad():
                logits = samples.model(replaced(samples, row, mask, grey_fill(samples, row))[None])[0].double()
            chances.append(float(logits.softmax(0)[samples.targets[row]]))
        score = total = 0.0
        for i, j in combinations(range(len(masks)), 2):
            weight = salience[i] - salience[j]
            score += weight if chances[i] <= chances[j] else -weight
            total += abs(weight)
        expected.append(score / total)
    np.testing.assert_allclose(metrics.get("saco", groups=groups)(samples).values, expected, atol=1e-5)


def test_saco_weighs_pairs_by_the_difference_in_salience(linear: Known) -> None:
    """The groups lower the output by 4, 3, 1 and 2 units: the last two are the wrong way round."""
    samples, _ = linear
    units = np.array([4.0, 3, 1, 2]).repeat(4)
    weights = torch.ones(4, 1, 16, 16, dtype=torch.float64)
    inputs = torch.as_tensor(patch_mask(samples, units))[None, None].expand(5, 1, 16, 16)
    salience = patch_mask(samples, np.array([10.0, 7, 2, 1]).repeat(4))
    samples = replace(samples, model=Linear(weights), inputs=inputs, maps=np.stack([salience] * 5))
    metric = metrics.get("saco[groups=4,imputer=zero,output=logit]")
    right, wrong = 3 + 8 + 9 + 5 + 6, 1
    np.testing.assert_allclose(metric(samples).values, (right - wrong) / (right + wrong), rtol=1e-12)


def ablated(model: VisionTransformer, image: Tensor, patch: int) -> Tensor:
    """Return the logits (K,) without one patch token, block by block."""
    tokens = model.patch_embed(image[None])
    tokens = torch.cat([model.cls_token, tokens], dim=1) + model.pos_embed
    tokens = torch.cat([tokens[:, : patch + 1], tokens[:, patch + 2 :]], dim=1)
    for block in model.blocks:
        tokens = block(tokens)
    return model.head(model.norm(tokens)[:, 0])[0]


@pytest.mark.parametrize("similarity", ["pearson", "spearman"])
def test_token_ablation_equals_a_vit_run_on_a_shorter_sequence(make_samples: Make, similarity: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=4).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    samples = make_samples(3, model=model)
    with torch.no_grad():
        without = [[ablated(model, image, patch) for patch in range(16)] for image in samples.inputs]
    drops = [[-float(logits[target]) for logits in of] for of, target in zip(without, samples.targets, strict=True)]
    correlation = spearmanr if similarity == "spearman" else pearsonr
    pairs = zip(per_patch(samples.maps), drops, strict=True)
    expected = [correlation(relevance, drop).statistic for relevance, drop in pairs]
    metric = metrics.get("token_ablation_correlation", similarity=similarity)
    np.testing.assert_allclose(metric(samples).values, expected, atol=1e-4)


def test_token_ablation_of_a_model_without_tokens_is_refused(make_samples: Make) -> None:
    with pytest.raises(RequestError, match="token_removal needs a timm"):
        metrics.get("token_ablation_correlation")(make_samples())


class Counting(nn.Module):
    """Counts the images that go through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.images += len(inputs)
        return self.model(inputs)


@pytest.mark.parametrize("spec", NOT_OF_THE_MAP)
def test_forward_passes_serve_every_explainer(make_samples: Make, spec: str) -> None:
    samples = make_samples(3)
    model = Counting(samples.model)
    samples, metric = replace(samples, model=model), metrics.get(spec)
    maps = samples.maps.copy()
    maps[1] = 0  # defined on fewer samples than the other explainer
    metric(samples)
    first = model.images
    metric(replace(samples, maps=-samples.maps))
    metric(replace(samples, maps=maps))
    assert first > 0 and model.images == first


def test_estimate_computes_each_patch_once(make_samples: Make) -> None:
    samples = make_samples(3)
    model = Counting(samples.model)
    metrics.get("faithfulness_estimate")(replace(samples, model=model))
    assert model.images == 1 + 3 * 16  # a probe, then the patches


def test_sensitivity_at_one_size_is_the_faithfulness_correlation_of_that_size(make_samples: Make) -> None:
    one = metrics.get("sensitivity_n[sizes=1,largest=0.3,runs=30]")(make_samples()).values
    np.testing.assert_array_equal(
        one, metrics.get("faithfulness_correlation[subset=0.3,runs=30]")(make_samples()).values
    )


def test_sizes_run_from_one_patch_to_the_largest_share(make_samples: Make) -> None:
    metric = SensitivityN()
    assert metric.counts(make_samples()) == [1, 2, 4, 7, 13]
    assert metric.counts(make_samples(patch=(8, 8))) == [1, 2, 3]
    assert SensitivityN(sizes=1, largest=0.5).counts(make_samples()) == [8]


def test_subset_is_a_fraction_or_a_number() -> None:
    assert [subset_size(subset, 196) for subset in (0.1, 0.001, 0.999, 1, 7, 500)] == [20, 1, 195, 1, 7, 195]


@slow
@given(st.integers(2, 40), st.data())
def test_subsets_have_their_size_and_come_from_seed_and_size_alone(features: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, features - 1))
    seeds = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4)), dtype=np.uint32)
    subsets = random_subsets(seeds, features, size, 12)
    assert subsets.shape == (len(seeds), 12, features) and (subsets.sum(2) == size).all()
    np.testing.assert_array_equal(random_subsets(seeds[-1:], features, size, 7)[0], subsets[-1, :7])


def test_every_feature_is_drawn_as_often_and_seeds_differ() -> None:
    subsets = random_subsets(np.array([3, 4], dtype=np.uint32), 20, 5, 4000)
    assert np.abs(subsets.mean(1) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)
    assert (subsets[0] != subsets[1]).any(axis=1).mean() > 0.99


def test_boxes_are_whole_lie_anywhere_and_come_from_seed_and_side() -> None:
    boxes = random_boxes(5, (7, 9), 3, 4000)
    assert (boxes.sum((1, 2)) == 9).all()
    corners = np.stack([boxes.any(2).argmax(1), boxes.any(1).argmax(1)], axis=1)
    assert (boxes.any(2).sum(1) == 3).all() and (boxes.any(1).sum(1) == 3).all()
    places, counts = np.unique(corners, axis=0, return_counts=True)
    assert len(places) == 5 * 7
    assert np.abs(counts / 4000 - 1 / 35).max() < 5 * np.sqrt(1 / 35 / 4000)
    np.testing.assert_array_equal(random_boxes(5, (7, 9), 3, 10), boxes[:10])
    assert (random_boxes(6, (7, 9), 3, 4000) != boxes).any()


def test_boxes_halve_their_side_and_fit_small_images(make_samples: Make) -> None:
    assert BoxSensitivity().lengths(make_samples(inputs=torch.zeros(5, 3, 224, 256))) == [28, 56, 112]
    assert BoxSensitivity().lengths(make_samples(inputs=torch.zeros(5, 3, 64, 64))) == [8, 16, 32]
    assert BoxSensitivity(sides=4).lengths(make_samples(inputs=torch.zeros(5, 3, 4, 4))) == [1, 2]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("faithfulness_correlation_pixels", {"subset": 224, "runs": 100, "imputer": "black", "output": "logit"}),
        ("box_sensitivity", {"boxes": 100, "imputer": "blur", "output": "logit"}),
        ("saco", {"imputer": "mean", "output": "probability"}),
        ("token_ablation_correlation", {"imputer": "token_removal", "output": "logit"}),
        ("faithfulness_estimate", {"imputer": "black", "similarity": "pearson"}),
    ],
)
def test_published_settings_are_the_defaults(name: str, setting: dict[str, object]) -> None:
    assert metrics.get(name).params.items() >= setting.items()


def test_squares_are_all_that_fit_into_a_grid_that_is_no_square() -> None:
    masks = squares((2, 3), 5)
    assert masks.sum(1).tolist() == [1] * 6 + [4, 4]
    assert masks[6:].tolist() == [[True, True, False] * 2, [False, True, True] * 2]


@pytest.mark.parametrize("name", ["faithfulness_correlation_pixels", "box_sensitivity"])
def test_masks_of_pixels_are_made_for_one_sample_at_a_time(make_samples: Make, name: str) -> None:
    metric = metrics.get(name)
    assert isinstance(metric, DropCorrelation)
    parts = metric.chunks(make_samples(4))
    assert [len(part) for part in parts] == [1] * 4
    for part in parts:
        removal = metric.removal(part)
        assert removal.segments is None and removal.removed.shape[2] == part.maps[0].size


@pytest.mark.parametrize("spec", PATCHWISE)
def test_patches_that_all_tie_are_undefined(make_samples: Make, spec: str) -> None:
    maps = np.tile(np.arange(16.0).reshape(4, 4), (5, 4, 4))
    assert metrics.get(spec)(make_samples(maps=maps)).reasons == ["all patches tie"] * 5


@pytest.mark.parametrize("spec", [*SIGNED, "infidelity", "infidelity_raw"])
def test_model_that_does_not_look_and_constant_maps_are_undefined(make_samples: Make, spec: str) -> None:
    samples, metric = make_samples(model=Linear(torch.zeros(4, 3, 16, 16))), metrics.get(spec)
    scores = metric(samples)
    assert np.isnan(scores.values).all() and scores.reasons == [metric.undefined_reason] * 5
    constant = metric(make_samples(maps=np.full((5, 16, 16), 0.1)))
    assert np.isnan(constant.values).all() and constant.reasons == ["constant map"] * 5


def test_one_square_says_nothing_of_a_map_without_units(make_samples: Make) -> None:
    samples = make_samples(patch=(8, 16))
    assert np.isfinite(metrics.get("infidelity")(samples).values).all()
    assert squares((1, 1), 3).shape == (1, 1)
    metric = metrics.get("infidelity")
    assert not metric.tells(np.ones((2, 1))).any()


TOKENS = arrays(np.int64, (3, 4, 4), elements=st.integers(-3, 3))


@slow
@given(TOKENS, st.sampled_from([*SIGNED, "infidelity"]), st.integers(0, 9))
def test_scores_are_in_range_and_blind_to_scale_and_order(tokens: np.ndarray, spec: str, seed: int) -> None:
    samples, metric = grey(of_tokens(tokens), seed), metrics.get(spec)
    scores = metric(samples)
    defined = np.isfinite(scores.values)
    assert [bool(reason) for reason in scores.reasons] == (~defined).tolist()
    low, high = metric.bounds
    assert ((scores.values[defined] >= low) & (scores.values[defined] <= high)).all()
    scaled = metric(replace(samples, maps=samples.maps / 7)).values
    np.testing.assert_allclose(scaled, scores.values, rtol=1e-6, atol=1e-9)
    order = np.array([2, 0, 1])
    alone = replace(samples.take(order), shared={})
    np.testing.assert_allclose(metric(alone).values, scores.values[order], atol=1e-9)


@slow
@given(TOKENS, st.sampled_from([*CORRELATIONS, "saco[output=logit,groups=4]"]))
def test_opposite_map_has_the_opposite_score(tokens: np.ndarray, spec: str) -> None:
    maps = of_tokens(tokens) + np.random.default_rng(0).random((3, 4, 4)).repeat(2, 1).repeat(2, 2) / 100
    metric = metrics.get(spec)
    forward, backward = metric(grey(maps)).values, metric(grey(-maps)).values
    np.testing.assert_allclose(forward, -backward, atol=1e-9)


@slow
@given(TOKENS)
def test_best_scale_is_best_and_the_zero_scale_the_worst(tokens: np.ndarray) -> None:
    best, raw = metrics.get("infidelity"), metrics.get("infidelity_raw")
    maps = of_tokens(tokens)
    least = best(grey(maps)).values
    scaled = np.array([raw(grey(maps * scale)).values for scale in (0.1, 0.5, 1, 3)])
    nothing = raw(grey(maps * 1e-12)).values
    assert (np.isnan(least) | (least <= scaled.min(axis=0) + 1e-9)).all()
    assert (np.isnan(least) | (least <= nothing + 1e-9)).all()


@pytest.mark.parametrize(
    "spec",
    [
        "faithfulness_estimate[imputer=mean]",
        "faithfulness_correlation[runs=20]",
        "faithfulness_correlation_pixels[subset=9,runs=20]",
        "sensitivity_n[sizes=3,runs=20]",
        "box_sensitivity[boxes=20]",
        "saco",
    ],
)
@pytest.mark.parametrize("skewed", [False, True])
def test_random_maps_score_zero_on_average(spec: str, skewed: bool) -> None:
    draw = np.random.default_rng(4)
    maps = of_tokens(draw.random((400, 4, 4)) if skewed else draw.standard_normal((400, 4, 4)))
    metric = metrics.get(spec)
    scores = metric(grey(maps, 1)).values
    error = scores.std() / np.sqrt(len(scores))
    assert metric.chance == 0 and error < 0.04
    assert abs(scores.mean()) < 4 * error


def test_each_patch_goes_alone(make_samples: Make) -> None:
    assert (each_alone(make_samples(2)) == np.eye(16, dtype=bool)).all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("faithfulness_estimate[imputer=maen]", "Did you mean mean"),
        ("faithfulness_estimate[imputr=mean]", "imputer"),
        ("faithfulness_correlation[subset=0]", "subset"),
        ("faithfulness_correlation[runs=2]", "runs"),
        ("sensitivity_n[largest=1]", "largest"),
        ("infidelity[largest=0]", "largest"),
        ("box_sensitivity[sides=0]", "sides"),
        ("saco[groups=1]", "groups"),
    ],
)
def test_bad_parameters_are_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        metrics.get(spec)
