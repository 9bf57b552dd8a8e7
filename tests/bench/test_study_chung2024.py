"""Chung et al. 2024: trivial maps on the real annotations, and the whole protocol on tiny fixtures."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import datasets, models, reproduction, studies
from bench.studies import chung2024
from explainer_bench import RequestError
from tests.bench import layouts

# Table B6: computed on the authors' masks by others than us, with one draw of the random tokens.
B6 = """
ROI area,mean,.431,.019,.588,.128
ROI area,median,.416,.013,.559,.084
pointing game,random pixel,.43,.02,.59,.13
pointing game,random token,.49,.04,.66,.17
pointing game,image centre,.68,.04,1,.42
pointing game,centred Gaussian by token,.86,.06,1,.68
pointing game,best constant token (oracle),.80,.42,1,.58
pointing game,leave-one-out ROI prior,.56,.22,.96,.42
pointing game,best published,.98,.52,.98,.94
IoU,whole image,.431,.019,.588,.128
IoU,"random tokens, top 5 %",.437,.023,.577,.140
IoU,"random tokens, top 10 %",.427,.020,.592,.134
IoU,"centred Gaussian, top 5 %",.09,.02,.11,.15
IoU,"centred Gaussian, top 10 %",.16,.02,.22,.21
IoU,"centred Gaussian, top 20 %",.28,.04,.39,.23
IoU,"centred Gaussian, top 40 %",.39,.04,.59,.19
IoU,"leave-one-out ROI prior, top 5 %",.15,.068,.12,.17
IoU,"leave-one-out ROI prior, top 10 %",.18,.059,.24,.22
IoU,centred square of 60 % of the image,.412,.031,.613,.176
IoU,best published,.73,.08,.62,.56
"""


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("masks")
    study = studies.get("chung2024", masks_only=True)
    return reproduction.reproduce(study, out, data_root=shared / "data"), out


def test_trivial_maps_score_on_the_real_annotations_what_others_found(real):
    result, _ = real
    wide, long = (section.table for section in result.sections)
    lines = [line.rsplit(",", 4) for line in B6.strip().splitlines()]
    expected = {tuple(name.replace('"', "").split(",", 1)): list(map(float, values)) for name, *values in lines}
    found = {(row["score"], row["map"]): [row[name] for name in chung2024.DATASETS] for _, row in wide.iterrows()}
    assert list(found) == list(expected)
    spread = long.pivot_table(index=["score", "map"], columns="dataset", values="draws_sd")
    for key, values in expected.items():
        for name, ours, theirs in zip(chung2024.DATASETS, found[key], values, strict=True):
            doubt = 3 * spread.loc[key, name] if key in spread.index else 0  # theirs is a single draw
            assert ours == pytest.approx(theirs, abs=0.01 + doubt), (key, name)


def test_the_annotations_need_neither_images_nor_models(real):
    result, out = real
    assert result.missing == [] and result.plan.empty and not (out / "runs").exists()
    long = pd.read_csv(out / "masks_intervals.csv")
    assert set(long.loc[long["dataset"] == "MURA", "n_empty"]) == {2} and set(long["n"]) == {50}
    known = long.dropna(subset=["low"])
    assert ((known["low"] <= known["value"]) & (known["value"] <= known["high"])).all()
    kvasir = long[(long["dataset"] == "Kvasir") & (long["map"] == "image centre")].iloc[0]
    assert kvasir["value"] > kvasir["published_best"] and kvasir["fisher_p"] == pytest.approx(1)
    duke = long[(long["dataset"] == "DUKE") & (long["map"] == "image centre")].iloc[0]
    assert duke["fisher_p"] < 1e-6 and set(long.loc[long["dataset"] == "DUKE", "n_groups"]) == {42}
    assert long.loc[long["map"].str.startswith("random"), "fisher_p"].isna().all()


def test_without_annotations_masks_only_is_one_line(tmp_path):
    with pytest.raises(RequestError, match=r"no annotations in .*cpchild: .*licence: MIT"):
        reproduction.reproduce("chung2024[masks_only=true]", tmp_path / "out", data_root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_any_folder_can_hold_the_data(tmp_path):
    root = tmp_path / "Chung, W. [2024] (masks)"
    for name in chung2024.DATASETS.values():
        layouts.make(name, root)
    for part in studies.get("chung2024").parts(root):
        assert datasets.get(part.dataset, root=root).annotations == root / layouts.ANNOTATIONS


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory):
    """All four data sets as fixtures, and one of the sixteen models for each, tiny."""
    root, weights = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("weights")
    shape = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for name in chung2024.DATASETS.values():
        layouts.make(name, root)
    parts = [part for part in studies.get("chung2024").parts(root) if part.names["model"] == "DINO"]
    for part in parts:
        classes = datasets.get(part.dataset, root=root).class_names
        torch.manual_seed(1)
        stem = part.weights.stem
        model = models.create("vit_base_patch16_224", stem, classes, preprocessing=part.weights.preprocessing, **shape)
        models.save(weights / f"{stem}.safetensors", model)
    out = tmp_path_factory.mktemp("out")
    return reproduction.reproduce("chung2024", out, data_root=root, weights_root=weights, device="cpu"), out


def test_the_protocol_runs_what_is_there(protocol):
    result, out = protocol
    assert all("too few ROIs for a leave-one-out prior" in line for line in result.failures)
    assert result.plan["state"].eq("ready").sum() == 4 and len(result.plan) == 16
    assert len(result.missing) == 12 and all("explainer-bench train chung2024_" in line for line in result.missing)
    boards = {path.name for path in out.glob("runs/*/leaderboards/*.long.csv")}
    assert boards == {
        f"{name}_annotations={layouts.ANNOTATIONS}{',task=finding' * (name == 'kvasir')}_.long.csv"
        for name in chung2024.DATASETS.values()
    }
    assert {path.name for path in (out / "runs").iterdir()} == {f"{n.lower()}-dino" for n in chung2024.DATASETS}


def test_the_published_table_stands_beside_ours(protocol):
    result, out = protocol
    table = next(section.table for section in result.sections if section.name == "beside")
    pointing = table[(table["metric"] == "pointing_game") & table["published"].notna()]
    published = pointing.pivot(index="dataset", columns="explainer", values="published")
    assert published.loc["Kvasir"].to_dict() == {
        "gradcam_eigen_aug[sign=raw]": 0.72,
        "raw_attention": 0.96,
        "transformer_attribution": 0.90,
    }
    assert set(pointing["model"]) == {"DINO"} and pointing["ours"].notna().all()
    assert {f"rect_iou_top{p}" for p in (5, 10)} < set(table["metric"])
    trivial = table[table["explainer"] == "center_gaussian"]
    assert trivial["published"].isna().all() and trivial["ours"].notna().any()
    assert Path(out / "outlook.csv").stat().st_size > 0


def test_annotated_images_are_explained_for_class_one_and_scored_on_their_masks(protocol):
    _, out = protocol
    scores = pd.concat(map(pd.read_parquet, (out / "runs" / "kvasir-dino" / "scores").rglob("*.parquet")))
    assert set(scores["sample"]) == {
        f"esophagitis/{layouts.KVASIR['esophagitis']}",
        f"polyps/{layouts.KVASIR['polyps']}",
    }
