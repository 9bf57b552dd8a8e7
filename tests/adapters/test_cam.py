"""Class activation maps against pytorch-grad-cam, and against their formulas, written out slowly."""

import copy
import gc
from collections.abc import Callable

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import adapters
from adapters import cam, conformance
from explainer_bench import RequestError

SMALL = {"num_classes": 5, "channels": (8, 8, 16, 16)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: conformance.build("vit"),
    "vit_registers": lambda: conformance.build("vit_registers"),
    "resnet": lambda: conformance.build("resnet"),
    "se": lambda: ResNet(BasicBlock, (1, 1, 1, 1), block_args={"attn_layer": "se"}, **SMALL),
    "cbam": lambda: ResNet(BasicBlock, (1, 1, 1, 1), block_args={"attn_layer": "cbam"}, **SMALL),
    "densenet": lambda: DenseNet(growth_rate=4, block_config=(1, 1), num_classes=5),
    "convnext": lambda: ConvNeXt(depths=(1,) * 4, dims=(8, 8, 8, 16), num_classes=5),
    "swin": lambda: SwinTransformer(
        img_size=64, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=5
    ),
}
LAYERS = {"vit": "blocks.1.norm1", "vit_registers": "blocks.1.norm1", "densenet": "features", "convnext": "norm_pre"}
LAYERS |= {"swin": "norm"}


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in float64, an image for each class, and the classes."""
    torch.manual_seed(1)
    model = MODELS[name]().double().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model, torch.randn(5, 3, *conformance.SIZES.get(name, (64, 64)), dtype=torch.double), torch.arange(5)


def to_maps(name: str) -> Callable[[Tensor], Tensor] | None:
    """Return pytorch-grad-cam's reshape_transform, where one is needed."""
    if name == "swin":
        return lambda maps: maps.permute(0, 3, 1, 2)
    if not name.startswith("vit"):
        return None
    model = MODELS[name]()
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    return lambda tokens: tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)


def package(method: str, name: str, **options: bool) -> np.ndarray:
    """Return pytorch-grad-cam's own maps (N, H, W), of a model whose parameters get gradients, as it needs them."""
    model, inputs, targets = case(name)
    model = copy.deepcopy(model).requires_grad_(True)
    layer = model.get_submodule(LAYERS.get(name, "layer4"))
    tool = getattr(pytorch_grad_cam, method)(model, [layer], to_maps(name))
    return tool(inputs, targets=[ClassifierOutputTarget(int(target)) for target in targets], **options)


def ours(spec: str, name: str) -> np.ndarray:
    model, inputs, targets = case(name)
    return adapters.get(spec)(model, inputs, targets)[:, 0]


def stretched(maps: np.ndarray) -> np.ndarray:
    """Scale each map to [0, 1] once more, as pytorch-grad-cam does after resizing."""
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    assert (high > low).any()
    return (maps - low) / np.maximum(high - low, 1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("gradcam", "GradCAM"),
        ("gradcam_plus_plus", "GradCAMPlusPlus"),
        ("layercam", "LayerCAM"),
        ("hirescam", "HiResCAM"),
        ("eigencam[sign=raw]", "EigenCAM"),
    ],
)
def test_equals_pytorch_grad_cam(spec: str, method: str, name: str) -> None:
    np.testing.assert_allclose(stretched(ours(spec, name)), package(method, name), atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "resnet"])
def test_the_study_setting_equals_pytorch_grad_cam(name: str) -> None:
    expected = package("GradCAM", name, eigen_smooth=True, aug_smooth=True)
    assert expected.max() > 0.1
    np.testing.assert_allclose(ours("gradcam_eigen_aug[sign=raw]", name), expected, atol=1e-5)


@pytest.mark.parametrize("spec", ["eigencam", "gradcam_eigen_aug"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_sign_of_the_component_does_not_matter(spec: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, principal = ours(spec, name), cam._principal
    assert before.any()
    monkeypatch.setattr(cam, "_principal", lambda channels: -principal(channels))
    np.testing.assert_array_equal(ours(spec, name), before)


@pytest.mark.parametrize("channels", [3, 40])
def test_the_component_is_the_singular_value_decompositions(channels: int) -> None:
    maps = torch.randn(2, channels, 3, 4)
    found = cam._component(maps, "deterministic", lambda p: p.amax((1, 2)) + p.amin((1, 2)))
    np.testing.assert_allclose(found, get_2d_projection_with_sign_correction(maps.numpy()), atol=1e-5)
    assert not cam._component(torch.ones(1, channels, 3, 4), "deterministic", lambda p: p.sum((1, 2))).any()


def test_the_study_setting_takes_grad_cams_sign() -> None:
    """Where one channel alone has weight, each run is Grad-CAM of the centred channel, or its opposite."""
    model = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).double()
    model[-1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    image = torch.randn(1, 3, 32, 32, dtype=torch.double)
    maps = model[0](image)[0, 0].detach()
    for target, sign in ((0, 1), (1, -1)):
        method = adapters.get("gradcam_eigen_aug[layer='0']")
        run = method._run(model.requires_grad_(False), image, torch.tensor([target]))
        native = (sign * (maps - maps.mean())).clamp(min=0)[None, None]
        expected = F.interpolate(native, size=(32, 32), mode="bilinear")[0].numpy()
        np.testing.assert_allclose(run, stretched(expected), atol=1e-9)


def test_before_average_pooling_grad_cam_and_hires_cam_are_cam() -> None:
    model, inputs, targets = case("resnet")
    activations = []
    with model.layer4.register_forward_hook(lambda *args: activations.append(args[2])):
        model(inputs)
    expected = torch.einsum("nchw,nc->nhw", activations[0], model.fc.weight[targets]).clamp(min=0).numpy()
    for name in ("gradcam", "hirescam"):
        maps = adapters.get(name).explain(model, inputs, targets).numpy()
        np.testing.assert_allclose(maps, stretched(expected), atol=1e-5)


def channels_of(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the layer that is read, what it puts out, and the same as (N, C, h, w)."""
    model, inputs, _ = case(name)
    layer, seen = model.get_submodule(LAYERS.get(name, "layer4")), []
    with layer.register_forward_hook(lambda *args: seen.append(args[2])):
        model(inputs)
    transform = to_maps(name)
    return layer, seen[0], transform(seen[0]) if transform else seen[0]


def finished(weights: Tensor, maps: Tensor, size: torch.Size) -> np.ndarray:
    weighted = torch.einsum("nc,nchw->nhw", weights, maps).clamp(min=0)[:, None]
    return stretched(F.interpolate(weighted, size=size, mode="bilinear")[:, 0].numpy())


@pytest.mark.parametrize("name", ["vit", "vit_registers", "resnet", "swin"])
def test_score_cam_is_its_formula(name: str) -> None:
    model, inputs, targets = case(name)
    _, _, maps = channels_of(name)
    masks = F.interpolate(maps, size=inputs.shape[-2:], mode="bilinear", align_corners=True)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    masks = (masks - low) / (high - low + 1e-8)
    rows = zip(inputs, masks, targets, strict=True)
    scores = [[model((image * mask)[None])[0, target] for mask in each] for image, each, target in rows]
    expected = finished(torch.tensor(scores).double().softmax(1), maps, inputs.shape[-2:])
    np.testing.assert_allclose(ours("scorecam", name), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "vit_registers", "resnet", "swin"])
def test_ablation_cam_is_its_formula(name: str) -> None:
    model, inputs, targets = case(name)
    _, whole, maps = channels_of(name)
    dimension = 1 if name == "resnet" else -1
    layer = model.get_submodule(LAYERS.get(name, "layer4"))
    weights = []
    for channel in range(maps.shape[1]):
        ablated = whole.clone()
        ablated.select(dimension, channel).zero_()
        with layer.register_forward_hook(lambda *_, ablated=ablated: ablated):
            weights.append(model(inputs).gather(1, targets[:, None])[:, 0])
    full = model(inputs).gather(1, targets[:, None])
    expected = finished(1 - torch.stack(weights, 1) / full, maps, inputs.shape[-2:])
    np.testing.assert_allclose(ours("ablationcam", name), expected, atol=1e-4)


def test_ablation_cam_behind_a_relu_is_the_packages() -> None:
    assert channels_of("resnet")[1].min() == 0
    np.testing.assert_allclose(ours("ablationcam", "resnet"), package("AblationCAM", "resnet"), atol=1e-6)


@pytest.mark.parametrize(("name", "layer"), [(n, LAYERS.get(n, "layer4")) for n in MODELS if not n.startswith("vit")])
def test_the_last_map_is_found_once_and_the_model_left_alone(name: str, layer: str) -> None:
    model = nn.Sequential(nn.Identity(), MODELS[name]()).train()
    before, forwards = copy.deepcopy(model.state_dict()), []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    assert cam.last_map(model) == cam.last_map(model) == f"1.{layer}"
    assert len(forwards) == 1
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_is_gone_is_forgotten() -> None:
    model = MODELS["densenet"]()
    cam.last_map(model)
    known = len(cam._last_maps)
    del model
    gc.collect()
    assert len(cam._last_maps) < known


class Tokens(nn.Module):
    """Patches, then tokens: no map is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.patches(images).flatten(2).mT).mean(1))


@pytest.mark.parametrize(
    ("model", "spec", "reason"),
    [
        (Tokens(), "gradcam", "name one, layer=NAME"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "eigencam", "name one, layer=NAME"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5)), "scorecam", "name one, layer=NAME"),
        (MODELS["resnet"](), "gradcam[layer=layer5]", "no module 'layer5'; near are layer4"),
        (MODELS["vit"](), "ablationcam[layer=zzz]", "no module 'zzz'; near are patch_embed"),
    ],
)
def test_a_model_without_such_a_layer_is_refused(model: nn.Module, spec: str, reason: str) -> None:
    assert reason in str(adapters.get(spec).supports(model))


@pytest.mark.parametrize("spec", ["gradcam", "eigencam", "scorecam", "ablationcam", "gradcam_eigen_aug"])
def test_a_layer_can_be_given(spec: str) -> None:
    model, inputs, targets = case("resnet")
    shallow = adapters.get(f"{spec}[layer=layer2.0]").explain(model, inputs, targets)
    assert not torch.equal(shallow, adapters.get(f"{spec}[layer=layer3]").explain(model, inputs, targets))
    if spec in ("gradcam", "eigencam"):
        assert shallow.shape == (5, 12, 12)


@pytest.mark.parametrize(("name", "layer"), [("resnet", "fc"), ("vit", "blocks.0.attn.attn_drop"), ("vit", "head")])
def test_a_layer_without_maps_is_one_clear_line(name: str, layer: str) -> None:
    model, inputs, targets = case(name)
    if layer.endswith("attn_drop"):
        model = nn.Sequential(model, nn.Linear(5, 5).double().requires_grad_(False))
        layer = "1"
    with pytest.raises(RequestError, match="has no map in it"):
        adapters.get("gradcam", layer=layer).explain(model, inputs, targets)


def test_a_progress_bar_is_not_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    ours("scorecam", "vit")
    ours("ablationcam", "vit")
    assert capfd.readouterr() == ("", "")
