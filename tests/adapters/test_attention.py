"""Attention maps against their definitions, written out matrix by matrix."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from adapters.recording import Recording

from .written_out import KINDS, images, make, read_rows, run


def explain(spec: str, model: VisionTransformer) -> np.ndarray:
    return adapters.get(spec).explain(model, images(model), [1, 4]).flatten(1).numpy()


def patches(model: VisionTransformer, matrix: Tensor) -> np.ndarray:
    """The mean of the rows that the head reads, without prefix tokens."""
    return matrix[read_rows(model), model.num_prefix_tokens :].mean(0).detach().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_raw_attention_is_the_row_of_what_the_head_reads(kind: str) -> None:
    model = make(kind)
    steps = [run(model, image)[1] for image in images(model)]
    for block in range(3):
        expected = [patches(model, step[block].attention.mean(0)) for step in steps]
        np.testing.assert_allclose(explain(f"attention_block_k[k={block}]", model), expected, rtol=1e-5)
    np.testing.assert_array_equal(explain("raw_attention", model), explain("attention_block_k[k=2]", model))


def fused(attention: Tensor, fusion: str, discard: float) -> Tensor:
    """Join the heads and set the smallest entries to 0, entry by entry, all but the first."""
    stacked = attention.detach().numpy()
    matrix = {"mean": stacked.mean, "min": stacked.min, "max": stacked.max}[fusion](0)
    flat = matrix.flatten()
    for position in np.argsort(flat)[: int(discard * flat.size)]:
        if position:
            flat[position] = 0
    return torch.from_numpy(flat.reshape(matrix.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize(("fusion", "discard"), [("mean", 0), ("min", 0.9), ("max", 0.9)])
def test_rollout_is_the_product_of_normalised_matrices(kind: str, start: int, fusion: str, discard: float) -> None:
    model, expected = make(kind), []
    for image in images(model):
        _, steps = run(model, image)
        flow = torch.eye(steps[0].tokens.shape[1], dtype=torch.double)
        for step in steps[start:]:
            mixed = fused(step.attention, fusion, discard) + torch.eye(len(flow))
            flow = torch.stack([row / row.sum() for row in mixed]) @ flow
        expected.append(patches(model, flow))
    maps = explain(f"rollout[fusion={fusion},discard={discard},start_layer={start}]", model)
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gae_with_unit_gradients_is_rollout_without_normalisation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(seen: Recording, module: nn.Module) -> Tensor:
        return torch.ones_like(seen.output(module))

    monkeypatch.setattr(Recording, "gradient", ones)
    model, expected = make(kind), []
    for image in images(model):
        _, steps = run(model, image)
        unit = torch.eye(steps[0].tokens.shape[1])
        product = torch.linalg.multi_dot([step.attention.mean(0) + unit for step in reversed(steps)])
        expected.append(patches(model, product))
    np.testing.assert_allclose(explain("gae", model), expected, rtol=1e-5)
