"""LIME and KernelSHAP against their packages, and against Shapley values counted out."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from captum.attr import KernelShap
from lime.lime_image import ImageExplanation, LimeImageExplainer
from scipy.stats import chisquare
from torch import Tensor, nn

import adapters
from adapters.base import Explainer
from adapters.masking import segment
from adapters.state import seeded
from adapters.vit import patch_size
from tests.adapters.conftest import build

TARGETS = [1, 3]


class Corners(nn.Module):
    """A game of the four 16 x 16 squares of an image of 32 x 32, with interactions and two classes."""

    def forward(self, images: Tensor) -> Tensor:
        a, b, c, d = nn.functional.avg_pool2d(images.mean(1), 16).flatten(1).unbind(1)
        return torch.stack([a + 2 * b - c + 3 * a * b - a * c * d + b * d, d - a * d], 1)


@pytest.fixture
def model() -> nn.Module:
    return build(img_size=64, patch_size=16).double().eval().requires_grad_(False)


@pytest.fixture
def image() -> Tensor:
    """(1, 3, 64, 64), of a few blotches."""
    coarse = torch.rand(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 4 - 2
    return nn.functional.interpolate(coarse, size=64)


def maps_of(explainer: Explainer, model: nn.Module, image: Tensor) -> np.ndarray:
    """The maps before they are rounded to float32."""
    with seeded(image[0], 0):
        return explainer.attribute(model, image, torch.tensor(TARGETS)).numpy()


def explanation_of(
    model: nn.Module, image: Tensor, segments: np.ndarray | None, num_samples: int, hide_color: int | None = None
) -> ImageExplanation:
    """What the lime package finds, from the same state of the global generators."""

    def query(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).softmax(1).numpy()

    with seeded(image[0], 0):
        explainer = LimeImageExplainer(random_state=np.random.randint(2**31 - 1))
        return explainer.explain_instance(
            image[0].permute(1, 2, 0).numpy(),
            query,
            labels=TARGETS,
            top_labels=None,
            hide_color=hide_color,
            num_samples=num_samples,
            segmentation_fn=None if segments is None else lambda _: segments,
        )


def painted(explanation: ImageExplanation, target: int) -> np.ndarray:
    weights = dict(explanation.local_exp[target])
    return np.vectorize(weights.get)(explanation.segments)


def test_lime_is_the_package(model: nn.Module, image: Tensor) -> None:
    maps = maps_of(adapters.get("lime", num_samples=150), model, image)
    explanation = explanation_of(model, image, segment(image[0]).numpy(), 150)
    assert len(explanation.local_exp[1]) > 3
    for target, found in zip(TARGETS, maps, strict=True):
        np.testing.assert_allclose(found, painted(explanation, target), atol=1e-9 * np.abs(maps).max())


@pytest.mark.parametrize("shape", ["plain", "non_square"])
def test_lime_patches_is_the_package_on_the_token_grid(shape: str) -> None:
    model = build(shape).double().eval().requires_grad_(False)
    height, width = patch_size(model)
    segments = np.kron(
        np.arange(model.patch_embed.num_patches).reshape(model.patch_embed.grid_size), np.ones((height, width), int)
    )
    image = torch.randn(1, 3, *segments.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = maps_of(adapters.get("lime_patches", num_samples=60), model, image)
    explanation = explanation_of(model, image, segments, 60)
    for target, found in zip(TARGETS, maps, strict=True):
        np.testing.assert_allclose(found, painted(explanation, target), atol=1e-9 * np.abs(maps).max())


def test_without_patch_tokens_the_patches_are_squares_of_16_pixels() -> None:
    (found,) = adapters.get("lime_patches", num_samples=40).explain(Corners(), torch.rand(1, 3, 32, 40), [0])
    assert [len(part.unique()) for part in (found[:16, :16], found[16:, 32:], found)] == [1, 1, 6]


@pytest.mark.parametrize("features", [1, 2, 50])
def test_lime_komorowski_is_the_packages_mask(model: nn.Module, image: Tensor, features: int) -> None:
    image = image.float().double()  # as an image of theirs, in float32
    maps = maps_of(adapters.get("lime_komorowski", num_samples=120, num_features=features), model, image)
    explanation = explanation_of(model, image, None, 120, hide_color=0)
    for target, found in zip(TARGETS, maps, strict=True):
        _, mask = explanation.get_image_and_mask(target, positive_only=True, num_features=features, hide_rest=False)
        assert mask.any()
        np.testing.assert_array_equal(found, mask)


def test_an_image_without_positive_weights_has_no_superpixel_marked(image: Tensor) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 2)

    assert not adapters.get("lime_komorowski", num_samples=20).explain(Constant(), image, [0]).any()


def test_each_distinct_image_is_asked_once(model: nn.Module) -> None:
    halves = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    halves[..., 32:] = 2.0
    asked: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    adapters.get("lime").explain(model, halves, [1])
    assert sum(asked) == 2 ** (int(segment(halves[0]).max()) + 1) <= 16


def test_kernel_shap_fits_as_captum_does(model: nn.Module) -> None:
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    explainer = adapters.get("kernel_shap", n_samples=80)
    (found,) = explainer.explain(model, image, [3]).double()
    with seeded(image[0], 0):
        design = explainer.sample(16)

    def same_samples(*_: object, **__: object) -> Iterator[Tensor]:
        yield from design.long().split(1)

    reference = KernelShap(model)
    reference.perturb_func = same_samples
    patches = torch.arange(16).view(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)[None, None]
    expected = reference.attribute(image, target=3, feature_mask=patches, n_samples=80)[0, 0]
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-4 * float(expected.abs().max()))


def shapley(values: dict[tuple[bool, ...], float], player: int) -> float:
    """The mean of what a player adds, over all orders in which players may come."""
    total, others = 0.0, [other for other in range(4) if other != player]
    for order in itertools.permutations(range(4)):
        before = set(order[: order.index(player)])
        without = tuple(other in before for other in range(4))
        total += values[tuple(shown or place == player for place, shown in enumerate(without))] - values[without]
    return total / math.factorial(len(others) + 1)


def worth(image: Tensor, target: int) -> dict[tuple[bool, ...], float]:
    """The logit of every coalition of squares."""
    values = {}
    for coalition in itertools.product([False, True], repeat=4):
        shown = torch.tensor(coalition).view(2, 2).repeat_interleave(16, 0).repeat_interleave(16, 1)
        values[coalition] = float(Corners()(image * shown)[0, target])
    return values


@pytest.mark.parametrize("target", [0, 1])
def test_from_all_coalitions_kernel_shap_finds_the_shapley_values(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    explainer = adapters.get("kernel_shap")
    often = {
        0: 1,
        1: 2,
        2: 1,
        3: 2,
        4: 1,
    }  # proportional to the Shapley kernel of four players, 3 / (C(4, k) k (4 - k))
    rows = [list(c) for c in itertools.product([False, True], repeat=4) for _ in range(often[sum(c)])]
    monkeypatch.setattr(type(explainer), "sample", lambda self, features: torch.tensor(rows))
    found = explainer.explain(Corners().double(), image, [target])[0, ::16, ::16].flatten()
    expected = [shapley(worth(image, target), player) for player in range(4)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_kernel_shap_comes_near_the_shapley_values_and_is_complete() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    found = adapters.get("kernel_shap", n_samples=4001).explain(Corners(), image, [0])[0, ::16, ::16].flatten()
    values = worth(image, 0)
    np.testing.assert_allclose(found, [shapley(values, player) for player in range(4)], atol=0.02)
    assert float(found.sum()) == pytest.approx(values[(True,) * 4] - values[(False,) * 4], abs=1e-4)


@pytest.mark.parametrize("n_samples", [4, 7, 30_000])
def test_coalitions_are_drawn_by_the_shapley_kernel(n_samples: int) -> None:
    torch.manual_seed(0)
    design = adapters.get("kernel_shap", n_samples=n_samples).sample(5)
    assert (len(design), design[0].all(), design[1].any()) == (n_samples, True, False)
    if n_samples < 100:
        return
    drawn, complements = design[2:].chunk(2)
    assert torch.equal(complements, ~drawn)
    chances = np.array([1 / (size * (5 - size) * math.comb(5, size)) for size in drawn.unique(dim=0).sum(1).tolist()])
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert len(counts) == 30
    assert chisquare(counts, chances / chances.sum() * len(drawn)).pvalue > 0.001
