"""One data set under one model: the samples in shards, their pixels, and what is known of them before explaining."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bench.datasets import Dataset, Sample
from bench.models import Model
from explainer_bench import RequestError

SHARD = 16  # samples per cell; fixed, so that the files of a run do not depend on how it is run


@dataclass(frozen=True)
class Shard:
    """Consecutive samples of a problem; what one cell holds.

    Parameters
    ----------
    index : int
        Its position.
    samples : list of Sample
        At most `SHARD`.
    inputs : Tensor
        (n, C, H, W) preprocessed images.
    masks : list of dict
        Per sample its ROI mask (H, W) bool per class, at the model's input size.
    """

    index: int
    samples: list[Sample]
    inputs: Tensor
    masks: list[dict[int, np.ndarray]]

    def roi(self, classes: np.ndarray) -> np.ndarray:
        """Return (n, H, W) bool: each sample's ROI for its class, all False where it has none."""
        empty = np.zeros(self.inputs.shape[-2:], dtype=bool)
        return np.stack([masks.get(int(c), empty) for masks, c in zip(self.masks, classes, strict=True)])

    def seeds(self, seed: int) -> np.ndarray:
        """Return (n,) uint32, one per sample, from `seed` and the sample's content."""
        digests = [hashlib.sha256(f"{seed} {sample.digest}".encode()).digest() for sample in self.samples]
        return np.array([int.from_bytes(digest[:4], "little") for digest in digests], dtype=np.uint32)


class Problem:
    """A data set under a model.

    Parameters
    ----------
    dataset : Dataset
        Its `split` is what is explained.
    model : Model
        Whose classes fit the data set's.
    samples : int
        How many; all where there are fewer.
    seed : int
        Decides which, in an order that a larger number continues.
    name : str, optional
        What boards call the data set; its own name by default.
    """

    def __init__(self, dataset: Dataset, model: Model, samples: int, seed: int, name: str = "") -> None:
        self.dataset, self.model = dataset, model
        self.names = name or dataset.name, model.name
        order = sorted(dataset.samples, key=lambda s: hashlib.sha256(f"{seed} {s.id}".encode()).digest())
        self.samples = order[:samples]
        if not self.samples:
            raise RequestError(f"data set {dataset.name!r} has no samples in its split {dataset.split!r}.")

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-len(self.samples) // SHARD)

    def shard(self, index: int) -> Shard:
        """Read and preprocess the images of one shard."""
        samples = self.samples[index * SHARD : (index + 1) * SHARD]
        items = [self.dataset.load(sample) for sample in samples]
        inputs = torch.stack([self.model.preprocess(item.image) for item in items])
        masks = [{c: self.model.preprocess_roi(mask) for c, mask in item.roi.items()} for item in items]
        return Shard(index, samples, inputs, masks)

    def shards(self, indices: range) -> Iterator[Shard]:
        """Read the shards one after another."""
        return (self.shard(index) for index in indices)

    @cached_property
    def _roi_sums(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        sums: dict[str, np.ndarray] = {}
        counts: dict[str, int] = {}
        for sample in self.dataset.samples:
            if (mask := self.dataset.load(sample).roi.get(sample.label)) is not None:
                mask = self.model.preprocess_roi(mask)
                sums[sample.group] = sums.get(sample.group, 0) + mask.astype(np.int32)
                counts[sample.group] = counts.get(sample.group, 0) + 1
        if len(sums) < 2:
            raise RequestError(f"data set {self.dataset.name!r} has too few ROIs for a leave-one-out prior.")
        return sums, counts

    @cached_property
    def _roi_total(self) -> tuple[np.ndarray, int]:
        sums, counts = self._roi_sums
        return sum(sums.values(), np.zeros(self.model.input_size, dtype=np.int64)), sum(counts.values())

    def roi_prior(self, shard: Shard) -> np.ndarray:
        """Return (n, H, W) in [0, 1]: the mean ROI of the whole split without the sample's own group."""
        (sums, counts), (total, n) = self._roi_sums, self._roi_total
        groups = [sample.group for sample in shard.samples]
        return np.stack([(total - sums.get(g, 0)) / (n - counts.get(g, 0)) for g in groups]).astype(np.float32)
