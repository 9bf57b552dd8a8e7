"""The contract of a training recipe: which data, which model, which loss; the loop is `bench.training`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

from bench.datasets.base import Dataset, Item, Sample
from bench.models import Model
from explainer_bench import Component

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Arrays(NamedTuple):
    """A split in memory: images (N, 3, H, W) uint8 at the model's input size, and the recipe's targets (N, ...)."""

    images: Tensor
    targets: Tensor


class Recipe(Component):
    """Base of all recipes.

    Parameters
    ----------
    epochs : int
        At most; early stopping may end before.
    batch_size : int
        Images per step.
    lr : float
        AdamW's peak learning rate, after a linear warm-up and before a cosine decay to zero.
    warmup : float
        Share of all steps until the peak.
    weight_decay : float
        Of every parameter with more than one dimension.
    patience : int
        Epochs without a better validation loss after which training stops.
    """

    model_name: ClassVar[str] = ""
    half: ClassVar[bool] = False  # store the checkpoint in half precision

    epochs: Count = 10
    batch_size: Count = 32
    lr: Rate = 1e-3
    warmup: Share = 0.05
    weight_decay: Rate = 0.05
    patience: Count = 3

    def dataset(self, split: str, root: Path | None) -> Dataset:
        """Return the data of one split: "train", "val" or "test"."""
        raise NotImplementedError

    def model(self, weights: Path | None) -> Model:
        """Return the model to train; its new weights depend on PyTorch's current random state only."""
        raise NotImplementedError

    def target(self, sample: Sample, item: Item) -> np.ndarray:
        """Return what the loss wants to know of one sample."""
        raise NotImplementedError

    def augment(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """Vary a training batch (B, 3, H, W) uint8; returns the same shape, uint8 or float in [0, 255]."""
        return images

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of logits (B, K), the mean over the batch; what early stopping watches on the validation split."""
        raise NotImplementedError

    def measure(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Figures of merit of logits (N, K) float64 on a held-out split."""
        raise NotImplementedError
