"""Every adapter inside Quantus itself, under ``torch.no_grad``, with a model that needs gradients to run at all."""

from typing import Any

import numpy as np
import pytest
import quantus
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import adapters
from metrics.quantus_bridge import GradientModel

SIZE = 64
CONTEXT = {"roi_prior": np.outer(np.arange(SIZE), np.arange(SIZE)) + 1.0, "concept": np.ones((2, 3, SIZE, SIZE))}
SHAPE = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 8, "num_classes": 4}


class HookedAttention(Attention):
    """Registers a backward hook in its forward pass, as the released LRP models do."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(x, *args, **kwargs)
        out.register_hook(lambda gradient: gradient)
        return out


@pytest.fixture(scope="module")
def hooked() -> VisionTransformer:
    torch.manual_seed(2)
    model = VisionTransformer(**SHAPE)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for block in model.blocks:
        block.attn.__class__ = HookedAttention
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((3, 1, SIZE, SIZE))
    mask[:, :, 16:32, 16:48] = 1
    blocks = np.kron(rng.random((3, 3, 4, 4)), np.ones((16, 16)))  # of noise alone there is a single superpixel
    return {
        "x_batch": (blocks + 0.2 * rng.random((3, 3, SIZE, SIZE))).astype(np.float32),
        "y_batch": np.array([0, 1, 2]),
        "s_batch": mask,
    }


def methods() -> dict[str, Any]:
    """Return every explainer that serves a Vision Transformer, with parameters that make it cheap."""
    model = VisionTransformer(**SHAPE)  # type: ignore[arg-type]
    built = {name: adapters.quick(name) for name in adapters.registry.names()}
    return {name: method for name, method in built.items() if not method.supports(model)}


def test_the_bare_model_cannot_run_without_gradients(hooked: VisionTransformer, batch: dict[str, np.ndarray]) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="doesn't require gradient"):
        hooked(torch.from_numpy(batch["x_batch"]))


def accepted(method: Any, model: torch.nn.Module, batch: dict[str, np.ndarray]) -> bool:
    """Tell whether Quantus's own assertions let these maps pass: none constant, none without a positive value."""
    context = {need: CONTEXT[need] for need in method.needs}
    maps = np.stack([method(model, batch["x_batch"], np.full(3, target), **context) for target in range(4)])
    flat = maps.reshape(12, -1)
    return bool(((flat.max(1) > flat.min(1)) & (flat.max(1) > 0)).all())


def test_every_adapter_works_unmodified_in_quantus_evaluate(
    hooked: VisionTransformer, batch: dict[str, np.ndarray]
) -> None:
    instances = {
        "Sparseness": quantus.Sparseness(disable_warnings=True),
        "Relevance Rank Accuracy": quantus.RelevanceRankAccuracy(disable_warnings=True),
        "Random Logit": quantus.RandomLogit(num_classes=4, disable_warnings=True),
    }
    usable = {name: method for name, method in methods().items() if accepted(method, GradientModel(hooked), batch)}
    assert len(usable) >= 0.75 * len(methods())
    with torch.no_grad():
        results = quantus.evaluate(
            metrics=instances,
            xai_methods=usable,
            model=GradientModel(hooked),
            **batch,
            explain_func_kwargs=CONTEXT,
        )
    assert set(results) == set(usable)
    for name, scores in results.items():
        assert set(scores) == set(instances), name
        for metric, values in scores.items():
            assert np.shape(values) == (3,) and np.isfinite(values).all(), (name, metric)


@pytest.mark.parametrize("name", methods())
def test_every_adapter_works_unmodified_in_random_logit(
    name: str, hooked: VisionTransformer, batch: dict[str, np.ndarray]
) -> None:
    method, model = methods()[name], GradientModel(hooked)
    metric = quantus.RandomLogit(num_classes=4, seed=1, disable_warnings=True)
    call: dict[str, Any] = {"explain_func": method, "explain_func_kwargs": CONTEXT, "channel_first": True}
    with torch.no_grad():
        if name == "constant":
            with pytest.raises(AssertionError, match="all equal to one"):  # Quantus scores no constant map
                metric(model=model, x_batch=batch["x_batch"], y_batch=batch["y_batch"], **call)
            return
        scores = metric(model=model, x_batch=batch["x_batch"], y_batch=batch["y_batch"], **call)
    assert len(scores) == 3 and np.isfinite(scores).all()
    assert method.class_discriminative != np.allclose(scores, 1, atol=1e-6)
