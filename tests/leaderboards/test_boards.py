"""Boards: their columns, gaps, order and files."""

import numpy as np
import pandas as pd
import pytest

import leaderboards
from explainer_bench import RequestError

WIDE = (
    "dataset model explainer n_samples n_failed rank rank_low rank_high tie_group mean_rank faithfulness_rank "
    "localization_rank compactness_rank class_sensitivity_rank faithfulness_estimate faithfulness_estimate_ci_low "
    "faithfulness_estimate_ci_high srg srg_ci_low srg_ci_high pointing_game pointing_game_ci_low "
    "pointing_game_ci_high sparseness sparseness_ci_low sparseness_ci_high class_correlation class_correlation_ci_low "
    "class_correlation_ci_high beats_baselines seconds_per_image status info"
)
LONG = (
    "dataset dataset_fingerprint model model_fingerprint explainer explainer_version params metric metric_version "
    "group higher_is_better n n_failed mean std ci_low ci_high chance rank rank_low rank_high tie_group "
    "seconds_per_image seed device precision quantus torch explainer_bench git utc status info"
)


def build(tables, **changes):
    return leaderboards.build(**(tables._asdict() | changes), n_boot=300)


def by_explainer(boards, dataset="toy"):
    return boards.wide[dataset].set_index("explainer")


def shuffled(table, seed):
    return table.sample(frac=1, random_state=seed)


def test_columns_are_the_interface(tables):
    boards = build(tables)
    assert list(boards.wide["toy"]) == WIDE.split()
    assert list(boards.long["toy"]) == LONG.split()


def test_further_groups_add_their_rank_columns(tables):
    metrics = tables.metrics.replace({"group": {"compactness": "robustness"}})
    columns = list(build(tables, metrics=metrics).wide["toy"])
    assert columns[13:15] == ["class_sensitivity_rank", "robustness_rank"]


def test_numbers_are_those_of_pandas(tables):
    long = build(tables).long["toy"].set_index(["explainer", "metric"])
    expected = tables.scores.groupby(["explainer", "metric"])["value"].agg(["count", "mean", "std"]).loc[long.index]
    np.testing.assert_array_equal(long["n"].astype(int), expected["count"])
    defined = expected["count"] == 48
    for column in ("mean", "std"):
        np.testing.assert_allclose(long.loc[defined, column], expected.loc[defined, column])
    assert (long["ci_low"] <= long["mean"]).all() and (long["mean"] <= long["ci_high"]).all()
    assert (long["chance"] == 0.5).all()


def test_ranks_follow_the_direction_of_each_metric(tables):
    long = build(tables).long["toy"]
    for _, rows in long[long["status"] == "ok"].groupby("metric"):
        expected = rows["mean"].rank(ascending=not rows["higher_is_better"].iloc[0])
        np.testing.assert_array_equal(rows["rank"], expected)


def test_board_is_sorted_by_rank_and_incomplete_rows_come_last(tables):
    explainers = tables.explainers.assign(n_failed=(tables.explainers["explainer"] == "random").astype(int))
    board = build(tables, explainers=explainers).wide["toy"]
    assert board["explainer"].tolist()[:3] == ["good", "twin", "late"]
    assert board["explainer"].iloc[-1] == "random"
    assert board["rank"].dropna().is_monotonic_increasing
    assert board["mean_rank"].dropna().is_monotonic_increasing


def test_identical_explainers_share_rank_interval_and_tie_group(tables):
    board = by_explainer(build(tables))
    columns = ["rank", "rank_low", "rank_high", "tie_group", "mean_rank"]
    assert board.loc["good", columns].tolist() == board.loc["twin", columns].tolist()
    assert board.loc["good", "rank"] == 1 and board.loc["late", "rank"] == 3


def test_an_undefined_score_counts_as_the_worst_of_its_image(tables):
    boards = build(tables)
    row = by_explainer(boards).loc["constant"]
    assert row["status"] == "ok" and row["rank"] > 0
    assert row["info"] == "undefined, counted as the image's worst: class_correlation 48 (constant map)"
    others = tables.scores.query("metric == 'class_correlation'").groupby("sample")["value"].max()
    assert row["class_correlation"] == pytest.approx(others.mean())  # lower is better
    assert boards.long["toy"].set_index(["explainer", "metric"]).loc[("constant", "class_correlation"), "n"] == 0


def test_leaving_out_the_hard_images_does_not_pay(make_tables):
    easy = np.random.default_rng(0).normal(size=(40, 5)) * [1, 1, 1, 1, -1]
    easy[:20] -= 5 * np.array([1, 1, 1, 1, -1])
    shy = easy - 0.001 * np.array([1, 1, 1, 1, -1])
    shy[:20] = np.nan
    board = by_explainer(build(make_tables({"honest": easy, "shy": shy})))
    assert (board.loc["honest", "rank"], board.loc["shy", "rank"]) == (1, 2)


def test_an_image_that_no_map_can_be_scored_on_stays_out(make_tables):
    values = {name: np.random.default_rng(i).normal(size=(40, 5)) for i, name in enumerate(("a", "b"))}
    for table in values.values():
        table[:10, 2] = np.nan
    board = by_explainer(build(make_tables(values)))
    assert (board["status"] == "ok").all() and (board["info"] == "").all()
    assert board.loc["a", "pointing_game"] == pytest.approx(np.nanmean(values["a"][:, 2]))


def test_too_few_clusters_say_nothing_of_certainty(make_tables):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(40, 5)) + shift for name, shift in (("a", 0), ("b", 9), ("c", 5))}
    board = by_explainer(build(make_tables(values, groups=np.arange(40) % 5)))
    assert (board["rank_low"] == 1).all() and (board["rank_high"] == 3).all() and (board["tie_group"] == 1).all()
    assert board[["srg_ci_low", "srg_ci_high"]].isna().all(axis=None)


def test_unfinished_shard_makes_a_row_incomplete(tables):
    lost = (tables.scores["explainer"] == "good") & (tables.scores["metric"] == "srg")
    lost &= tables.scores["sample"] < "s0010"
    boards = build(tables, scores=tables.scores[~lost])
    row = by_explainer(boards).loc["good"]
    assert (row["status"], row["info"]) == ("incomplete", "lacks srg") and pd.isna(row["rank"])
    long = boards.long["toy"].set_index(["explainer", "metric"])
    assert long.loc[("good", "srg"), ["n", "n_failed"]].tolist() == [38, 10]


@pytest.mark.parametrize(
    ("status", "expected"), [("failed", "failed"), ("unsupported", "unsupported"), ("ok", "incomplete")]
)
def test_explainer_without_scores_is_listed(tables, status, expected):
    explainers = tables.explainers.copy()
    broken = explainers["explainer"] == "plain"
    explainers.loc[broken, ["status", "info"]] = [status, "RuntimeError: no gradient"]
    scores = tables.scores[tables.scores["explainer"] != "plain"]
    boards = build(tables, scores=scores, explainers=explainers)
    row = by_explainer(boards).loc["plain"]
    assert (row["status"], row["info"], row["n_samples"]) == (expected, "RuntimeError: no gradient", 0)
    assert row[["rank", "mean_rank", "srg", "faithfulness_rank"]].isna().all()
    assert (boards.long["toy"].query("explainer == 'plain'")["n_failed"] == 48).all()


def test_failed_cells_make_a_row_incomplete(tables):
    explainers = tables.explainers.copy()
    explainers.loc[explainers["explainer"] == "plain", "n_failed"] = 1
    row = by_explainer(build(tables, explainers=explainers)).loc["plain"]
    assert row["status"] == "incomplete" and pd.isna(row["rank"])


def test_run_without_any_score_gives_a_board(tables):
    explainers = tables.explainers.assign(status="failed")
    board = build(tables, scores=tables.scores[:0], explainers=explainers).wide["toy"]
    assert len(board) == 6 and board["rank"].isna().all() and list(board) == WIDE.split()


def test_metric_that_no_one_has_is_no_gap(tables):
    scores = tables.scores.copy()
    scores.loc[scores["metric"] == "pointing_game", ["value", "reason"]] = [np.nan, "empty ROI"]
    board = by_explainer(build(tables, scores=scores))
    assert board.loc["good", "status"] == "ok" and board.loc["good", "rank"] == 1
    assert board["localization_rank"].isna().all()


def test_beaten_trivial_rows_are_named(tables):
    board = by_explainer(build(tables))
    assert board.loc["good", "beats_baselines"] == "constant;random"
    assert board.loc["plain", "beats_baselines"] == ""


def test_files_do_not_depend_on_the_order_of_the_rows(tables, tmp_path):
    changed = {name: shuffled(getattr(tables, name), 1) for name in ("scores", "metrics", "explainers")}
    for name, boards in (("a", build(tables)), ("b", build(tables, **changed))):
        leaderboards.write(boards, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["toy.csv", "toy.long.csv"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_data_sets_and_models_do_not_disturb_each_other(tables):
    def doubled(table):
        return pd.concat([table, table.assign(dataset="other"), table.assign(model="second")])

    run = tables.run | {"dataset_fingerprint": {"toy": "d1", "other": "d2"}}
    boards = build(tables, scores=doubled(tables.scores), explainers=doubled(tables.explainers), run=run)
    both = boards.wide["toy"]
    assert len(both) == 12 and set(boards.long["other"]["dataset_fingerprint"]) == {"d2"}
    for _, rows in both.drop(columns="model").groupby(both["model"]):
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), build(tables).wide["toy"].drop(columns="model"))


def test_numbers_survive_the_file(tables, tmp_path):
    boards = build(tables)
    paths = leaderboards.write(boards, tmp_path)
    back = pd.read_csv(paths[0], keep_default_na=True)
    for column in boards.wide["toy"].select_dtypes("number"):
        ours = boards.wide["toy"][column].astype(float)
        np.testing.assert_allclose(back[column].astype(float), ours, rtol=1e-9, equal_nan=True)
    assert "<NA>" not in paths[0].read_text() and "nan" not in paths[0].read_text()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\t=1", "\rx", " =1", "\n=1"])
def test_texts_of_strangers_are_no_formulas(tables, tmp_path, text):
    explainers = tables.explainers.assign(info=text, params=text)
    wide, long = leaderboards.write(build(tables, explainers=explainers), tmp_path)
    for path, column in ((wide, "info"), (long, "params")):
        cells = pd.read_csv(path)[column]
        assert cells.str.startswith("'").all() and not cells.str.contains("[\t\r\n]").any()


def test_texts_stay_on_one_line_and_numbers_stay_numbers(tables, tmp_path):
    explainers = tables.explainers.assign(info='a, "b"\nc', seconds_per_image=-1.5)
    wide, _ = leaderboards.write(build(tables, explainers=explainers), tmp_path)
    assert len(wide.read_text().splitlines()) == 7
    board = pd.read_csv(wide)
    assert board["info"][0] == 'a, "b" c' and board["seconds_per_image"][0] == -1.5


def test_file_names_stay_in_the_folder(tables, tmp_path):
    def renamed(table):
        return table.assign(dataset="../up/here")

    run = tables.run | {"dataset_fingerprint": {"../up/here": "d"}}
    boards = build(tables, scores=renamed(tables.scores), explainers=renamed(tables.explainers), run=run)
    assert all(path.parent == tmp_path for path in leaderboards.write(boards, tmp_path))


def test_summary_fits_a_terminal(tables):
    boards = build(tables)
    text = leaderboards.summary(boards.wide["toy"], boards.trivial).set_index("explainer")
    assert text["rank"].iloc[0].startswith("1 [1-") and text["rank"].iloc[-1].startswith("6 [")
    assert text.loc["good", "does not beat"] == "none: it beats all" and "model" not in text
    assert text.loc["plain", "does not beat"] == "any"
    assert text.loc["random", "does not beat"] == "(trivial)"
    assert list(text)[2:7] == ["mean", "faithful", "localiz.", "compact", "class s."]
    metrics = tables.metrics.replace({"group": {"compactness": "robustness"}})
    other = build(tables, metrics=metrics)
    assert list(leaderboards.summary(other.wide["toy"], other.trivial))[4:7] == ["faithful", "localiz.", "class s."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"scores": t.scores.drop(columns="group")}, "lacks group"),
        (lambda t: {"metrics": t.metrics.query("metric != 'srg'")}, "scores of srg"),
        (lambda t: {"explainers": t.explainers.query("explainer != 'good'")}, "toy / vit / good"),
        (lambda t: {"scores": pd.concat([t.scores, t.scores[:1]])}, "two faithfulness_estimate"),
        (lambda t: {"metrics": t.metrics.assign(group="beauty")}, "unknown group 'beauty'"),
        (lambda t: {"explainers": t.explainers.assign(status="odd")}, "unknown status 'odd'"),
        (lambda t: {"run": {}}, "lacks dataset_fingerprint"),
    ],
)
def test_bad_tables_get_one_clear_line(tables, change, message):
    with pytest.raises(RequestError, match=message) as error:
        build(tables, **change(tables))
    assert "\n" not in str(error.value)


def test_only_the_core_groups_decide_the_overall_rank_and_what_is_beaten(tables):
    without = tables.metrics["metric"] != "sparseness"
    scores = tables.scores[tables.scores["metric"] != "sparseness"]
    expected = by_explainer(build(tables, metrics=tables.metrics[without], scores=scores))
    metrics = tables.metrics.replace({"group": {"compactness": "robustness"}})
    found = by_explainer(build(tables, metrics=metrics))
    columns = ["rank", "mean_rank", "tie_group", "beats_baselines"]
    pd.testing.assert_frame_equal(found[columns], expected.loc[found.index, columns])
    alone = tables.metrics.assign(group="robustness")
    assert by_explainer(build(tables, metrics=alone))["rank"].notna().all()
