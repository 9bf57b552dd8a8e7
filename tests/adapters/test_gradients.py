"""Gradient methods against captum, and against their formulas, written out with the same random draws."""

import copy
from collections.abc import Callable

import captum.attr
import numpy as np
import pytest
import torch
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import adapters
from adapters import conformance
from adapters.state import seeded

SAMPLED = ["smoothgrad", "smoothgrad_squared", "vargrad", "gradient_shap", "expected_gradients"]


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in float64, two images and their classes."""
    model = conformance.build(name).double().eval().requires_grad_(False)
    size = conformance.SIZES[name]
    torch.manual_seed(0)
    return model, torch.randn(2, 3, *size, dtype=torch.double), torch.tensor([1, 4])


def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images).gather(1, targets[:, None]).sum(), images)[0]


@pytest.mark.parametrize("name", ["vit_registers", "resnet"])
def test_saliency_and_input_times_gradient_are_captums(name: str) -> None:
    model, inputs, targets = case(name)
    leaf = inputs.clone().requires_grad_()
    saliency = captum.attr.Saliency(model).attribute(leaf, target=targets).amax(1)
    product = captum.attr.InputXGradient(model).attribute(leaf, target=targets).sum(1)
    for spec, expected in (("saliency", saliency), ("input_x_gradient", product)):
        maps = adapters.get(spec).explain(model, inputs, targets)
        torch.testing.assert_close(maps, expected.detach().float(), rtol=1e-5, atol=1e-6)


def test_integrated_gradients_are_complete() -> None:
    model, inputs, targets = case("vit")
    maps = adapters.get("integrated_gradients[n_steps=400]").explain(model, inputs, targets)
    difference = (model(inputs) - model(0 * inputs)).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(maps.double().sum((1, 2)), difference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [3, 20])
def test_noisy_gradients_are_their_formulas(samples: int) -> None:
    """20 samples are more than captum gets at a time."""
    model, inputs, targets = case("vit")
    for image, target in zip(inputs, targets, strict=True):
        with seeded(image, 0):
            noise = torch.cat([torch.randn(len(part), *image.shape) for part in torch.arange(samples).split(16)])
        copies = image + 0.15 * (image.max() - image.min()) * noise
        gradients = gradient(model, copies, target.expand(samples))
        formulas = {
            "smoothgrad": gradients.mean(0),
            "smoothgrad_squared": (gradients**2).mean(0),
            "vargrad": gradients.var(0, correction=0),
        }
        for name, expected in formulas.items():
            maps = adapters.get(name, samples=samples).explain(model, image[None], target[None])
            torch.testing.assert_close(maps[0], expected.sum(0).float(), rtol=1e-4, atol=1e-5)


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a linear model with a weight per pixel, an image and the class 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double().requires_grad_(False)
    return model, torch.rand(1, 3, 4, 4, dtype=torch.double) + torch.arange(3)[:, None, None], torch.tensor([1])


def test_on_a_linear_model_gradient_shap_is_input_times_gradient_and_noise_averages_out() -> None:
    model, image, target = linear()
    expected = adapters.get("input_x_gradient").explain(model, image, target)
    exact = adapters.get("gradient_shap[noise=0,samples=20]").explain(model, image, target)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)
    noisy = adapters.get("gradient_shap[samples=4000]").explain(model, image, target)
    assert not torch.equal(noisy, expected)
    torch.testing.assert_close(noisy, expected, rtol=0, atol=0.03)


def test_on_a_linear_model_expected_gradients_are_weights_times_the_distance_to_the_mean_baseline() -> None:
    model, image, target = linear()
    middle = (image.amax((2, 3), keepdim=True) + image.amin((2, 3), keepdim=True)) / 2
    expected = ((image - middle) * model[1].weight[1].view_as(image)).sum(1)
    maps = adapters.get("expected_gradients[samples=4000]").explain(model, image, target)
    torch.testing.assert_close(maps, expected.float(), rtol=0, atol=0.01)
    constant = torch.ones_like(image)  # its baselines are itself
    assert not adapters.get("expected_gradients").explain(model, constant, target).any()


def test_gradient_shap_without_noise_tends_to_integrated_gradients() -> None:
    model, inputs, targets = case("vit")
    expected = adapters.get("integrated_gradients").explain(model, inputs, targets).flatten()
    near, far = (
        torch.linalg.norm(adapters.get(spec).explain(model, inputs, targets).flatten() - expected)
        for spec in ("gradient_shap[noise=0,samples=600]", "gradient_shap[noise=0,samples=6]")
    )
    assert near < far / 4
    assert near < 0.15 * torch.linalg.norm(expected)


@pytest.mark.parametrize("spec", ["integrated_gradients[n_steps=9]", *(f"{name}[samples=37]" for name in SAMPLED)])
def test_no_more_images_at_a_time_than_memory_holds(spec: str) -> None:
    model, inputs, targets = case("vit")
    rows: list[int] = []
    model.register_forward_hook(lambda module, images, logits: rows.append(len(logits)))
    method = adapters.get(spec)
    method.explain(model, inputs, targets)
    assert max(rows) == 16
    assert sum(rows) == len(inputs) * method.cost / 2


def small_densenet() -> nn.Module:
    torch.manual_seed(0)
    return DenseNet(growth_rate=4, block_config=(1, 1), num_classes=5)


@pytest.mark.parametrize("build", [lambda: conformance.build("resnet"), small_densenet])
def test_deeplift_is_complete(build: Callable[[], nn.Module]) -> None:
    model = build().double().eval()
    assert any(getattr(module, "inplace", False) for module in model.modules())
    _, inputs, targets = case("resnet")
    with torch.no_grad():
        difference = (model(inputs) - model(0 * inputs)).gather(1, targets[:, None])[:, 0]
    scores = adapters.get("deeplift").explain(model, inputs, targets).double().sum((1, 2))
    torch.testing.assert_close(scores, difference, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """Uses one ReLU twice, or calls it as a function."""

    def __init__(self, function: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.act = torch.relu if function else self.relu

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.second(self.act(self.first(images)))).mean((2, 3))


class Deciding(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


def gated() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(16,) * 4, block_args={"attn_layer": "se"})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(), "uses 'relu' 2 times"),
        (Twice(function=True), "calls relu as a function"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), "has GELU"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "has LayerNorm"),
        (gated(), "calls sigmoid as a function"),
        (Deciding(), "torch.fx cannot follow its forward (symbolically traced"),
        (conformance.build("vit"), "as a function"),
    ],
)
def test_deeplift_refuses_what_its_rules_do_not_reach(model: nn.Module, reason: str) -> None:
    assert reason in str(adapters.get("deeplift").supports(model))


class GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(min=0) * (ctx.saved_tensors[0] > 0)


class Guided(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return GuidedReLU.apply(inputs)


def test_guided_backpropagation_is_its_formula() -> None:
    model, inputs, targets = case("resnet")
    guided = copy.deepcopy(model)
    for module in guided.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Guided())
    expected = gradient(guided, inputs, targets).sum(1).float()
    assert not torch.allclose(expected, gradient(model, inputs, targets).sum(1).float())
    maps = adapters.get("guided_backprop").explain(model, inputs, targets)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)


def test_guided_backpropagation_refuses_models_without_relu() -> None:
    assert "no nn.ReLU" in str(adapters.get("guided_backprop").supports(conformance.build("vit")))


class ReadTwice(nn.Module):
    """What goes into its ReLU goes past it, too."""

    def __init__(self, function: str = "") -> None:
        super().__init__()
        self.conv, self.act, self.head, self.function = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 5), function

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.conv(inputs)
        if self.function:
            features = getattr(torch, self.function)(features)
            return self.head(self.act(features).mean((2, 3)))
        return self.head((features + self.act(features)).mean((2, 3)))


@pytest.mark.parametrize("name", ["deeplift", "guided_backprop"])
@pytest.mark.parametrize(
    ("function", "reason"), [("", "is read elsewhere"), ("abs", "calls abs"), ("relu", "calls relu")]
)
def test_what_captum_would_get_wrong_is_refused(name: str, function: str, reason: str) -> None:
    assert reason in (adapters.get(name).supports(ReadTwice(function)) or "")
