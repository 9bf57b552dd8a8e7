"""What every explainer must keep, found by the registry: a new file is covered with no edit here."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from adapters import Explainer

NAMES = adapters.registry.names()


def explainer(name: str) -> Explainer:
    return adapters.get(f"{name}[{adapters.registry.find(name).quick}]")


def batch(model: VisionTransformer, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, *model.patch_embed.img_size, generator=generator) - 0.5, torch.arange(n) % 5


def context(method: Explainer, inputs: Tensor) -> dict[str, Any]:
    height, width = inputs.shape[-2:]
    prior = np.outer(np.arange(height), np.arange(width)) / (height * width)
    known = {"roi_prior": prior, "concept": torch.ones(2, 3, height, width)}
    return {need: known[need] for need in method.needs}


def explain(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, **kwargs: Any) -> np.ndarray:
    method = explainer(name)
    return method(model, inputs, targets, **context(method, inputs), **kwargs)


def state(model: nn.Module) -> list[Any]:
    modules = [
        (m.training, getattr(m, "fused_attn", None), sorted(vars(m)), m.__dict__.get("forward"))
        for m in model.modules()
    ]
    hooks = [
        len(getattr(m, kind))
        for m in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    return [modules, hooks, [(p.requires_grad, p.grad) for p in model.parameters()]]


@pytest.mark.parametrize("name", NAMES)
def test_states_its_facts(name: str) -> None:
    method = explainer(name)
    assert method.family
    assert method.__doc__
    assert method.trivial or method.reference
    assert method.spec.startswith(name)
    assert set(method.needs) <= set(adapters.base.CONTEXT)


@pytest.mark.parametrize("name", NAMES)
def test_explains_any_vit_the_same_alone_and_in_a_batch_under_no_grad(name: str, vit: VisionTransformer) -> None:
    inputs, targets = batch(vit.double())  # in float32 rounding alone moves transformer_attribution by more
    before = state(vit)
    with torch.no_grad():
        together = explain(name, vit, inputs, targets)
        alone = [explain(name, vit, inputs[i : i + 1], targets[i : i + 1]) for i in range(3)]
        again = explain(name, vit, inputs.flip(0).numpy(), targets.flip(0).numpy())
    assert together.shape == (3, 1, *vit.patch_embed.img_size)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    tolerance = 1e-5 * np.abs(together).max()
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=0, atol=tolerance)
    np.testing.assert_allclose(again[::-1], together, rtol=0, atol=tolerance)
    assert state(vit) == before


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_changes_nothing(name: str, plain: VisionTransformer) -> None:
    inputs, targets = batch(plain)
    maps = []
    for fused in (True, False):
        for block in plain.blocks:
            block.attn.fused_attn = fused
        maps.append(explain(name, plain, inputs, targets))
    np.testing.assert_allclose(maps[0], maps[1], rtol=0, atol=1e-5 * np.abs(maps[0]).max())


@pytest.mark.parametrize("name", NAMES)
def test_depends_on_the_target_exactly_if_it_says_so(name: str, plain: VisionTransformer) -> None:
    inputs, targets = batch(plain)
    first, second = explain(name, plain, inputs, targets), explain(name, plain, inputs, (targets + 1) % 5)
    assert explainer(name).class_discriminative != np.array_equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_is_seeded_per_sample_and_leaves_the_generators_alone(name: str, plain: VisionTransformer) -> None:
    inputs, targets = batch(plain)
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1]
    first = explain(name, plain, inputs, targets)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.rand(3)
    np.random.rand(3)
    assert np.array_equal(explain(name, plain, inputs, targets), first)
    other = explain(name, plain, inputs, targets, seed=1)
    assert explainer(name).stochastic != np.array_equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_signed_maps_say_so(name: str, vit: VisionTransformer) -> None:
    inputs, targets = batch(vit)
    assert explainer(name).signed or (explain(name, vit, inputs, targets) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_explains_inside_inference_mode(name: str, plain: VisionTransformer) -> None:
    inputs, targets = batch(plain)
    outside = explain(name, plain, inputs, targets)
    with torch.inference_mode():
        np.testing.assert_allclose(explain(name, plain, inputs, targets), outside, atol=1e-6 * np.abs(outside).max())


@pytest.mark.parametrize("name", NAMES)
def test_explains_a_wrapped_model(name: str, plain: VisionTransformer) -> None:
    inputs, targets = batch(plain)
    wrapped = nn.Sequential(nn.Identity(), plain)
    assert np.array_equal(explain(name, wrapped, inputs, targets), explain(name, plain, inputs, targets))


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_a_cnn_or_says_why_not(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method, inputs = explainer(name), torch.rand(2, 3, 32, 32)
    if reason := method.supports(model):
        with pytest.raises(adapters.base.RequestError, match=reason):
            method(model, inputs, torch.tensor([0, 1]))
    else:
        assert explain(name, model, inputs, torch.tensor([0, 1])).shape == (2, 1, 32, 32)
