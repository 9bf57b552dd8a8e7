"""Train the small ViT that ships with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import datasets, models
from bench.datasets.base import Dataset, Item, Sample
from bench.datasets.digits import CANVAS, Digits
from bench.models import Model
from bench.recipes.base import Count, Rate, Recipe
from explainer_bench import RequestError

SIZES = {"val": 512, "test": 1024}


class DigitsRecipe(Recipe):
    """A six-block ViT of 64 x 64 px in patches of 8 x 8, that tells which digits are present.

    Multi-label: one independent logit per digit, trained from the image's labels alone; the ROIs are not used.

    Parameters
    ----------
    size : int
        Training images.
    """

    name = "digits"
    model_name = "digits_vit"
    half = True

    epochs: Count = 16
    batch_size: Count = 32
    lr: Rate = 1e-3
    patience: Count = 4
    size: Count = 8192

    def dataset(self, split: str, root: Path | None) -> Dataset:
        """Return one split; `root` is not needed."""
        return datasets.get("digits", split=split, size=SIZES.get(split, self.size))

    def model(self, weights: Path | None) -> Model:
        """Return the untrained ViT."""
        if weights is not None:
            raise RequestError("recipe digits trains from scratch: leave --weights out.")
        shape = {"img_size": CANVAS, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 4}
        return models.create("vit_tiny_patch16_224", self.model_name, Digits.class_names, **shape)

    def target(self, sample: Sample, item: Item) -> np.ndarray:
        """Return (10,) float32: whether each digit is present."""
        return np.isin(np.arange(len(Digits.class_names)), list(item.roi)).astype(np.float32)

    def augment(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """Exchange the colour channels: every colour is equally likely in each."""
        return images[:, torch.from_numpy(generator.permutation(3))]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, mean over digits."""
        return F.binary_cross_entropy_with_logits(logits, targets)

    def measure(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Share of images whose top class is present, and whose present classes are all told and no other."""
        present = targets > 0.5
        top = present[np.arange(len(logits)), logits.argmax(1)]
        return {"top1_present": float(top.mean()), "all_labels": float(((logits > 0) == present).all(1).mean())}
