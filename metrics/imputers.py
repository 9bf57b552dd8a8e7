"""Imputers: what takes the place of removed features. The name of one is part of the name of a metric.

``mean``, ``zero``, ``black``, ``black_pixel`` and ``blur`` fill the place with an image that does not depend on what is
removed; ``road`` interpolates from what is left; ``token_removal`` leaves the tokens out of a ViT's sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur  # type: ignore[import-untyped]

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
    kernel = [2 * max(1, int(3 * s)) + 1 for s in sigma]
    return torch.cat([gaussian_blur(images, kernel, sigma) for images in samples.inputs.split(16)])


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


def of_pixels(name: str) -> str:
    """Return `name` if it is that of an imputer of any set of pixels, else raise a RequestError."""
    if known(name) == "token_removal":
        raise RequestError("the imputer token_removal removes patches, not pixels or segments: choose another.")
    return name


Imputer = Annotated[str, AfterValidator(known)]
PixelImputer = Annotated[str, AfterValidator(of_pixels)]


def road_noise(samples: Samples) -> Tensor:
    """Return (N, C, H, W) standard normal noise, each sample's from its own seed: the same whatever is removed."""
    shape = samples.inputs.shape[1:]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in samples.seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(samples.inputs)


def impute_road(images: Tensor, mask: Tensor, noise: Tensor, level: float = 0.01) -> Tensor:
    """Return the images with their masked pixels interpolated from the others, plus noise.

    Noisy linear imputation of Rong et al., ICML 2022 (arXiv:2202.00449): a masked pixel is the weighted mean of its
    neighbours, masked ones included, 1/6 for each of the four direct and 1/12 for each of the four diagonal ones; at
    the border the mean is over the neighbours there are. Where nothing is left to interpolate from, every pixel is the
    mean colour of the image.

    Parameters
    ----------
    images : Tensor
        (B, C, H, W) float, on any device.
    mask : Tensor
        (B, 1, H, W) bool, the pixels to impute.
    noise : Tensor
        (B, C, H, W) standard normal.
    level : float
        Standard deviation of the noise, in units of `images`, as in Quantus.

    Returns
    -------
    Tensor
        (B, C, H, W); each image is independent of the others, and within 1e-6 of its range of the exact solution.
    """
    height, width = images.shape[2:]
    padding = 0, -width % _BLOCK, 0, -height % _BLOCK
    inside = F.pad(torch.ones_like(mask[:1], dtype=torch.float64), padding)
    start = torch.where(mask, images.double().mean((2, 3), keepdim=True), images.double())
    solved = _relax(F.pad(start, padding), F.pad(mask, padding), inside)[..., :height, :width]
    return torch.where(mask, (solved + level * noise).to(images.dtype), images)


_BLOCK = 16  # sides are brought to multiples of it, so that they halve four times


class _Grid(NamedTuple):
    """The equations of one resolution: ``weight * x - _neighbours(x) = r`` where `unknown`, x = 0 elsewhere."""

    unknown: Tensor
    weight: Tensor

    def sweep(self, x: Tensor, r: Tensor) -> Tensor:
        """Return the Jacobi step from `x`; undamped, it shrinks all that a coarser grid cannot see by 3."""
        return _neighbours(x).add_(r).mul_(self.unknown).div_(self.weight)

    def residual(self, x: Tensor, r: Tensor) -> Tensor:
        """Return what is missing in each equation."""
        return _neighbours(x).add_(r).sub_(self.weight * x).mul_(self.unknown)


def _neighbours(x: Tensor) -> Tensor:
    """Return the weighted sum of each pixel's neighbours; 12 times it is [1, 2, 1] both ways, less the centre."""
    rows = 2 * x
    rows[..., 1:] += x[..., :-1]
    rows[..., :-1] += x[..., 1:]
    both = 2 * rows
    both[..., 1:, :] += rows[..., :-1, :]
    both[..., :-1, :] += rows[..., 1:, :]
    return both.sub_(x, alpha=4).div_(12)


def _grids(unknown: Tensor, inside: Tensor) -> list[_Grid]:
    """Return the grid and its halvings; a coarse pixel is unknown where all of its four are."""
    grid = _Grid(unknown, _neighbours(inside).clamp_min_(1 / 12))
    if min(unknown.shape[2:]) < 8 or any(side % 2 for side in unknown.shape[2:]):
        return [grid]
    return [grid, *_grids(-F.max_pool2d(-unknown, 2), F.max_pool2d(inside, 2))]


def _cycle(grids: list[_Grid], r: Tensor) -> Tensor:
    """Return a symmetric approximation of the solution for `r`: one multigrid cycle."""
    grid, coarser = grids[0], grids[1:]
    x = r / grid.weight * grid.unknown
    for _ in range(1 if coarser else 8):
        x = grid.sweep(x, r)
    if coarser:
        correction = _cycle(coarser, 4 * F.avg_pool2d(grid.residual(x, r), 2))
        x += F.interpolate(correction, scale_factor=2) * grid.unknown
        for _ in range(2):
            x = grid.sweep(x, r)
    return x


def _relax(x: Tensor, mask: Tensor, inside: Tensor, accuracy: float = 1e-8, most: int = 100) -> Tensor:
    """Return `x` (B, C, H, W) with its masked pixels at the weighted mean of their neighbours.

    Conjugate gradients in float64, preconditioned by a multigrid cycle in float32: about ten steps, whatever the mask.
    Each channel of each image stops on its own, so that it does not depend on the others.
    """
    fine = _Grid(mask.double(), _neighbours(inside).clamp_min_(1 / 12))
    grids = _grids(mask.float(), inside.float())
    r, p, last = fine.residual(x, torch.zeros_like(x)), torch.zeros_like(x), torch.ones_like(x[..., :1, :1])
    goal = accuracy * x.abs().amax((2, 3), keepdim=True)
    for _ in range(most):
        open_ = r.abs().amax((2, 3), keepdim=True) > goal
        if not open_.any():
            break
        z = _cycle(grids, r.float()).double()
        now = _dot(r, z)
        p = z + (now / last).nan_to_num_() * p
        change = fine.residual(p, torch.zeros_like(p))
        step = torch.where(open_, -now / _dot(p, change), 0)
        x, r, last = x + step * p, r + step * change, now
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)
