"""Reproducing a study: what is missing is said, what is there is run, published values stand beside ours."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

import leaderboards
from bench import cli, models, reproduction, studies, training
from bench.datasets.digits import Digits
from bench.studies import Part, Study, Weights
from explainer_bench import RequestError
from leaderboards import beside

SHAPE = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


class Toy(Study):
    """Two models of digits."""

    name = "toy"
    title = "A toy & its <study>"
    reference = "nobody"

    @property
    def published(self):
        rows = [
            ("Digits", "First", "pointing_game", "rollout", 0.5, 50, "a table"),
            ("Digits", "Second", "pointing_game", "rollout", 0.25, 50, "a table"),
            ("Digits", "First", "sparseness", "rollout", 0.4, np.nan, "memory"),
        ]
        return pd.DataFrame(rows, columns=["dataset", "model", "metric", "explainer", "value", "n", "mark"])

    def parts(self, data_root):
        weights = {name: Weights(f"toy_{name.lower()}", "ask the authors", "x") for name in ("First", "Second")}
        explainers, metrics = ["rollout", "random", "sobel"], ["pointing_game", "sparseness"]
        return [
            Part({"dataset": "Digits", "model": name}, "digits[size=40]", w, explainers, metrics, 20, "label")
            for name, w in weights.items()
        ]


@pytest.fixture(scope="module")
def weights_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = models.create("vit_tiny_patch16_224", "toy_first", Digits.class_names, **SHAPE)
    models.save(folder / "somewhere" / "toy_first.safetensors", model)
    return folder


@pytest.fixture(scope="module")
def reproduced(weights_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return reproduction.reproduce(Toy(), out, weights_root=weights_root, device="cpu"), out


def test_a_dry_run_says_what_is_missing_and_writes_nothing(weights_root, tmp_path):
    result = reproduction.reproduce(Toy(), tmp_path / "out", weights_root=weights_root, dry_run=True)
    assert result.plan["state"].tolist() == ["ready", "lacks 1"] and not (tmp_path / "out").exists()
    assert result.missing == [f"no toy_second.safetensors or .pth under {weights_root}: ask the authors."]


def test_nothing_to_run_is_one_line(tmp_path):
    with pytest.raises(RequestError, match=r"toy: nothing can be run. no toy_\{first,second\}\..* --weights-root"):
        reproduction.reproduce(Toy(), tmp_path)


def test_what_is_there_is_run(reproduced):
    result, out = reproduced
    assert [path.name for path in (out / "runs").iterdir()] == ["digits-first"]
    assert result.failures == [] and len(result.missing) == 1
    (section,) = result.sections
    table = section.table
    assert set(table["model"]) == {"First"}
    row = table.set_index(["metric", "explainer"]).loc[("pointing_game", "rollout")]
    assert row["published"] == 0.5 and row["mark"] == "a table"
    assert (row["published_low"], row["published_high"]) == pytest.approx((0.366, 0.634), abs=1e-3)
    assert row["n"] == 20 and (row["ours_low"], row["ours_high"]) == beside.wilson(row["ours"], 20)
    assert table.set_index(["metric", "explainer"]).loc[("sparseness", "rollout"), "mark"] == "memory"


def test_differences_are_paired_and_to_the_best_trivial_row(reproduced):
    result, _ = reproduced
    table = result.sections[0].table
    for _, rows in table.groupby("metric"):
        ours = rows.set_index("explainer")["ours"]
        best = ours[["random", "sobel"]].idxmax()
        assert set(rows["best_trivial"]) == {best}
        assert rows.set_index("explainer").loc[best, "over_trivial"] == 0
        assert np.allclose(rows["over_trivial"], rows["ours"] - ours[best])
        rollout = rows.set_index("explainer").loc["rollout"]
        assert rollout["over_trivial_low"] <= rollout["over_trivial"] <= rollout["over_trivial_high"]


def test_the_page_and_the_table_hold_the_same(reproduced):
    result, out = reproduced
    page = (out / "index.html").read_text()
    assert "A toy &amp; its &lt;study&gt;" in page and "ask the authors" in page and 'href="beside.csv"' in page
    table = pd.read_csv(out / "beside.csv")
    assert len(table) == len(result.sections[0].table) == 6
    assert f"{table['ours'].iloc[0]:.3f}" in page


def test_wilson():
    assert beside.wilson(0.96, 50) == pytest.approx((0.865, 0.989), abs=1e-3)
    assert beside.wilson(0, 10)[0] == 0 and beside.wilson(0, 10)[1] == pytest.approx(0.278, abs=1e-3)
    assert all(np.isnan(beside.wilson(0.5, np.nan)))


@pytest.mark.parametrize("other", ["b/x.safetensors", "a/x.pth"])
def test_weights_that_are_there_twice_are_refused(tmp_path, other):
    weights, found = Weights("x", "", "resnet18"), ["a/x.safetensors", other]
    for name in found:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    line = f"the weights x are there twice, {tmp_path / found[0]} and {tmp_path / found[1]}: keep one of them."
    with pytest.raises(RequestError) as error:
        weights.find(tmp_path)
    assert str(error.value) == line
    (tmp_path / other).unlink()
    assert weights.find(tmp_path) == tmp_path / found[0]


def test_weights_of_others_need_their_architecture_ours_do_not(weights_root, tmp_path):
    weights = Weights("toy_first", "", "vit_tiny_patch16_224", "chung2024_crop")
    ours = weights.find(weights_root)
    assert weights.spec(ours) == str(ours)
    plain = tmp_path / "toy_first.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, plain)
    assert weights.spec(plain) == f"vit_tiny_patch16_224[weights={plain},preprocessing=chung2024_crop]"


def _compared(of_mine, of_random, of_best=None):
    """Put made-up per-image scores of `mine` and of two trivial rows beside nothing published."""
    values = {"mine": of_mine, "random": of_random, "sobel": of_random if of_best is None else of_best}
    rows = [
        {"explainer": name, "sample": f"{i:03d}", "group": str(i), "value": value, "reason": "", "chance": np.nan}
        for name, column in values.items()
        for i, value in enumerate(column)
    ]
    scores = pd.DataFrame(rows).assign(dataset="d", model="m", metric="hits")
    names = {
        "explainer_version": "1",
        "params": "",
        "seconds_per_image": 0.0,
        "status": "ok",
        "info": "",
        "n_failed": 0,
    }
    explainers = pd.DataFrame({"explainer": list(values), "trivial": [False, True, True]})
    explainers = explainers.assign(dataset="d", model="m", **names)
    metrics = pd.DataFrame(
        [{"metric": "hits", "metric_version": "1", "group": "localization", "higher_is_better": True}]
    )
    run = dict.fromkeys(leaderboards.board.RUN_COLUMNS, "") | {
        "seed": 0,
        "dataset_fingerprint": {},
        "model_fingerprint": {},
    }
    long = leaderboards.build(scores, metrics, explainers, run, n_boot=200).long["d"]
    published = pd.DataFrame(columns=["dataset", "model", "metric", "explainer", "value", "n", "mark"])
    return beside.beside(published, long, scores, ["random", "sobel"]).set_index("explainer")


def test_leaving_out_the_hard_images_does_not_pay():
    rng = np.random.default_rng(0)
    easy = np.r_[np.full(20, 0.9), np.full(20, 0.1)] + rng.normal(0, 0.01, 40)
    table = _compared(np.r_[easy[:20] - 0.2, np.full(20, np.nan)], easy)
    assert table.loc["mine", "over_trivial"] == pytest.approx(table.loc["mine", "ours"] - table.loc["random", "ours"])
    assert table.loc["mine", "over_trivial_high"] < 0


def test_wilson_counts_the_images_that_the_mean_counts():
    hits = np.r_[np.ones(15), np.zeros(5)]
    table = _compared(np.r_[np.ones(10), np.full(10, np.nan)], hits)
    assert table.loc["random", ["ours_low", "ours_high"]].tolist() == pytest.approx(beside.wilson(0.75, 20))
    mine = table.loc["mine"]
    assert (mine["ours_low"], mine["ours_high"]) == pytest.approx(beside.wilson(mine["ours"], 20))


def test_the_best_trivial_row_is_the_one_to_beat():
    rng = np.random.default_rng(0)
    table = _compared(rng.uniform(0, 1, 30) + 1, rng.uniform(0, 1, 30), rng.uniform(0, 1, 30) - 1)
    assert set(table["best_trivial"]) == {"random"} and table.loc["mine", "over_trivial_low"] > 0


class GotToTheDataError(Exception):
    """The command lacked nothing but data."""


@pytest.mark.parametrize("study", studies.registry.names())
def test_the_commands_of_a_dry_run_lack_nothing(tmp_path, monkeypatch, study):
    def choose(*_):
        raise GotToTheDataError

    monkeypatch.setattr(training, "choose", choose)
    hows = {part.weights.how for part in studies.get(study).parts(None)}
    commands = {command for how in hows for command in re.findall("(explainer-bench train .*?)(?:;|$)", how)}
    assert len(commands) == len(hows)
    for command in commands:
        arguments = [{"FILE": "f.pth", "DIR": str(tmp_path), "F": "0.5"}.get(a, a) for a in shlex.split(command)]
        assert {"--data-root", "--out"} < set(arguments)
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(GotToTheDataError):
            cli.main()
