"""Explainers that fit a linear model to the answers to images of which some segments are hidden: LIME, KernelSHAP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from skimage.segmentation import quickshift
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor, nn

from adapters import vit
from adapters.masking import ROWS, QueryExplainer, ask, segment
from explainer_bench import RequestError


class _Surrogate(QueryExplainer):
    """Base: the weights of a linear model that predicts the answer from which segments are shown."""

    stochastic = True
    probability: ClassVar[bool] = True  # explained is the softmax probability, else the logit
    regressor: ClassVar[type] = Ridge

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) signed weights of the segments, in units of what is explained."""
        image = inputs[0].detach()
        segments = self.segment(model, image)
        design = self.sample(int(segments.max()) + 1)
        distinct, number = design.unique(dim=0, return_inverse=True)  # of few segments, many samples are the same
        versions = _versions(image, self.hidden(image, segments), segments, distinct.to(image.device))
        answers = ask(model, versions, targets, self.probability)[number]
        fitted = self.regressor().fit(design.double().numpy(), answers.numpy(), self.importance(design).numpy())
        return self.paint(torch.from_numpy(fitted.coef_).view(len(targets), -1), segments.cpu())

    def segment(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the number of each pixel's segment, (H, W) long."""
        return segment(image)

    def hidden(self, image: Tensor, segments: Tensor) -> Tensor:
        """Return the image (C, H, W) with all segments hidden: here the normalised image's 0."""
        return torch.zeros_like(image)

    def sample(self, features: int) -> Tensor:
        """Draw (rows, features) bool, which segments each sample shows."""
        raise NotImplementedError

    def importance(self, design: Tensor) -> Tensor:
        """Return the (rows,) weights of the samples in the fit."""
        raise NotImplementedError

    def paint(self, weights: Tensor, segments: Tensor) -> Tensor:
        """Make (T, H, W) maps of (T, features) weights."""
        return weights[:, segments]


class Lime(_Surrogate):
    """LIME with the lime package's own settings: quickshift superpixels, hidden by their mean colour, ridge weights.

    `num_samples` images each show a random half of the superpixels, the first shows all. The map is the superpixels'
    weights in a ridge regression (alpha 1) of the target's softmax probability, where a sample with a share ``s`` of
    superpixels shown counts ``sqrt(exp(-d^2 / 0.25^2))``, ``d = 1 - sqrt(s)`` being its cosine distance.
    Samples, weights and fit equal the package's; only the perturbed images are made and asked in batches, each distinct
    one once. Quickshift sees the normalised image scaled to [0, 1]. All targets of an image share the samples.
    """

    name = "lime"
    reference = "Ribeiro, Singh and Guestrin, Why should I trust you?, KDD 2016; the numbers of lime 0.2.0.1"
    quick = "num_samples=12"
    num_samples: Annotated[int, Field(ge=1)] = 1000

    @property
    def cost(self) -> float:
        """One forward pass per sample; fewer where superpixels are so few that samples repeat."""
        return self.num_samples

    def hidden(self, image: Tensor, segments: Tensor) -> Tensor:
        """Return the image with every segment in its mean colour."""
        places, pixels = segments.flatten(), image.flatten(1).double()
        sums = pixels.new_zeros(len(image), int(segments.max()) + 1).index_add_(1, places, pixels)
        return (sums / places.bincount())[:, segments].to(image)

    def sample(self, features: int) -> Tensor:
        """Draw as the package does, from a generator of its own."""
        generator = np.random.RandomState(np.random.randint(2**31 - 1))
        generator.randint(1000)  # which the package spends on a seed for the segmentation
        design = torch.from_numpy(generator.randint(0, 2, self.num_samples * features)).view(-1, features).bool()
        design[0] = True
        return design

    def importance(self, design: Tensor) -> Tensor:
        """Weigh a sample by the cosine of its angle to the full image."""
        distance = 1 - design.double().mean(1).sqrt()
        return torch.exp(-(distance**2) / 0.25**2).sqrt()


class _OnPatches(_Surrogate):
    """Base: its segments are the patches of the model's tokens; squares of 16 pixels for a model without tokens."""

    def segment(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the number of each pixel's patch, in raster order."""
        sides = zip(image.shape[1:], vit.patch_size(model), strict=True)
        rows, columns = (torch.arange(side, device=image.device) // size for side, size in sides)
        return rows[:, None] * (columns[-1] + 1) + columns


class LimePatches(_OnPatches, Lime):
    """LIME with the patches of the model's tokens as superpixels, hidden by their mean colour.

    All else is as in `lime`. The squares are 16 x 16 pixels for a model that has no patch tokens. With 196 patches
    in place of some 30 superpixels, 1000 samples determine each weight less well: more samples cost proportionally.
    """

    name = "lime_patches"


class LimeKomorowski(Lime):
    """LIME as Komorowski, Baniecki and Biecek evaluated it: a binary map of the 2 best superpixels of 500 samples.

    Superpixels are hidden by the value 0 of the normalised image, and quickshift segments the normalised image as it
    is, although it expects colours in [0, 1]. The map is 1 on the `num_features` superpixels with the largest positive
    weights, and 0 elsewhere. Samples and fit are those of `lime`. Theirs explains the predicted class (the first of
    the 3 `top_labels`), here it is the target; their random draws were not seeded. Where not a single weight is
    positive the map is 0 everywhere.
    """

    name = "lime_komorowski"
    signed = False
    reference = (
        "Komorowski, Baniecki and Biecek, Towards evaluating explanations of Vision Transformers for medical imaging, "
        "CVPR Workshops 2023"
    )
    quick = "num_samples=3"  # so few that the seed shows even in a binary map
    num_samples: Annotated[int, Field(ge=1)] = 500
    num_features: Annotated[int, Field(ge=1)] = 2

    def segment(self, model: nn.Module, image: Tensor) -> Tensor:
        """Return the number of each pixel's superpixel in the image as it is."""
        pixels = image.expand(3, -1, -1).permute(1, 2, 0).float().cpu().numpy()
        return torch.from_numpy(quickshift(pixels, kernel_size=4, max_dist=200, ratio=0.2)).to(image.device)

    def hidden(self, image: Tensor, segments: Tensor) -> Tensor:
        """Return the normalised image's 0."""
        return torch.zeros_like(image)

    def paint(self, weights: Tensor, segments: Tensor) -> Tensor:
        """Mark the superpixels with the largest positive weights."""
        ranks = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        best = (ranks < self.num_features) & (weights > 0)
        return super().paint(best.float(), segments)


class KernelShap(_OnPatches):
    """KernelSHAP: an estimate of the Shapley values of the patches of the model's tokens, for the target logit.

    The players are the patches (squares of 16 x 16 pixels for a model without patch tokens); an absent one is 0 in the
    normalised image, the mean colour of the data that the model's normalisation was computed on. The values are the
    weights of a linear regression on `n_samples` coalitions (by default 1000, or 4 per player where that is more),
    whose sizes ``k`` of ``M`` players are drawn with probability proportional to ``1 / (k (M - k))``. The full and the
    empty image count 1,000,000 times as much, so that the values sum to what the logits of the two differ by. Sampling
    and fit are captum's `KernelShap`; but each coalition comes with its complement, which shap does, too, and which
    makes the estimate less noisy where players interact; it needs twice as many coalitions as players.
    """

    name = "kernel_shap"
    probability = False
    regressor = LinearRegression
    reference = "Lundberg and Lee, A unified approach to interpreting model predictions, NeurIPS 2017"
    quick = "n_samples=12"
    n_samples: Annotated[int, Field(ge=4)] | None = None

    @property
    def cost(self) -> float:
        """One forward pass per coalition."""
        return self.n_samples or 1000

    def sample(self, features: int) -> Tensor:
        """Draw coalitions after the full and the empty one."""
        if features < 2:
            raise RequestError(f"{self.name} shares the logit out among patches, and this image has one only.")
        count, sizes = self.n_samples or max(1000, 4 * features), torch.arange(1, features)
        chances = 1 / (sizes * (features - sizes))
        drawn = sizes[chances.multinomial((count - 1) // 2, replacement=True)]
        shown = torch.rand(len(drawn), features).argsort(1).argsort(1) < drawn[:, None]
        ends = torch.tensor([[True], [False]]).expand(2, features)
        return torch.cat([ends, shown, ~shown])[:count]

    def importance(self, design: Tensor) -> Tensor:
        """Hold the fit to the full and the empty image."""
        ends = design.all(1) | ~design.any(1)
        return torch.where(ends, 1e6, 1.0)


def _versions(image: Tensor, hidden: Tensor, segments: Tensor, design: Tensor) -> Iterator[Tensor]:
    """Yield batches of the image in which each row of `design` shows some segments, and the others are as `hidden`."""
    for rows in design.split(ROWS):
        yield torch.where(rows[:, segments][:, None], image, hidden)
