"""The CNNs that Goncalves et al. compared: DenseNet-121 and ResNet-50, plain, with SE and with CBAM.

Importing this registers them with timm, so that their names work wherever timm's do.

The layers are placed so that the parameter counts with two classes are the published ones. DenseNet-121 has no global
pooling: its classifier reads all 7 x 7 x 1024 features, and no ReLU follows the last BatchNorm. Gates stand after each
dense block, before its transition or the last BatchNorm, and in ResNet-50 after the last BatchNorm of each bottleneck,
before the shortcut is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torchvision
from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from bench.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from explainer_bench import RequestError

REDUCTION = 16
STRIDE = 32  # pixels per feature of both backbones
DENSE = (256, 512, 1024, 1024)  # channels after each dense block
GATES = ("se", "cbam")
_OF_TIMM = ("pretrained", "pretrained_cfg_overlay", "cache_dir")  # what `timm.create_model` passes on besides


class SE(nn.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018), its linear layers without biases.

    Parameters
    ----------
    channels : int
        Of the maps (N, C, H, W) that it scales by one factor in (0, 1) per channel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // REDUCTION
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape."""
        return maps * self.fc(self.pool(maps).flatten(1))[:, :, None, None]


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., ECCV 2018): a factor per channel, then one per position.

    Both maxima are pooling modules of a fixed size and the perceptron sees averages and maxima in one call, because
    captum's DeepLIFT has rules for modules alone, each used once.

    Parameters
    ----------
    channels, side : int
        Of the maps (N, C, side, side), the only ones that it takes.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        hidden = channels // REDUCTION
        self.over_positions, self.over_channels = nn.MaxPool1d(side * side), nn.MaxPool3d((channels, 1, 1))
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.sigmoid = nn.Sigmoid()
        self.spatial = nn.Sequential(
            nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01), nn.Sigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape."""
        flat = maps.flatten(2)
        pooled = torch.cat((flat.mean(2, keepdim=True), self.over_positions(maps.flatten(2))), dim=2)
        maps = maps * self.sigmoid(self.mlp(pooled.transpose(1, 2)).sum(1))[:, :, None, None]
        largest = self.over_channels(maps.unsqueeze(1)).squeeze(1)
        return maps * self.spatial(torch.cat((largest, maps.mean(1, keepdim=True)), dim=1))


def _gate(kind: str, channels: int, side: int) -> nn.Module:
    return SE(channels) if kind == "se" else CBAM(channels, side)


def _check_size(img_size: int) -> None:
    if img_size % STRIDE:
        raise RequestError(f"img_size={img_size} is not a multiple of {STRIDE}, which these CNNs need.")


class DenseNet121(nn.Module):
    """torchvision's DenseNet-121, its features flattened into one linear classifier.

    Parameters
    ----------
    gate : {"", "se", "cbam"}
        What follows each dense block.
    num_classes : int
        Logits.
    img_size : int
        Side in pixels of the images (N, 3, H, W), the only one that it takes: a multiple of 32.
    """

    def __init__(self, gate: str = "", num_classes: int = 2, img_size: int = 224) -> None:
        super().__init__()
        _check_size(img_size)
        self.num_classes, self.img_size = num_classes, (img_size, img_size)
        densenet = torchvision.models.densenet121(weights=None)
        self.features = nn.Sequential()
        for name, layer in densenet.features.named_children():
            self.features.add_module(name, layer)
            if gate and name.startswith("denseblock"):
                stage = int(name[-1])
                self.features.add_module(f"{gate}{stage}", _gate(gate, DENSE[stage - 1], img_size // 2 ** (stage + 1)))
        side = img_size // STRIDE
        self.classifier = nn.Linear(side * side * densenet.classifier.in_features, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the classifier."""
        return self.classifier

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K)."""
        return self.classifier(self.features(images).flatten(1))


class _Block(Bottleneck):
    """A bottleneck with a ReLU for each use, as DeepLIFT wants it, and perhaps a gate before the shortcut is added."""

    gate = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def add_gate(self, kind: str, side: int) -> None:
        self.gate = kind
        self.add_module(kind, _gate(kind, self.conv3.out_channels, side))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.gate:
            x = self.get_submodule(self.gate)(x)
        return self.relu(x + shortcut)


class ResNet50(torchvision.models.ResNet):
    """torchvision's ResNet-50.

    Parameters
    ----------
    gate : {"", "se", "cbam"}
        What each bottleneck ends with.
    num_classes : int
        Logits.
    img_size : int
        Side in pixels of the images (N, 3, H, W), a multiple of 32; with CBAM the only one that it takes.
    """

    def __init__(self, gate: str = "", num_classes: int = 2, img_size: int = 224) -> None:
        super().__init__(_Block, [3, 4, 6, 3], num_classes=num_classes)
        _check_size(img_size)
        self.num_classes, self.img_size = num_classes, (img_size, img_size)
        for stage, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)):
            for block in layer if gate else ():
                block.add_gate(gate, img_size // 2 ** (stage + 2))

    def get_classifier(self) -> nn.Linear:
        """Return the classifier."""
        return self.fc


def gates(own: Iterable[str], state: Iterable[str]) -> list[str]:
    """Return the prefixes of the gates among the keys `own`, where `state` has none of them, so is a plain CNN's."""
    parts = {key: key.split(".") for key in own}
    found = {
        ".".join(p[: i + 1]) + "." for p in parts.values() for i, word in enumerate(p) if word.rstrip("1234") in GATES
    }
    return [] if any(key.startswith(tuple(found)) for key in state) else sorted(found)


_WHAT = {
    "densenet121_goncalves": "DenseNet-121 without global pooling",
    "se_densenet121_goncalves": "DenseNet-121 without global pooling, SE after each dense block",
    "cbam_densenet121_goncalves": "DenseNet-121 without global pooling, CBAM after each dense block",
    "resnet50_goncalves": "ResNet-50, torchvision's",
    "se_resnet50_goncalves": "ResNet-50 with SE in each bottleneck",
    "cbam_resnet50_goncalves": "ResNet-50 with CBAM in each bottleneck",
}


def catalogue() -> dict[str, str]:
    """Return a line for each architecture."""
    return {name: f"{line} (Goncalves et al. 2022)" for name, line in _WHAT.items()}


def _cfg(name: str) -> dict[str, Any]:
    classifier, first = ("classifier", "features.conv0") if "densenet" in name else ("fc", "conv1")
    known = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear", "crop_pct": 1.0}
    return {"input_size": (3, 224, 224), "num_classes": 2, "classifier": classifier, "first_conv": first, **known}


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in _WHAT})


_BACKBONES: dict[str, type[DenseNet121] | type[ResNet50]] = {"densenet121": DenseNet121, "resnet50": ResNet50}


def _register(name: str) -> None:
    gate, _, backbone = name.removesuffix("_goncalves").rpartition("_")

    def entry(pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        given = {key: value for key, value in kwargs.items() if key not in _OF_TIMM}
        module = _BACKBONES[backbone](gate, **given)
        module.pretrained_cfg = {**get_pretrained_cfg(name).to_dict(), "input_size": (3, *module.img_size)}
        return module

    entry.__name__ = name
    register_model(entry)


for _name in _WHAT:
    _register(_name)
