"""The perturbation engine: what a model says of images with some of their features removed.

A feature is a patch of the pixel grid (`Samples.patch`), a pixel, or a segment of any other partition of the image.
Metrics state which features to remove (`PerturbationMetric.removed`) and read the model's outputs off (`read`). The
engine computes each distinct removal of each image once, whoever asks for it: those that do not depend on a map serve
every explainer, two maps of the same order share their curve, and a curve serves every metric. All that is asked for
goes through the model in one stream of batches of one size. No result depends on the batch size or on which other
samples or requests are present, apart from the rounding of the model's own forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from explainer_bench import RequestError, out_of_memory
from metrics.base import Metric, Samples
from metrics.imputers import STATIC, Imputer, impute_road, road_noise
from metrics.quantus_bridge import with_gradients
from metrics.vit import TokenModel, drop_tokens

Output = Literal["logit", "probability"]


@dataclass(frozen=True)
class Outputs:
    """What the model says of N images in S perturbed versions; every array but the first is (N, S) float64.

    Parameters
    ----------
    removed : ndarray
        (N, S, F) bool, the features that were removed.
    logit : ndarray
        The target's logit.
    rival : ndarray
        The logit of the class that is most probable besides the target on the unperturbed image; NaN where the model
        has a single class.
    log_partition : ndarray
        The logarithm of the sum over classes of the exponential of the logit.
    predicted : ndarray
        The class with the largest logit; NaN where the logits are not finite.
    """

    removed: np.ndarray
    logit: np.ndarray
    rival: np.ndarray
    log_partition: np.ndarray
    predicted: np.ndarray

    def target(self, output: Output) -> np.ndarray:
        """Return (N, S): the target's logit or probability."""
        return self.logit if output == "logit" else np.exp(self.logit - self.log_partition)


def target_output(logits: np.ndarray, targets: np.ndarray, output: Output) -> np.ndarray:
    """Return (N,) float64: the target's logit or probability, from the logits (N, K)."""
    values = logits if output == "logit" else np.exp(log_softmax(logits, axis=1))
    return values[np.arange(len(targets)), targets]


def rivals(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return (N,) int: the most probable class besides the target, or the target where there is no other."""
    others = np.array(logits, dtype=float)
    if others.shape[1] > 1:
        others[np.arange(len(targets)), targets] = -np.inf
    return others.argmax(axis=1)


@dataclass(frozen=True)
class Removal:
    """Which features to remove from each of some images, and what to put in their place.

    Parameters
    ----------
    removed : ndarray
        (N, S, F) bool, in S versions per image.
    imputer : str
        See `metrics.imputers`.
    segments : ndarray, optional
        (N, H, W) int in [0, F): the feature of each pixel. Without it the features are, in raster order, the patches
        or, if there are as many, the pixels.
    """

    removed: np.ndarray
    imputer: str
    segments: np.ndarray | None = None


@dataclass
class _Table:
    """The removals of one kind (imputer, patches or segments) that are known or asked for."""

    positions: dict[tuple[int, bytes], int] = field(default_factory=dict)
    values: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))
    rows: list[int] = field(default_factory=list)  # of those asked for and not known yet
    masks: list[np.ndarray] = field(default_factory=list)  # their features, packed to bits
    segments: dict[int, np.ndarray] = field(default_factory=dict)  # of each row, where it is not the patches
    features: int = 0

    def want(self, rows: np.ndarray, packed: np.ndarray) -> np.ndarray:
        """Return (n,) int: the position of each packed mask in `values`, once it is computed."""
        wanted = np.empty(len(rows), dtype=int)
        for place, (row, mask) in enumerate(zip(rows.tolist(), packed, strict=True)):
            key = row, mask.tobytes() if mask.size <= 64 else hashlib.blake2b(mask, digest_size=16).digest()
            position = self.positions.setdefault(key, len(self.positions))
            if position == len(self.values) + len(self.rows):
                self.rows.append(row)
                self.masks.append(mask)
            wanted[place] = position
        return wanted

    def forget_pending(self) -> None:
        """Drop what was asked for and could not be computed."""
        self.positions = {key: place for key, place in self.positions.items() if place < len(self.values)}
        self.rows, self.masks = [], []


class Passes:
    """The perturbed forward passes of one model on N images, each computed once.

    Parameters
    ----------
    samples : Samples
        The whole of the images; their maps are not looked at.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.computed = 0  # forward passes so far
        self._tables: dict[tuple[str, int, bytes], _Table] = {}
        self._fills: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The samples' model, wrapped if it cannot run without gradients."""
        return with_gradients(self.samples.model, self.samples.inputs)

    def read(self, rows: np.ndarray, removal: Removal) -> Outputs:
        """Return the outputs for the samples at `rows`; computes those that are not known."""
        table, wanted = self._want(rows, removal)
        self._run(removal.imputer, table)
        logit, rival, log_partition, predicted = np.moveaxis(table.values[wanted], -1, 0)
        return Outputs(removal.removed, logit, rival, log_partition, predicted)

    def want(self, rows: np.ndarray, removal: Removal) -> None:
        """Ask for a removal, to be computed together with others by the next `run`."""
        self._want(rows, removal)

    def _want(self, rows: np.ndarray, removal: Removal) -> tuple[_Table, np.ndarray]:
        n, steps, features = removal.removed.shape
        digest = (
            b"" if removal.segments is None else hashlib.blake2b(removal.segments.tobytes(), digest_size=16).digest()
        )
        table = self._tables.setdefault((removal.imputer, features, digest), _Table(features=features))
        if removal.segments is not None:
            table.segments.update(zip(rows.tolist(), removal.segments, strict=True))
        packed = np.packbits(removal.removed.reshape(n * steps, features), axis=1)
        return table, table.want(rows.repeat(steps), packed).reshape(n, steps)

    def run(self) -> None:
        """Compute all that was asked for."""
        for (imputer, *_), table in self._tables.items():
            self._run(imputer, table)

    def _run(self, imputer: str, table: _Table) -> None:
        if not table.rows:
            return
        try:
            table.values = np.concatenate([table.values, self._stream(imputer, table)])
            self.computed += len(table.rows)
            table.rows, table.masks = [], []
        except BaseException:
            table.forget_pending()
            raise

    def _stream(self, imputer: str, table: _Table) -> np.ndarray:
        """Return (M, 4): the outputs of the pending removals of one table."""
        rows, packed = np.array(table.rows), np.stack(table.masks)
        with self._forward(imputer, table) as forward:

            def run(index: Tensor) -> Tensor:
                chosen = self._moved(rows[index.numpy()])
                masks = np.unpackbits(packed[index.numpy()], axis=1, count=table.features).astype(bool)
                return self._read(forward(chosen, self._moved(masks)), chosen)

            values = np.empty((len(rows), 4))
            for group in _equally_long(packed) if imputer == "token_removal" else [np.arange(len(rows))]:
                values[group] = in_batches(run, torch.from_numpy(group), self.samples.batch_size).cpu().numpy()
        return values

    def _moved(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.samples.inputs.device, non_blocking=True)

    @cached_property
    def _classes(self) -> Tensor:
        """(N, 2): each image's target and its rival."""
        targets = self.samples.targets
        return self._moved(np.stack([targets, rivals(self.samples.logits, targets)], axis=1)).long()

    def _read(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return (B, 4) of the logits (B, K) of the samples at `rows`."""
        if len(logits) != len(rows) or logits.ndim != 2:
            raise RequestError(f"the model returns {tuple(logits.shape)} for {len(rows)} images, not logits (N, K).")
        logits = logits.double()
        pair = logits.gather(1, self._classes[rows])
        if logits.shape[1] == 1:
            pair[:, 1] = torch.nan
        partition, predicted = logits.logsumexp(1, keepdim=True), logits.argmax(1, keepdim=True).double()
        return torch.cat([pair, partition, predicted.where(partition.isfinite(), torch.nan)], dim=1)

    @contextmanager
    def _forward(self, imputer: str, table: _Table) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Yield the way from rows (B,) and removed features (B, F) bool to logits (B, K)."""
        samples = self.samples
        model = self.model
        low = samples.precision == "bf16"
        with torch.no_grad(), torch.autocast(samples.inputs.device.type, torch.bfloat16, enabled=low):
            if imputer == "token_removal":
                yield lambda rows, removed: drop_tokens(model, samples.inputs[rows], ~removed)
            elif imputer in STATIC and self._by_patch(table) and (tokens := TokenModel.of(model, samples.patch)):
                with tokens:
                    whole = self._embed("", tokens, samples.inputs)
                    filled = self._embed(imputer, tokens, self._fill(imputer))
                    yield lambda rows, removed: tokens(torch.where(removed[..., None], filled[rows], whole[rows]))
            else:
                yield lambda rows, removed: model(self._images(imputer, table, rows, removed))

    def _by_patch(self, table: _Table) -> bool:
        return not table.segments and table.features == n_patches(self.samples)

    def _fill(self, imputer: str) -> Tensor:
        if imputer not in self._fills:
            self._fills[imputer] = STATIC[imputer](self.samples).expand_as(self.samples.inputs)
        return self._fills[imputer]

    def _embed(self, name: str, model: TokenModel, images: Tensor) -> Tensor:
        if name not in self._tokens:
            chunks = images.split(self.samples.batch_size)
            self._tokens[name] = torch.cat([model.embed(chunk.contiguous()) for chunk in chunks])
        return self._tokens[name]

    def _images(self, imputer: str, table: _Table, rows: Tensor, removed: Tensor) -> Tensor:
        """Return the perturbed images (B, C, H, W)."""
        samples, pixels = self.samples, self.samples.inputs.shape[2:]
        if table.segments:
            labels = np.stack([table.segments[row] for row in rows.tolist()])
            labels_of = torch.from_numpy(labels).to(removed.device).flatten(1).long()
            mask = removed.gather(1, labels_of).view(-1, 1, *pixels)
        elif not self._by_patch(table):
            mask = removed.view(-1, 1, *pixels)
        else:
            (down, across), (height, width) = patch_grid(samples), samples.patch
            mask = removed.view(-1, 1, down, across).repeat_interleave(height, 2).repeat_interleave(width, 3)
        images = samples.inputs[rows]
        if imputer == "road":
            return impute_road(images, mask, self._noise()[rows])
        return torch.where(mask, self._fill(imputer)[rows], images)

    def _noise(self) -> Tensor:
        if "road" not in self._fills:
            self._fills["road"] = road_noise(self.samples)
        return self._fills["road"]


def _equally_long(packed: np.ndarray) -> list[np.ndarray]:
    """Return the positions of the masks, those that remove equally many features together."""
    removed = np.bitwise_count(packed).sum(axis=1, dtype=int)
    return [np.flatnonzero(removed == n) for n in np.unique(removed)]


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


def passes(samples: Samples) -> Passes:
    """Return the forward passes that all explainers and metrics of these images share."""
    return samples.share("passes", Passes)


def prefetch(cells: Iterable[tuple[Metric, Samples]]) -> None:
    """Compute in one stream what some metrics will ask of the model for some explainers of the same images.

    Those that remove patches: the masks of pixels are too large to wait, and enough to fill batches of their own.
    """
    asked = [(metric, metric.defined(samples)) for metric, samples in cells if isinstance(metric, PatchMetric)]
    asked = [(metric, samples) for metric, samples in asked if len(samples)]
    for metric, samples in asked:
        passes(samples).want(_rows(samples), metric.removal(samples))
    for engine in {id(passes(samples)): passes(samples) for _, samples in asked}.values():
        engine.run()


def _rows(samples: Samples) -> np.ndarray:
    return np.arange(len(samples)) if samples.rows is None else samples.rows


def outputs(samples: Samples, removal: Removal) -> Outputs:
    """Return what the model says of the samples with features removed, (N, S)."""
    return passes(samples).read(_rows(samples), removal)


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


def n_patches(samples: Samples) -> int:
    """Return the number of patches of an image."""
    rows, columns = patch_grid(samples)
    return rows * columns


def patch_sums(samples: Samples) -> np.ndarray:
    """Return (N, P) float64: the sum of each map over each patch, in raster order.

    Every patch is added up in the same order, so patches with equal pixels tie exactly.
    """
    return samples.keep("patch sums", lambda: _patch_sums(samples))


def _patch_sums(samples: Samples) -> np.ndarray:
    (rows, columns), (down, across) = patch_grid(samples), samples.patch
    patches = samples.maps.reshape(-1, rows, down, columns, across).swapaxes(2, 3)
    return np.ascontiguousarray(patches).reshape(len(samples), rows * columns, down * across).sum(-1)


def patch_ranks(samples: Samples) -> np.ndarray:
    """Return (N, P) int: 0 for the most relevant patch of each map to P - 1 for the least relevant one.

    Ties are broken as in `ranks`.
    """
    return samples.keep("patch ranks", lambda: ranks(patch_sums(samples), samples.seeds))


def ranks(values: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Return (N, F) int: 0 for the largest of each row of `values` (N, F), F - 1 for the smallest.

    Ties are broken by a permutation drawn from the sample's seed: it favours no place, and is the same for every
    explainer and batch.
    """
    ranked = np.empty(values.shape, dtype=np.int64)
    for row, (of_row, seed) in enumerate(zip(values, seeds, strict=True)):
        lottery = np.random.default_rng(int(seed)).permutation(len(of_row))
        ranked[row, np.lexsort((lottery, -of_row))] = np.arange(len(of_row))
    return ranked


class PerturbationMetric(Metric):
    """Base of the metrics that read off what the model says of images with features removed.

    A subclass implements `removed` and `read`; where its features are no patches, `segments` as well.

    Parameters
    ----------
    imputer : str
        What takes the place of removed features, see `metrics.imputers`.
    output : {"logit", "probability"}
        What is read off the model.
    """

    expensive = True

    imputer: Imputer = "mean"
    output: Output = "logit"

    def removed(self, samples: Samples) -> np.ndarray:
        """Return (N, S, F) bool: the features to remove in each of S versions of each image."""
        raise NotImplementedError

    def read(self, samples: Samples, seen: Outputs) -> np.ndarray:
        """Return (N,) float64 from what the model said of those versions, (N, S) in `seen`."""
        raise NotImplementedError

    def segments(self, samples: Samples) -> np.ndarray | None:
        """Return (N, H, W) int: the feature of each pixel; None for patches or pixels in raster order."""
        return None

    def removal(self, samples: Samples) -> Removal:
        """Return what this metric asks the engine for."""
        return Removal(self.removed(samples), self.imputer, self.segments(samples))

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64."""
        chunks = self.chunks(samples)
        return np.concatenate([self.read(part, outputs(part, self.removal(part))) for part in chunks])

    def chunks(self, samples: Samples) -> list[Samples]:
        """Split the samples into parts whose masks memory can hold; patches are few enough for any number."""
        return [samples] if len(samples) else []


class PatchMetric(PerturbationMetric):
    """Base of the metrics that remove patches: undefined where the map does not tell any patch from another."""

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        tied = np.ptp(patch_sums(samples), axis=1) == 0
        reasons = super().undefined(samples)
        return [reason or ("all patches tie" if tie else "") for reason, tie in zip(reasons, tied, strict=True)]
