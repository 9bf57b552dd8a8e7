"""One data set under one model: the samples in shards, their pixels, and what is known of them before explaining."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from adapters import Explainer
from bench.datasets import Dataset, Item, Sample
from bench.datasets.base import Masks
from bench.models import Model
from bench.store import identity
from explainer_bench import RequestError
from metrics.quantus_bridge import with_gradients

SHARD = 16  # samples per cell; fixed, so that the files of a run do not depend on how it is run


def evidence(dataset: Dataset, model: Model) -> str:
    """Return the region that the model is known to use, as its checkpoint says; "" where that is not known."""
    region = str(model.meta.get("evidence", ""))
    return region if region in dataset.regions else ""


def portable(dataset: Dataset) -> Dataset:
    """Return the data set without what differs between machines: its root, and where other files of it lie."""
    named = {name: _portable(value) for name, value in dataset.params.items()}
    return replace(dataset, **{**named, "root": None})  # type: ignore[arg-type]


def _portable(value: Any) -> Any:
    """Return of a path its name; text that is a relative path lies below the root, and stays."""
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        return type(value)(Path(value).name)
    return value


class Shard:
    """Consecutive samples of a problem; what one cell holds. Pixels are read when they are first asked for.

    Parameters
    ----------
    index : int
        Its position.
    samples : list of Sample
        At most `SHARD`.
    dataset, model
        What reads and preprocesses them.
    """

    def __init__(self, index: int, samples: list[Sample], dataset: Dataset, model: Model) -> None:
        self.index, self.samples, self._dataset, self._model = index, samples, dataset, model
        self._moved: dict[torch.device, Tensor] = {}
        self._masks: dict[str, list[Masks]] = {}

    @cached_property
    def _items(self) -> list[Item]:
        return [self._dataset.load(sample) for sample in self.samples]

    @cached_property
    def inputs(self) -> Tensor:
        """(n, C, H, W) preprocessed images."""
        return torch.stack([self._model.preprocess(item.image) for item in self._items])

    def masks(self, region: str = "") -> list[Masks]:
        """Return per sample the masks (H, W) bool per class of a named region, at the model's input size.

        Without a name, of the region that the model is known to use, or else of the ROI.
        """
        region = region or evidence(self._dataset, self._model)
        if region not in self._masks:
            items = (item.masks(region).items() for item in self._items)
            self._masks[region] = [{c: self._model.preprocess_roi(mask) for c, mask in masks} for masks in items]
        return self._masks[region]

    def inputs_on(self, device: torch.device) -> Tensor:
        """Return `inputs` on a device; moved there once."""
        if device not in self._moved:
            self._moved[device] = self.inputs.to(device)
        return self._moved[device]

    def roi(self, classes: np.ndarray, region: str = "") -> np.ndarray:
        """Return (n, H, W) bool: each sample's region for its class, see `masks`; all False where it has none."""
        empty = np.zeros(self._model.input_size, dtype=bool)
        return np.stack([masks.get(int(c), empty) for masks, c in zip(self.masks(region), classes, strict=True)])

    def seeds(self, seed: int) -> np.ndarray:
        """Return (n,) uint32, one per sample, from `seed` and the sample's content."""
        digests = [hashlib.sha256(f"{seed} {sample.digest}".encode()).digest() for sample in self.samples]
        return np.array([int.from_bytes(digest[:4], "little") for digest in digests], dtype=np.uint32)


def _in_turn(samples: list[Sample]) -> list[Sample]:
    """Put the first of every class before the second of any."""
    seen: Counter[int] = Counter()
    turns = []
    for sample in samples:
        turns.append(seen[sample.label])
        seen[sample.label] += 1
    return [samples[row] for row in np.argsort(turns, kind="stable")]


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
    balanced : bool
        Take the classes in turn.
    """

    def __init__(self, dataset: Dataset, model: Model, samples: int, seed: int, balanced: bool = False) -> None:
        self.dataset, self.model = dataset, model
        self._concepts: dict[Explainer, Tensor] = {}
        self.names = portable(dataset).spec, model.name
        order = sorted(dataset.samples, key=lambda s: hashlib.sha256(f"{seed} {s.id}".encode()).digest())
        self.samples = (_in_turn(order) if balanced else order)[:samples]
        if not self.samples:
            raise RequestError(f"data set {dataset.name!r} has no samples in its split {dataset.split!r}.")

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-len(self.samples) // SHARD)

    def shard(self, index: int) -> Shard:
        """Return one shard."""
        samples = self.samples[index * SHARD : (index + 1) * SHARD]
        return Shard(index, samples, self.dataset, self.model)

    def shards(self, indices: range) -> Iterator[Shard]:
        """Return the shards one after another."""
        return (self.shard(index) for index in indices)

    @cached_property
    def module(self) -> nn.Module:
        """The model's module, wrapped if it cannot run without gradients; probed once for all cells."""
        device = next(self.model.module.parameters()).device
        return with_gradients(self.model.module, torch.zeros(1, 3, *self.model.input_size, device=device))

    @cached_property
    def identity(self) -> list[object]:
        """What of data set and model, besides the samples, decides a result."""
        known = evidence(self.dataset, self.model)
        return [identity(portable(self.dataset)), self.model.fingerprint, *([known] if known else [])]

    def context(self, explainer: Explainer, shard: Shard, repeats: int = 1) -> dict[str, Any]:
        """Return what an explainer `needs` to explain a shard, each sample `repeats` times in a row."""
        context: dict[str, Any] = {}
        if "roi_prior" in explainer.needs:
            context["roi_prior"] = self.roi_prior(shard).repeat(repeats, 0)
        if "concept" in explainer.needs:
            if explainer not in self._concepts:
                images = [np.asarray(Image.open(file).convert("RGB")) for file in explainer.files()]
                self._concepts[explainer] = torch.stack([self.model.preprocess(image) for image in images])
            context["concept"] = self._concepts[explainer]
        return context

    @cached_property
    def _roi_sums(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        sums: dict[str, np.ndarray] = {}
        counts: dict[str, int] = {}
        region = evidence(self.dataset, self.model)
        for sample in self.dataset.samples:
            if (mask := self.dataset.load(sample).masks(region).get(sample.label)) is not None:
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
