"""Reproducing a study: what is missing is said, what is there is run, published values stand beside ours."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from bench import models, reproduction
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


def test_weights_of_others_need_their_architecture_ours_do_not(weights_root, tmp_path):
    weights = Weights("toy_first", "", "vit_tiny_patch16_224", "chung2024_crop")
    ours = weights.find(weights_root)
    assert weights.spec(ours) == str(ours)
    plain = tmp_path / "toy_first.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, plain)
    assert weights.spec(plain) == f"vit_tiny_patch16_224[weights={plain},preprocessing=chung2024_crop]"
