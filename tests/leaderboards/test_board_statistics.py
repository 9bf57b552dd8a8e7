"""The statistics of boards against known truths, by simulation and by hand."""

import numpy as np
import pytest

from leaderboards import statistics


def intervals(values, clusters, n_boot=400):
    replicates = statistics.bootstrap_means(values, clusters, n_boot, statistics.generator("toy", 0))
    return statistics.interval(replicates)


def clustered(rng, n_clusters, size, columns):
    """Values whose mean is 0, most of whose variance lies between clusters."""
    clusters = np.repeat(np.arange(n_clusters), size)
    effect = rng.normal(size=(n_clusters, columns))[clusters]
    return (effect + 0.3 * rng.normal(size=effect.shape))[:, :, None], clusters


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(80, 400, 1))
    low, high = intervals(values, np.arange(80))
    assert 0.90 <= np.mean((low <= 1) & (high >= 1)) <= 0.99


def test_resampling_clusters_keeps_coverage_where_resampling_images_loses_it():
    values, clusters = clustered(np.random.default_rng(1), n_clusters=30, size=6, columns=300)
    low, high = intervals(values, clusters)
    naive_low, naive_high = intervals(values, np.arange(len(values)))
    assert (high - low).mean() > 1.5 * (naive_high - naive_low).mean()
    assert 0.88 <= np.mean((low <= 0) & (high >= 0)) <= 0.99
    assert np.mean((naive_low <= 0) & (naive_high >= 0)) < 0.75


def test_resamples_are_shared_by_all_explainers_and_metrics():
    rng = np.random.default_rng(2)
    first = rng.normal(size=(30, 1, 2))
    values = np.concatenate([first, first + 0.25], axis=1)
    replicates = statistics.bootstrap_means(values, np.arange(30), 100, rng)
    np.testing.assert_allclose(replicates[:, 1] - replicates[:, 0], 0.25)


def test_resamples_average_defined_values_only():
    values = np.array([1.0, 1.0, np.nan, np.nan, 1.0, np.nan]).reshape(6, 1, 1)
    replicates = statistics.bootstrap_means(values, np.arange(6), 200, np.random.default_rng(0))
    assert np.nanmax(np.abs(replicates - 1)) < 1e-12
    assert np.isnan(replicates).sum() <= 10  # only resamples that drew no defined sample: 200 / 2**6 expected


def test_mean_of_nothing_is_undefined():
    assert np.isnan(statistics.mean(np.full((3, 1), np.nan)))[0]


def test_ranks_share_ties_and_skip_gaps():
    cost = np.array([[0.1, np.nan], [0.1, 2.0], [0.3, 1.0]])
    expected = [[1.5, np.nan], [1.5, 2], [3, 1]]
    np.testing.assert_array_equal(statistics.rank(cost, np.ones(3, dtype=bool)), expected)


def test_last_digits_break_no_ties():
    cost = np.array([[0.3], [0.1 + 0.2], [0.2]])
    np.testing.assert_array_equal(statistics.rank(cost, np.ones(3, dtype=bool)), [[2.5], [2.5], [1]])


def test_incomplete_explainer_is_ranked_but_moves_no_one():
    cost = np.random.default_rng(3).normal(size=(5, 6, 4)).round(1)
    complete = np.array([True, True, False, True, False, True])
    ranks = statistics.rank(cost, complete)
    alone = statistics.rank(cost[:, complete], np.ones(4, dtype=bool))
    np.testing.assert_array_equal(ranks[:, complete], alone)
    for row in (2, 4):
        better = (cost[:, complete] < cost[:, [row]]).sum(axis=1)
        ties = (cost[:, complete] == cost[:, [row]]).sum(axis=1)
        np.testing.assert_array_equal(ranks[:, row], 1 + better + ties / 2)


def test_groups_of_metrics_have_one_vote_each():
    ranks = np.array([[1.0, 1.0, 1.0, 2.0], [2.0, 2.0, 2.0, 1.0]])
    by_group, overall = statistics.mean_ranks(ranks, np.array([0, 0, 0, 1]))
    np.testing.assert_array_equal(by_group, [[1, 2], [2, 1]])
    np.testing.assert_array_equal(overall, [1.5, 1.5])


def test_gap_makes_the_mean_rank_undefined():
    by_group, overall = statistics.mean_ranks(np.array([[1.0, np.nan, 2.0]]), np.array([0, 0, 1]))
    assert np.isnan(by_group[0, 0]) and by_group[0, 1] == 2 and np.isnan(overall[0])


def test_tie_group_starts_where_the_difference_to_its_best_is_sure():
    cost = np.array([3.0, 1.0, 1.2, np.nan, 3.1, 2.0])
    noise = np.random.default_rng(4).normal(scale=0.25, size=(2000, 6))
    # 1.0 and 1.2 overlap; 2.0 is apart from 1.0 and best of its group; 3.0 is apart from 2.0 and ties with 3.1.
    groups = statistics.tie_groups(cost, cost + noise)
    np.testing.assert_array_equal(groups, [3, 1, 1, np.nan, 3, 2])


def test_tie_groups_use_paired_differences():
    shared = np.random.default_rng(5).normal(scale=10, size=(2000, 1))
    cost = np.array([1.0, 1.1])
    np.testing.assert_array_equal(statistics.tie_groups(cost, cost + shared), [1, 2])


def test_rank_interval_holds_the_rank():
    low, high = statistics.rank_interval(np.array([1.0]), np.array([[2.0], [3.0], [2.0]]))
    assert (low[0], high[0]) == (1, 3)


def beats(cost, clusters=None, trivial=2):
    clusters = np.arange(len(cost)) if clusters is None else clusters
    is_trivial = np.arange(cost.shape[1]) < trivial
    everyone = np.ones(cost.shape[1], dtype=bool)
    return statistics.beats(cost, np.array([0, 0, 1]), clusters, everyone, is_trivial)


def test_noise_rarely_beats_a_trivial_row():
    rng = np.random.default_rng(6)
    boards = 80
    false = sum(beats(rng.normal(size=(40, 5, 3))).any() for _ in range(boards))
    assert false / boards <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / boards)


def test_copies_of_few_patients_beat_no_one():
    few = np.random.default_rng(7).normal(size=(5, 5, 3))
    few[:, 2] = -10
    images = np.repeat(few, 40, axis=0)
    assert beats(images)[2].any()
    assert not beats(images, clusters=np.repeat(np.arange(5), 40)).any()


def test_better_explainer_beats_trivial_rows_and_not_itself():
    cost = np.random.default_rng(8).normal(size=(40, 4, 3))
    cost[:, 3] -= 2
    result = beats(cost)
    assert result[3].tolist() == [True, True, False, False]
    assert not np.diag(result).any()


def test_worse_explainer_beats_no_one():
    cost = np.random.default_rng(10).normal(size=(40, 4, 3))
    cost[:, 3] += 2
    assert not beats(cost)[3].any()


def test_wins_are_corrected_for_all_pairs(monkeypatch):
    p_values = iter([0.03, 0.01, 0.02, 0.04])
    monkeypatch.setattr(statistics, "_p_value", lambda differences: next(p_values))
    # Holm: 4 x 0.01 is below 0.05; 3 x 0.02 is not and ends the procedure.
    result = beats(np.zeros((10, 5, 3)), trivial=1)
    assert result[2, 0] and result.sum() == 1


def test_pair_is_compared_where_both_are_defined():
    cost = np.random.default_rng(9).normal(size=(40, 3, 3))
    cost[:, 2, :2], cost[:, 2, 2] = -10, 10
    assert not beats(cost)[2, 0]
    cost[:, 0, 2] = np.nan
    assert beats(cost)[2, 0]


@pytest.mark.parametrize("fill", [np.nan, 1.0])
def test_nothing_to_compare_is_no_win(fill):
    assert not beats(np.full((10, 3, 3), fill)).any()


def test_resamples_depend_on_the_name_and_the_seed_only():
    first, again, other = (statistics.generator(name, 0).random(3) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
