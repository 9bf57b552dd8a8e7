"""How well a classifier does, with bootstrap intervals over groups of samples.

Every figure is computed for many weightings of the samples at once: all ones for the figure itself, and how often
a resample holds each sample for its interval. That is one sort per class instead of one per resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, log_softmax, logsumexp, softmax

from explainer_bench import RequestError
from leaderboards.statistics import MIN_CLUSTERS

BINS = 15
RESAMPLES = 1000
_WORK = 4e8  # images x classes x resamples, beyond which fewer resamples are drawn
_CHUNK = 4_000_000  # numbers in one block of weightings

Figures = Callable[[np.ndarray], dict[str, np.ndarray]]


class Performance(NamedTuple):
    """Figures by name, their 95 % intervals, the bins of the calibration error, and the number of resamples."""

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    calibration: list[dict[str, float]]
    resamples: int


def measure(
    loss: str,
    outputs: np.ndarray,
    targets: np.ndarray,
    groups: Sequence[str],
    class_names: Sequence[str] = (),
    contrasts: Sequence[tuple[str, str]] = (),
    resamples: int = RESAMPLES,
    split: str = "test",
) -> Performance:
    """Measure a model's outputs on held-out samples.

    Parameters
    ----------
    loss : {"cross_entropy", "bce", "huber"}
        What they were trained for. The first gives accuracy, balanced accuracy, AUROC and AUPRC (of class 1 where
        there are two classes, else the mean over classes against the rest) and the calibration error of the top
        class; the second the shares of images whose top class is present (`top1_present`) and whose classes are
        all right (`all_labels`), the mean AUROC and AUPRC of the classes, and the calibration error of all
        probabilities; the third the mean absolute, mean squared and root mean squared error.
    outputs : ndarray
        (N, K) float64: logits, or values.
    targets : ndarray
        (N,) class, or (N, K).
    groups : sequence of str
        Of each sample; resamples draw whole groups.
    class_names, contrasts
        Pairs of classes whose AUROC against each other is a figure more.
    resamples : int
        Of the bootstrap; fewer where samples and classes are very many.
    split : str
        What the samples are called in an error.

    Returns
    -------
    Performance
        A class without samples, or with nothing else, has no AUROC and no AUPRC: the mean leaves it out. Fewer than
        `leaderboards.statistics.MIN_CLUSTERS` groups say nothing of their spread: intervals are NaN.

    Raises
    ------
    RequestError
        Where outputs are NaN or infinite.
    """
    _check_finite(outputs, split)
    count = int(np.clip(_WORK / max(1, outputs.size), min(100, resamples), resamples))
    kinds = {"cross_entropy": _classes, "bce": _presence, "huber": _values}
    figures, bins = kinds[loss](outputs, targets)
    pairs = [_contrast(outputs, targets, pair, list(class_names)) for pair in contrasts]
    weights, enough = _weightings(groups, count), len(set(groups)) >= MIN_CLUSTERS
    blocks = np.array_split(weights, max(1, weights.size // _CHUNK))
    parts = [{name: v for f in (figures, *pairs) for name, v in f(block).items()} for block in blocks]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Performance(
        {name: float(value[0]) for name, value in values.items()},
        {name: _interval(value[1:]) if enough else (np.nan, np.nan) for name, value in values.items()},
        bins,
        count,
    )


def _check_finite(outputs: np.ndarray, split: str) -> None:
    odd = int((~np.isfinite(outputs)).any(axis=1).sum())
    if odd:
        line = f"the model's outputs of {odd} of {len(outputs)} images of the {split} split are NaN or infinite"
        raise RequestError(f"{line}: train with a smaller lr, and where half is true, with half=false.")


def _interval(values: np.ndarray) -> tuple[float, float]:
    kept = values[~np.isnan(values)]
    low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (np.nan, np.nan)
    return float(low), float(high)


def _weightings(groups: Sequence[str], resamples: int) -> np.ndarray:
    """(1 + resamples, N): ones, then how often each resample of whole groups holds each sample."""
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return np.vstack([np.ones(len(index)), counts[:, index]])


def _classes(logits: np.ndarray, labels: np.ndarray) -> tuple[Figures, list[dict[str, float]]]:
    share = softmax(logits, axis=1)
    correct = (logits.argmax(1) == labels).astype(float)
    positive = labels[:, None] == np.arange(logits.shape[1])
    scored, scores = (slice(1, 2), np.diff(logits)) if logits.shape[1] == 2 else (slice(None), log_odds(logits))
    bins = _Bins(share.max(1), correct)

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        recalls = [_share(weights[:, mine], correct[mine]) for mine in positive.T]
        return {
            "accuracy": _share(weights, correct),
            "balanced_accuracy": _mean(recalls),
            **_ranked(scores, positive[:, scored], weights),
            "ece": bins.error(weights),
        }

    return figures, bins.table()


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Each class's logit less the log-sum-exp of the others, (N, K): it ranks as the softmax does, and never saturates.

    Only the top class has a probability above one half, so only there 1 - p must not be computed from p.
    """
    share = log_softmax(logits, axis=1)
    rows, top = np.arange(len(logits)), logits.argmax(1)
    others = logits.copy()
    others[rows, top] = -np.inf
    share[rows, top] = -np.inf  # until it is known
    odds = share - np.log1p(-np.exp(share))
    odds[rows, top] = logits[rows, top] - logsumexp(others, axis=1)
    return odds


def _presence(logits: np.ndarray, targets: np.ndarray) -> tuple[Figures, list[dict[str, float]]]:
    present = targets > 0.5
    top = present[np.arange(len(logits)), logits.argmax(1)].astype(float)
    whole = ((logits > 0) == present).all(1).astype(float)
    bins = _Bins(expit(logits), present.astype(float))

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        shares = {"top1_present": _share(weights, top), "all_labels": _share(weights, whole)}
        return {**shares, **_ranked(logits, present, weights), "ece": bins.error(weights)}

    return figures, bins.table()


def _values(outputs: np.ndarray, targets: np.ndarray) -> tuple[Figures, list[dict[str, float]]]:
    error = outputs - targets

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        squared = _share(weights, (error**2).mean(1))
        return {"mae": _share(weights, np.abs(error).mean(1)), "mse": squared, "rmse": np.sqrt(squared)}

    return figures, []


def _contrast(logits: np.ndarray, labels: np.ndarray, pair: tuple[str, str], names: list[str]) -> Figures:
    """AUROC of one class against another among the images of the two."""
    first, second = (names.index(name) for name in pair)
    mine = np.isin(labels, (first, second))
    margin, positive = (logits[:, first] - logits[:, second])[mine], (labels == first)[mine]
    return lambda weights: {f"auroc_{pair[0]}_vs_{pair[1]}": ranked(margin, positive, weights[:, mine])[0]}


def _share(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted mean (B,) of `values` (N,) under weights (B, N); NaN where nothing weighs."""
    with np.errstate(invalid="ignore"):
        return weights @ values / weights.sum(1)


def _mean(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over classes of (B,) each, leaving NaN out; NaN where all are."""
    table = np.stack(columns)
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(known, table, 0).sum(0) / known.sum(0)


def _ranked(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    pairs = [ranked(scores[:, k], positive[:, k], weights) for k in range(scores.shape[1])]
    return {"auroc": _mean([auroc for auroc, _ in pairs]), "auprc": _mean([auprc for _, auprc in pairs])}


def ranked(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision under many weightings, as scikit-learn defines them with `sample_weight`.

    Parameters
    ----------
    scores : ndarray
        (N,): higher for the positives. Equal ones count half in the AUROC, together in the average precision.
    positive : ndarray
        (N,) bool.
    weights : ndarray
        (B, N).

    Returns
    -------
    tuple of ndarray
        (B,) each; NaN where positives or negatives are missing.
    """
    if positive.all() or not positive.any():
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    weights = weights[:, order]
    true = np.cumsum(weights * positive[order], axis=1)[:, last]
    false = np.cumsum(weights * ~positive[order], axis=1)[:, last]
    new_true, new_false = (np.diff(counts, axis=1, prepend=0) for counts in (true, false))
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = ((true - new_true / 2) * new_false).sum(1) / (true[:, -1] * false[:, -1])
        precision = np.nan_to_num(true / (true + false))
        auprc = (new_true * precision).sum(1) / true[:, -1]
    return auroc, np.where(np.isnan(auroc), np.nan, auprc)


class _Bins:
    """Probabilities in equal bins: how far mean probability and frequency are apart, weighted by their number."""

    def __init__(self, probability: np.ndarray, happened: np.ndarray) -> None:
        self.index = np.minimum((probability * BINS).astype(int), BINS - 1).reshape(len(probability), -1)
        self.probability, self.happened = (a.reshape(len(probability), -1) for a in (probability, happened))

    def error(self, weights: np.ndarray) -> np.ndarray:
        """Expected calibration error (B,) under weights (B, N)."""
        gap = self.probability - self.happened
        sums = [weights @ np.where(self.index == b, gap, 0).sum(1) for b in range(BINS)]
        return np.abs(sums).sum(0) / (weights.sum(1) * self.index.shape[1])

    def table(self) -> list[dict[str, float]]:
        """Each bin that is not empty: its edges, number, mean probability and frequency."""
        rows: list[dict[str, Any]] = []
        for b in range(BINS):
            if (mine := self.index == b).any():
                means = {"probability": self.probability[mine].mean(), "frequency": self.happened[mine].mean()}
                edges = {"from": b / BINS, "to": (b + 1) / BINS, "count": int(mine.sum())}
                rows.append({**edges, **{name: float(value) for name, value in means.items()}})
        return rows
