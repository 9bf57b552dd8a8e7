"""From an image file's pixels to a model's input: resize, crop, normalise; and what published studies did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explainer_bench import RequestError, did_you_mean

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HOUNSFIELD = (-1000.0, 400.0)  # what the LIDC loader maps to 0 and 1


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes a model's input.

    The geometry is one of two: with `shortest_side`, the image is resized, its proportions kept, until its shortest
    side has that many pixels, and the centre is cut out; without, the whole image is squashed to `input_size`.

    Parameters
    ----------
    input_size : tuple of int
        Height and width in pixels that the model gets.
    mean, std : tuple of float
        Per channel, of images in [0, 1].
    interpolation : str
        Pillow's name of the filter: nearest, bilinear, bicubic, lanczos, box or hamming. All but nearest are
        antialiased.
    shortest_side : int, optional
        Pixels, at least the larger of `input_size`.

    Raises
    ------
    RequestError
        For a `shortest_side` that is smaller than what is cut out.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    shortest_side: int | None = None

    def __post_init__(self) -> None:
        if self.shortest_side is not None and self.shortest_side < max(self.input_size):
            size = " x ".join(map(str, self.input_size))
            raise RequestError(f"an image of shortest side {self.shortest_side} has no centre of {size} to cut out.")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocessing:
        """Read what `to_json` returned; headers from before there was a choice of geometry squash."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them; `shortest_side` only where there is one."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if value is not None}

    def scaled_to(self, input_size: tuple[int, int]) -> Preprocessing:
        """Return the same for a model of another input size, `shortest_side` in proportion."""
        ratio = max(input_size) / max(self.input_size)
        side = None if self.shortest_side is None else round(self.shortest_side * ratio)
        return replace(self, input_size=input_size, shortest_side=side)

    def normalises_as(self, mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
        """Tell whether mean and std are these, to three decimals."""
        return bool(np.allclose([*self.mean, *self.std], [*mean, *std], atol=5e-4))

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Bring an RGB image (H, W, 3) uint8 to `input_size`."""
        return self._resize(image, Image.Resampling[self.interpolation.upper()])

    def normalise(self, images: Tensor) -> Tensor:
        """Turn resized images (..., C, H, W) uint8 into what the module wants, float32."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def __call__(self, image: np.ndarray) -> Tensor:
        """Resize and normalise an RGB image.

        Parameters
        ----------
        image : ndarray
            (H, W, 3) uint8.

        Returns
        -------
        Tensor
            (3, H', W') float32 with (H', W') the `input_size`, on the CPU.
        """
        return self.normalise(torch.from_numpy(self.resize(image).transpose(2, 0, 1).copy()))

    def preprocess_roi(self, mask: np.ndarray) -> np.ndarray:
        """Bring a mask (H, W) bool to `input_size` by the geometry of the images, nearest neighbour."""
        return self._resize(mask.astype(np.uint8), Image.Resampling.NEAREST).astype(bool)

    def _resize(self, array: np.ndarray, filter_: Image.Resampling) -> np.ndarray:
        height, width = self._resized(*array.shape[:2])
        if array.shape[:2] != (height, width):
            array = np.array(Image.fromarray(array).resize((width, height), filter_))
        top, left = (round((have - want) / 2) for have, want in zip((height, width), self.input_size, strict=True))
        return array[top : top + self.input_size[0], left : left + self.input_size[1]]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest_side is None:
            return self.input_size
        short = min(height, width)  # the longer side is cut to whole pixels, as in torchvision
        return int(self.shortest_side * height / short), int(self.shortest_side * width / short)


class Variant(NamedTuple):
    """A published way to preprocess, and who published it."""

    preprocessing: Preprocessing
    source: str


def from_hounsfield(mean: float, std: float) -> Preprocessing:
    """Return the preprocessing of an LIDC model that was trained with `mean` and `std` in Hounsfield units.

    The loader maps [-1000, 400] HU to [0, 1] and repeats the one channel.
    """
    low, high = HOUNSFIELD
    return Preprocessing((224, 224), ((mean - low) / (high - low),) * 3, (std / (high - low),) * 3)


def _grey(mean: float, std: float, shortest_side: int) -> Preprocessing:
    return Preprocessing((224, 224), (mean,) * 3, (std,) * 3, shortest_side=shortest_side)


_SQUASH = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)
_CROP = replace(_SQUASH, shortest_side=256)
_CHUNG = "Chung et al., iMIMIC 2024: ImageNet mean and std for every initialisation, supervised weights included"
_KOMOROWSKI = "Komorowski et al., CVPR-W 2023"
_BROCKI = "Brocki et al., TMLR 2024"
# Interpolation is stated nowhere, so it is torchvision's default, bilinear with antialiasing.
VARIANTS = {
    "chung2024_resize": Variant(_SQUASH, f"{_CHUNG}; DUKE, CP-Child: Resize((224, 224))"),
    "chung2024_crop": Variant(_CROP, f"{_CHUNG}; Kvasir, MURA: shortest side 256, CenterCrop(224)"),
    "komorowski2023": Variant(_grey(0.56, 0.21, 256), f"{_KOMOROWSKI}, the script that explains and scores"),
    "komorowski2023_validation": Variant(
        _grey(0.58, 0.21, 224),
        f"{_KOMOROWSKI}, validation while training; for training itself, mean and std were the first batch's",
    ),
    "brocki2024_imagenet": Variant(_CROP, f"{_BROCKI}, CDAM, ImageNet"),
    "brocki2024_lidc": Variant(
        from_hounsfield(-635.5, 357.7),
        f"{_BROCKI}, CDAM, LIDC-IDRI, fold 1: mean -635.5 HU, std 357.7 HU; the other folds have others",
    ),
    "goncalves2022": Variant(_SQUASH, "Goncalves et al., IEEE Access 2022: Resize((224, 224)), DeiT included"),
}
OF_TIMM = "timm"


def of_timm(cfg: dict[str, Any], input_size: tuple[int, int]) -> Preprocessing:
    """Return what timm's own evaluation does for an architecture, its `crop_pct` and `crop_mode` included.

    Parameters
    ----------
    cfg : dict
        As `timm.data.resolve_data_config` returns it.
    input_size : tuple of int
        Height and width in pixels.

    Raises
    ------
    RequestError
        For a `crop_mode` that pads.
    """
    whole = whole_image(cfg, input_size)
    if cfg["crop_mode"] == "squash" and cfg["crop_pct"] == 1:
        return whole
    if cfg["crop_mode"] != "center" or input_size[0] != input_size[1]:
        mode = cfg["crop_mode"]
        raise RequestError(f"preprocessing timm: crop mode {mode!r} at {input_size} is not of those that it knows.")
    return replace(whole, shortest_side=math.floor(input_size[0] / cfg["crop_pct"]))


def whole_image(cfg: dict[str, Any], input_size: tuple[int, int]) -> Preprocessing:
    """Return timm's mean, std and interpolation for an architecture, nothing cropped: the default of our models."""
    return Preprocessing(input_size, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"])


def find(name: str) -> Preprocessing:
    """Return a published variant.

    Raises
    ------
    RequestError
        For an unknown name.
    """
    if name not in VARIANTS:
        raise RequestError(f"unknown preprocessing {name!r}.{did_you_mean(name, [*VARIANTS, OF_TIMM])}")
    return VARIANTS[name].preprocessing
