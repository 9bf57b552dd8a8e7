"""The perturbation engine: each distinct removal once, at token level where it can, and the same whatever the batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.imputers import STATIC
from metrics.perturbation import (
    Passes,
    Removal,
    in_batches,
    outputs,
    passes,
    patch_grid,
    patch_ranks,
    patch_sums,
    prefetch,
    ranks,
    rivals,
)
from metrics.quantus_bridge import GradientModel
from metrics.vit import TokenModel, drop_tokens

Make = Callable[..., Samples]
VITS: dict[str, dict[str, object]] = {
    "class_token": {},
    "mean_pooled": {"global_pool": "avg", "fc_norm": True},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True},
    "not_overlapping_the_prefix": {"no_embed_class": True, "reg_tokens": 1, "pre_norm": True},
    "distilled": {},
}
AT_TOKEN_LEVEL = set(VITS) - {"distilled"}


def vit(kind: str = "class_token") -> VisionTransformer:
    """Return a random ViT of two blocks and four classes on 4 x 4 patches, whose logits differ between images."""
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = (VisionTransformerDistilled if kind == "distilled" else VisionTransformer)(**size, **VITS[kind])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval().requires_grad_(False)


def of_vit(make_samples: Make, model: nn.Module, **changes: object) -> Samples:
    samples = make_samples(model=model, **changes)
    with torch.no_grad():
        return replace(samples, logits=model(samples.inputs).double().numpy())


def removals(n: int = 5, steps: int = 6, features: int = 16) -> np.ndarray:
    """Random removals (N, S, F), with nothing and with everything removed among them."""
    removed = np.random.default_rng(0).random((n, steps, features)) < np.linspace(0, 1, steps)[:, None]
    removed[:, -1] = True
    return removed


def by_hand(samples: Samples, removed: np.ndarray, fill: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the target's logits (N, S), one perturbed image at a time."""
    logits = np.empty(removed.shape[:2])
    for row, step in np.ndindex(logits.shape):
        image = samples.inputs[row].clone()
        for patch in np.flatnonzero(removed[row, step]):
            y, x = divmod(int(patch), 4)
            image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = fill(samples.inputs[row])[
                :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4
            ]
        with torch.no_grad():
            logits[row, step] = samples.model(image[None])[0, samples.targets[row]]
    return logits


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda image: image.mean((1, 2), keepdim=True).expand_as(image),
    "zero": torch.zeros_like,
    "black": lambda image: image.min().expand_as(image),
    "black_pixel": lambda image: torch.full_like(image, -3.0),
}


@pytest.mark.parametrize("imputer", FILLS)
@pytest.mark.parametrize("kind", [*VITS, "no_vit"])
def test_logits_are_those_of_the_perturbed_images(
    make_samples: Make, classifier: nn.Module, kind: str, imputer: str
) -> None:
    model = classifier if kind == "no_vit" else vit(kind)
    samples = of_vit(make_samples, model)
    assert (TokenModel.of(model, samples.patch) is not None) == (kind in AT_TOKEN_LEVEL)
    seen = outputs(samples, Removal(removals(), imputer))
    np.testing.assert_allclose(seen.logit, by_hand(samples, removals(), FILLS[imputer]), atol=1e-5)


def test_outputs_are_read_off_the_logits(make_samples: Make) -> None:
    samples = of_vit(make_samples, vit())
    seen = outputs(samples, Removal(np.zeros((5, 1, 16), dtype=bool), "mean"))
    logits, targets = samples.logits, samples.targets
    others = [np.delete(row, target).max() for row, target in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(seen.logit[:, 0], logits[np.arange(5), targets], atol=1e-5)
    np.testing.assert_allclose(seen.rival[:, 0], others, atol=1e-5)
    np.testing.assert_array_equal(seen.predicted[:, 0], logits.argmax(1))
    probability = torch.from_numpy(logits).softmax(1).numpy()[np.arange(5), targets]
    np.testing.assert_allclose(seen.target("probability")[:, 0], probability, atol=1e-6)


def test_the_only_class_has_no_rival(make_samples: Make) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1)).eval()
    samples = of_vit(make_samples, model, targets=np.zeros(5, dtype=int))
    seen = outputs(samples, Removal(removals(), "mean"))
    assert np.isnan(seen.rival).all() and (seen.target("probability") == 1).all()
    np.testing.assert_array_equal(rivals(samples.logits, samples.targets), 0)


@pytest.mark.parametrize("place", ["patch_embed", "patch_embed.proj", "blocks.1", "blocks.1.mlp"])
def test_hooks_of_a_model_see_what_they_would_see(make_samples: Make, place: str) -> None:
    """A hook that changes its module's output changes the logits alike, at whatever level the images are perturbed."""
    model = vit()
    model.get_submodule(place).register_forward_hook(lambda _, args, output: output * 1.5 + 0.1)
    samples = of_vit(make_samples, model)
    seen = outputs(samples, Removal(removals(), "mean"))
    np.testing.assert_allclose(seen.logit, by_hand(samples, removals(), FILLS["mean"]), atol=1e-5)


def test_model_that_needs_gradients_runs_wrapped(make_samples: Make, hooked: nn.Module) -> None:
    samples = make_samples(model=hooked.requires_grad_(False))
    with torch.no_grad():
        expected = GradientModel(hooked)(samples.inputs).numpy()[np.arange(5), samples.targets]
        seen = outputs(samples, Removal(np.zeros((5, 1, 16), dtype=bool), "mean"))
    np.testing.assert_allclose(seen.logit[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("imputer", ["mean", "token_removal"])
def test_model_is_as_it_was_even_after_an_error(make_samples: Make, imputer: str) -> None:
    model = vit()
    samples = of_vit(make_samples, model)
    handle = model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    engine = Passes(samples)
    vars(engine)["model"] = model  # the probe is not what breaks
    removal = Removal(removals()[:, :1] | np.eye(16, dtype=bool)[0], imputer)
    with pytest.raises(RuntimeError, match="broken"):
        engine.read(np.arange(5), removal)
    handle.remove()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        np.testing.assert_allclose(model(samples.inputs).numpy(), samples.logits, atol=1e-6)
    assert engine.computed == 0
    other = replace(removal, removed=np.roll(removal.removed, 1, axis=-1))
    for asked in (other, removal):  # nothing half done is taken for done, nor done for a request that never came
        before = engine.computed
        assert np.isfinite(engine.read(np.arange(5), asked).logit).all()
        assert engine.computed == before + 5


def without_tokens(model: VisionTransformer, image: Tensor, removed: np.ndarray) -> Tensor:
    """Return the logits (K,) of an image whose patch tokens are deleted, written out."""
    tokens = model._pos_embed(model.patch_embed(image[None]))
    prefix = model.num_prefix_tokens
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, ~torch.from_numpy(removed)]], dim=1)
    return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))[0]


@pytest.mark.parametrize("kind", VITS)
def test_removed_tokens_leave_the_sequence(make_samples: Make, kind: str) -> None:
    model = vit(kind)
    samples = of_vit(make_samples, model)
    removed = removals()
    removed[:, :, 5] = False  # a mean over no tokens is none
    seen = outputs(samples, Removal(removed, "token_removal"))
    with torch.no_grad():
        expected = [
            [without_tokens(model, image, one)[target] for one in of_image]
            for image, of_image, target in zip(samples.inputs, removed, samples.targets, strict=True)
        ]
    np.testing.assert_allclose(seen.logit, expected, atol=1e-5)


def test_tokens_are_removed_inside_a_wrapper(make_samples: Make) -> None:
    model = vit()
    removal = Removal(removals(), "token_removal")
    expected = outputs(of_vit(make_samples, model), removal).logit
    np.testing.assert_allclose(outputs(of_vit(make_samples, nn.Sequential(model)), removal).logit, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["no_vit", "no_prefix"])
def test_tokens_of_no_vit_or_all_tokens_there_are_cannot_be_removed(
    make_samples: Make, classifier: nn.Module, kind: str
) -> None:
    samples = make_samples(model=classifier if kind == "no_vit" else vit(kind))
    with pytest.raises(RequestError, match="token_removal"):
        drop_tokens(samples.model, samples.inputs, torch.zeros(5, 16, dtype=torch.bool))


def test_distinct_removals_are_computed_once_over_explainers_and_metrics(make_samples: Make) -> None:
    samples = make_samples()
    other = replace(samples, maps=samples.maps**3)  # the same order of pixels, but not of patches
    metrics.get("srg", steps=16)(samples)
    assert passes(samples).computed == 5 * 30
    metrics.get("srg", steps=16)(replace(samples, maps=samples.maps * 7))
    metrics.get("srg", steps=8)(replace(samples, maps=-samples.maps))
    metrics.get("srg", steps=16, output="probability")(samples.take(np.array([3, 1])))
    assert passes(samples).computed == 5 * 30
    metrics.get("morf_auc", steps=16)(samples)
    assert passes(samples).computed == 5 * 31  # the end of the curve
    metrics.get("srg", steps=16)(other)
    distinct = len({(row, mask.tobytes()) for maps in (samples, other) for row, mask in masks_of(maps)})
    assert passes(other).computed == distinct + 5
    metrics.get("srg", steps=16, imputer="zero")(samples)
    assert passes(samples).computed == distinct + 5 + 5 * 30


def masks_of(samples: Samples) -> list[tuple[int, np.ndarray]]:
    removed = metrics.get("srg", steps=16).removed(samples)  # type: ignore[attr-defined]
    return [(row, mask) for row, of_image in enumerate(removed) for mask in of_image]


def test_prefetch_computes_in_one_stream_all_that_the_scores_need(make_samples: Make) -> None:
    samples = make_samples(batch_size=7)
    flat = np.ones_like(samples.maps[:1])
    others = [replace(samples, maps=maps) for maps in (-(samples.maps**3), np.concatenate([flat, samples.maps[1:]]))]
    chosen = [metrics.get(spec) for spec in ("srg", "faithfulness_estimate", "sparseness", "saco", "deletion_auc")]
    cells = [(metric, each) for metric in chosen for each in (samples, *others)]
    alone = [metric(replace(each, shared={})) for metric, each in cells]
    prefetch(cells)
    computed = passes(samples).computed
    assert computed > 0
    for (metric, each), expected in zip(cells, alone, strict=True):
        scores = metric(each)
        np.testing.assert_allclose(scores.values, expected.values, atol=1e-6)
        assert scores.reasons == expected.reasons
    assert passes(samples).computed == computed


def test_removals_asked_for_together_fill_the_batches(make_samples: Make) -> None:
    sizes: list[int] = []

    class Watching(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append(len(inputs))
            return self.model(inputs)

    samples = make_samples(batch_size=16)
    samples = replace(samples, model=Watching(samples.model))
    rolled = replace(samples, maps=np.roll(samples.maps, 1, axis=0))
    prefetch([(metrics.get("srg", steps=4), each) for each in (samples, rolled)])
    probe, *full, last = sizes
    assert probe == 1 and set(full) == {16} and last <= 16
    assert sum(full) + last == passes(samples).computed > 5 * 6  # more than one explainer alone needs


@pytest.mark.parametrize("imputer", ["mean", "blur", "road", "token_removal"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_outputs_do_not_depend_on_the_batch(make_samples: Make, imputer: str, batch_size: int) -> None:
    removal = Removal(removals(), imputer)
    expected = outputs(of_vit(make_samples, vit()), removal)
    samples = of_vit(make_samples, vit(), batch_size=batch_size)
    for rows in (np.array([4, 0]), np.arange(5)):
        seen = outputs(samples.take(rows), Removal(removal.removed[rows], imputer))
        np.testing.assert_allclose(seen.logit, expected.logit[rows], atol=1e-5)


@pytest.mark.parametrize("kind", ["class_token", "mean_pooled"])
@pytest.mark.parametrize("imputer", ["mean", "token_removal"])
def test_bf16_comes_close_and_is_not_the_same(make_samples: Make, kind: str, imputer: str) -> None:
    removal = Removal(removals()[:, :-1], imputer)
    exact, coarse = (outputs(of_vit(make_samples, vit(kind), precision=p), removal).logit for p in ("fp32", "bf16"))
    assert coarse.dtype == np.float64
    gap = np.abs(exact - coarse).max() / np.abs(exact).max()
    assert 1e-5 < gap < 0.05


def test_segments_are_removed_as_they_lie(make_samples: Make) -> None:
    """The patches in another numbering, of each image its own, are the patches."""
    samples = make_samples()
    rng = np.random.default_rng(0)
    numbers = np.stack([rng.permutation(16) for _ in range(5)])
    segments = numbers.reshape(5, 4, 4).repeat(4, 1).repeat(4, 2)
    removed = removals()
    renumbered = np.zeros_like(removed)
    for row in range(5):
        renumbered[row][:, numbers[row]] = removed[row]
    expected = outputs(samples, Removal(removed, "blur")).logit
    seen = outputs(samples, Removal(renumbered, "blur", segments)).logit
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    computed = passes(samples).computed
    outputs(samples, Removal(renumbered, "blur", segments.copy()))
    assert passes(samples).computed == computed


def test_imputers_are_of_each_image_alone(make_samples: Make) -> None:
    inputs = torch.tensor([[[[0.0, 1], [2, 3]], [[4, 5], [6, 7]]], [[[-9, 0], [0, 1]], [[8, 8], [8, 8]]]])
    samples = make_samples(2, inputs=inputs, black=torch.tensor([-1.0, -2]))
    assert STATIC["mean"](samples).squeeze().tolist() == [[1.5, 5.5], [-2, 8]]
    assert STATIC["black"](samples).squeeze().tolist() == [0, -9]
    assert STATIC["black_pixel"](samples).squeeze().tolist() == [-1, -2]
    assert STATIC["zero"](samples).item() == 0


def test_patch_sums_run_in_raster_order(make_samples: Make) -> None:
    maps = np.arange(5 * 256, dtype=float).reshape(5, 16, 16)
    sums = patch_sums(make_samples(maps=maps, patch=(8, 4)))
    assert sums.shape == (5, 8)
    assert sums[1, 5] == maps[1, 8:16, 4:8].sum()


def test_upsampled_tokens_tie_exactly(make_samples: Make) -> None:
    maps = np.full((5, 16, 16), 0.1)
    assert (np.ptp(patch_sums(make_samples(maps=maps)), axis=1) == 0).all()


def test_ranks_follow_the_map_and_ties_favour_no_place(make_samples: Make) -> None:
    n = 2000
    maps = np.zeros((n, 16, 16))
    maps[:, 4:8, 8:12] = 1
    ranked = patch_ranks(make_samples(n, maps=maps))
    assert (np.sort(ranked, axis=1) == np.arange(16)).all()
    assert (ranked[:, 6] == 0).all()
    mean_rank = np.delete(ranked, 6, axis=1).mean(axis=0)
    assert np.abs(mean_rank - 8).max() < 4 * np.sqrt((15**2 - 1) / 12 / n)


def test_ranks_do_not_depend_on_the_other_samples(make_samples: Make) -> None:
    samples = make_samples(maps=np.zeros((5, 16, 16)))
    rows = np.array([4, 2])
    np.testing.assert_array_equal(patch_ranks(samples.take(rows)), patch_ranks(samples)[rows])
    assert ranks(np.array([[1.0, 3, 2]]), np.array([0])).tolist() == [[2, 0, 1]]


def test_image_that_is_no_whole_number_of_patches_is_refused(make_samples: Make) -> None:
    with pytest.raises(RequestError, match="16 x 16 pixels are not a whole number of patches of 5 x 4"):
        patch_grid(make_samples(patch=(5, 4)))


def test_model_that_returns_no_logits_is_refused(make_samples: Make) -> None:
    samples = make_samples(model=nn.Identity())
    with pytest.raises(RequestError, match="not logits"):
        outputs(samples, Removal(removals(), "mean"))


OUT_OF_MEMORY = [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_batches_halve_when_memory_runs_out(error: RuntimeError) -> None:
    sizes = []

    def run(index: torch.Tensor) -> torch.Tensor:
        sizes.append(len(index))
        if len(index) > 3:
            raise error
        return index * 2

    assert in_batches(run, torch.arange(10), 16).tolist() == list(range(0, 20, 2))
    assert sizes == [10, 8, 4, 2, 2, 2, 2, 2]


def test_scores_survive_a_memory_that_is_too_small(make_samples: Make) -> None:
    class Greedy(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor) -> Tensor:
            if len(inputs) > 3:
                raise torch.OutOfMemoryError("full")
            return self.model(inputs)

    samples = make_samples()
    expected = metrics.get("srg")(samples).values
    scores = metrics.get("srg")(replace(samples, model=Greedy(samples.model), shared={})).values
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_other_errors_and_a_single_image_too_large_are_raised() -> None:
    def fail(message: str) -> torch.Tensor:
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shape"):
        in_batches(lambda index: fail("wrong shape"), torch.arange(4), 2)
    with pytest.raises(RuntimeError, match="can't allocate"):
        in_batches(lambda index: fail("can't allocate memory"), torch.arange(4), 2)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(16, 4, embed_dim=16, depth=2, num_heads=2, num_classes=4).eval()


def normalise(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 2 - 1,)


def double(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


ALTERATIONS: dict[str, Callable[[Any], object]] = {
    "a pre-hook of the model": lambda vit: vit.register_forward_pre_hook(normalise),
    "a hook of the model": lambda vit: vit.register_forward_hook(double),
    "a hook of the blocks": lambda vit: vit.blocks.register_forward_hook(double),
    "a hook of the last norm": lambda vit: vit.norm.register_forward_hook(double),
    "a patched forward of the last block": lambda vit: setattr(
        vit.blocks[-1], "forward", lambda tokens: type(vit.blocks[-1]).forward(vit.blocks[-1], tokens) - tokens
    ),
    "a patched pooling": lambda vit: setattr(vit, "pool", lambda tokens: tokens.mean(1)),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_vit_is_asked_as_it_is_and_stays_as_it_is(make_samples: Make, name: str) -> None:
    vit = small_vit()
    ALTERATIONS[name](vit)
    samples = make_samples(3, model=vit)
    before = vit(samples.inputs)
    scores = metrics.get("srg", steps=4)(samples).values
    np.testing.assert_allclose(
        scores, metrics.get("srg", steps=4)(replace(samples, model=Wrapped(vit))).values, atol=1e-5
    )
    assert torch.equal(vit(samples.inputs), before)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"inputs": s.inputs + 1},
        lambda s: {"model": Wrapped(nn.Sequential(s.model, nn.Tanh()))},
        lambda s: {"targets": (s.targets + 1) % 4},
        lambda s: {"seeds": s.seeds + np.uint32(1)},
    ],
)
def test_replaced_samples_do_not_see_what_was_computed_for_others(make_samples: Make, change: Callable) -> None:
    samples = make_samples()
    metric = metrics.get("sensitivity_n", sizes=2, runs=5)
    first = metric(samples).values
    other = replace(samples, **change(samples))
    expected = metric(replace(other, shared={})).values
    assert not np.allclose(expected, first)
    np.testing.assert_array_equal(metric(other).values, expected)
    part = replace(samples.take(np.array([3, 1])), inputs=samples.inputs[[0, 4]])
    np.testing.assert_array_equal(metric(part).values, metric(replace(part, shared={})).values)


def test_a_request_that_fails_harms_no_other(make_samples: Make) -> None:
    samples = make_samples()
    expected = metrics.get("srg")(replace(samples, shared={})).values
    engine = passes(samples)
    engine.want(np.arange(5), Removal(np.ones((5, 2, 7), dtype=bool), "mean"))  # there are no 7 features
    engine.want(np.arange(5), Removal(np.eye(16, dtype=bool)[None].repeat(5, 0), "token_removal"))  # and no tokens
    with pytest.raises(RuntimeError):
        engine.run()
    np.testing.assert_array_equal(metrics.get("srg")(samples).values, expected)


def test_logits_that_are_not_finite_leave_every_score_undefined(make_samples: Make) -> None:
    class Broken(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.full((len(inputs), 4), torch.nan)

    samples = make_samples(model=Broken(), targets=np.zeros(5, dtype=int))
    for name in ("srg", "road", "road_lerf", "positive_perturbation_auc", "aopc"):
        scores = metrics.get(name)(samples)
        assert np.isnan(scores.values).all() and all(scores.reasons), name


def test_token_removal_wants_the_patches_of_the_model(make_samples: Make) -> None:
    samples = make_samples(3, model=small_vit(), patch=(8, 8))
    with pytest.raises(RequestError, match="16 patch tokens, the metric 4 patches"):
        metrics.get("srg", imputer="token_removal")(samples)
