"""`run` and `board`, as a user would."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import metrics

from .conftest import Outcome, tables

Command = Callable[..., Outcome]
FAST = "cdam,rollout,random,constant"
CHEAP = "srg[steps=4],pointing_game,sparseness,class_correlation"
HERE = ["--explainers", FAST, "--metrics", CHEAP, "--samples", 20]
BOARD = [
    "dataset",
    "model",
    "explainer",
    "n_samples",
    "n_failed",
    "rank",
    "rank_low",
    "rank_high",
    "tie_group",
    "mean_rank",
    "faithfulness_rank",
    "localization_rank",
    "compactness_rank",
    "class_sensitivity_rank",
]
LONG = [
    "dataset",
    "dataset_fingerprint",
    "model",
    "model_fingerprint",
    "explainer",
    "explainer_version",
    "params",
    "metric",
    "metric_version",
    "group",
    "higher_is_better",
    "n",
    "n_failed",
    "mean",
    "std",
    "ci_low",
    "ci_high",
    "chance",
    "rank",
    "rank_low",
    "rank_high",
    "tie_group",
    "seconds_per_image",
    "seed",
    "device",
    "precision",
    "quantus",
    "torch",
    "explainer_bench",
    "git",
    "utc",
    "status",
    "info",
]


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from bench import api, suite

    folder = tmp_path_factory.mktemp("run")
    chosen = suite.load(
        "quickstart", models=[str(checkpoint)], explainers=FAST.split(","), metrics=CHEAP.split(","), samples=20
    )
    api.run(chosen, out=folder, device="cpu")
    return folder


def test_a_run_leaves_boards_a_page_and_a_manifest(finished: Path) -> None:
    wide = pd.read_csv(finished / "leaderboards/digits.csv")
    assert list(wide.columns[:14]) == BOARD
    assert list(wide.columns[-4:]) == ["beats_baselines", "seconds_per_image", "status", "info"]
    assert set(wide["explainer"]) == set(FAST.split(","))
    assert (wide["n_samples"] == 20).all() and (wide["n_failed"] == 0).all()
    for metric in CHEAP.split(","):
        defined = wide[wide[metric].notna()]
        assert (defined[f"{metric}_ci_low"] <= defined[metric]).all()
        assert (defined[metric] <= defined[f"{metric}_ci_high"]).all()
    constant = wide.set_index("explainer").loc["constant"]
    assert "srg[steps=4] 20" in constant["info"] and constant["rank"] == 4
    assert list(pd.read_csv(finished / "leaderboards/digits.long.csv").columns) == LONG
    page = (finished / "leaderboards/index.html").read_text()
    assert "cdam" in page and "data:image/" in page
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["suite"]["samples"] == 20
    assert set(manifest["stages"]) == {"predict", "explain", "score"}
    assert 0 < manifest["stages"]["score"]["seconds_in_forward"] < manifest["stages"]["score"]["seconds"]


def test_class_blind_maps_score_one_on_class_correlation(finished: Path) -> None:
    wide = pd.read_csv(finished / "leaderboards/digits.csv").set_index("explainer")
    assert wide.loc["rollout", "class_correlation"] == pytest.approx(1)
    assert wide.loc["cdam", "class_correlation"] < 0.99


def test_the_same_command_again_computes_nothing(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["run", "quickstart", "--model", checkpoint, *HERE, "--out", tmp_path]
    first, before = command(*arguments), None
    assert first.code == 0
    assert "scores: 32 computed, 0 found" in first.out
    before = tables(tmp_path)
    second = command(*arguments)
    assert "scores: 0 computed, 32 found" in second.out
    assert tables(tmp_path) == before
    more = command(*arguments, "--samples", 33)
    assert "scores: 32 computed, 16 found" in more.out  # the first shard of 16 is the same
    again = command(*arguments, "--fresh")
    assert "scores: 32 computed, 0 found" in again.out
    assert tables(tmp_path) == before


def test_parts_of_a_divided_run_make_the_same_boards(
    command: Command, checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    arguments = ["run", "quickstart", "--model", checkpoint, *HERE, "--out", tmp_path]
    none = command(*arguments, "--shard", "3/3")  # there are two shards of 16
    assert none.code == 0 and not (tmp_path / "leaderboards").exists()
    assert "16 cells of the plan are not computed yet" in command(*arguments, "--shard", "2/2").out
    assert command(*arguments, "--shard", "1/2").code == 0
    assert tables(tmp_path) == tables(finished)
    assert command("board", tmp_path, "--out", tmp_path / "again").code == 0
    assert (tmp_path / "again/digits.csv").read_bytes() == (tmp_path / "leaderboards/digits.csv").read_bytes()


def test_stages_run_alone(command: Command, checkpoint: Path, finished: Path, tmp_path: Path) -> None:
    arguments = ["run", "quickstart", "--model", checkpoint, *HERE, "--out", tmp_path]
    early = command(*arguments, "--stage", "explain")
    assert early.code == 2 and "run the stage `predict` first" in early.err
    for stage in ("predict", "explain", "score"):
        assert command(*arguments, "--stage", stage).code == 0
    assert command("board", tmp_path, "--out", tmp_path / "early").code == 0
    assert "scores: 0 computed" in command(*arguments).out
    assert tables(tmp_path) == tables(finished)


@pytest.mark.parametrize(("moment", "how"), [(0.15, signal.SIGKILL), (0.6, signal.SIGKILL), (0.4, signal.SIGINT)])
def test_killed_in_the_middle_it_goes_on_where_it_was(
    command: Command, checkpoint: Path, finished: Path, tmp_path: Path, moment: float, how: signal.Signals
) -> None:
    arguments = ["run", "quickstart", "--model", str(checkpoint), *map(str, HERE), "--out", str(tmp_path)]
    code = "import sys; from bench.cli import main; sys.argv[0] = 'explainer-bench'; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("scores/**/*.parquet"))) < 32 * moment:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    _, err = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 130 and b"goes on from here" in err and b"Traceback" not in err
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores/**/[!.]*.parquet")}
    assert 0 < len(kept) < 32
    outcome = command(*arguments)
    assert f"scores: {32 - len(kept)} computed, {len(kept)} found" in outcome.out
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert tables(tmp_path) == tables(finished)


def test_scores_do_not_depend_on_the_batch_size(checkpoint: Path, tmp_path: Path) -> None:
    from bench import api, report, suite

    explainers = ["gae", "integrated_gradients[n_steps=4]", "random_token", "constant"]
    chosen = suite.load(
        "quickstart", models=[str(checkpoint)], explainers=explainers, metrics=metrics.registry.names(), samples=3
    )
    boards = []
    for batch_size in (1, 16):
        out = tmp_path / str(batch_size)
        api.run(chosen, out=out, device="cpu", batch_size=batch_size)
        cells = json.loads((out / "plan.json").read_text())["cells"]
        store = report.Store(out)
        boards.append(np.concatenate([store.read_table(cell["scores"])["value"] for cell in cells]))
    assert len(boards[0]) == 3 * len(explainers) * len(metrics.registry.names())
    np.testing.assert_allclose(boards[0], boards[1], rtol=1e-4, atol=1e-5)


BROKEN = '''
import torch
from adapters import Explainer

class Broken(Explainer):
    """Broken on purpose."""

    name = "broken"
    family = "test"
    how: str = "raise"

    def attribute(self, model, inputs, targets, **context):
        if self.how == "raise":
            raise KeyError("no such thing")
        if self.how == "nan":
            return inputs.mean(1) * torch.nan
        return inputs
'''


def test_a_broken_explainer_fails_its_own_cells_only(
    command: Command, checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    listed = f"{FAST},{file}:Broken,{file}:Broken[how=nan],{file}:Broken[how=shape]"
    arguments = ["--metrics", CHEAP, "--samples", 20, "--out", tmp_path / "run"]
    outcome = command("run", "quickstart", "--model", checkpoint, "--explainers", listed, *arguments)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "KeyError: 'no such thing'" in outcome.err
    wide = pd.read_csv(tmp_path / "run/leaderboards/digits.csv").set_index("explainer")
    for name, error in [("broken", "no such thing"), ("broken[how=nan]", "NaN"), ("broken[how=shape]", "tensor (8")]:
        assert wide.loc[name, "status"] == "failed"
        assert wide.loc[name, "n_failed"] == 20
        assert error in wide.loc[name, "info"]
        assert np.isnan(wide.loc[name, "rank"])
    expected = pd.read_csv(finished / "leaderboards/digits.csv").set_index("explainer")
    healthy = wide.loc[FAST.split(",")]
    same = ["mean_rank", "rank", "rank_low", "rank_high", "srg[steps=4]", "srg[steps=4]_ci_low", "status"]
    pd.testing.assert_frame_equal(healthy[same], expected.loc[FAST.split(","), same], check_dtype=False)
    assert "traceback" in next((tmp_path / "run/failures").rglob("*.json")).read_text()


FAULTY = '''
from adapters import vit

class Faulty(vit.ViTExplainer):
    """Shares its pass with others, and fails."""

    name = "faulty"
    family = "test"

    def watches(self, model):
        return vit.attentions(model)

    def read(self, seen):
        raise KeyError("not seen")
'''


def test_a_broken_explainer_does_not_harm_those_it_shares_a_pass_with(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    arguments = ["--model", checkpoint, "--metrics", CHEAP, "--samples", 8]
    outcome = command(
        "run", "quickstart", *arguments, "--explainers", f"cdam,{file},rollout,constant", "--out", tmp_path / "a"
    )
    assert outcome.code == 1
    assert "KeyError: 'not seen'" in outcome.err
    alone = command("run", "quickstart", *arguments, "--explainers", "cdam,rollout,constant", "--out", tmp_path / "b")
    assert alone.code == 0
    first, second = (pd.read_csv(tmp_path / run / "leaderboards/digits.csv").set_index("explainer") for run in "ab")
    same = ["srg[steps=4]", "srg[steps=4]_ci_low", "status"]
    assert first.loc["faulty", "status"] == "failed"
    pd.testing.assert_frame_equal(first.loc[second.index, same], second[same])


BAD_METRIC = '''
import numpy as np
from metrics import Metric

class AllFail(Metric):
    """Fails."""

    name = "all_fail"
    group = "compactness"

    def score(self, samples):
        return np.zeros(len(samples)) if False else 0.5
'''


def test_a_metric_that_fails_for_all_takes_no_rank_away(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD_METRIC)
    arguments = ["--explainers", "cdam,random,rollout", "--samples", 8, "--out", tmp_path / "run"]
    listed = f"sparseness,{tmp_path / 'bad.py'}"
    outcome = command("run", "quickstart", "--model", checkpoint, "--metrics", listed, *arguments)
    assert outcome.code == 1
    assert "metric all_fail" in outcome.err and "not one score for each of 8" in outcome.err
    wide = pd.read_csv(tmp_path / "run/leaderboards/digits.csv")
    assert wide["rank"].notna().all() and (wide["status"] == "ok").all()


def test_computed_again_and_failing_leaves_no_old_result(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        BROKEN.replace(
            'if self.how == "nan":',
            'if __import__("os").environ.get("BREAK") is None:\n            return inputs.mean(1)\n        if True:',
        )
    )
    arguments = ["run", "quickstart", "--model", checkpoint, "--metrics", "sparseness", "--samples", 4]
    arguments += ["--explainers", f"{file}:Broken[how=x],random", "--out", tmp_path / "run"]
    assert command(*arguments).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BREAK", "1")
        assert command(*arguments, "--fresh").code == 1
    wide = pd.read_csv(tmp_path / "run/leaderboards/digits.csv").set_index("explainer")
    assert wide.loc["broken[how=x]", "status"] == "failed" and np.isnan(wide.loc["broken[how=x]", "sparseness"])


def test_another_version_of_the_data_set_is_another_cell(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "from bench.datasets.digits import Digits\nclass Mine(Digits):\n    name = 'mine'\n"
    file.write_text(text)
    arguments = ["run", "quickstart", "--dataset", file, "--model", checkpoint, "--metrics", "pointing_game"]
    arguments += ["--explainers", "random", "--samples", 4, "--out", tmp_path / "run"]
    assert "scores: 1 computed" in command(*arguments).out
    assert "scores: 0 computed" in command(*arguments).out
    file.write_text(text + "    version = '2'\n")
    assert "scores: 1 computed" in command(*arguments).out


def test_a_mended_explainer_is_computed_and_its_failure_forgotten(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    arguments = ["run", "quickstart", "--model", checkpoint, "--metrics", "sparseness", "--samples", 4]
    arguments += ["--explainers", f"{file}:Broken[how=nan],random", "--out", tmp_path / "run"]
    assert command(*arguments).code == 1
    file.write_text(BROKEN.replace("* torch.nan", "* 1"))
    outcome = command(*arguments)
    assert outcome.code == 0
    assert "scores: 1 computed, 1 found" in outcome.out
