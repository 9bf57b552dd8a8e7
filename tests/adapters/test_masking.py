"""Occlusion, ablation and RISE against captum and the formula written out; one image's targets share its queries."""

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, Occlusion
from skimage.transform import resize
from torch import Tensor, nn

import adapters
from adapters.masking import QueryExplainer, probabilities, segment
from adapters.state import seeded
from explainer_bench import RequestError
from tests.adapters.conftest import build

TARGETS = torch.tensor([1, 3])
QUERIES = [name for name, cls in adapters.registry.classes.items() if issubclass(cls, QueryExplainer)]


def blotches(*size: int) -> Tensor:
    coarse = torch.rand(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 4 - 2
    return nn.functional.interpolate(coarse, size=size)


def twice(image: Tensor) -> Tensor:
    """One image, of which two targets are explained."""
    return image.expand(2, -1, -1, -1)


@pytest.mark.parametrize(
    ("parameters", "window", "stride"),
    [({}, (8, 16), (8, 16)), ({"window": 10}, (10, 10), (10, 10)), ({"window": 9, "stride": 4}, (9, 9), (4, 4))],
)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_occlusion_is_captums(
    parameters: dict[str, int], window: tuple[int, int], stride: tuple[int, int], baseline: float
) -> None:
    model, image = build("non_square").double().eval(), blotches(24, 48)
    found = adapters.get("occlusion", baseline=baseline, **parameters).explain(model, twice(image), TARGETS)
    with torch.no_grad():
        expected = Occlusion(model).attribute(
            twice(image), (3, *window), (3, *stride), baselines=baseline, target=TARGETS
        )
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-6 * expected.abs().max())


def test_a_window_larger_than_the_image_hides_all_of_it() -> None:
    model, image = build().double().eval(), blotches(32, 32)
    (found,) = adapters.get("occlusion", window=50).explain(model, image, [2])
    with torch.no_grad():
        expected = model(image)[0, 2] - model(image * 0)[0, 2]
    np.testing.assert_allclose(found, np.full((32, 32), expected), rtol=1e-6)


@pytest.mark.parametrize("spec", ["occlusion[window=4,stride=5]", "occlusion[stride=9]"])
def test_windows_with_gaps_are_refused(spec: str) -> None:
    with pytest.raises(RequestError, match=r"stride=\d leaves gaps between windows of \d pixels"):
        adapters.get(spec).explain(build(), blotches(32, 32), [0])


@pytest.mark.parametrize(
    ("spec", "cost"), [("occlusion", 197), ("occlusion[window=32]", 50), ("occlusion[stride=8]", 730)]
)
def test_the_cost_of_occlusion_counts_its_windows(spec: str, cost: int) -> None:
    assert adapters.get(spec).cost == cost
    model, asked = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), []
    model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    adapters.get(spec).explain(model, torch.rand(1, 3, 224, 224), [0])
    assert sum(asked) == cost


@pytest.mark.parametrize("baseline", [0.0, -1.5])
def test_feature_ablation_is_captums(baseline: float) -> None:
    model, image = build(img_size=64).double().eval(), blotches(64, 64)
    segments = segment(image[0])
    found = adapters.get("feature_ablation", baseline=baseline).explain(model, twice(image), TARGETS)
    with torch.no_grad():
        expected = FeatureAblation(model).attribute(
            twice(image), baselines=baseline, target=TARGETS, feature_mask=segments[None, None]
        )
    assert segments.max() > 2
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-6 * expected.abs().max())


def written_out(model: nn.Module, image: Tensor, masks: np.ndarray, p: float) -> np.ndarray:
    """RISE's sum, one mask at a time."""
    total = np.zeros((len(TARGETS), *image.shape[2:]))
    for mask in masks:
        with torch.no_grad():
            probabilities = model(image * torch.from_numpy(mask)).softmax(1)[0]
        for row, target in enumerate(TARGETS):
            total[row] += float(probabilities[target]) * mask
    return total / len(masks) / p


@pytest.mark.parametrize(("n_masks", "cells", "p"), [(20, 7, 0.5), (9, 4, 0.3)])
def test_rise_is_the_sum_over_the_authors_masks(n_masks: int, cells: int, p: float) -> None:
    model, image = build("non_square").double().eval(), blotches(24, 48)
    found = adapters.get("rise", n_masks=n_masks, cells=cells, p=p).explain(model, twice(image), TARGETS)
    height, width = -(-24 // cells), -(-48 // cells)
    with seeded(image[0], 0):
        grids = (torch.rand(n_masks, cells, cells) < p).double().numpy()
        down, across = (torch.randint(size, (n_masks, 1))[:, 0].tolist() for size in (height, width))
    masks = []
    for grid, y, x in zip(grids, down, across, strict=True):
        full = resize(grid, ((cells + 1) * height, (cells + 1) * width), order=1, mode="reflect", anti_aliasing=False)
        masks.append(full[y : y + 24, x : x + 48])
    np.testing.assert_allclose(found, written_out(model, image, np.stack(masks), p), rtol=1e-5)


def test_masks_show_the_share_p_and_are_drawn_in_several_batches() -> None:
    torch.manual_seed(0)
    explainer = adapters.get("rise", n_masks=300, p=0.3)
    masks = torch.cat(list(explainer._masks(torch.zeros(3, 28, 28))))
    assert masks.shape == (300, 28, 28)
    assert float(masks.mean()) == pytest.approx(0.3, abs=0.02)
    assert masks.min() >= 0 and masks.max() <= 1


@pytest.mark.parametrize("name", QUERIES)
def test_targets_of_an_image_share_its_queries_and_keep_their_maps(name: str) -> None:
    explainer = adapters.quick(name)
    model, images = build().double(), blotches(32, 32)
    images = torch.cat([images, images, images.flip(3)])
    asked: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    together = explainer.explain(model, images, [0, 1, 1])
    of_all = sum(asked)
    asked.clear()
    alone = [explainer.explain(model, images[row : row + 1], [target])[0] for row, target in enumerate([0, 1, 1])]
    of_first, of_last = np.split(np.array(asked), [len(asked) // 3 * 2])
    assert of_all == of_first.sum() / 2 + of_last.sum()
    for row in range(3):
        np.testing.assert_allclose(together[row], alone[row], atol=1e-6 * float(alone[row].abs().max()))


def test_the_shared_queries_are_tested_for_all() -> None:
    assert len(QUERIES) == 10


def test_the_probability_of_a_single_logit_is_its_sigmoid() -> None:
    logits = torch.tensor([[-1.0], [3.0]])
    assert torch.equal(probabilities(logits), logits.sigmoid())
    assert torch.equal(probabilities(logits.expand(2, 2)), torch.full((2, 2), 0.5))
