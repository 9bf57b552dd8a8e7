"""The contract of a metric: per-sample float64 scores, undefined ones NaN with a reason."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from explainer_bench import Component

T = TypeVar("T")
GROUPS = (
    "faithfulness",
    "localization",
    "plausibility",
    "compactness",
    "class_sensitivity",
    "robustness",
    "randomization",
    "axiomatic",
)
Precision = Literal["fp32", "bf16"]
SIGN_POLICIES = ("signed", "positive", "absolute")


class Reexplain(Protocol):
    """The samples' explainer, for metrics that explain again, on other images or on another model."""

    def __call__(self, model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (M, H, W) float64 maps of `images` (M, C, H, W) for `targets` (M,).

        `rows` (M,) says which sample each image was made from: some explainers need to know (its ROI prior, say).
        The model is left as it was.
        """


@dataclass(frozen=True)
class Samples:
    """What a metric may look at: N explained images of one model. `maps`, `roi` and `logits` cannot be written to.

    Parameters
    ----------
    model : nn.Module
        Image classifier returning logits, in eval mode.
    inputs : Tensor
        (N, C, H, W) float, normalised as the model wants them, on the model's device.
    targets : ndarray
        (N,) int, the explained class.
    maps : ndarray
        (N, H, W) float64, the attribution maps at the input's resolution.
    roi : ndarray
        (N, H, W) bool; all False where the target has no region of interest.
    logits : ndarray
        (N, K) float64, the model's output on `inputs`.
    seeds : ndarray
        (N,) uint32, one per sample, whatever batch it comes in.
    patch : tuple of int
        Height and width in pixels of one feature of patch-wise metrics (the ViT's patch).
    batch_size : int
        Perturbed images per forward pass; changes memory and speed, never a score.
    explain : callable, optional
        ``explain(classes (N,) int) -> (N, H, W)``: the same explainer's maps of the same images for other classes.
    reexplain : Reexplain, optional
        The explainer itself, at the input's resolution.
    labels : ndarray, optional
        (N,) int, the true classes.
    roi_of : callable, optional
        ``roi_of(classes (N,) int, region="") -> (N, H, W) bool``: each sample's ROI for another class, or its region of
        this name ("lung", say); all False without one.
    mosaics : callable, optional
        ``mosaics() -> (images (N, C, H, W), own (N, H, W) bool)``: for each sample a mosaic of images, and the part of
        it that shows the sample's target; all False where there is none.
    black : Tensor, optional
        (C,), what a black pixel is in `inputs`.
    precision : "fp32" or "bf16"
        How perturbed images go through the model; maps and everything else are not touched.
    shared : dict
        Results that do not depend on the explainer, kept for all explainers of these images (see `once`).
    """

    model: nn.Module
    inputs: Tensor
    targets: np.ndarray
    maps: np.ndarray
    roi: np.ndarray
    logits: np.ndarray
    seeds: np.ndarray
    patch: tuple[int, int]
    batch_size: int = 16
    explain: Callable[[np.ndarray], np.ndarray] | None = None
    reexplain: Reexplain | None = None
    labels: np.ndarray | None = None
    roi_of: Callable[..., np.ndarray] | None = None
    mosaics: Callable[[], tuple[Tensor, np.ndarray]] | None = None
    black: Tensor | None = None
    precision: Precision = "fp32"
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    # `replace` starts anew with these: which samples these are `rows` of, set by `take`, and what `keep` keeps
    whole: Samples | None = field(default=None, init=False, repr=False)
    rows: np.ndarray | None = field(default=None, init=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("maps", "roi", "logits"):  # a metric that changes them would change what the next one sees
            view = np.asarray(getattr(self, name)).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: np.ndarray) -> Samples:
        """Return the samples at `rows`; what is `shared` stays so."""
        names = "targets", "maps", "roi", "logits", "seeds", "labels"
        arrays = {name: array[rows] for name in names if (array := getattr(self, name)) is not None}
        by_class = {name: self._of_classes(getattr(self, name), rows) for name in ("explain", "roi_of")}
        again, mosaics = self.reexplain, self.mosaics
        part = replace(
            self,
            inputs=self.inputs[torch.as_tensor(rows, device=self.inputs.device)],
            reexplain=again and (lambda model, images, targets, of: again(model, images, targets, rows[of])),
            mosaics=mosaics and (lambda: _both_at(mosaics(), rows)),
            **arrays,
            **by_class,
        )
        object.__setattr__(part, "whole", self.whole or self)
        object.__setattr__(part, "rows", rows if self.rows is None else self.rows[rows])
        return part

    def _of_classes(self, function: Callable[..., np.ndarray] | None, rows: np.ndarray) -> Any:
        def at_rows(classes: np.ndarray, *more: Any) -> np.ndarray:
            full = self.targets.copy()
            full[rows] = classes
            assert function is not None
            return function(full, *more)[rows]

        return function and at_rows

    def keep(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, computed once for all metrics that look at these maps."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def once(self, key: Hashable, compute: Callable[[Samples], np.ndarray]) -> np.ndarray:
        """Return ``compute(samples)``, one row per sample, computed once for all explainers of these images.

        `key` names everything that the result depends on besides the images, targets and model.
        """
        found = self.share(key, compute)
        return found if self.rows is None else found[self.rows]

    def share(self, key: Hashable, compute: Callable[[Samples], T]) -> T:
        """Return ``compute(whole)`` for the whole of which these are a part, computed once for all explainers.

        Samples of other images, targets, seeds or another model do not get to see it, even with the same `shared`.
        """
        whole = self.whole or self
        objects = whole.model, whole.inputs
        arrays = (whole.targets, whole.seeds, whole.logits, whole.black if whole.black is None else whole.black.cpu())
        values = *map(str, (whole.patch, whole.precision)), *(np.asarray(array).tobytes() for array in arrays)
        of_images = *map(id, objects), *values
        if (key, of_images) not in whole.shared:
            whole.shared[key, of_images] = compute(whole), objects  # which keeps their ids from being given away
        return whole.shared[key, of_images][0]


class Scores(NamedTuple):
    """Per-sample values (N,) float64 and, for each NaN, the reason (else "")."""

    values: np.ndarray
    reasons: list[str]


class Metric(Component):
    """Base of all metrics.

    A subclass states the constants below and implements `score`. The base class finds the samples for which
    the metric is undefined, says why, and hands `score` only batches it can score.
    """

    group: ClassVar[str] = ""  # one of GROUPS
    formula: ClassVar[str] = ""  # in plain text; what its card shows, as the four that follow
    rewards: ClassVar[str] = ""  # what a good score means
    fooled_by: ClassVar[str] = ""  # which worthless maps score well
    deviation: ClassVar[str] = ""  # from Quantus 0.6.0, where it has the metric
    higher_is_better: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-np.inf, np.inf)
    chance: ClassVar[float | None] = None  # expected score of a random map, where it does not depend on the sample
    sign_policy: ClassVar[str] = "signed"  # signed, positive or absolute: what `score` makes of negative attributions
    scale_invariant: ClassVar[bool] = True  # maps times a positive number score the same
    needs_roi: ClassVar[bool] = False
    needs_mosaics: ClassVar[bool] = False
    undefined_on_constant: ClassVar[bool] = True
    asks: ClassVar[str] = ""  # "single_patches": it tells nothing of explainers that ask the model the same
    expensive: ClassVar[bool] = False  # needs forward passes of the model
    undefined_reason: ClassVar[str] = "not finite"  # what it means where `score` gives NaN

    def score(self, samples: Samples) -> np.ndarray:
        """Return one float64 per sample, each independent of the other samples.

        Parameters
        ----------
        samples : Samples
            Only samples for which the metric is defined.
        """
        raise NotImplementedError(f"metric {self.name!r} defines no `score`")

    def misstated(self) -> str:
        """Return what is wrong with the constants that the class states, or ""."""
        low, high = self.bounds
        if not isinstance(self.higher_is_better, bool):
            return f"higher_is_better is {self.higher_is_better!r}: state True or False"
        if self.sign_policy not in SIGN_POLICIES:
            return f"sign_policy is {self.sign_policy!r}: use one of {', '.join(SIGN_POLICIES)}"
        return "" if low < high else f"bounds are {self.bounds}: state the lower one first"

    def other_classes(self, logits: np.ndarray, targets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Return (N, M) int: the classes besides the target whose maps `score` asks of ``samples.explain``."""
        return np.empty((len(targets), 0), dtype=int)

    def chance_level(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64: the expected score of a random map on each sample; NaN where unknown."""
        return np.full(len(samples), np.nan if self.chance is None else self.chance)

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        reasons = []
        for spread, roi in zip(samples.keep("spread", lambda: _spread(samples.maps)), samples.roi, strict=True):
            if not np.isfinite(spread):
                reasons.append("map is not finite")
            elif self.needs_roi and not roi.any():
                reasons.append("empty ROI")
            elif self.undefined_on_constant and spread == 0:
                reasons.append("constant map")
            else:
                reasons.append("")
        return reasons

    def defined(self, samples: Samples) -> Samples:
        """Return the samples that `score` gets to see."""
        return _at(samples, np.flatnonzero([not reason for reason in self.undefined(samples)]))

    def __call__(self, samples: Samples) -> Scores:
        """Score every sample.

        Returns
        -------
        Scores
            Values (N,) float64, NaN exactly where a reason is given.

        Raises
        ------
        ValueError
            If `score` does not return one value per sample.
        """
        reasons = self.undefined(samples)
        values = np.full(len(samples), np.nan)
        rows = np.flatnonzero([not reason for reason in reasons])
        if len(rows):
            scores = np.asarray(self.score(_at(samples, rows)))
            if scores.shape != rows.shape:
                raise ValueError(f"{self.name} returned {scores.shape}, not one score for each of {len(rows)} samples")
            values[rows] = scores
        for row in rows[~np.isfinite(values[rows])]:
            values[row], reasons[row] = np.nan, self.undefined_reason
        return Scores(values, reasons)


def _spread(maps: np.ndarray) -> list[float]:
    """Return the largest minus the smallest value of each map (N, H, W); NaN where one is not finite."""
    return [float(np.ptp(values)) if np.isfinite(values).all() else np.nan for values in maps]


def _both_at(pair: tuple[Tensor, np.ndarray], rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
    return pair[0][torch.as_tensor(rows, device=pair[0].device)], pair[1][rows]


def _at(samples: Samples, rows: np.ndarray) -> Samples:
    if len(rows) == len(samples):
        return samples
    return samples.keep(("take", rows.tobytes()), lambda: samples.take(rows))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (N,) float64: Pearson's correlation of each row of `a` (N, M) with that of `b`; NaN where one is constant.

    A row whose spread is within the rounding of its values counts as constant.
    """
    correlation = np.full(len(a), np.nan)
    for row, pair in enumerate(zip(a, b, strict=True)):
        centred = [values - values.mean() for values in pair]
        norms = [np.linalg.norm(values) for values in centred]
        if all(norm > 1e-13 * np.linalg.norm(values) for norm, values in zip(norms, pair, strict=True)):
            correlation[row] = np.clip(centred[0] / norms[0] @ (centred[1] / norms[1]), -1, 1)
    return correlation
