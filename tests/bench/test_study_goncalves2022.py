"""The attention survey, end to end on tiny models and fixtures of its data sets."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from bench import datasets, models, recipes, reproduction, training
from bench.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from bench.studies import goncalves2022
from bench.studies.goncalves2022 import DATASETS, FRACTIONS, MODELS
from leaderboards import beside
from tests.bench import layouts

SIZE = Preprocessing((64, 64), IMAGENET_MEAN, IMAGENET_STD)
TRAINED = {  # which stand-ins there are, by how much they lean to class 0
    ("APTOS2019", "ResNet-50", 100): 9.0,
    ("APTOS2019", "CBAMResNet-50", 100): 9.0,
    ("APTOS2019", "DeiT", 100): 9.0,
    ("ISIC2020", "ResNet-50", 50): 9.0,
    ("ISIC2020", "SEResNet-50", 50): -9.0,
}


def stand_in(part, lean):
    """Return a tiny model under the name of a part's weights."""
    dataset, model = part.names["dataset"], part.names["model"]
    names = datasets.registry.find(DATASETS[dataset]).class_names
    names = names if isinstance(names, tuple) else datasets.get(DATASETS[dataset]).class_names
    torch.manual_seed(list(MODELS).index(model))
    vit = model == "DeiT"
    architecture, kwargs = ("test_vit", {"img_size": 64}) if vit else ("test_resnet", {})
    made = models.create(architecture, part.weights.stem, names, preprocessing=SIZE, **kwargs)
    made.module.get_classifier().bias.copy_(torch.tensor([lean, -lean]))
    return made


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The fixtures of two of the three data sets, and the stand-ins."""
    data, weights = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("weights")
    for name, cls in (("aptos2019", datasets.get("aptos2019")), ("isic2020", datasets.get("isic2020"))):
        layouts.make(name, data / cls.folder)
    for part in goncalves2022.Goncalves2022().parts(None):
        key = (part.names["dataset"], part.names["model"], int(part.names["fraction"]))
        if key in TRAINED:
            models.save(
                weights / part.names["dataset"] / f"{part.weights.stem}.safetensors", stand_in(part, TRAINED[key])
            )
    return {"data_root": data, "weights_root": weights}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def reproduced(roots, out):
    return reproduction.reproduce("goncalves2022", out, **roots, samples=2, device="cpu")


def section(result, name):
    (found,) = [each for each in result.sections if each.name == name]
    return found


def test_the_parts_are_the_grid():
    parts = goncalves2022.Goncalves2022().parts(None)
    assert len(parts) == len({part.name for part in parts}) == len({part.weights.stem for part in parts}) == 84
    published = goncalves2022.Goncalves2022().published
    grid = {(p.names["dataset"], p.names["model"], int(p.names["fraction"])) for p in parts}
    assert set(published[goncalves2022.KEYS].itertuples(index=False, name=None)) == grid
    assert published["accuracy"].between(0.7, 1).all()


def test_published_values_that_the_text_names():
    known = goncalves2022.Goncalves2022().published.set_index(goncalves2022.KEYS)["accuracy"]
    assert known["APTOS2019", "SEResNet-50", 100] == 0.982
    assert known["ISIC2020", "CBAMResNet-50", 1] == 0.805
    assert known["MIMIC-CXR", "DeiT", 50] == 0.84
    assert (known["ISIC2020"] < 0.982).all()  # what always saying benign scores


def test_the_recipe_agrees_on_what_is_pretrained():
    for kind in MODELS.values():
        recipe = recipes.get(f"goncalves2022[architecture={kind.architecture}]")
        assert bool(recipe.starts_from) == kind.pretrained


def test_training_writes_the_names_that_are_looked_for(roots, tmp_path):
    tiny = "goncalves2022[dataset=aptos2019,architecture=test_resnet,epochs=1]"
    report = training.train(tiny, tmp_path, data_root=roots["data_root"], fraction=0.1)
    stems = [part.weights.stem for part in goncalves2022.Goncalves2022().parts(None)]
    assert report["model"].replace("test_resnet", MODELS["ResNet-50"].architecture) in stems


def test_parameters_need_neither_data_nor_weights(tmp_path):
    result = reproduction.reproduce("goncalves2022", tmp_path)
    table = section(result, "parameters").table.set_index("model")
    assert len(result.sections) == 1 and (tmp_path / "parameters.csv").is_file()
    assert table.loc[table.index != "DeiT", "difference"].eq(0).all()
    assert table.loc["DeiT", "difference"] == 197 * 192 + 192
    assert table.loc["SEResNet-50", "over_backbone"] == pytest.approx(26_027_074 / 23_512_130 - 1)
    assert len(result.plan) == 84 and (result.plan["state"] == "lacks 2").all()


def test_what_is_missing_is_grouped(roots, tmp_path):
    result = reproduction.reproduce("goncalves2022", tmp_path / "out", **roots, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert result.plan["state"].value_counts()["ready"] == len(TRAINED)
    assert len(result.missing) == 1 + 21
    assert result.missing[0].startswith("mimic_cxr: ")
    (line,) = [line for line in result.missing if "aptos2019_cbam_resnet50" in line]
    stem = "goncalves2022_aptos2019_cbam_resnet50_goncalves"
    assert line.startswith(f"no {stem}_0.{{01,1,5}}.safetensors or .pth under {roots['weights_root']}: ")
    command = 'explainer-bench train "goncalves2022[dataset=aptos2019,architecture=cbam_resnet50_goncalves]"'
    assert f"{command} --data-root DIR --fraction F --out DIR" in line and "--weights" not in line
    (line,) = [line for line in result.missing if "aptos2019_densenet121" in line]
    assert (
        "--data-root DIR --weights FILE --fraction F --out DIR" in line and "FILE: torchvision's DenseNet-121" in line
    )


def test_only_what_is_there_is_run(reproduced, out):
    assert reproduced.failures == []
    assert len(list((out / "runs").iterdir())) == len(TRAINED)
    names = [each.name for each in reproduced.sections]
    assert names[:4] == ["parameters", "accuracy_aptos2019", "accuracy_isic2020", "accuracy"]
    assert names[4:] == ["attention", "maps_aptos2019", "maps_isic2020", "explanations", "explanations_all"]


def figures(reproduced, *part):
    """Return the rows of a part in the table of all figures, by figure."""
    return section(reproduced, "accuracy").table.set_index(goncalves2022.KEYS).loc[part].set_index("figure")


def test_accuracies_are_of_the_whole_split(reproduced, roots):
    table = figures(reproduced, "ISIC2020", "ResNet-50", 50)
    row = table.loc["accuracy"]
    dataset = datasets.get("isic2020", root=roots["data_root"])
    labels = np.array([sample.label for sample in dataset.samples])
    assert row["images"] == len(labels) == 8 and row["groups"] == len({s.group for s in dataset.samples})
    assert row["majority"] == max(labels.mean(), 1 - labels.mean()) and table.loc["auprc", "majority"] == labels.mean()
    assert row["ours"] == (labels == 0).mean() and row["published"] == 0.966
    assert table["published"].notna().sum() == 1
    assert figures(reproduced, "ISIC2020", "SEResNet-50", 50).loc["accuracy", "ours"] == (labels == 1).mean()
    (weights,) = roots["weights_root"].rglob("goncalves2022_isic2020_resnet50_goncalves_0.5.safetensors")
    model = models.get(str(weights), dataset.class_names)
    inputs = torch.stack([model.preprocess(dataset.load(sample).image) for sample in dataset.samples])
    margin = model.module(inputs).detach().double().softmax(1)[:, 1]
    assert table.loc["auroc", "ours"] == pytest.approx(roc_auc_score(labels, margin))
    brief = section(reproduced, "accuracy_isic2020").table.set_index("model").loc["ResNet-50"]
    assert brief["auroc"] == table.loc["auroc", "ours"] and brief["prevalence"] == labels.mean()


def test_published_intervals_only_where_the_split_is_known(reproduced):
    table = section(reproduced, "accuracy").table.query("figure == 'accuracy'").set_index("dataset")
    aptos = table.loc["APTOS2019"].iloc[0]
    assert (aptos["published_low"], aptos["published_high"]) == beside.wilson(aptos["published"], 550)
    assert table.loc["ISIC2020", "published_low"].isna().all()
    assert set(table["mark"]) == {"read off a figure: +-0.003"}


def test_attention_is_compared_with_its_own_backbone(reproduced):
    table = section(reproduced, "attention").table.set_index(["dataset", "model", "fraction"])
    assert len(table) == 2
    row = table.loc["ISIC2020", "SEResNet-50", 50]
    attention, plain = (figures(reproduced, "ISIC2020", model, 50)["ours"] for model in ("SEResNet-50", "ResNet-50"))
    assert row["accuracy"] == attention["accuracy"] - plain["accuracy"]
    assert row["balanced_accuracy"] == pytest.approx(0)  # always 1 against always 0
    assert row["confounded"] == "" and row["published"] == pytest.approx(0.972 - 0.966)
    assert table.loc["APTOS2019", "CBAMResNet-50", 100]["confounded"] == "only ResNet-50 pretrained"


def test_paired_differences():
    labels = np.repeat([0, 1], [30, 10])
    base = {"sample": [f"{i}" for i in range(40)], "group": [f"{i // 2}" for i in range(40)], "label": labels}
    zero = pd.DataFrame({**base, "logit_0": 1.0, "logit_1": 0.0})
    right = pd.DataFrame({**base, "logit_0": 1.0 - labels, "logit_1": labels})
    found = goncalves2022._difference(right, zero)
    assert found["accuracy"] == 0.25 and found["balanced_accuracy"] == 0.5
    assert found["accuracy_low"] < 0.25 < found["accuracy_high"]
    assert found["balanced_accuracy_low"] == found["balanced_accuracy_high"] == 0.5  # in every resample
    assert set(goncalves2022._difference(zero, zero).values()) == {0.0}


def test_maps_are_of_images_that_all_get_right(reproduced, roots):
    maps = section(reproduced, "maps_aptos2019")
    assert "3 of 7 models" in maps.text and "100 %" in maps.text
    ((caption, path),) = maps.figures.items()
    assert path.read_bytes().startswith(b"\x89PNG")
    dataset = datasets.get("aptos2019", root=roots["data_root"])
    label = {sample.id: sample.label for sample in dataset.samples}
    shown = caption.removeprefix("APTOS2019: ").split(", ")
    assert shown and all(label[sample] == 0 for sample in shown)  # all models say 0
    assert "No image" in section(reproduced, "maps_isic2020").text
    assert not section(reproduced, "maps_isic2020").figures


def test_every_cell_has_scores(reproduced):
    brief = section(reproduced, "explanations").table
    methods = brief.groupby(goncalves2022.KEYS)["explainer"].agg(set)
    assert methods["APTOS2019", "DeiT", 100] == {"transformer_attribution", "gradcam", "integrated_gradients"}
    cnn = {"deeplift", "lrp_epsilon", "gradcam", "integrated_gradients"}
    assert len(methods) == len(TRAINED) and all(methods.drop(("APTOS2019", "DeiT", 100)) == cnn)
    scores = section(reproduced, "explanations_all").table
    assert set(scores["metric"]) == set(goncalves2022.METRICS)
    assert "random_token" in set(scores["explainer"]) and "roi_prior" not in set(scores["explainer"])
    row = brief[brief["explainer"] == "lrp_epsilon"].iloc[0]
    same = (scores[[*goncalves2022.KEYS, "explainer"]] == row[[*goncalves2022.KEYS, "explainer"]]).all(axis=1)
    srg = scores[same].set_index("metric").loc["srg"]
    assert row["srg"] == srg["mean"] and row["over_trivial"] == srg["over_trivial"]


def test_what_was_predicted_is_not_predicted_again(reproduced, roots, out, monkeypatch):
    monkeypatch.setattr(goncalves2022, "_predict", None)
    study = goncalves2022.Goncalves2022()
    (part,) = [part for part in study.parts(None) if part.name == "isic2020-resnet-50-50"]
    folder, suite = out / "runs" / part.name, part.suite(roots["weights_root"], 2, 0)
    done = goncalves2022.Done(part, folder, pd.DataFrame(), pd.DataFrame(), suite, roots["data_root"])
    again = study.measure(done, lambda *_: None)
    row = figures(reproduced, "ISIC2020", "ResNet-50", 50).loc["accuracy"]
    assert (again["logit_0"] > again["logit_1"]).all() and row["ours"] == (again["label"] == 0).mean()


def test_the_test_split_and_the_pictures_are_of_full_precision(roots, tmp_path, monkeypatch):
    """CUDA would round the inputs of convolutions to 10 bits: what the runner switches off is off here, too."""
    (part,) = [part for part in goncalves2022.Goncalves2022().parts(None) if part.name == "aptos2019-resnet-50-100"]
    suite, seen = part.suite(roots["weights_root"], 2, 0), []
    done = goncalves2022.Done(part, tmp_path, pd.DataFrame(), pd.DataFrame(), suite, roots["data_root"])

    class Watching:
        def supports(self, model):
            return None

        def __call__(self, model, images, classes):
            seen.append(torch.backends.cudnn.allow_tf32)
            return images.numpy()

    run = done.open()
    run.problems[0].model.module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    table = goncalves2022._predict(run.problems[0], run.device, lambda *_: None)
    assert seen and not any(seen)
    seen.clear()
    monkeypatch.setattr(goncalves2022, "adapters", SimpleNamespace(get=lambda name: Watching()))
    assert list(goncalves2022._columns(done, table["sample"][:1]))
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32


def test_shares_are_those_of_the_study():
    assert FRACTIONS == (1, 10, 50, 100)
