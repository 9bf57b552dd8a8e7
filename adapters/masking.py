"""Explainers that hide regions of the image and ask the model again, and what all that only ask it have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters import vit
from adapters.base import Explainer, check_targets, predict
from adapters.superpixels import superpixels

ROWS = 64  # changed images per pass through the model


class QueryExplainer(Explainer):
    """Base of the explainers that only ask the model about changed versions of an image.

    One image comes with all of its targets, which are explained from the same answers of the model.
    """

    family = "perturbation"
    signed = True
    shares_draws = True
    batch_size = 1


class _Ablation(QueryExplainer):
    """Base of the explainers by what the target logit loses when a region of the image takes a constant value."""

    baseline: float = 0.0

    def drops(self, model: nn.Module, image: Tensor, regions: Iterable[Tensor], targets: Tensor) -> Tensor:
        """Return (R, T), how much less each target's logit is without each region.

        Parameters
        ----------
        model : nn.Module
            Classifier.
        image : Tensor
            (C, H, W).
        regions : iterable of Tensor
            (rows, H, W) bool, R in all.
        targets : Tensor
            (T,) long.
        """
        hidden = (torch.where(region[:, None], self.baseline, image) for region in regions)
        with_all = ask(model, [image[None]], targets)
        return with_all - ask(model, hidden, targets)


class Occlusion(_Ablation):
    """What the target logit loses when a window of the image is hidden, for a window that slides over it.

    A pixel's value is the mean of ``logit(image) - logit(image without the window)`` over the windows that cover it.
    The window is hidden by the value `baseline` in all channels of the normalised image; 0 is the mean colour of the
    data that the model's normalisation was computed on. By default the window is one patch of the model's (16 x 16
    pixels where it has none) and moves by its own size; `window` and `stride` are pixels. The last windows of a row
    or column are cut at the image's edge. All this is captum's `Occlusion`. Zeiler and Fergus plot the probability
    that remains, with a grey square: here it is the loss of logit, so that the evidence for the target is positive.

    A metric that hides single patches, such as `faithfulness_estimate`, asks the same question: there a good score is
    little evidence.
    """

    name = "occlusion"
    asks = "single_patches"
    reference = "Zeiler and Fergus, Visualizing and understanding convolutional networks, ECCV 2014"
    quick = "window=24"
    window: Annotated[int, Field(ge=1)] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None

    @property
    def cost(self) -> float:
        """The image and every window, on 224 x 224 pixels with patches of 16 x 16."""
        window = self.window or 16
        return 1 + _count(224, window, self.stride or window) ** 2

    def supports(self, model: nn.Module) -> str | None:
        """Return that the windows leave gaps, or None."""
        window = min(self._window(model))
        gaps = self.stride is not None and self.stride > window
        return f"stride={self.stride} leaves gaps between windows of {window} pixels" if gaps else None

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) mean losses, in units of logit."""
        image = inputs[0].detach()
        sizes = zip(image.shape[1:], self._window(model), strict=True)
        rows, columns = (_windows(side, size, self.stride or size, image.device) for side, size in sizes)
        drops = self.drops(model, image, _rectangles(rows, columns), targets).unflatten(0, (len(rows), -1))
        rows, columns = rows.double().cpu(), columns.double().cpu()
        total = torch.einsum("yxt,yh,xw->thw", drops, rows, columns)
        return total / torch.outer(rows.sum(0), columns.sum(0))

    def _window(self, model: nn.Module) -> tuple[int, int]:
        return (self.window, self.window) if self.window else vit.patch_size(model)


class FeatureAblation(_Ablation):
    """What the target logit loses when one superpixel of the image is hidden.

    Every pixel of a superpixel has the value ``logit(image) - logit(image without it)``. The superpixels are those of
    `lime`; they are hidden by the value `baseline` in all channels of the normalised image; 0 is the mean colour of
    the data that the model's normalisation was computed on. Given these superpixels, it is captum's
    `FeatureAblation`. Values are not divided by the superpixel's area, so large ones tend to have larger values.
    """

    name = "feature_ablation"
    reference = "captum's FeatureAblation; on superpixels as Ribeiro, Singh and Guestrin, KDD 2016"

    @property
    def cost(self) -> float:
        """The image and every superpixel, of which 38 are typical."""
        return 39

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) losses, in units of logit."""
        image = inputs[0].detach()
        segments = segment(image)
        numbers = torch.arange(int(segments.max()) + 1, device=image.device)
        regions = (chunk[:, None, None] == segments for chunk in numbers.split(ROWS))
        return self.drops(model, image, regions, targets).T[:, segments.cpu()]


class Rise(QueryExplainer):
    """The mean of random soft masks, weighted by the target's probability where the image is seen through them.

    ``map = sum over masks of p(image * mask) * mask / (n_masks * p)``. A mask is a grid of `cells` x `cells` cells,
    each 1 with probability `p`, else 0, enlarged bilinearly to one cell more than the image and cut out at a random
    place. What a mask hides is 0 in the normalised image, the mean colour of the data that the model's normalisation
    was computed on. Explained is the softmax probability. Masks and mean are those of the authors' code; but there the
    same masks serve all images, while here each image draws its own, which all of its targets share.
    """

    name = "rise"
    signed = False
    stochastic = True
    reference = "Petsiuk, Das and Saenko, RISE: Randomized input sampling for explanation, BMVC 2018"
    quick = "n_masks=8"
    n_masks: Annotated[int, Field(ge=1)] = 1000
    cells: Annotated[int, Field(ge=2)] = 7
    p: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @property
    def cost(self) -> float:
        """One forward pass per mask."""
        return self.n_masks

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W), at least 0, in units of probability."""
        image = inputs[0].detach()
        total = torch.zeros(len(targets), *image.shape[1:], device=image.device)
        for masks in self._masks(image):
            seen = (image * masks[:, None]).to(image)
            probability = ask(model, [seen], targets, probability=True).to(masks)
            total += torch.tensordot(probability, masks, ([0], [0]))
        return total / self.n_masks / self.p

    def _masks(self, image: Tensor) -> Iterator[Tensor]:
        """Draw (rows, H, W) masks in [0, 1], `n_masks` in all."""
        for number in torch.ones(self.n_masks).split(ROWS):
            grid = (torch.rand(len(number), self.cells, self.cells) < self.p).float().to(image.device)
            down, across = (self._enlarge(len(number), side).to(image.device) for side in image.shape[1:])
            yield down @ grid @ across.mT

    def _enlarge(self, rows: int, side: int) -> Tensor:
        """Return (rows, side, cells), how much of each cell each pixel gets, after a random shift per row."""
        cell = -(-side // self.cells)
        pixels = torch.randint(cell, (rows, 1)) + torch.arange(side) + 0.5
        last = self.cells - 1
        places = (pixels * self.cells / (cell * (self.cells + 1)) - 0.5).abs()
        places = last - (last - places).abs()  # mirrored at the centres of the outermost cells, as the authors' resize
        return (1 - (places[..., None] - torch.arange(self.cells)).abs()).clamp(min=0)


def ask(model: nn.Module, batches: Iterable[Tensor], targets: Tensor, probability: bool = False) -> Tensor:
    """Return the model's (rows, T) logits or softmax probabilities of some classes, float64 on the CPU.

    Parameters
    ----------
    model : nn.Module
        Classifier.
    batches : iterable of Tensor
        Images, (n, C, H, W) each.
    targets : Tensor
        (T,) long.
    probability : bool
        Whether to return probabilities.
    """
    logits = torch.cat([predict(model, batch) for batch in batches]).cpu().double()
    check_targets(targets, logits)
    return (probabilities(logits) if probability else logits)[:, targets.cpu()]


def probabilities(logits: Tensor) -> Tensor:
    """Return the softmax over classes of (N, K) logits, or the sigmoid, where there is a single one."""
    return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()


def segment(image: Tensor) -> Tensor:
    """Return the number of each pixel's superpixel, (H, W) long, of an image (C, H, W)."""
    return torch.from_numpy(superpixels(image.permute(1, 2, 0).double().cpu().numpy())).to(image.device)


def _count(side: int, window: int, stride: int) -> int:
    return -(-max(side - window, 0) // stride) + 1


def _windows(side: int, window: int, stride: int, device: torch.device) -> Tensor:
    """Return (n, side) bool, which pixels of a row or column lie in each position of the window."""
    starts = torch.arange(_count(side, window, stride), device=device)[:, None] * stride
    pixels = torch.arange(side, device=device)
    return (starts <= pixels) & (pixels < starts + window)


def _rectangles(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield (n, H, W) bool, the window in every position, row by row."""
    positions = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(columns)))
    for down, across in (chunk.T for chunk in positions.split(ROWS)):
        yield rows[down][:, :, None] & columns[across][:, None]
