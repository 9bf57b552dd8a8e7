"""Trivial rows: maps that know nothing of the model. An explainer that does not beat them has shown nothing."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from skimage.filters import sobel
from torch import Tensor, nn

from adapters import vit
from adapters.base import Explainer
from adapters.superpixels import superpixels


class _Trivial(Explainer):
    family = "trivial"
    trivial = True
    class_discriminative = False


class Random(_Trivial):
    """Independent uniform noise per pixel, drawn per image."""

    name = "random"
    stochastic = True

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) in [0, 1)."""
        return torch.rand(len(inputs), *inputs.shape[-2:])


class RandomToken(_Trivial):
    """Independent uniform noise per patch token, drawn per image; on 16 x 16 pixels for a model without tokens."""

    name = "random_token"
    stochastic = True

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) in [0, 1)."""
        rows, columns = (-(-side // size) for side, size in zip(inputs.shape[-2:], vit.patch_size(model), strict=True))
        return torch.rand(len(inputs), rows, columns)


class CenterGaussian(_Trivial):
    """A Gaussian at the image's centre, with a standard deviation of a quarter of each side."""

    name = "center_gaussian"
    reference = "the Center baseline of Zhang et al., Top-down neural attention by excitation backprop, IJCV 2018"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) in (0, 1]."""
        profiles = []
        for side in inputs.shape[-2:]:
            position = (torch.arange(side) - (side - 1) / 2) / (side / 4)
            profiles.append(torch.exp(-(position**2) / 2))
        return torch.outer(*profiles).expand(len(inputs), -1, -1)


class CenterSquare(_Trivial):
    """1 inside a square at the image's centre that covers the share `area` of the image, 0 outside.

    On an image that is not square, a rectangle of its proportions. A pixel is inside if its centre is.
    """

    name = "center_square"
    area: Annotated[float, Field(gt=0, le=1)] = 0.6

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) of 0 and 1."""
        inside = []
        for side in inputs.shape[-2:]:
            distance = (torch.arange(side) - (side - 1) / 2).abs()
            inside.append((distance < side * self.area**0.5 / 2).float())
        return torch.outer(*inside).expand(len(inputs), -1, -1)


class Sobel(_Trivial):
    """Edge strength of the image's channel mean."""

    name = "sobel"
    reference = "Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018 (edge detector)"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W), at least 0."""
        grey = inputs.detach().mean(1).double().cpu().numpy()
        return torch.stack([torch.from_numpy(sobel(image)) for image in grey])


class EdgesVariance(_Trivial):
    """Variance of the image's channel mean over the `window` x `window` pixels around each; the border is repeated."""

    name = "edges_variance"
    window: Annotated[int, Field(ge=2)] = 5

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W), at least 0."""
        border = [(self.window - 1) // 2, self.window // 2] * 2
        grey = F.pad(inputs.detach().double().mean(1, keepdim=True), border, mode="replicate")
        windows = grey[:, 0].unfold(1, self.window, 1).unfold(2, self.window, 1)
        return windows.var((-2, -1), unbiased=False)


class SuperpixelRandom(_Trivial):
    """Independent uniform noise per superpixel, cut as `lime` does, drawn per image."""

    name = "superpixel_random"
    stochastic = True

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) in [0, 1)."""
        images = inputs.detach().permute(0, 2, 3, 1).double().cpu().numpy()
        segments = [torch.from_numpy(superpixels(image)) for image in images]
        return torch.stack([torch.rand(int(each.max()) + 1)[each] for each in segments])


class Intensity(_Trivial):
    """The image itself: the mean of its channels above its darkest pixel."""

    name = "intensity"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W), at least 0."""
        grey = inputs.mean(1)
        return grey - grey.amin((1, 2), keepdim=True)


class Constant(_Trivial):
    """The same value everywhere."""

    name = "constant"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) ones."""
        return torch.ones_like(inputs[:, 0])


class ROIPrior(_Trivial):
    """Where the ROIs of the other images lie: their leave-one-out mean mask, given by the caller as `roi_prior`."""

    name = "roi_prior"
    needs = ("roi_prior",)

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) in [0, 1]."""
        return context["roi_prior"]
