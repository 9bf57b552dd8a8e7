"""Train the small ViT that ships with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from bench import datasets, models
from bench.datasets.base import Dataset, Item, Sample
from bench.datasets.digits import CANVAS, Digits
from bench.models import Model
from bench.recipes.base import Count, Rate, Recipe
from explainer_bench import RequestError

PATCH = 8
SIZES = {"val": 512, "test": 1024}


class DigitsRecipe(Recipe):
    """A six-block ViT of 64 x 64 px in patches of 8 x 8, that tells which digits are present.

    Multi-label: one independent logit per digit. So that minutes suffice without pre-training, the patch
    tokens are trained along with the class token: the same head is to tell which share of the patch each
    digit's ROI covers (token labelling, Jiang et al., NeurIPS 2021). Only the class token classifies.

    Parameters
    ----------
    size : int
        Training images.
    token_weight : float
        Weight of the patch tokens' loss beside the class token's.
    """

    name = "digits"
    model_name = "digits_vit"
    half = True
    reference = "https://arxiv.org/abs/2104.10858"

    epochs: Count = 8
    batch_size: Count = 32
    size: Count = 12288
    token_weight: Rate = 1.0

    def dataset(self, split: str, root: Path | None) -> Dataset:
        """Return one split; `root` is not needed."""
        return datasets.get("digits", split=split, size=SIZES.get(split, self.size))

    def model(self, weights: Path | None) -> Model:
        """Return the untrained ViT."""
        if weights is not None:
            raise RequestError("recipe digits trains from scratch: leave --weights out.")
        shape = {"img_size": CANVAS, "patch_size": PATCH, "embed_dim": 96, "depth": 6, "num_heads": 4}
        return models.create("vit_tiny_patch16_224", self.model_name, Digits.class_names, **shape)

    def target(self, sample: Sample, item: Item) -> np.ndarray:
        """Return (1 + patches, 10) float32: whether each digit is present, then its share of every patch."""
        side = CANVAS // PATCH
        target = np.zeros((1 + side * side, len(Digits.class_names)), np.float32)
        for digit, mask in item.roi.items():
            target[0, digit] = 1
            target[1:, digit] = mask.reshape(side, PATCH, side, PATCH).mean((1, 3)).ravel()
        return target

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of the class token's logits."""
        return F.binary_cross_entropy_with_logits(logits, targets[:, 0])

    def training_loss(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the patch tokens' binary cross-entropy."""
        logits = module.head(module.forward_features(inputs))  # type: ignore[operator]
        tokens = F.binary_cross_entropy_with_logits(logits[:, 1:], targets[:, 1:])
        return self.loss(logits[:, 0], targets) + self.token_weight * tokens

    def measure(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Share of images whose top class is present, and whose present classes are all told and no other."""
        present = targets[:, 0] > 0.5
        top = present[np.arange(len(logits)), logits.argmax(1)]
        return {"top1_present": float(top.mean()), "all_labels": float(((logits > 0) == present).all(1).mean())}
