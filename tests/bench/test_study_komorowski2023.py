"""The two studies of Komorowski et al., end to end on COVID-QU-Ex's layout with tiny models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import adapters
import metrics
from bench import models, reproduction, studies
from bench.datasets.covid_qu_ex import CovidQuEx
from bench.studies import komorowski2023 as study
from bench.studies.maps import explained, of_classes
from tests.bench.layouts import make, mask, picture

SHAPE = {"img_size": 56, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
LUNG_TEST = "Lung Segmentation Data/Lung Segmentation Data/Test"


def weights(folder: Path, *stems: str) -> Path:
    for number, stem in enumerate(stems):
        torch.manual_seed(number)
        model = models.create("vit_base_patch16_224", stem, CovidQuEx.class_names, "komorowski2023", **SHAPE)
        models.save(folder / f"{stem}.safetensors", model)
    return folder


def drawn(path: Path) -> bool:
    """Whether a figure has more than a few colours."""
    return len(np.unique(np.asarray(Image.open(path).convert("L")))) > 30


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """Both protocols; the tree with infection masks is missing, the other has two test images of each class."""
    root = make("covid_qu_ex", tmp_path_factory.mktemp("data"))
    (root / "Infection Segmentation Data").rename(root / "elsewhere")
    for number, name in enumerate(CovidQuEx.class_names):
        folder = root / LUNG_TEST / name
        (folder / "images" / "more.png").write_bytes(picture(100 + number, mode="L"))
        (folder / "lung masks" / "more.png").write_bytes(mask((5, 35, 5, 20)))
    out = tmp_path_factory.mktemp("out")
    given = weights(tmp_path_factory.mktemp("weights"), "komorowski2023", "komorowski2023_cvprw")
    result = reproduction.reproduce(
        "komorowski2023", out, data_root=root, weights_root=given, samples=5, device="cpu", batch_size=256
    )
    return result, out, root, given


@pytest.fixture(scope="module")
def beside(reproduced):
    return pd.read_csv(reproduced[1] / "beside.csv").set_index(["model", "metric", "explainer"])


def test_what_is_there_is_run_and_the_rest_is_named(reproduced):
    result, out, *_ = reproduced
    assert result.failures == []
    assert result.plan["state"].tolist() == ["ready", "ready", "lacks 1", "lacks 1"]
    assert [path.name for path in sorted((out / "runs").iterdir())] == [
        "covid-qu-ex-cvpr-w_2023",
        "covid-qu-ex-lrp_study",
    ]
    (line,) = result.missing
    assert "kaggle.com/datasets/anasmohammedtahir/covidqu" in line


def test_a_dry_run_says_how_to_get_models_and_data(tmp_path):
    result = reproduction.reproduce("komorowski2023", tmp_path / "out", data_root=tmp_path, dry_run=True)
    text = "\n".join(result.missing)
    assert result.plan["images planned"].tolist() == [87, 300, 300, 300] and not (tmp_path / "out").exists()
    assert "explainer-bench train komorowski2023 --" in text and "train komorowski2023_cvprw --" in text


@pytest.mark.parametrize(
    ("model", "metric", "explainer", "value"),
    [
        ("LRP study", study.ESTIMATE, "lime_komorowski", 0.08),
        ("LRP study", study.ESTIMATE, "transformer_attribution", 0.27),
        ("CVPR-W 2023", study.CORRELATION, "transformer_attribution", 0.30),
        ("CVPR-W 2023", study.SENSITIVITY, "lime_komorowski", 0.20),
        ("CVPR-W 2023", study.COMPLEXITY, "rollout[fusion=max,discard=0.99]", 0.20),
    ],
)
def test_published_values_stand_beside_ours(beside, model, metric, explainer, value):
    row = beside.loc[(model, metric, explainer)]
    assert row["published"] == value and row["mark"]
    assert np.isfinite(row["ours"]) and 0 < row["n"] <= 5
    assert row["best_trivial"] in study.NO_PRIOR and np.isfinite(row["over_trivial"])


def test_every_published_row_is_one_that_is_run():
    parts = {part.names["model"]: part for part in studies.get("komorowski2023").parts(None)[:2]}
    for row in studies.get("komorowski2023").published.itertuples():
        part = parts[row.model]
        assert row.metric in [metrics.get(spec).spec for spec in part.metrics]
        assert row.explainer in [adapters.get(spec).spec for spec in part.explainers]


def test_tables_are_whole(beside):
    lrp, cvprw = (beside.loc[model] for model in ("LRP study", "CVPR-W 2023"))
    assert set(lrp.index.get_level_values("metric")) == {study.ESTIMATE}
    assert set(cvprw.index.get_level_values("metric")) == {study.CORRELATION, study.SENSITIVITY, study.COMPLEXITY}
    assert len(lrp) == len(study.EXPLAINERS) + len(study.NO_PRIOR)
    assert np.isfinite(beside["ours"]).all()
    assert beside["ours"].xs(study.COMPLEXITY, level="metric").between(0, 1).all()


def test_scores_by_class(reproduced):
    table = pd.read_csv(reproduced[1] / "by_class.csv")
    rows = table[(table["explainer"] == "transformer_attribution") & (table["metric"] == study.ESTIMATE)]
    assert rows["class"].tolist() == list(CovidQuEx.class_names) and sorted(rows["n"]) == [1, 2, 2]
    several = rows[rows["n"] > 1]
    assert (several["lower_quartile"] < several["median"]).all() and several["std"].gt(0).all()


def test_as_many_images_of_each_class(tmp_path_factory, reproduced):
    *_, root, given = reproduced
    part = studies.get("komorowski2023").parts(None)[1]
    suite = part.suite(given, 5, 0)
    run = studies.base.Done(part, tmp_path_factory.mktemp("run"), None, None, suite, root).open()
    labels = [sample.label for sample in run.problems[0].samples]
    assert sorted(labels[:3]) == [0, 1, 2] and len(set(labels[3:])) == 2


def test_the_page_names_the_preprocessing_and_shows_every_figure(reproduced):
    result, out, *_ = reproduced
    page = (out / "index.html").read_text()
    figures = [path for section in result.sections for path in section.figures.values()]
    assert len(figures) == 3 and all(drawn(path) for path in figures)
    assert page.count("data:image/png;base64,") == 3
    assert "komorowski2023: shortest side 64, centre of 56 x 56, mean 0.56 0.56 0.56, std 0.21 0.21 0.21" in page
    assert "explains the predicted class with TransformerLRP" in page and "0.270" in page


def test_maps_of_every_class_are_those_of_the_explainer(reproduced):
    _, out, root, given = reproduced
    part = studies.get("komorowski2023").parts(None)[0]
    done = studies.base.Done(part, out / "runs" / part.name, None, None, part.suite(given, 5, 0), root)
    run = done.open()
    shard, known = next(explained(run))
    stored = of_classes(run, shard, known, study.LRP)
    for number in range(3):
        own = adapters.get(study.LRP)(run.problems[0].model.module, shard.inputs, np.full(5, number))[:, 0]
        assert np.allclose([maps[number] for maps in stored], own, rtol=1e-3, atol=1e-6)


def test_localization_against_both_masks(tmp_path):
    root = make("covid_qu_ex", tmp_path)
    given = weights(tmp_path / "weights", "komorowski2023_cvprw")
    (root / "Lung Segmentation Data").rename(root / "elsewhere")
    result = reproduction.reproduce(
        "komorowski2023", tmp_path / "out", data_root=root, weights_root=given, samples=5, device="cpu"
    )
    assert result.failures == [] and [section.name for section in result.sections] == [
        "beside",
        "models",
        "localization",
    ]
    table = pd.read_csv(tmp_path / "out" / "localization.csv").set_index(["metric", "explainer"])
    assert set(table["dataset"]) == {study.MASKED} and np.isfinite(table["ours"]).all()
    lung = table.loc[("relevance_mass_accuracy[roi=lung]", "transformer_attribution")]
    infection = table.loc[("relevance_mass_accuracy[roi=infection]", "transformer_attribution")]
    assert lung["n"] == 5 and infection["n"] in (1, 2) and lung["chance"] > infection["chance"] > 0
    assert ("pointing_game[roi=infection]", "roi_prior") in table.index
