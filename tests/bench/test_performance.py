"""Figures of merit: scikit-learn's values, and intervals over groups."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn import metrics as sk

from bench.training import performance
from explainer_bench import RequestError

RNG = np.random.default_rng(0)
NAMES = ("benign", "malignant", "normal")


def alone(n):
    return list(map(str, range(n)))


@pytest.mark.parametrize("decimals", [1, 8])  # with and without ties
def test_ranked_is_scikit_learns(decimals):
    positive, scores = RNG.random(80) < 0.3, RNG.random(80).round(decimals)
    weights = np.vstack([np.ones(80), RNG.integers(0, 4, (3, 80))])
    auroc, auprc = performance.ranked(scores, positive, weights)
    for row, weight in enumerate(weights):
        assert auroc[row] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=weight))
        assert auprc[row] == pytest.approx(sk.average_precision_score(positive, scores, sample_weight=weight))


@pytest.mark.parametrize("classes", [2, 3])
def test_figures_of_a_classifier_are_scikit_learns(classes):
    labels, logits = RNG.integers(0, classes, 90), RNG.normal(size=(90, classes))
    logits[np.arange(90), labels] += 0.7
    share, top = softmax(logits, axis=1), logits.argmax(1)
    figures = performance.measure("cross_entropy", logits, labels, alone(90)).figures
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, top))
    assert figures["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, top))
    if classes == 2:
        assert figures["auroc"] == pytest.approx(sk.roc_auc_score(labels, share[:, 1]))
        assert figures["auprc"] == pytest.approx(sk.average_precision_score(labels, share[:, 1]))
    else:
        one_hot = np.eye(3)[labels]
        assert figures["auroc"] == pytest.approx(sk.roc_auc_score(labels, share, multi_class="ovr"))
        assert figures["auprc"] == pytest.approx(sk.average_precision_score(one_hot, share, average="macro"))


def test_a_contrast_looks_at_two_classes_only():
    labels, logits = np.arange(90) % 3, RNG.normal(size=(90, 3))
    figures = performance.measure("cross_entropy", logits, labels, alone(90), NAMES, [("malignant", "benign")]).figures
    two = labels < 2
    wanted = sk.roc_auc_score(labels[two] == 1, (logits[:, 1] - logits[:, 0])[two])
    assert figures["auroc_malignant_vs_benign"] == pytest.approx(wanted)


def test_sure_classifiers_are_ranked_by_what_softmax_rounds_away():
    sure = np.zeros((6, 2))
    sure[:, 1] = [40, 45, 50, 60, 70, 80]
    labels = np.array([0, 1, 0, 1, 0, 1])
    assert len(np.unique(softmax(sure, axis=1)[:, 1])) == 1
    figures = performance.measure("cross_entropy", sure, labels, alone(6)).figures
    assert figures["auroc"] == pytest.approx(sk.roc_auc_score(labels, sure[:, 1]))
    assert figures["auprc"] == pytest.approx(sk.average_precision_score(labels, sure[:, 1]))

    logits, labels = RNG.normal(scale=60, size=(200, 4)), RNG.integers(0, 4, 200)
    odds = np.stack([logits[:, k] - logsumexp(np.delete(logits, k, 1), axis=1) for k in range(4)], axis=1)
    assert np.allclose(performance.log_odds(logits), odds, rtol=1e-12)
    figures = performance.measure("cross_entropy", logits, labels, alone(200)).figures
    pairs = [(labels == k, odds[:, k]) for k in range(4)]
    assert figures["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(*pair) for pair in pairs]))
    assert figures["auprc"] == pytest.approx(np.mean([sk.average_precision_score(*pair) for pair in pairs]))
    rounded = softmax(logits, axis=1)
    assert figures["auroc"] != pytest.approx(sk.roc_auc_score(labels, rounded, multi_class="ovr"), abs=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "huber"])
def test_outputs_that_are_not_finite_have_no_figures(loss):
    outputs = RNG.normal(size=(20, 2))
    outputs[3, 0], outputs[7] = np.nan, np.inf
    targets = np.arange(20) % 2 if loss == "cross_entropy" else np.eye(2)[np.arange(20) % 2]
    with pytest.raises(RequestError, match="outputs of 2 of 20 images of the val split are NaN or infinite"):
        performance.measure(loss, outputs, targets, alone(20), split="val")


def test_few_groups_have_no_intervals():
    labels, logits = np.arange(60) % 2, RNG.normal(size=(60, 2))
    for count in (1, 2, 5, 6):
        groups = [str(i % count) for i in range(60)]
        result = performance.measure("cross_entropy", logits, labels, groups)
        assert np.isfinite(list(result.figures.values())).all()
        assert np.isfinite(list(result.intervals.values())).all() == (count == 6)
        assert np.isnan(list(result.intervals.values())).all() == (count < 6)


def test_a_perfect_and_a_useless_classifier():
    labels = np.arange(30) % 3
    perfect = performance.measure("cross_entropy", 50.0 * np.eye(3)[labels], labels, alone(30))
    assert {k: round(v, 6) for k, v in perfect.figures.items()} == {
        "accuracy": 1,
        "balanced_accuracy": 1,
        "auroc": 1,
        "auprc": 1,
        "ece": 0,
    }
    assert perfect.intervals["auroc"] == (1, 1)
    useless = performance.measure("cross_entropy", np.zeros((30, 3)), labels, alone(30)).figures
    assert useless["auroc"] == 0.5 and useless["balanced_accuracy"] == pytest.approx(1 / 3)
    assert useless["auprc"] == pytest.approx(1 / 3) and useless["ece"] == pytest.approx(0)


def test_calibration_by_hand():
    logits = np.log(np.array([[0.9, 0.1]] * 4 + [[0.3, 0.7]] * 4))
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0])  # 3 of 4 at .9, 2 of 4 at .7
    result = performance.measure("cross_entropy", logits, labels, alone(8))
    assert result.figures["ece"] == pytest.approx((0.15 + 0.2) / 2)
    table = [(row["count"], round(row["probability"], 6), row["frequency"]) for row in result.calibration]
    assert table == [(4, 0.7, 0.5), (4, 0.9, 0.75)]
    assert all(row["from"] <= row["probability"] <= row["to"] for row in result.calibration)


def test_figures_of_presence():
    present = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]])
    logits = np.array([[2.0, 1, -1], [-1, 1, 2], [1, -2, 3], [-1, -1, 4]])
    figures = performance.measure("bce", logits, present.astype(np.float32), alone(4)).figures
    assert figures["top1_present"] == 0.75 and figures["all_labels"] == 0.75
    assert figures["auroc"] == pytest.approx(sk.roc_auc_score(present, logits, average="macro"))
    assert figures["auprc"] == pytest.approx(sk.average_precision_score(present, logits, average="macro"))
    share = 1 / (1 + np.exp(-logits))
    one_bin = performance.measure("bce", np.zeros((4, 3)), present.astype(np.float32), alone(4)).figures["ece"]
    assert one_bin == pytest.approx(abs(0.5 - present.mean())) and share.shape == (4, 3)


def test_figures_of_values():
    outputs, targets = np.array([[1.0, 2], [3, 5]]), np.array([[1.0, 0], [2, 5]])
    figures = performance.measure("huber", outputs, targets, alone(2)).figures
    assert figures == pytest.approx({"mae": 0.75, "mse": 1.25, "rmse": 1.25**0.5})


def test_a_class_without_samples_is_left_out():
    labels, logits = np.arange(40) % 2, RNG.normal(size=(40, 3))
    figures = performance.measure("cross_entropy", logits, labels, alone(40)).figures
    share = softmax(logits, axis=1)
    wanted = np.mean([sk.roc_auc_score(labels == k, share[:, k]) for k in (0, 1)])
    assert figures["auroc"] == pytest.approx(wanted)
    one = performance.measure("cross_entropy", logits, np.zeros(40, int), alone(40))
    assert np.isnan(one.figures["auroc"]) and np.isnan(one.intervals["auroc"]).all()
    assert one.figures["balanced_accuracy"] == one.figures["accuracy"]


def test_intervals_hold_the_figure_and_shrink_with_the_number_of_groups():
    labels = RNG.integers(0, 2, 400)
    logits = RNG.normal(size=(400, 2))
    logits[np.arange(400), labels] += 1

    def width(groups, rows=slice(None)):
        result = performance.measure("cross_entropy", logits[rows], labels[rows], groups)
        low, high = result.intervals["accuracy"]
        assert low < result.figures["accuracy"] < high and result.resamples == performance.RESAMPLES
        return high - low

    correct = (logits.argmax(1) == labels).mean()
    assert width(alone(400)) == pytest.approx(2 * 1.96 * (correct * (1 - correct) / 400) ** 0.5, rel=0.15)
    repeated = np.repeat(np.arange(100), 4)
    assert width(list(map(str, repeated)), repeated) == pytest.approx(width(alone(100), slice(0, 100)), rel=0.2)


def test_many_classes_and_samples_are_resampled_less_often(monkeypatch):
    monkeypatch.setattr(performance, "_WORK", 3000)
    logits = RNG.normal(size=(10, 2))
    assert performance.measure("cross_entropy", logits, np.arange(10) % 2, alone(10)).resamples == 150
    assert performance.measure("cross_entropy", logits, np.arange(10) % 2, alone(10), resamples=50).resamples == 50


def test_blocks_of_resamples_change_nothing(monkeypatch):
    labels, logits = RNG.integers(0, 3, 60), RNG.normal(size=(60, 3))
    whole = performance.measure("cross_entropy", logits, labels, alone(60))
    monkeypatch.setattr(performance, "_CHUNK", 1000)
    blocks = performance.measure("cross_entropy", logits, labels, alone(60))
    assert np.allclose(list(blocks.intervals.values()), list(whole.intervals.values()))
    assert blocks.figures == pytest.approx(whole.figures)
