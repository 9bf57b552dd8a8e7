"""The perturbation engine: replace patches of images, in batches on the model's device, and read the target's logit.

One feature is one patch of the pixel grid (`Samples.patch`). Nothing here depends on the batch size or on which other
samples are present, apart from the rounding of the model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from explainer_bench import RequestError, did_you_mean, out_of_memory
from metrics.base import Metric, Samples
from metrics.quantus_bridge import with_gradients

Removed = Callable[[Tensor, Tensor], Tensor]


def channel_means(inputs: Tensor) -> Tensor:
    """Return (N, C, 1, 1): the mean colour of each image, in the model's normalised units."""
    return inputs.double().mean((2, 3), keepdim=True).to(inputs.dtype)


def lowest_value(inputs: Tensor) -> Tensor:
    """Return (N, 1, 1, 1): the lowest value of each image over all channels (what Quantus calls "black")."""
    return inputs.amin((1, 2, 3), keepdim=True)


IMPUTERS: dict[str, Callable[[Tensor], Tensor]] = {"mean": channel_means, "black": lowest_value}


def known_imputer(name: str) -> str:
    """Return `name` if it is one of `IMPUTERS`, else raise a RequestError."""
    if name not in IMPUTERS:
        raise RequestError(f"unknown imputer {name!r}.{did_you_mean(name, list(IMPUTERS))}")
    return name


Imputer = Annotated[str, AfterValidator(known_imputer)]


def patch_grid(samples: Samples) -> tuple[int, int]:
    """Return the number of patches down and across an image.

    Raises
    ------
    RequestError
        Where the image is not a whole number of patches.
    """
    (height, width), (down, across) = samples.inputs.shape[2:], samples.patch
    if height % down or width % across:
        raise RequestError(
            f"images of {height} x {width} pixels are not a whole number of patches of {down} x {across}: "
            "resize the images or choose a patch size that divides them."
        )
    return height // down, width // across


def patch_sums(samples: Samples) -> np.ndarray:
    """Return (N, P) float64: the sum of each map over each patch, in raster order.

    Every patch is added up in the same order, so patches with equal pixels tie exactly.
    """
    (rows, columns), (down, across) = patch_grid(samples), samples.patch
    patches = samples.maps.reshape(-1, rows, down, columns, across).swapaxes(2, 3)
    return np.ascontiguousarray(patches).reshape(len(samples), rows * columns, down * across).sum(-1)


def patch_ranks(samples: Samples) -> np.ndarray:
    """Return (N, P) int: 0 for the most relevant patch of each map to P - 1 for the least relevant one.

    Ties are broken by a permutation drawn from the sample's seed: it favours no place, and is the same for every
    explainer and batch.
    """
    sums = patch_sums(samples)
    ranks = np.empty(sums.shape, dtype=np.int64)
    for row, (values, seed) in enumerate(zip(sums, samples.seeds, strict=True)):
        lottery = np.random.default_rng(int(seed)).permutation(len(values))
        ranks[row, np.lexsort((lottery, -values))] = np.arange(len(values))
    return ranks


def logits_without(samples: Samples, steps: int, removed: Removed, imputer: str) -> np.ndarray:
    """Return (N, steps) float64: the target's logit of each image with patches replaced.

    Parameters
    ----------
    samples : Samples
        N images; their maps are not looked at.
    steps : int
        Number of perturbed versions of each image.
    removed : callable
        ``removed(rows (B,), steps (B,)) -> (B, P) bool``: the patches to replace, on the model's device.
    imputer : str
        Key of `IMPUTERS`: what replaces them.
    """
    inputs, device, (down, across) = samples.inputs, samples.inputs.device, patch_grid(samples)
    targets = torch.as_tensor(samples.targets, device=device).long()
    model = with_gradients(samples.model, inputs)
    patches = inputs.unflatten(3, (across, -1)).unflatten(2, (down, -1))
    fill = IMPUTERS[imputer](inputs)[..., None, None]

    def run(index: Tensor) -> Tensor:
        rows = index // steps
        mask = removed(rows, index % steps).view(-1, 1, down, 1, across, 1)
        images = torch.where(mask, fill[rows], patches[rows]).reshape(-1, *inputs.shape[1:])
        return model(images).gather(1, targets[rows, None])[:, 0].double()

    index = torch.arange(len(samples) * steps, device=device)
    return in_batches(run, index, samples.batch_size).view(len(samples), steps).cpu().numpy()


def in_batches(run: Callable[[Tensor], Tensor], index: Tensor, batch_size: int) -> Tensor:
    """Return ``run(index)``, computed in batches without gradients; they halve whenever memory runs out."""
    done: list[Tensor] = []
    start = 0
    while start < len(index):
        try:
            with torch.no_grad():
                done.append(run(index[start : start + batch_size]))
            start += batch_size
        except RuntimeError as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
            batch_size //= 2
    return torch.cat(done)


class PatchMetric(Metric):
    """Base of the metrics that perturb patches: undefined where the map does not tell any patch from another."""

    expensive = True

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        tied = np.ptp(patch_sums(samples), axis=1) == 0
        reasons = super().undefined(samples)
        return [reason or ("all patches tie" if tie else "") for reason, tie in zip(reasons, tied, strict=True)]
