"""Mosaics of four images, two that show a class and two that do not: where evidence for it can be is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bench.datasets import Dataset, Sample
from bench.models import Model
from bench.problem import Shard

OWN = OTHER = 2  # of the four images of a mosaic


class Mosaics:
    """The mosaics of one data set's split under one model; nothing is read before they are asked for.

    A mosaic stands for one sample and one class, its target. Two images are labelled with the target, the first of
    them the sample's own where that is its label. Two are labelled otherwise and show nothing of the target, that is,
    have no ROI for it. No two of the four are of one group. Partners and positions are drawn from the whole split by
    a seed made of the sample's content and the suite's seed: they depend neither on the shard nor on how
    many samples are explained, but on what the split holds. Each image is preprocessed as the model wants it, then
    resized, antialiased, to its quarter of the input.

    Parameters
    ----------
    dataset : Dataset
        Its `split` is what partners are drawn from.
    model : Model
        What preprocesses them.
    seed : int
        The suite's.
    """

    def __init__(self, dataset: Dataset, model: Model, seed: int) -> None:
        self.dataset, self.model, self.seed = dataset, model, seed
        self._shown: dict[str, set[int]] = {}
        self._last: tuple[object, tuple[Tensor, np.ndarray]] | None = None

    def __call__(self, shard: Shard, targets: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return the mosaics of a shard, those of the last call without computing them again.

        Parameters
        ----------
        shard : Shard
            n samples of the data set.
        targets : ndarray
            (n,) int, the class that each mosaic is made for.

        Returns
        -------
        Tensor
            (n, 3, H, W) float32 preprocessed mosaics on the CPU; zeros where the split has not the images for one.
        ndarray
            (n, H, W) bool: where the target's class is shown; all False without a mosaic.
        """
        key = [sample.id for sample in shard.samples], targets.tolist()
        if self._last is None or self._last[0] != key:
            pairs = [self.mosaic(*pair) for pair in zip(shard.samples, targets.tolist(), strict=True)]
            self._last = key, (torch.stack([image for image, _ in pairs]), np.stack([own for _, own in pairs]))
        return self._last[1]

    def mosaic(self, sample: Sample, target: int) -> tuple[Tensor, np.ndarray]:
        """Return one mosaic (3, H, W) and where it shows the target (H, W) bool."""
        image, own = torch.zeros(3, *self.model.input_size), np.zeros(self.model.input_size, dtype=bool)
        digest = hashlib.sha256(f"{self.seed} mosaic {sample.digest}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        chosen = self.choose(sample, target, rng)
        if len(chosen) < OWN + OTHER:
            return image, own
        quarters = list(self._quarters())
        for position, (partner, place) in enumerate(zip(chosen, rng.permutation(len(quarters)), strict=True)):
            image[:, *quarters[place]] = self._shrunk(partner, image[0][quarters[place]].shape)
            own[quarters[place]] = position < OWN
        return image, own

    def choose(self, sample: Sample, target: int, rng: np.random.Generator) -> list[Sample]:
        """Return the four images of one mosaic, those of the target's class first; fewer where the split lacks them."""
        shuffled = [self.dataset.samples[place] for place in rng.permutation(len(self.dataset.samples))]
        own = (s for s in [sample, *shuffled] if s.label == target)
        chosen = _of_new_groups(own, [], OWN)
        others = (s for s in shuffled if s.label != target and target not in self.shown(s))
        return _of_new_groups(others, chosen, OTHER)

    def shown(self, sample: Sample) -> set[int]:
        """Return the classes that an image has a ROI for; it is read once."""
        if sample.id not in self._shown:
            self._shown[sample.id] = set(self.dataset.load(sample).roi)
        return self._shown[sample.id]

    def _quarters(self) -> Iterator[tuple[slice, slice]]:
        height, width = self.model.input_size
        for rows in (slice(height // 2), slice(height // 2, height)):
            for columns in (slice(width // 2), slice(width // 2, width)):
                yield rows, columns

    def _shrunk(self, sample: Sample, size: torch.Size) -> Tensor:
        image = self.model.preprocess(self.dataset.load(sample).image)
        return interpolate(image[None], tuple(size), mode="bilinear", antialias=True)[0]


def _of_new_groups(candidates: Iterator[Sample], chosen: list[Sample], n: int) -> list[Sample]:
    """Return `chosen` and the first `n` candidates, or as many as there are, each of a group of its own."""
    chosen, wanted = list(chosen), len(chosen) + n
    groups = {sample.group for sample in chosen}
    for candidate in candidates:
        if candidate.group not in groups:
            groups.add(candidate.group)
            chosen.append(candidate)
        if len(chosen) == wanted:
            break
    return chosen
