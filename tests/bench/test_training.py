"""Training: the seed decides, the best epoch is kept, and what is written is what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from bench import datasets, models, recipes, training
from bench.datasets.base import Sample
from bench.recipes.base import Arrays, Recipe
from bench.recipes.busi import ARCHITECTURE, BusiRecipe
from bench.recipes.digits import DigitsRecipe
from explainer_bench import RequestError

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}


class Toy(Recipe):
    """Tell bright from dark images."""

    name = "toy"
    model_name = "toy_vit"
    epochs: int = 4
    batch_size: int = 8

    def dataset(self, split, root):
        return datasets.get("digits", split=split, size=20)

    def model(self, weights):
        return models.create(ARCHITECTURE, self.model_name, ("dark", "bright"), **SMALL)

    def target(self, sample, item):
        return np.array(int(item.image.mean() > 75))

    def loss(self, logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets)

    def measure(self, logits, targets):
        return {"accuracy": float((logits.argmax(1) == targets).mean())}


def test_same_seed_same_file_other_seed_another(tmp_path):
    reports = [training.train(Toy(), tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    prints = [report["model_fingerprint"] for report in reports]
    assert prints[0] == prints[1] != prints[2]
    assert reports[0]["test"] == reports[1]["test"]


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    training.train(Toy(epochs=1), tmp_path)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_report_and_checkpoint_belong_together(tmp_path):
    seen = []
    report = training.train("digits[size=70,epochs=2]", tmp_path, progress=lambda *step: seen.append(step))
    model = models.get(report["checkpoint"])
    assert {path.name for path in tmp_path.iterdir()} == {"digits_vit.safetensors", "digits_vit.report.json"}
    written = json.loads((tmp_path / "digits_vit.report.json").read_text())
    assert written["model_fingerprint"] == report["model_fingerprint"] == model.fingerprint
    assert model.meta["training"]["test"] == written["test"] == report["test"]
    assert report["data"]["train"]["images"] == 70 and len(report["history"]) == 2
    assert seen[-1][:2] == (6, 6) and [step[0] for step in seen] == [1, 2, 3, 4, 5, 6]


def test_early_stopping_restores_the_best_epoch(monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    weights = []

    def validate(recipe, model, val, device):
        weights.append(model.module.head.weight.clone())
        return next(losses)

    monkeypatch.setattr(training, "_validate", validate)
    recipe = Toy(epochs=9, patience=2)
    model = recipe.model(None)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    arrays = Arrays(images, torch.arange(16) % 2)
    fitted = training.fit(recipe, model, arrays, arrays, "cpu", 0, lambda *_: None)
    assert fitted.best_epoch == 2 and len(fitted.history) == 4
    assert torch.equal(model.module.head.weight, weights[1]) and not torch.equal(weights[1], weights[3])
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())


def test_subset_takes_a_share_of_every_class():
    samples = [Sample(f"{label}/{i:03d}", label, "", "") for label, n in enumerate((100, 40, 3)) for i in range(n)]
    tenth = training.subset(samples, 0.1)
    assert [sum(s.label == label for s in tenth) for label in range(3)] == [10, 4, 1]
    assert [s.id for s in tenth] == sorted(s.id for s in tenth)
    assert {s.id for s in tenth} <= {s.id for s in training.subset(samples, 0.5)}
    assert training.subset(samples, 1.0) == samples


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_wrong_fraction(tmp_path, fraction):
    with pytest.raises(RequestError, match="fraction"):
        training.train(Toy(), tmp_path / "out", fraction=fraction)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "kwargs", "line"),
    [
        ("digit", {}, "Did you mean digits"),
        ("digits[epoch=3]", {}, "Did you mean epochs"),
        ("digits", {"weights": Path("x")}, "leave --weights out"),
        ("busi", {}, "needs --weights FILE"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path, spec, kwargs, line):
    with pytest.raises(RequestError, match=line):
        training.train(spec, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_digits_targets_are_presence():
    dataset = datasets.get("digits", size=1)
    item = dataset.load(dataset.samples[0])
    target = DigitsRecipe().target(dataset.samples[0], item)
    assert target.shape == (10,) and set(np.flatnonzero(target)) == set(item.roi)


def test_busi_augmentation_moves_little_and_keeps_the_range():
    images = torch.from_numpy(np.tile(np.linspace(0, 255, 224).astype(np.uint8)[:, None], (4, 3, 1, 224)))
    varied = BusiRecipe().augment(images, np.random.default_rng(0))
    assert varied.shape == images.shape and varied.min() >= 0 and varied.max() <= 255
    assert torch.equal(varied, BusiRecipe().augment(images, np.random.default_rng(0)))
    ramp = varied.mean((1, 3))
    assert (ramp[:, 180:].mean(1) > ramp[:, :40].mean(1) + 80).all()


def test_busi_figures_of_a_perfect_and_a_useless_model():
    targets = np.arange(30) % 3
    perfect = BusiRecipe().measure(10.0 * np.eye(3)[targets], targets)
    assert set(perfect.values()) == {1.0}
    useless = BusiRecipe().measure(np.zeros((30, 3)), targets)
    assert useless["auroc_macro"] == useless["auroc_malignant_vs_benign"] == 0.5


def test_busi_trains_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("benign", "malignant", "normal"):
        folder = tmp_path / "data" / "Dataset_BUSI_with_GT" / name
        folder.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)).save(folder / f"{name} ({i}).png")
            Image.fromarray(np.full((40, 40), 255, np.uint8)).save(folder / f"{name} ({i})_mask.png")
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(models.create(ARCHITECTURE).module.state_dict(), weights)
    recipe = recipes.get("busi[epochs=1,batch_size=4]")
    report = training.train(recipe, tmp_path / "out", tmp_path / "data", weights, fraction=0.5)
    assert report["model"] == "busi_vit_tiny_0.5" and report["test"]["images"] >= 3
    model = models.get(report["checkpoint"], datasets.registry.find("busi").class_names)
    assert model.name == "busi_vit_tiny_0.5" and model.input_size == (224, 224)
