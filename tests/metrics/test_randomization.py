"""Randomization: what is drawn anew and what is left alone, worst and best explainers, and Quantus on the same maps."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import quantus
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import metrics
from explainer_bench import RequestError
from metrics import Metric, Samples
from metrics.quantus_bridge import GradientModel, evaluate
from metrics.randomization import Mprt, duplicate, find_stages, is_norm, randomised, redraw, similarities

Make = Callable[..., Samples]
ORDERS = "cascading_top_down", "cascading_bottom_up", "independent"
KINDS = "spearman", "pearson", "ssim"
NAMES = "mprt", "smooth_mprt", "efficient_mprt"
VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4, "patch_size": 8, "img_size": 16}


class Frozen(nn.Module):
    """Batch normalisation whose parameters are buffers, as torchvision's FrozenBatchNorm2d."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.full((3,), 5.0))


class FrozenNorm(Frozen):
    pass


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(**VIT, reg_tokens=2, init_values=0.1),
    "distilled": lambda: VisionTransformerDistilled(**VIT),
    "torchvision": lambda: TorchvisionViT(16, 8, 3, 2, 16, 32, num_classes=4),
    "resnet": lambda: ResNet(BasicBlock, (2, 1, 1, 1), num_classes=4, channels=(4, 4, 8, 8)),
    "wrapped": lambda: nn.Sequential(nn.Identity(), GradientModel(VisionTransformer(**VIT))),
    "linear": lambda: nn.Linear(4, 4),
    "norm_first": lambda: nn.Sequential(FrozenNorm(), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4)),
}
EXPECTED = {
    "vit": ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "head"],
    "distilled": ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "head"],
    "torchvision": ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(3)), "heads.head"],
    "resnet": ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0", "fc"],
    "wrapped": [f"1.module.{part}" for part in ("patch_embed", "blocks.0", "blocks.1", "blocks.2", "head")],
    "linear": ["all"],
    "norm_first": ["1", "3"],
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return named(request.param)


def named(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            nn.init.normal_(tensor, mean=0.5, std=0.4)
    return model.eval()


@pytest.fixture
def vit() -> nn.Module:
    return named("vit")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("name", MODELS)
def test_stages_go_from_input_to_output(name: str) -> None:
    assert [stage.name for stage in find_stages(named(name))] == EXPECTED[name]


def test_every_parameter_is_in_one_stage(model: nn.Module) -> None:
    found = [tensor for stage in find_stages(model) for tensor in stage.tensors]
    assert len(found) == len(set(found))
    assert set(found) >= set(dict(model.named_parameters()))


def test_tokens_and_positions_are_randomised_with_the_embedding(vit: nn.Module) -> None:
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight"} <= set(find_stages(vit)[0].tensors)
    torchvision = find_stages(named("torchvision"))[0].tensors
    assert {"class_token", "encoder.pos_embedding", "conv_proj.weight"} <= set(torchvision)


def test_shared_parameter_is_drawn_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert [stage.tensors for stage in find_stages(model)] == [["0.weight", "0.bias"], ["2.bias"]]


def test_every_parameter_changes_and_no_two_are_alike(model: nn.Module) -> None:
    before = state(model)
    for stage in find_stages(model):
        redraw(model, stage, seed=0)
    assert changed(model, before) >= set(dict(model.named_parameters()))
    own = [p.flatten() for m in model.modules() if not is_norm(m) for p in m.parameters(recurse=False)]
    drawn = [values / values.norm() for values in own]
    for place, one in enumerate(drawn):
        assert not any(torch.allclose(one, other) for other in drawn[place + 1 :] if other.shape == one.shape)


def test_projections_of_multihead_attention_are_drawn_each_on_its_own() -> None:
    model = named("torchvision")
    before = state(model)
    for stage in find_stages(model):
        redraw(model, stage, seed=0)
    projections = [name for name in before if "in_proj_weight" in name]
    assert len(projections) == 3 and set(projections) <= changed(model, before)
    assert not torch.equal(*(model.state_dict()[name] for name in projections[:2]))


def test_draws_keep_the_root_mean_square_and_centre_on_zero() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    nn.init.constant_(model[0].weight, 0.3)
    nn.init.zeros_(model[0].bias)
    redraw(model, find_stages(model)[0], seed=0)
    weight = model[0].weight.detach()
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(weight.mean())) < 0.01
    assert not model[0].bias.any()


def test_normalisations_start_afresh(model: nn.Module) -> None:
    for stage in find_stages(model):
        redraw(model, stage, seed=0)
    for module in filter(is_norm, model.modules()):
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, fresh in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
            assert name not in own or (own[name] == fresh).all()


@pytest.mark.parametrize("order", ORDERS)
def test_original_and_generators_are_left_alone(vit: nn.Module, order: str) -> None:
    before, generator = state(vit), torch.get_rng_state()
    attributes = [sorted(vars(module)) for module in vit.modules()]
    assert len(list(randomised(vit, order, 0))) == 5
    assert not changed(vit, before)
    assert [sorted(vars(module)) for module in vit.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), generator)


def test_cascades_add_up_and_meet_where_all_is_random(vit: nn.Module) -> None:
    before, ends = state(vit), []
    for order in ORDERS[:2]:
        sizes = []
        for name, model in randomised(vit, order, 0):
            touched = changed(model, before)
            assert any(tensor.startswith(name) for tensor in touched)
            sizes.append(len(touched))
        assert sizes == sorted(set(sizes))
        ends.append(state(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in before)


def test_top_down_begins_with_the_head_and_bottom_up_with_the_embedding(vit: nn.Module) -> None:
    names = [stage.name for stage in find_stages(vit)]
    assert [name for name, _ in randomised(vit, "cascading_bottom_up", 0)] == names
    assert [name for name, _ in randomised(vit, "cascading_top_down", 0)] == names[::-1]


def test_independent_randomises_one_stage_at_a_time(vit: nn.Module) -> None:
    before, stages = state(vit), {stage.name: set(stage.tensors) for stage in find_stages(vit)}
    assert [changed(model, before) for _, model in randomised(vit, "independent", 0)] == list(stages.values())[::-1]


@given(n=st.integers(1, 9))
@settings(max_examples=9, deadline=None)
def test_thinning_keeps_the_number_asked_for_and_the_last(n: int) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(7)))
    every = [name for name, _ in randomised(model, "cascading_top_down", 0)]
    kept = [name for name, _ in randomised(model, "cascading_top_down", 0, stages=n)]
    assert len(kept) == min(n, 7) and kept[-1] == every[-1]
    assert kept == [name for name in every if name in kept]


def test_thinned_cascade_is_as_random_as_the_full_one(vit: nn.Module) -> None:
    (end,) = (state(model) for _, model in randomised(vit, "cascading_top_down", 0, stages=1))
    *_, full = (state(model) for _, model in randomised(vit, "cascading_top_down", 0))
    assert all(torch.equal(end[name], full[name]) for name in end)


def test_seed_decides_the_draws(vit: nn.Module) -> None:
    one, again, other = ([state(m) for _, m in randomised(vit, ORDERS[0], seed)][-1] for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["cls_token"], other["cls_token"])


@pytest.mark.parametrize("wrap", [False, True])
def test_models_that_keep_graphs_are_copied(hooked: nn.Module, wrap: bool) -> None:
    hooked(torch.zeros(1, 3, 16, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(hooked)
    with torch.inference_mode():
        copied = duplicate(GradientModel(hooked) if wrap else hooked)
    assert type(copied) is type(hooked) and copied is not hooked
    assert not any(parameter.is_inference() for parameter in copied.parameters())


def explainer_of(maps: Callable[[nn.Module, Tensor], np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda model, images, targets, rows: maps(model, images)


def edges(model: nn.Module, images: Tensor) -> np.ndarray:
    grey = images.double().mean(1).numpy()
    return np.abs(grey - np.roll(grey, 1, axis=1))


def hashed(model: nn.Module, images: Tensor) -> np.ndarray:
    """Noise that another weight changes completely."""
    seed = abs(hash(tuple(float(parameter.detach().sum()) for parameter in model.parameters())))
    return np.random.default_rng(seed).standard_normal((len(images), *images.shape[2:]))


def told(make_samples: Make, explain: Callable[[nn.Module, Tensor], np.ndarray], n: int = 5) -> Samples:
    samples = make_samples(n)
    return replace(samples, maps=explain(samples.model, samples.inputs), reexplain=explainer_of(explain))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_map_of_the_image_alone_scores_worst(make_samples: Make, order: str, kind: str) -> None:
    metric = metrics.get("mprt", order=order, similarity=kind)
    np.testing.assert_allclose(metric(told(make_samples, edges)).values, metric.bounds[1])


def test_map_of_the_noisy_image_alone_scores_worst(make_samples: Make) -> None:
    np.testing.assert_allclose(metrics.get("smooth_mprt[draws=3]")(told(make_samples, edges)).values, 1)
    assert (metrics.get("efficient_mprt")(told(make_samples, edges)).values == 0).all()


@pytest.mark.parametrize("absolute", [True, False])
def test_map_of_the_weights_alone_scores_zero_on_average(make_samples: Make, absolute: bool) -> None:
    scores = metrics.get("mprt", absolute=absolute)(told(make_samples, hashed, 100)).values
    assert abs(scores.mean()) < 0.02 and scores.max() < 0.5


def test_sign_counts_only_where_asked(make_samples: Make) -> None:
    samples = make_samples()
    original = {name: p.detach().clone() for name, p in samples.model.named_parameters()}

    def flips(model: nn.Module, images: Tensor) -> np.ndarray:
        same = all(torch.equal(p, original[name]) for name, p in model.named_parameters())
        return images.double().mean(1).numpy() * (1 if same else -1)

    samples = told(make_samples, flips)
    np.testing.assert_allclose(metrics.get("mprt")(samples).values, 1)
    for kind in ("spearman", "pearson"):
        np.testing.assert_allclose(metrics.get("mprt", absolute=False, similarity=kind)(samples).values, -1)


def in_turn(maps: np.ndarray) -> Callable[..., np.ndarray]:
    """Explain again with the maps (S, N, H, W) of each stage in turn."""
    turns: Iterator[np.ndarray] = iter(maps)
    return lambda *_: next(turns)


def test_score_is_the_mean_over_stages_without_the_original_and_without_constant_maps(make_samples: Make) -> None:
    samples = make_samples(3)
    stages = np.random.default_rng(0).standard_normal((3, *samples.maps.shape))
    stages[1, 1], stages[:, 2] = 0.3, 0
    scores = metrics.get("mprt[similarity=pearson]")(replace(samples, reexplain=in_turn(stages)))
    a = np.abs(samples.maps.reshape(3, -1))
    each = np.array([[np.corrcoef(a[n], np.abs(stages[s, n]).ravel())[0, 1] for s in range(3)] for n in range(2)])
    np.testing.assert_allclose(scores.values[:2], [each[0].mean(), each[1, [0, 2]].mean()])
    assert np.isnan(scores.values[2]) and scores.reasons == ["", "", "constant map at every stage"]


@pytest.mark.parametrize("name", NAMES)
def test_no_explainer_is_one_clear_line(make_samples: Make, name: str) -> None:
    with pytest.raises(RequestError, match="reexplain"):
        metrics.get(name)(make_samples(reexplain=None))


@pytest.mark.parametrize("name", NAMES)
def test_all_explainers_see_the_same_models_and_images(make_samples: Make, name: str) -> None:
    samples, seen = make_samples(2), [[], []]

    def record(who: int) -> Callable[..., np.ndarray]:
        def reexplain(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
            seen[who].append((torch.cat([p.detach().flatten() for p in model.parameters()]), images.clone()))
            return np.random.default_rng(who).random((len(images), 16, 16))

        return reexplain

    for who in range(2):
        metrics.get(name)(replace(samples, reexplain=record(who)))
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.equal(a, b) for one, two in zip(*seen, strict=True) for a, b in zip(one, two, strict=True))


def test_costs_what_it_says(make_samples: Make) -> None:
    explained: list[int] = []

    def count(model: nn.Module, images: Tensor) -> np.ndarray:
        explained.append(len(images))
        return images.double().mean(1).numpy()

    for spec, expected in {
        "mprt": 3,
        "mprt[stages=1]": 1,
        "smooth_mprt[draws=4]": 16,
        "smooth_mprt[draws=4,stages=2]": 12,
        "efficient_mprt": 1,
    }.items():
        explained.clear()
        metrics.get(spec)(make_samples(5, reexplain=explainer_of(count)))
        assert sum(explained) == 5 * expected


def test_smoothing_averages_over_noise_in_units_of_the_range(make_samples: Make) -> None:
    samples, draws = make_samples(2), []
    samples = replace(samples, inputs=samples.inputs * torch.tensor([1.0, 10.0])[:, None, None, None])

    def record(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        draws.append((images - samples.inputs[rows]).numpy())
        return images.double().mean(1).numpy()

    metric = metrics.get("smooth_mprt[draws=30,stages=1]")
    maps = metric.maps_of(replace(samples, reexplain=record), samples.model)
    for row, image in enumerate(samples.inputs):
        assert draws[row].std() == pytest.approx(0.1 * float(image.max() - image.min()), rel=0.05)
        assert abs(draws[row].mean()) < 0.02 * draws[row].std() + 0.01
        np.testing.assert_allclose(maps[row], (image + torch.from_numpy(draws[row])).double().mean((0, 1)), atol=1e-5)


def test_without_noise_it_is_the_plain_test(make_samples: Make) -> None:
    samples = make_samples()
    samples = replace(samples, maps=samples.reexplain(samples.model, samples.inputs, samples.targets, np.arange(5)))
    smooth = metrics.get("smooth_mprt[noise=0,draws=2,order=independent]")(samples).values
    np.testing.assert_allclose(smooth, metrics.get("mprt[order=independent]")(samples).values, atol=1e-5)


def real_maps(shared: Path) -> np.ndarray:
    """Maps (4, 32, 32) of real images, of four explainers, and their values relative to the largest."""
    with np.load(shared / "golden/explainers_vit_tiny.npz") as stored:
        keys = [f"{case}/{name}" for case in ("catdog__243", "el2__340") for name in ("gae", "cdam")]
        maps = np.stack([np.array(stored[key], dtype=float).reshape(14, 14) for key in keys])
    return np.pad(maps, ((0, 0), (0, 2), (0, 2)), mode="reflect") / np.abs(maps).max(axis=(1, 2), keepdims=True)


def some_maps(request: pytest.FixtureRequest, kind: str, n: int) -> np.ndarray:
    """Return (n, 16, 16): random maps, or real ones with some noise that tells them apart."""
    rng = np.random.default_rng(5)
    if kind == "random":
        return rng.standard_normal((n, 16, 16))
    real = real_maps(request.getfixturevalue("shared"))
    return real[np.arange(n) % 4] + 0.1 * rng.standard_normal((n, 16, 16))


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("similarity", ["spearman", "pearson"])
def test_stages_score_as_in_quantus(
    make_samples: Make, request: pytest.FixtureRequest, kind: str, similarity: str
) -> None:
    maps = some_maps(request, kind, 5)
    samples, compare = make_samples(1, maps=maps[:1]), getattr(quantus.similarity_func, f"correlation_{similarity}")
    served: Iterator[np.ndarray] = iter(maps[:, None, None])  # Quantus explains the unrandomised model first
    reference = quantus.MPRT(similarity_func=compare, layer_order="top_down", disable_warnings=True)
    expected = evaluate(reference, samples, 0, samples.model, lambda **_: next(served))
    metric = metrics.get("mprt", similarity=similarity)
    found = metric.by_stage(replace(samples, reexplain=in_turn(maps[1:4, None])))
    assert list(found) == list(expected)[1:] and next(iter(expected)) == "original"
    for stage, values in found.items():
        np.testing.assert_allclose(values, expected[stage], atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_efficient_score_is_that_of_quantus(make_samples: Make, request: pytest.FixtureRequest, kind: str) -> None:
    maps = some_maps(request, kind, 12)
    samples = make_samples(6, maps=maps[:6])
    found = metrics.get("efficient_mprt")(replace(samples, reexplain=lambda *_: maps[6:])).values
    for row in range(6):
        served = iter([maps[row], *[maps[6 + row]] * 9])
        reference = quantus.EfficientMPRT(disable_warnings=True, skip_layers=True)
        expected = evaluate(reference, samples, row, samples.model, lambda served=served, **_: next(served)[None, None])
        assert found[row] == pytest.approx(expected, abs=1e-5)


def test_complexity_of_constant_and_uniform_maps(make_samples: Make) -> None:
    metric = metrics.get("efficient_mprt")
    uniform = np.arange(400.0).reshape(1, 20, 20)
    np.testing.assert_allclose(metric.complexity(uniform), np.log(100))
    np.testing.assert_allclose(metric(make_samples(3, reexplain=lambda *_: np.full((3, 16, 16), 0.2))).values, -1)


maps_of_any_kind = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.integers(2, 6).map(
        lambda levels: np.random.default_rng(seed).integers(0, levels, (2, 1, 9, 9)).astype(float) - 1
    )
)


@given(pair=maps_of_any_kind, kind=st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_similarity_is_symmetric_and_within_bounds(pair: np.ndarray, kind: str) -> None:
    a, b = pair
    value = similarities(a, b, kind)
    np.testing.assert_allclose(value, similarities(b, a, kind), atol=1e-12)
    assert (-1 - 1e-12 <= value[0] <= 1 + 1e-12) == (np.ptp(a) > 0 and np.ptp(b) > 0)
    if np.ptp(a) > 0:
        np.testing.assert_allclose(similarities(a, a, kind), 1)


@given(pair=maps_of_any_kind)
@settings(max_examples=30, deadline=None)
def test_rank_correlation_follows_order_and_averages_ties(pair: np.ndarray) -> None:
    a, b = pair
    value = similarities(a, b, "spearman")
    np.testing.assert_allclose(similarities(np.exp(a), b, "spearman"), value, atol=1e-12)
    ranks = [rankdata(each.ravel()) for each in (a, b)]
    if np.isfinite(value[0]):
        assert value[0] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_to_a_constant_map_is_undefined(kind: str) -> None:
    varied = np.random.default_rng(0).random((1, 9, 9))
    assert np.isnan(similarities(varied, np.full((1, 9, 9), 0.1), kind)).all()


def test_parameters_are_stated(make_samples: Make) -> None:
    assert metrics.get("mprt[stages=2]").spec == "mprt[stages=2]"
    for wrong in ("mprt[stages=0]", "mprt[order=sideways]", "smooth_mprt[draws=0]", "efficient_mprt[bins=1]"):
        with pytest.raises(RequestError, match="parameter"):
            metrics.get(wrong)
    assert isinstance(metrics.get("smooth_mprt"), Mprt) and isinstance(metrics.get("mprt"), Metric)


def test_complexity_of_a_nearly_constant_map_is_a_number(make_samples: Make) -> None:
    maps = make_samples().maps.copy()
    maps[1] = 1 + np.finfo(float).eps * (np.arange(256).reshape(16, 16) % 2)
    scores = metrics.get("efficient_mprt")(make_samples(maps=maps))
    assert np.isfinite(scores.values).all()


def test_a_normalising_classifier_is_randomised() -> None:
    class NormedLinear(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), NormedLinear(4, 3))
    before = model[1].weight.detach().clone()
    redraw(model, find_stages(model)[-1], 0)
    assert model[1].weight.unique().numel() == 12 and not torch.equal(model[1].weight, before)
