"""What the runner hands to metrics, and what it does with those that fail."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench import api, runner
from bench import suite as suites
from explainer_bench import RequestError
from metrics.perturbation import prefetch

METRICS = '''
import numpy as np
from metrics import Metric
from metrics.perturbation import PatchMetric

class Again(Metric):
    """Largest difference between a map and the explainer's map of the same image, asked for again."""
    name = "again"
    group = "robustness"
    higher_is_better = False
    def score(self, samples):
        maps = samples.reexplain(samples.model, samples.inputs.flip(0), samples.targets[::-1],
                                 np.arange(len(samples))[::-1])
        return np.abs(maps[::-1] - samples.maps).max((1, 2))

class Known(Metric):
    """1 if the label, ROIs, mosaic and black pixel of a sample are what the data set and the model say."""
    name = "known"
    group = "axiomatic"
    undefined_on_constant = False
    def score(self, samples):
        own = (samples.roi_of(samples.targets) == samples.roi).all((1, 2))
        of_label = samples.roi_of(samples.labels).any((1, 2))
        mosaics, parts = samples.mosaics()
        own &= (parts.mean((1, 2)) == 0.5) & (mosaics.shape == samples.inputs.shape)
        return (own & of_label & bool((samples.black <= samples.inputs.amin((0, 2, 3)) + 1e-6).all())).astype(float)

class Broken(PatchMetric):
    """Fails before it asks anything."""
    name = "broken"
    group = "faithfulness"
    def removed(self, samples):
        raise ValueError("no patches for you")
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(METRICS)
    return path


def run(
    out: Path, metrics: list[str], explainers: list[str], precision: str = "fp32"
) -> tuple[api.Result, pd.DataFrame]:
    suite = suites.load("quickstart", metrics=metrics, explainers=explainers, samples=3)
    result = api.run(suite, out=out, device="cpu", precision=precision)  # type: ignore[arg-type]
    assert result.report
    return result, result.report.boards.long["digits"].set_index(["explainer", "metric"])


def test_the_same_explainer_explains_again(tmp_path: Path, file: Path) -> None:
    explainers = ["rollout", "lime", "roi_prior", "random", f"concept_cdam[folder={concept(tmp_path)}]"]
    _, board = run(tmp_path / "out", [f"{file}:Again"], explainers)
    assert (board["n"] == 3).all()
    np.testing.assert_allclose(board["mean"], 0, atol=1e-5)


def concept(tmp_path: Path) -> Path:
    from PIL import Image

    (tmp_path / "concept").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "concept" / "red.png")
    return tmp_path / "concept"


def test_labels_rois_and_the_black_pixel_are_known(tmp_path: Path, file: Path) -> None:
    _, board = run(tmp_path / "out", [f"{file}:Known"], ["random"])
    assert (board["mean"] == 1).all()


def test_a_metric_that_fails_costs_its_own_cells_only(tmp_path: Path, file: Path) -> None:
    result, board = run(tmp_path / "out", [f"{file}:Broken", "srg"], ["rollout", "random"])
    assert len(result.failures) == 1 and "no patches for you" in result.failures[0]
    assert (board.xs("srg", level="metric")["n"] == 3).all()


def test_explainers_scored_in_one_stream_score_the_same(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, explainers = ["srg", "saco", "sparseness", f"{file}:Broken"], ["rollout", "cdam", "constant"]
    one_by_one, expected = run(tmp_path / "alone", metrics, explainers)
    streams = []
    monkeypatch.setitem(runner.TOGETHER, "cpu", 2)
    monkeypatch.setattr(runner.perturbation, "prefetch", lambda cells: streams.append(prefetch(list(cells))))
    together, found = run(tmp_path / "together", metrics, explainers)
    assert len(streams) == 1  # the broken metric ends the first, and asks nothing of a constant map
    assert together.failures == one_by_one.failures
    pd.testing.assert_frame_equal(found[["mean", "n"]], expected.loc[found.index, ["mean", "n"]])
    _, found = run(tmp_path / "two", metrics[:-1], explainers)
    assert len(streams) == 3
    np.testing.assert_allclose(found["mean"], expected["mean"][found.index], rtol=1e-5)


def test_precision_changes_the_scores_a_little_and_nothing_else(tmp_path: Path) -> None:
    metrics, explainers = ["srg", "sparseness"], ["rollout", "cdam"]
    _, exact = run(tmp_path / "out", metrics, explainers)
    result, rounded = run(tmp_path / "out", metrics, explainers, "bf16")
    assert result.counts["explanations found"] == 2 and result.counts["predictions found"] == 1
    assert result.counts["scores found"] == 2 and result.counts["scores computed"] == 2  # sparseness asks no model
    assert set(exact["precision"]) == {"fp32"} and set(rounded["precision"]) == {"bf16"}
    difference = (exact["mean"] - rounded["mean"]).abs()
    assert 0 < difference.max() < 0.5
    assert (difference.xs("sparseness", level="metric") == 0).all()


def test_an_explainer_made_of_what_the_metric_asks_is_marked(tmp_path: Path) -> None:
    result, _ = run(tmp_path / "out", ["faithfulness_estimate", "srg"], ["occlusion", "rollout"])
    assert result.report
    info = result.report.boards.wide["digits"].set_index("explainer")["info"]
    assert "circular: made of what faithfulness_estimate asks the model" in info["occlusion"]
    assert "circular" not in info["rollout"]


def test_a_metric_that_fails_is_named_also_where_a_map_is_constant(tmp_path: Path, file: Path) -> None:
    result, board = run(tmp_path / "out", [f"{file}:Broken", "srg"], ["rollout", "random", "constant"])
    assert len(result.failures) == 1 and result.failures[0].startswith("metric broken on digits")
    assert set(board.index.get_level_values("metric")) == {"broken", "srg"}
    assert result.report
    wide = result.report.boards.wide["digits"].set_index("explainer")
    assert (wide["status"] == "ok").all() and wide["rank"].notna().all()
    assert wide["broken"].isna().all() and wide["mean_rank"].idxmax() == "constant"


def test_a_metric_cannot_change_what_the_next_one_sees(tmp_path: Path) -> None:
    path = tmp_path / "clip.py"
    path.write_text(
        METRICS
        + '''
class Clip(Metric):
    """Writes to the maps."""
    name = "clip"
    group = "compactness"
    def score(self, samples):
        maps = samples.maps
        maps[maps < 0] = 0
        return maps.sum((1, 2))
'''
    )
    _, alone = run(tmp_path / "alone", ["srg"], ["integrated_gradients[n_steps=2]"])
    result, beside = run(tmp_path / "beside", [f"{path}:Clip", "srg"], ["integrated_gradients[n_steps=2]"])
    assert len(result.failures) == 1 and "read-only" in result.failures[0]
    found, expected = (board.xs("srg", level="metric")["mean"].to_numpy() for board in (beside, alone))
    np.testing.assert_array_equal(found, expected)


def test_what_no_map_can_be_scored_on_is_said(tmp_path: Path) -> None:
    result, _ = run(tmp_path / "out", ["pointing_game[roi_size=large]", "srg"], ["rollout", "constant"])
    assert result.report
    (line,) = result.report.undefined
    assert line.startswith("pointing_game[roi_size=large] on digits, digits_vit: undefined on 3 of 3 images: ")
    assert line.endswith("ROI is not large")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ('higher_is_better = "yes"', "state True or False"),
        ('sign_policy = "abs"', "use one of signed, positive, absolute"),
        ("bounds = (1.0, 0.0)", "state the lower one first"),
    ],
)
def test_misstated_constants_are_one_clear_line(tmp_path: Path, wrong: str, words: str) -> None:
    path = tmp_path / "wrong.py"
    head = 'from metrics import Metric\nclass M(Metric):\n    """Wrong."""\n    name = "m"\n    group = "compactness"\n'
    path.write_text(f"{head}    {wrong}\n")
    with pytest.raises(RequestError, match=words):
        run(tmp_path / "out", [str(path)], ["rollout"])
