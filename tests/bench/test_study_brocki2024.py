"""The study of CDAM, end to end on the layouts of ImageNet and LIDC-IDRI with tiny models."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import adapters
import metrics
from bench import datasets, models, recipes, reproduction, studies
from bench.studies import brocki2024 as study
from bench.studies.komorowski2023 import MASKED
from explainer_bench import RequestError
from tests.bench.layouts import make, picture

SHAPE = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


def weights(folder: Path, dataset: str, stem: str) -> Path:
    torch.manual_seed(1)
    model = models.create("dino_vits8", stem, datasets.get(dataset).class_names, stem, **SHAPE)
    models.save(folder / f"{stem}.safetensors", model)
    return folder


def drawn(path: Path) -> bool:
    """Whether a figure has more than a few colours."""
    return len(np.unique(np.asarray(Image.open(path).convert("L")))) > 30


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = make("imagenet", tmp_path_factory.mktemp("data"))
    given, out = weights(root / "weights", "imagenet", "brocki2024_imagenet"), tmp_path_factory.mktemp("out")
    result = reproduction.reproduce(
        "brocki2024", out, data_root=root, weights_root=given, samples=4, device="cpu", batch_size=256
    )
    return result, out


@pytest.fixture(scope="module")
def lidc(tmp_path_factory):
    root = make("lidc_idri", tmp_path_factory.mktemp("data"))
    concept = root / "concept"
    concept.mkdir()
    (concept / "a.png").write_bytes(picture(1))
    given, out = weights(root / "weights", "lidc_idri", "brocki2024_lidc"), tmp_path_factory.mktemp("out")
    result = reproduction.reproduce(
        studies.get("brocki2024", concept=str(concept)),
        out,
        data_root=root,
        weights_root=given,
        samples=2,
        device="cpu",
        batch_size=256,
    )
    return result, out, f"concept_cdam[folder={concept}]"


def test_what_is_there_is_run_and_the_rest_is_named(imagenet):
    result, out = imagenet
    assert result.failures == [] and result.plan["state"].tolist() == ["ready", "lacks 2"]
    assert [path.name for path in (out / "runs").iterdir()] == ["imagenet-vit-s_8_dino"]
    text = "\n".join(result.missing)
    assert "lidc_idri" in text and "explainer-bench train brocki2024_lidc" in text


def test_a_dry_run_says_how_to_get_models_and_data(tmp_path):
    result = reproduction.reproduce("brocki2024", tmp_path / "out", dry_run=True)
    assert result.plan["images planned"].tolist() == [1000, 1000] and not (tmp_path / "out").exists()
    assert "dino_deitsmall8_pretrain.pth" in "\n".join(result.missing)


def test_published_values_stand_beside_ours(imagenet):
    table = pd.read_csv(imagenet[1] / "beside.csv")
    assert len(table) == 7 + 6
    row = table.set_index(["metric", "explainer"]).loc[("token_compactness", "cdam")]
    assert row["published"] == 0.8380 and "1,000 images" in row["mark"] and row["n"] == 4
    assert table["published"].notna().sum() == 10 and np.isfinite(table["ours"]).all()


def test_token_scores_are_those_of_the_explainers(imagenet):
    """Compactness by the notebook's rule on tokens is our metric's, where the map is enlarged to the nearest."""
    _, out = imagenet
    long = pd.read_csv(out / "compactness.csv").set_index(["metric", "explainer"])["ours"]
    ours = pd.read_csv(out / "beside.csv").set_index(["metric", "explainer"])["ours"]
    for explainer in ("cdam", "smooth_cdam", "raw_attention", "token_ablation"):
        pixels = long["cdam_compactness[rule=notebook]", explainer]
        assert ours["token_compactness", explainer] == pytest.approx(pixels, abs=1e-6)


def test_the_notebook_counts_scores_below_a_share_of_the_largest():
    scores = np.array([[-9.0, -0.04, 0.06, 1.0], [0.0, 0.2, -0.1, 4.0]])
    assert study.notebook_compactness(scores).tolist() == [0.25, 0.5]


def test_correlation_is_over_all_tokens_together():
    rng = np.random.default_rng(0)
    values = {"cdam": rng.normal(size=(7, 30)), "gae": rng.normal(size=(7, 30)) + np.arange(7)[:, None]}
    values["gae"] += values["cdam"]
    rows = {row[:2]: row for row in study._of_tokens(study.Tokens(values, np.arange(7)))}
    *_, value, low, high = rows["token_pearson", "cdam ~ gae"]
    assert value == pytest.approx(np.corrcoef(values["cdam"].ravel(), values["gae"].ravel())[0, 1])
    assert low < value < high


def test_every_benchmark_has_its_table(imagenet):
    _, out = imagenet
    part = studies.get("brocki2024").parts(None)[0]
    rows = []
    for name in ("correctness", "compactness", "class_sensitivity"):
        table = pd.read_csv(out / f"{name}.csv")
        assert np.isfinite(table["ours"]).all(), name
        rows += table[["metric", "explainer"]].itertuples(index=False, name=None)
    asked = {(metrics.get(m).spec, adapters.get(e).spec) for m in part.metrics for e in part.explainers}
    assert asked == set(rows)
    compact = pd.read_csv(out / "class_sensitivity.csv").set_index(["metric", "explainer"])["ours"]
    assert compact["class_correlation", "raw_attention"] == pytest.approx(1)
    assert compact["class_correlation[other=least]", "cdam"] < 0.999


def test_lung_nodules_are_explained_as_malignant(lidc):
    result, out, concept = lidc
    assert result.failures == [] and result.plan["state"].tolist() == ["lacks 2", "ready"]
    models_ = pd.read_csv(out / "models.csv")
    assert models_.loc[0, "target"] == 1 and models_.loc[0, "preprocessing"].startswith("brocki2024_lidc:")
    scores = pd.read_csv(out / "localization.csv").set_index(["metric", "explainer"])
    assert np.isfinite(scores["ours"]).all() and ("pointing_game", "roi_prior") in scores.index
    assert ("pointing_game", concept) in scores.index
    assert not pd.read_csv(out / "class_sensitivity.csv")["metric"].str.contains("least").any()


def test_the_page_shows_every_figure(imagenet, lidc):
    for result, out, *_ in (imagenet, lidc):
        figures = [path for section in result.sections for path in section.figures.values()]
        assert len(figures) == 2 and all(drawn(path) for path in figures)
        page = (out / "index.html").read_text()
        assert page.count("data:image/png;base64,") == 2 and "Class sensitivity" in page
    assert "0.838" in (imagenet[1] / "index.html").read_text()


def test_parameters_are_those_of_the_released_code():
    assert adapters.get("smoothgrad").params == {"samples": 50, "noise": 0.15}
    assert adapters.get("smooth_cdam").params == {"at": "block_input", "samples": 50, "noise": 0.05}
    assert adapters.get("integrated_cdam").params["steps"] == 50 and adapters.get("integrated_gradients").n_steps == 50
    for spec in study.FIDELITY:
        assert (metrics.get(spec).steps, metrics.get(spec).output) == (40, "logit")
    assert {metrics.get(spec).boxes for spec in study.BOXES} == {100}
    assert {metrics.get(spec).largest for spec in study.BOXES} == set(study.SIDES)


def test_a_concept_without_a_folder_is_one_line(tmp_path):
    with pytest.raises(RequestError, match="concept=nowhere is no folder"):
        reproduction.reproduce("brocki2024[concept=nowhere]", tmp_path)


@pytest.mark.parametrize("name", ["brocki2024", "komorowski2023"])
def test_a_recipe_trains_each_model_on_the_data_it_is_explained_on(name):
    for part in studies.get(name).parts(None):
        recipe = recipes.get(part.weights.stem)
        assert recipe.checkpoint_name == part.weights.stem
        if part.names["dataset"] != MASKED:  # explained on masks of another tree than it was trained on
            assert recipe.dataset == part.dataset
        assert recipe.preprocessing in (None, part.weights.preprocessing)
        assert models.ALIASES.get(recipe.architecture, recipe.architecture) == models.ALIASES.get(
            part.weights.architecture, part.weights.architecture
        )
