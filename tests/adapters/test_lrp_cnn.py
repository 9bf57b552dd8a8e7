"""LRP through CNNs against its rules written out as matrices, input times gradient, captum, and conservation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LRP
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from zennit.canonizers import SequentialMergeBatchNorm

import adapters
from adapters.canonical import canonical

from .conftest import build

NAMES = ["lrp_epsilon", "lrp_epsilon_plus", "lrp_epsilon_gamma_box", "lrp_epsilon_alpha2_beta1"]


class SE(nn.Module):
    """Squeeze and excitation in the form of moskomule/senet.pytorch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(width, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class CBAM(nn.Module):
    """Channel, then spatial attention, in the form of Jongchan/attention-module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width))
        self.spatial = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.size(2), x.size(3))
        pooled = self.mlp(F.avg_pool2d(x, size, stride=size)) + self.mlp(F.max_pool2d(x, size, stride=size))
        x = x * F.sigmoid(pooled).unsqueeze(2).unsqueeze(3).expand_as(x)
        pair = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * F.sigmoid(self.spatial(pair))


class Gated(Bottleneck):
    """A bottleneck with a gate after its last BatchNorm."""

    gate: type[nn.Module] = SE

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.bn3 = nn.Sequential(self.bn3, self.gate(self.conv3.out_channels))


class WithCBAM(Gated):
    gate = CBAM


class Overwriting(nn.Module):
    """A pre-activation block whose ReLU works on the shortcut, too, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(F.relu(x, inplace=True))
        y.relu_()
        return self.fc((x + self.conv(y)).relu().mean((2, 3)))


SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
DENSE = {"growth_rate": 4, "block_config": (2, 2)}
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "torchvision_resnet": lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "torchvision_densenet": lambda: torchvision.models.DenseNet(**DENSE, num_init_features=8, num_classes=5),
    "torchvision_mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "timm_resnet18": lambda: timm.create_model("resnet18", num_classes=5, **SMALL),
    "timm_resnet50d": lambda: timm.create_model("resnet50d", num_classes=5, drop_rate=0.2, drop_path_rate=0.2, **SMALL),
    "timm_densenet121": lambda: timm.create_model("densenet121", num_classes=5, **DENSE),
    "timm_seresnet18": lambda: timm.create_model("seresnet18", num_classes=5, **SMALL),
    "timm_seresnet50": lambda: timm.create_model("seresnet50", num_classes=5, **SMALL),
    "timm_se": lambda: timm.create_model("resnet18", num_classes=5, block_args={"attn_layer": "se"}, **SMALL),
    "timm_cbam": lambda: timm.create_model("resnet18", num_classes=5, block_args={"attn_layer": "cbam"}, **SMALL),
    "survey_se": lambda: torchvision.models.ResNet(Gated, [1, 1, 1, 1], num_classes=5, width_per_group=8),
    "survey_cbam": lambda: torchvision.models.ResNet(WithCBAM, [1, 1, 1, 1], num_classes=5, width_per_group=8),
    "survey_densenet": lambda: nn.Sequential(
        torchvision.models.DenseNet(**DENSE, num_init_features=8).features, CBAM(16), nn.Flatten(), nn.Linear(256, 5)
    ),
    "overwriting": Overwriting,
}


def trained(name: str) -> nn.Module:
    """Return a float64 model in training mode, with BatchNorms as training leaves them."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model.train()


def without_biases(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    return model


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1)) * 4 - 2


def input_times_gradient(model: nn.Module, inputs: Tensor, targets: list[int]) -> np.ndarray:
    inputs = inputs.clone().requires_grad_()
    model.eval()(inputs)[range(len(inputs)), targets].sum().backward()
    return (inputs * inputs.grad).sum(1).detach().numpy()


def close(actual: Tensor, expected: np.ndarray | Tensor, tolerance: float = 1e-5) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_canonical_copy_computes_the_same_and_leaves_the_model_alone(name: str) -> None:
    model, inputs = trained(name), images()
    facts = [(dict(vars(m)), getattr(m, "inplace", None)) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    copied = canonical(model)
    assert facts == [(dict(vars(m)), getattr(m, "inplace", None)) for m in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    kept = inputs.clone()
    with torch.no_grad():
        close(copied(inputs), model.eval()(inputs), 1e-12)
    assert torch.equal(inputs, kept)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_epsilon_is_input_times_gradient_with_gates_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = trained(name), images()
    relevance = adapters.get("lrp_epsilon", epsilon=1e-12).explain(model, inputs, [1, 4])
    sigmoid = torch.sigmoid
    for place in (torch, Tensor):  # what modules, functions and methods end in
        monkeypatch.setattr(place, "sigmoid", lambda x: sigmoid(x).detach())
    close(relevance, input_times_gradient(model, inputs, [1, 4]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_epsilon_is_conserved_without_biases(name: str) -> None:
    model, inputs = without_biases(trained(name)), images()
    relevance = adapters.get("lrp_epsilon", epsilon=1e-12).explain(model, inputs, [1, 4])
    close(relevance.sum((1, 2)), model.eval()(inputs)[[0, 1], [1, 4]].detach(), 1e-4)


@pytest.mark.parametrize("method", NAMES)
def test_every_rule_is_conserved_without_biases_in_a_wide_model(method: str) -> None:
    model, inputs = without_biases(trained("torchvision_resnet")), images()
    relevance = adapters.get(method).explain(model, inputs, [1, 4])
    close(relevance.sum((1, 2)), model.eval()(inputs)[[0, 1], [1, 4]].detach(), 1e-4)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", ["torchvision_densenet", "timm_cbam", "survey_se"])
def test_images_do_not_mix(name: str, method: str) -> None:
    model, inputs, explainer = trained(name), images(3), adapters.get(method)
    alone = [explainer.explain(model, inputs[i : i + 1], [i]) for i in range(3)]
    close(explainer.explain(model, inputs, [0, 1, 2]), torch.cat(alone))


class Small(nn.Module):
    """Two convolutions, an average and a linear layer, by modules or by functions."""

    def __init__(self, functional: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functional = functional
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=bias), nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=bias)
        self.relu, self.pool, self.flatten = nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()
        self.fc = nn.Linear(24, 5, bias=bias)
        self.double()

    def layers(self) -> list[nn.Module]:
        return [self.first, self.relu, self.second, self.relu, self.pool, self.flatten, self.fc]

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            x = torch.relu(self.second(F.relu(self.first(x), inplace=True)))
            return self.fc(F.avg_pool2d(x, 2).flatten(1))
        for layer in self.layers():
            x = layer(x)
        return x


def small_image() -> Tensor:
    return torch.rand(1, 3, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(2)) * 4 - 2


def shares(rule: str, weight: Tensor, bias: Tensor, x: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Contributions (units, inputs), and what the sum over inputs lacks of what relevance is divided by."""
    if rule == "flat":
        return (weight != 0).to(x), torch.zeros_like(bias)
    if rule == "box":
        low, high = bounds
        return weight * x - weight.clamp(min=0) * low - weight.clamp(max=0) * high, torch.zeros_like(bias)
    if rule == "gamma":
        return (weight + 0.25 * weight.clamp(min=0)) * x, bias + 0.25 * bias.clamp(min=0)
    if rule == "positive":
        return (weight * x).clamp(min=0), bias.clamp(min=0)
    if rule == "negative":
        return (weight * x).clamp(max=0), bias.clamp(max=0)
    return weight * x, bias


def by_matrices(model: Small, image: Tensor, target: int, rules: list[str]) -> Tensor:
    """LRP of one image with every layer as a dense matrix, `rules` for the first and the second convolution."""
    steps, x = [], image
    for layer in model.layers():
        steps.append((layer, x))
        x = layer(x)
    relevance = torch.zeros_like(x[0])
    relevance[target] = x[0, target]
    rule_of = {model.first: rules[0], model.second: rules[1]}
    bounds = tuple(b[0].expand_as(image[0]).flatten() for b in (image.amin((2, 3), True), image.amax((2, 3), True)))
    for layer, x in reversed(steps):
        if isinstance(layer, nn.ReLU | nn.Flatten):
            continue
        basis = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape[1:])
        bias = layer(torch.zeros_like(x)).flatten()
        weight = (layer(basis).flatten(1) - bias).T
        parts = {"alpha_beta": [(2, "positive"), (-1, "negative")]}
        passed = torch.zeros(x.numel(), dtype=x.dtype)
        for factor, rule in parts.get(rule_of.get(layer, ""), [(1, rule_of.get(layer, "epsilon"))]):
            share, rest = shares(rule, weight, bias, x.flatten(), bounds)
            total = share.sum(1) + rest
            total = total + 1e-6 * torch.where(total < 0, -1, 1)
            passed += factor * (share * (relevance / total)[:, None]).sum(0)
        relevance = passed
    return relevance.view_as(image).sum(1).detach()


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("lrp_epsilon_plus", ["flat", "positive"]),
        ("lrp_epsilon_gamma_box", ["box", "gamma"]),
        ("lrp_epsilon_alpha2_beta1", ["alpha_beta", "alpha_beta"]),
        ("lrp_epsilon[epsilon=1e-6]", ["epsilon", "epsilon"]),
    ],
)
def test_equals_its_rules_written_as_matrices(name: str, rules: list[str], functional: bool) -> None:
    model, image = Small(functional), small_image()
    close(adapters.get(name).explain(model, image, [3]), by_matrices(model.eval(), image, 3, rules))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, bias=False)]
        self.features = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


def test_epsilon_equals_captum_where_only_modules_compute() -> None:
    model = Plain().double().eval()
    relevance = adapters.get("lrp_epsilon").explain(model, images(), [1, 4])
    close(relevance, LRP(model).attribute(images(), target=torch.tensor([1, 4])).sum(1).detach())


class Branched(nn.Module):
    """A functional shortcut or gate, without biases."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.first, self.second = gate, nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        y = self.second(x)
        return self.fc(self.pool(x * torch.sigmoid(y) if self.gate else x + y).flatten(1))


@pytest.mark.parametrize("gate", [False, True])
def test_captum_does_not_conserve_relevance_at_a_shortcut_or_gate(gate: bool) -> None:
    model = Branched(gate).double()
    logit = model(small_image())[0, 3].item()
    relevance = adapters.get("lrp_epsilon").explain(model, small_image(), [3])
    assert relevance.sum().item() == pytest.approx(logit, rel=1e-5)
    assert LRP(model).attribute(small_image(), target=3).sum().item() != pytest.approx(logit, rel=0.1)


def test_zennits_canonizer_takes_the_order_of_declaration_for_that_of_computation() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        SequentialMergeBatchNorm().apply(trained("torchvision_densenet"))


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (build(), "LayerNorm"),
        (torchvision.models.swin_t(num_classes=5), "LayerNorm"),
        (timm.create_model("convnext_atto", num_classes=5), "LayerNorm"),
        (timm.create_model("efficientnet_b0", num_classes=5), "SiLU"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU()), "GELU"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), Product()), "product"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), Branching()), "torch.fx cannot follow its forward"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)), "running statistics"),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.Softmax(1)), "Softmax"),
    ],
)
def test_what_has_no_rule_is_refused_with_a_reason(model: nn.Module, reason: str) -> None:
    for name in NAMES:
        assert reason in (adapters.get(name).supports(model) or "")
