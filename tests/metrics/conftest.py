"""Small models and samples for the tests of metrics."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metrics import Samples

CLASSES, SIDE, PATCH = 4, 16, 4


class HookedAttention(nn.Module):
    """Attention over patches that needs gradients in its forward pass, as implementations of LRP do."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, PATCH, PATCH)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, classes)
        self.attention: Tensor | None = None
        self.history: list[Tensor] = []

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embed(inputs).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        attention = (query @ key.transpose(1, 2)).softmax(-1)
        attention.register_hook(self.keep)
        self.attention, self.history = attention, [attention]
        return self.head((tokens + attention @ value).mean(1))


class Linear(nn.Module):
    """Logits that are weighted sums of the pixels: replacing a patch changes each by a known amount."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", inputs, self.weights)


def per_patch(values: np.ndarray, side: int = 4) -> np.ndarray:
    """Sum (N, H, W) over patches: (N, P)."""
    n, height, width = values.shape
    return values.reshape(n, height // side, side, width // side, side).sum((2, 4)).reshape(n, -1)


@pytest.fixture
def hooked() -> nn.Module:
    torch.manual_seed(0)
    return HookedAttention().eval()


@pytest.fixture
def classifier() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Conv2d(8, 8, 3, 2), nn.GELU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    model = nn.Sequential(*layers)
    model(torch.zeros(1, 3, SIDE, SIDE))
    return model.eval()


def class_maps(rng: np.random.Generator, n: int) -> np.ndarray:
    """Signed token maps (N, K, H, W) for every class."""
    tokens = rng.standard_normal((n, CLASSES, SIDE // PATCH, SIDE // PATCH))
    return tokens.repeat(PATCH, 2).repeat(PATCH, 3) + 0.05 * rng.standard_normal((n, CLASSES, SIDE, SIDE))


def input_x_gradient(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Explain again, as `Samples.reexplain`: deterministic, signed, image by image."""
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        chosen = model(images).gather(1, torch.as_tensor(targets).long()[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, images)
    return (images * gradient).sum(1).detach().double().numpy()


@pytest.fixture
def make_samples(classifier: nn.Module) -> Callable[..., Samples]:
    """Samples of a small RGB classifier; keyword arguments replace their fields."""

    def make(n: int = 5, **changes: object) -> Samples:
        rng = np.random.default_rng(1)
        inputs = torch.as_tensor(rng.standard_normal((n, 3, SIDE, SIDE)), dtype=torch.float32)
        maps = class_maps(rng, n)
        targets = rng.integers(CLASSES, size=n)
        roi = np.zeros((n, SIDE, SIDE), dtype=bool)
        roi[:, 3:11, 5:14] = True
        other_roi = rng.random((n, CLASSES, 1, 1)) < np.indices((SIDE, SIDE)).sum(0) / 20
        other_roi[..., :6] = False  # the ROI has a column that no other class shares
        mosaic = rng.permuted(np.repeat([[True, False]], n, axis=0).repeat(2, 1), axis=1).reshape(n, 2, 2)
        with torch.no_grad():
            logits = classifier(inputs).double().numpy()
        samples = Samples(
            model=classifier,
            inputs=inputs,
            targets=targets,
            maps=maps[np.arange(n), targets],
            roi=roi,
            logits=logits,
            seeds=rng.integers(2**32, size=n).astype(np.uint32),
            patch=(PATCH, PATCH),
            explain=lambda classes: maps[np.arange(n), classes],
            reexplain=input_x_gradient,
            labels=rng.integers(CLASSES, size=n),
            roi_of=lambda classes: other_roi[np.arange(n), classes],
            mosaics=lambda: (inputs.flip(-1), mosaic.repeat(SIDE // 2, 1).repeat(SIDE // 2, 2)),
            black=torch.full((3,), -3.0),
        )
        return replace(samples, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def linear(make_samples: Callable[..., Samples]) -> tuple[Samples, np.ndarray]:
    """Samples of a linear model, and the true drop (N, H, W) of the target's logit when a pixel goes grey (0)."""
    weights = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    samples, model = make_samples(), Linear(weights)
    inputs = samples.inputs.double()
    inputs -= inputs.mean((2, 3), keepdim=True)  # so that "mean" replaces by 0
    drops = (inputs * weights[samples.targets]).sum(1).numpy()
    return replace(samples, model=model, inputs=inputs, logits=model(inputs).numpy()), drops


@pytest.fixture
def subset() -> Callable[[Samples, list[int]], Samples]:
    """The samples at some rows as if they had come alone: nothing shared with the others."""
    return lambda samples, rows: replace(samples.take(np.array(rows)), shared={})
