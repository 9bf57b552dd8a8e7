"""What metrics that explain again share: the explainer, noisy copies of the images, and what the model says of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from explainer_bench import RequestError
from metrics.base import Metric, Samples
from metrics.perturbation import in_batches
from metrics.quantus_bridge import bare

Noise = Literal["uniform", "gaussian"]

_BATCH = 16  # not that of the samples: some scores divide by small differences of logits, and would show its rounding


class ReexplainingMetric(Metric):
    """Base of the metrics that ask the samples' explainer for more maps, of other images or of another model."""

    expensive = True

    def explain(self, samples: Samples, model: nn.Module, images: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return (M, H, W) float64: maps of `images` (M, C, H, W), made from the samples at `rows`, for their targets.

        The explainer bounds the memory that it takes.

        Raises
        ------
        RequestError
            If the samples come without their explainer.
        """
        if samples.reexplain is None:
            raise RequestError(f"metric {self.name!r} explains again: give Samples a `reexplain`.")
        return samples.reexplain(bare(model), images, samples.targets[rows], rows).astype(float)


def noisy(samples: Samples, row: int, noise: Noise, size: float, draws: int) -> Tensor:
    """Return (draws, C, H, W): noisy copies of one image.

    The draws come from the sample's seed alone: they are the same for every explainer, metric and batch.

    Parameters
    ----------
    samples : Samples
        N images.
    row : int
        Which of them.
    noise : {"uniform", "gaussian"}
        Uniform in +- size, or normal with that standard deviation, independently for every value of every channel.
    size : float
        In the units of the inputs.
    draws : int
        How many.
    """
    rng, shape = np.random.default_rng(int(samples.seeds[row])), (draws, *samples.inputs.shape[1:])
    drawn = rng.uniform(-size, size, shape) if noise == "uniform" else size * rng.standard_normal(shape)
    return samples.inputs[row] + torch.from_numpy(drawn).to(samples.inputs)


def logits_of(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return (M, K) float64: what a model, wrapped where it needs gradients, says of `images` (M, C, H, W)."""
    return in_batches(lambda index: model(images[index]), torch.arange(len(images)), _BATCH).double().cpu().numpy()
