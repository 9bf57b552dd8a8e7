"""Data sets that are drawn, not read: what all of them do alike."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from bench.datasets.base import Dataset, Item, Sample


class DrawnDataset(Dataset):
    """Base of the embedded data sets: image ``i`` is drawn from its own seed and has the label ``i % K``.

    A subclass implements `draw`. Only integers should be drawn and computed, so that the same image comes out
    everywhere.

    Parameters
    ----------
    split : {"train", "val", "test"}
        Different images of the same kind.
    size : int
        Number of images; the first n of a larger set are the set of size n.
    seed : int
        Another seed, another set of images.
    """

    where: ClassVar[str] = "embedded"

    size: Annotated[int, Field(gt=0, le=1_000_000)] = 512
    seed: Annotated[int, Field(ge=0)] = 0

    def draw(self, index: int) -> Item:
        """Draw image `index`; what `load` does, without a sample."""
        raise NotImplementedError

    @cached_property
    def samples(self) -> list[Sample]:
        """The images in order of their index."""
        return [self._sample(index) for index in range(self.size)]

    def load(self, sample: Sample) -> Item:
        """Draw the image and its masks."""
        return self.draw(sample.source)

    def _sample(self, index: int) -> Sample:
        name = f"{self.split}/{index:06d}"
        return Sample(name, index % len(self.class_names), name, _digest(self.draw(index)), index)


def _digest(item: Item) -> str:
    digest = hashlib.sha256(item.image.tobytes())
    for region, masks in sorted(item.regions.items() or [("", item.roi)]):
        for label, mask in sorted(masks.items()):
            named = f"{region}{label}".encode() if region else bytes([label])
            digest.update(named + np.packbits(mask).tobytes())
    return digest.hexdigest()


def shuffled(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return a permutation made of plain integers, whose stream is stable over NumPy versions."""
    return np.argsort(rng.integers(0, 2**32, n), kind="stable")
