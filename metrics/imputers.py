"""Imputers: what takes the place of removed features. The name of one is part of the name of a metric.

``mean``, ``zero``, ``black``, ``black_pixel`` and ``blur`` fill the place with an image that does not depend on what is
removed; ``road`` interpolates from what is left; ``token_removal`` leaves the tokens out of a ViT's sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from explainer_bench import RequestError, did_you_mean
from metrics.base import Samples


def mean(samples: Samples) -> Tensor:
    """Return (N, C, 1, 1): the mean colour of each image."""
    return samples.inputs.double().mean((2, 3), keepdim=True).to(samples.inputs.dtype)


def zero(samples: Samples) -> Tensor:
    """Return (1, 1, 1, 1): zero in the model's normalised units, the mean colour of its training images."""
    return samples.inputs.new_zeros(1, 1, 1, 1)


def lowest(samples: Samples) -> Tensor:
    """Return (N, 1, 1, 1): the lowest value of each image over all channels, what Quantus calls "black"."""
    return samples.inputs.amin((1, 2, 3), keepdim=True)


def black_pixel(samples: Samples) -> Tensor:
    """Return (1, C, 1, 1): a black pixel, 0 before normalisation."""
    if samples.black is None:
        raise RequestError("the imputer black_pixel needs `Samples.black`: give it, or choose another imputer.")
    return samples.black.to(samples.inputs).view(1, -1, 1, 1)


def blur(samples: Samples) -> Tensor:
    """Return (N, C, H, W): the image under a Gaussian whose deviation is a 16th of its side (14 of 224 pixels)."""
    sigma = [side / 16 for side in samples.inputs.shape[:1:-1]]
    return gaussian_blur(samples.inputs, [2 * int(3 * s) + 1 for s in sigma], sigma)


STATIC: dict[str, Callable[[Samples], Tensor]] = {
    "mean": mean,
    "zero": zero,
    "black": lowest,
    "black_pixel": black_pixel,
    "blur": blur,
}
NAMES = (*STATIC, "road", "token_removal")


def known(name: str) -> str:
    """Return `name` if it is an imputer's, else raise a RequestError."""
    if name not in NAMES:
        raise RequestError(f"unknown imputer {name!r}.{did_you_mean(name, list(NAMES))}")
    return name


Imputer = Annotated[str, AfterValidator(known)]


def road_noise(samples: Samples) -> Tensor:
    """Return (N, C, H, W) standard normal noise, each sample's from its own seed: the same whatever is removed."""
    shape = samples.inputs.shape[1:]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in samples.seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(samples.inputs)


def impute_road(images: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Return the images (B, C, H, W) with the pixels in `mask` (B, 1, H, W) linearly imputed from their neighbours."""
    raise NotImplementedError
