"""Training: the seed decides, the best epoch is kept, a killed run goes on, and what is written was measured."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from bench import datasets, models, recipes, training
from bench.datasets.base import Sample
from bench.training import loop
from explainer_bench import RequestError
from tests.bench import layouts

ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
HOUSE = Path(training.__file__).parents[2]


def toy(**changes):
    """A recipe of a second: the first digit of an image, on 32 px."""
    fields = {
        "size": 40,
        "val_size": 24,
        "test_size": 24,
        "model_name": "toy",
        "kwargs": KWARGS,
        "loss": "cross_entropy",
        "epochs": 4,
        "batch_size": 8,
        "augment": {},
        "half": False,
    }
    return recipes.get("digits", **(fields | changes))


def weights_of(path):
    return safetensors.torch.load_file(path)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class StoppedError(Exception):
    """What an impatient user raises."""


def stop_after(steps):
    def progress(done, total, note):
        if done == steps:
            raise StoppedError

    return progress


def parts(recipe, seed=0):
    chosen = training.choose(recipe, None)
    with loop.seeded(seed):
        model = training.create(recipe, None, chosen["train"].dataset.class_names)
    return model, {name: training.read(recipe, *part, model) for name, part in chosen.items()}


def test_same_seed_same_weights_other_seed_others(tmp_path):
    reports = [training.train(toy(epochs=2), tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    prints = [report["model_fingerprint"] for report in reports]
    assert prints[0] == prints[1] != prints[2]
    assert reports[0]["test"] == reports[1]["test"]
    assert len({report["initial_fingerprint"] for report in reports}) == 2


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    training.train(toy(epochs=1, dropout=0.2), tmp_path)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_what_is_written_belongs_together(tmp_path):
    seen = []
    spec = "digits[size=70,val_size=30,test_size=30,epochs=2]"
    report = training.train(spec, tmp_path, progress=lambda *step: seen.append(step))
    model = models.get(report["checkpoint"])
    files = {path.name.removeprefix("digits_vit.") for path in tmp_path.iterdir()}
    assert files == {"safetensors", "report.json", "curve.csv", "curve.png", "md"}
    written = json.loads((tmp_path / "digits_vit.report.json").read_text())
    assert written["model_fingerprint"] == report["model_fingerprint"] == model.fingerprint
    assert model.meta["training"]["test"] == written["test"] == report["test"]
    assert report["data"]["train"]["images"] == 70 and len(report["history"]) == 2
    assert [step[:2] for step in seen] == [(i, 6) for i in range(1, 7)]
    curve = pd.read_csv(tmp_path / "digits_vit.curve.csv")
    assert list(curve["epoch"]) == [1, 2]
    assert list(curve["val_loss"]) == [entry["val_loss"] for entry in report["history"]]
    assert Image.open(tmp_path / "digits_vit.curve.png").size[0] > 400
    assert "evidence" not in model.meta


def test_the_figures_are_those_of_the_stored_weights(tmp_path):
    recipe = toy(half=True, loss="bce", epochs=1)
    report = training.train(recipe, tmp_path)
    model = models.get(report["checkpoint"])
    split = training.read(recipe, *training.choose(recipe, None)["test"], model)
    measured = training.measure(recipe, model, split, "cpu").figures
    assert {"images": len(split), **measured} == report["test"]


def test_the_card_states_figures_with_intervals(tmp_path):
    report = training.train(toy(epochs=1, evidence="finding", augment={"flip": True}), tmp_path, fraction=0.5)
    card = (tmp_path / "toy_0.5.md").read_text()
    low, high = report["intervals"]["test"]["auroc"]
    assert low < report["test"]["auroc"] < high
    assert f"{report['test']['auroc']:.3f} ({low:.3f} to {high:.3f})" in card
    for line in ("balanced accuracy", "AUPRC", "expected calibration error", "## Intended use", "50.00% of the whole"):
        assert line in card
    assert "| lr | `0.001` |" in card and '| augment | `{"flip": true}` |' in card
    assert "(toy_0.5.curve.png)" in card and (tmp_path / "toy_0.5.curve.png").exists()
    assert models.get(report["checkpoint"]).meta["evidence"] == "finding" and "region `finding`" in card


class Patients(type(datasets.get("digits"))):
    """Digits of so many patients in each split; from nine on, the splits share them."""

    patients: ClassVar[dict[str, int]] = {}

    @cached_property
    def samples(self):
        count = self.patients[self.split]
        return [
            replace(s, group=f"{self.split if count < 9 else ''}{i % count}") for i, s in enumerate(super().samples)
        ]


@pytest.mark.parametrize(
    ("patients", "shared", "line"),
    [
        ({"train": 10, "val": 6, "test": 8}, {}, "No group (a patient, or near-duplicates) is in more than one split."),
        ({"train": 10, "val": 6, "test": 9}, {"train, test": 9}, "divided between splits: 9 in train and test.**"),
        (
            {"train": 10, "val": 12, "test": 9},
            {"train, val": 10, "train, test": 9, "val, test": 9},
            "divided between splits: 10 in train and val; 9 in train and test; 9 in val and test.**",
        ),
        (
            None,
            {},
            "Every image is a group of its own: which ones are of one patient, or near-duplicates, is not known.",
        ),
    ],
)
def test_the_card_tells_which_groups_are_divided(tmp_path, monkeypatch, patients, shared, line):
    if patients:
        monkeypatch.setattr(Patients, "patients", patients)
        monkeypatch.setattr(datasets, "get", lambda name, root=None, **params: Patients(**params))
    report = training.train(toy(epochs=1), tmp_path)
    assert {pair: n for pair, n in report["shared_groups"].items() if n} == shared
    assert json.loads((tmp_path / "toy.report.json").read_text())["shared_groups"] == report["shared_groups"]
    card = (tmp_path / "toy.md").read_text()
    assert line in card and "never divided" not in card
    assert ("**Groups" in card) == bool(shared)


def test_folds_of_nodules_divide_patients(tmp_path):
    root, shared = layouts.make("lidc_idri", tmp_path / "lidc_idri"), {}
    for folds in ("patient", "nodule"):
        recipe = recipes.get("brocki2024_lidc", dataset=f"lidc_idri[folds={folds}]")
        shared[folds] = sum(training.shared_groups(training.choose(recipe, root)).values())
    assert shared["patient"] == 0 < shared["nodule"]


def test_too_few_groups_for_an_interval_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Patients, "patients", {"train": 10, "val": 3, "test": 8})
    monkeypatch.setattr(datasets, "get", lambda name, root=None, **params: Patients(**params))
    report = training.train(toy(epochs=1), tmp_path)
    card = (tmp_path / "toy.md").read_text()
    assert (
        report["intervals"]["val"]["accuracy"] == [None, None] and None not in report["intervals"]["test"]["accuracy"]
    )
    assert "None on the val split: its groups, 3, are fewer than 6" in card and "None on the test split" not in card
    assert f"| accuracy | {report['val']['accuracy']:.3f} | {report['test']['accuracy']:.3f} (" in card


def test_weights_beyond_half_precision_have_no_figures(tmp_path, monkeypatch):
    fit = loop.fit

    def fit_and_overflow(recipe, model, *rest):
        fitted = fit(recipe, model, *rest)
        model.module.head.bias[0] = 1e6
        return fitted

    monkeypatch.setattr(loop, "fit", fit_and_overflow)
    with pytest.raises(RequestError, match=r"outputs of 24 of 24 images of the val split are .* with half=false\.$"):
        training.train(toy(epochs=1, half=True), tmp_path)
    assert not (tmp_path / "toy.safetensors").exists() and not (tmp_path / "toy.md").exists()


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_one_class_alone_is_refused(tmp_path, loss):
    root = layouts.make("kvasir_seg", tmp_path / "kvasir_seg")
    recipe = toy(dataset="kvasir_seg", loss=loss, size=None, val_size=None, test_size=None)
    line = "data set kvasir_seg: every image of the training split is of class 'polyp', so there is nothing to learn"
    with pytest.raises(RequestError, match=line):
        training.train(recipe, tmp_path / "out", root)
    assert not (tmp_path / "out").exists()


def test_early_stopping_restores_the_best_epoch(monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    weights = []

    def validate(self, val):
        weights.append(self.module.head.weight.clone())
        return next(losses)

    monkeypatch.setattr(loop.Learner, "validate", validate)
    recipe = toy(epochs=9, patience=2)
    model, split = parts(recipe)
    fitted = loop.fit(recipe, model, split["train"], split["val"], "cpu", 0)
    assert fitted.best_epoch == 2 and len(fitted.history) == 4
    assert torch.equal(model.module.head.weight, weights[1]) and not torch.equal(weights[1], weights[3])
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())


RANDOM = {
    "dropout": 0.3,
    "kwargs": KWARGS | {"drop_path_rate": 0.3, "depth": 2},
    "augment": {"flip": True, "zoom": 0.1},
}


@pytest.mark.parametrize("steps", [7, 10, 19])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, steps):
    recipe = toy(**RANDOM)  # 5 steps an epoch
    whole = training.train(recipe, tmp_path / "whole")
    with pytest.raises(StoppedError):
        training.train(recipe, tmp_path / "cut", progress=stop_after(steps))
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["toy.state.pt"]
    seen = []
    told = []
    cut = training.train(recipe, tmp_path / "cut", progress=lambda *step: seen.append(step[0]), tell=told.append)
    going_on = [line.partition(" (")[0] for line in told if "goes on" in line]
    assert going_on == ([f"toy goes on after epoch {(steps - 1) // 5} of 4"] if steps > 5 else [])
    assert seen[0] == (steps - 1) // 5 * 5 + 1 and seen[-1] == 20
    assert equal(weights_of(whole["checkpoint"]), weights_of(cut["checkpoint"]))
    assert cut["best_epoch"] == whole["best_epoch"] and cut["test"] == whole["test"]
    assert not (tmp_path / "cut" / "toy.state.pt").exists()


def test_dropout_and_augmentation_matter(tmp_path):
    plain = training.train(toy(kwargs=RANDOM["kwargs"] | {"drop_path_rate": 0}, epochs=1), tmp_path / "plain")
    for name in ("dropout", "augment", "kwargs"):
        changed = toy(**({"kwargs": RANDOM["kwargs"] | {"drop_path_rate": 0}} | {name: RANDOM[name]}), epochs=1)
        assert training.train(changed, tmp_path / name)["model_fingerprint"] != plain["model_fingerprint"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from bench import training
    spec, out, root, weights, last = sys.argv[1:]
    def progress(done, total, note):
        if done == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
    path = lambda text: Path(text) if text else None
    training.train(spec, Path(out), path(root), path(weights), progress=progress)
"""


def killed(spec, out, last, root="", weights=""):
    """Train in another process that dies by SIGKILL in step `last`."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), spec, out, root, weights, last]
    done = subprocess.run(list(map(str, command)), cwd=HOUSE, env={**os.environ, "PYTHONPATH": str(HOUSE)})
    assert done.returncode == -signal.SIGKILL


def test_digits_killed_and_gone_on_with(tmp_path):
    spec = "digits[size=64,val_size=16,test_size=16,epochs=3]"
    killed(spec, tmp_path / "cut", 4)
    assert (tmp_path / "cut" / "digits_vit.state.pt").exists()
    seen = []
    cut = training.train(spec, tmp_path / "cut", progress=lambda *step: seen.append(step[0]))
    assert seen[0] == 3
    whole = training.train(spec, tmp_path / "whole")
    assert equal(weights_of(whole["checkpoint"]), weights_of(cut["checkpoint"]))


@pytest.fixture(scope="module")
def busi(tmp_path_factory):
    """A small archive in BUSI's layout, and random weights in the place of ImageNet's."""
    folder = tmp_path_factory.mktemp("busi")
    rng = np.random.default_rng(0)
    for name in ("benign", "malignant", "normal"):
        place = folder / "Dataset_BUSI_with_GT" / name
        place.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)).save(place / f"{name} ({i}).png")
            Image.fromarray(np.full((40, 40), 255, np.uint8)).save(place / f"{name} ({i})_mask.png")
    safetensors.torch.save_file(models.create(ARCHITECTURE, depth=2).module.state_dict(), folder / "w.safetensors")
    return folder, folder / "w.safetensors"


def test_busi_killed_and_gone_on_with(tmp_path, busi):
    spec = "busi[epochs=2,batch_size=8,kwargs={depth: 2}]"
    killed(spec, tmp_path / "cut", 3, *busi)
    cut = training.train(spec, tmp_path / "cut", *busi)
    whole = training.train(spec, tmp_path / "whole", *busi)
    assert equal(weights_of(whole["checkpoint"]), weights_of(cut["checkpoint"]))
    assert {"accuracy", "balanced_accuracy", "auroc", "auprc", "ece", "auroc_malignant_vs_benign"} < set(cut["test"])
    model = models.get(cut["checkpoint"], datasets.registry.find("busi").class_names)
    assert model.name == "busi_vit_tiny" and model.input_size == (224, 224)


def test_another_request_does_not_go_on(tmp_path):
    with pytest.raises(StoppedError):
        training.train(toy(), tmp_path, progress=stop_after(7))
    state = (tmp_path / "toy.state.pt").read_bytes()
    for recipe, kwargs, line in [
        (toy(lr=0.5), {}, "with lr 0.001, not 0.5: give another --out, or --fresh"),
        (toy(augment={"flip": True}), {}, "with augment flip False, not True"),
        (toy(size=41), {}, "size 40, not 41"),
        (toy(), {"seed": 3}, "with seed 0, not 3"),
    ]:
        with pytest.raises(RequestError, match=line):
            training.train(recipe, tmp_path, **kwargs)
    assert (tmp_path / "toy.state.pt").read_bytes() == state
    seen = []
    training.train(toy(lr=0.5), tmp_path, fresh=True, progress=lambda *step: seen.append(step[0]))
    assert seen[0] == 1 and not (tmp_path / "toy.state.pt").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else"])
def test_a_foreign_state_is_refused(tmp_path, content):
    (tmp_path / "toy.state.pt").write_bytes(content)
    with pytest.raises(RequestError, match=r"toy.state.pt is no state of a training: give another --out"):
        training.train(toy(), tmp_path)
    assert (tmp_path / "toy.state.pt").read_bytes() == content


@pytest.mark.parametrize("ending", ["state.pt", "safetensors", "md"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, monkeypatch, ending, fresh):
    monkeypatch.setattr(training, "read", lambda *_: pytest.fail("read images"))
    (tmp_path / f"toy.{ending}").mkdir()
    with pytest.raises(RequestError, match=rf"toy\.{ending} is a folder where a file is to be written: give another"):
        training.train(toy(), tmp_path, fresh=fresh)


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "read", lambda *_: pytest.fail("read images"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"^cannot write to .*file/out \(Not a directory\): name another folder\.$"):
        training.train(toy(), tmp_path / "file" / "out")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_read_batch_by_batch_give_the_same_numbers(tmp_path, monkeypatch, workers):
    held = training.train(toy(**RANDOM, epochs=2), tmp_path / "held")
    monkeypatch.setattr(loop, "IN_MEMORY", 0)
    monkeypatch.setattr(loop.Split, "keep", lambda self: pytest.fail("kept in memory"))
    read = training.train(toy(**RANDOM, epochs=2), tmp_path / "read", workers=workers)
    assert read["model_fingerprint"] == held["model_fingerprint"] and read["test"] == held["test"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line(workers, monkeypatch):
    def load(self, sample):
        raise RequestError("x.png cannot be read as an image (truncated): replace the file.")

    data, model = datasets.get("digits", size=4), models.create(ARCHITECTURE, **KWARGS)
    monkeypatch.setattr(type(data), "load", load)
    with pytest.raises(RequestError, match=r"^x.png cannot be read as an image \(truncated\): replace the file\.$"):
        training.read(toy(), data, data.samples, model, workers)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"not finite in epoch \d: take a smaller lr than 1e\+20, with --fresh\.$"):
        training.train(toy(lr=1e20, clip=None, optimizer="sgd", schedule="constant", warmup=0), tmp_path)
    assert not (tmp_path / "toy.safetensors").exists()


def test_the_advice_on_a_loss_that_is_not_finite_can_be_followed(tmp_path, monkeypatch):
    losses = iter([1.0, math.nan, 1.0])
    monkeypatch.setattr(loop.Learner, "validate", lambda self, val: next(losses))
    with pytest.raises(RequestError, match=r"in epoch 2: take a smaller lr than 0\.5, with --fresh\.$"):
        training.train(toy(lr=0.5), tmp_path)
    assert training.train(toy(lr=0.1, epochs=1), tmp_path, fresh=True)["params"]["lr"] == 0.1


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    first = training.train(toy(epochs=2), tmp_path)
    left = contents(tmp_path)
    (tmp_path / "toy.md").unlink()
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "read", lambda *_: pytest.fail("read images"))
        again = training.train(toy(epochs=2, description="Another word."), tmp_path, tell=told.append)
    assert told == ["toy is there already, nothing is trained: --fresh trains it anew."]
    assert again | {"seconds": 0} == first | {"seconds": 0}
    written = contents(tmp_path)
    assert written.keys() == left.keys() and written["toy.safetensors"] == left["toy.safetensors"]
    assert json.loads(written["toy.report.json"]) == json.loads(left["toy.report.json"])
    assert len(training.train(toy(epochs=2), tmp_path, fresh=True, tell=told.append)["history"]) == 2
    assert len(told) == 3 and "epoch 2 of 2" in told[-1]


def test_a_finished_training_is_not_overwritten(tmp_path):
    training.train(toy(epochs=1), tmp_path)
    left = contents(tmp_path)
    for recipe, kwargs, line in [
        (
            toy(epochs=1, lr=0.5),
            {},
            r"toy\.safetensors is of a training with lr 0\.001, not 0\.5: give another --out, or",
        ),
        (toy(epochs=1), {"seed": 3}, "with seed 0, not 3: give another --out, or --fresh to start anew"),
    ]:
        with pytest.raises(RequestError, match=line):
            training.train(recipe, tmp_path, **kwargs)
    assert contents(tmp_path) == left
    training.train(toy(epochs=1, lr=0.5), tmp_path, fresh=True)
    assert models.get(tmp_path / "toy.safetensors").meta["training"]["params"]["lr"] == 0.5


def test_a_training_begun_anew_goes_on_although_another_is_there(tmp_path):
    training.train(toy(epochs=1), tmp_path)
    with pytest.raises(StoppedError):
        training.train(toy(lr=0.5), tmp_path, fresh=True, progress=stop_after(7))
    seen = []
    training.train(toy(lr=0.5), tmp_path, progress=lambda *step: seen.append(step[0]))
    assert seen[0] == 6


@pytest.mark.parametrize("kind", ["rubbish", "another's", "saved"])
def test_a_foreign_checkpoint_is_not_overwritten(tmp_path, kind):
    path, model = tmp_path / "toy.safetensors", models.create(ARCHITECTURE, **KWARGS)
    if kind == "rubbish":
        path.write_bytes(b"weights of years")
    elif kind == "saved":
        models.save(path, model)
    else:
        safetensors.torch.save_file(model.module.state_dict(), path)
    left = path.read_bytes()
    with pytest.raises(RequestError, match=r"toy\.safetensors is no checkpoint of a training: give another --out, or"):
        training.train(toy(epochs=1), tmp_path)
    assert path.read_bytes() == left
    assert training.train(toy(epochs=1), tmp_path, fresh=True)["model"] == "toy"


def test_every_epoch_is_told(tmp_path):
    told = []
    report = training.train(toy(epochs=2), tmp_path, tell=told.append)
    assert told == [
        f"epoch {k} of 2: train loss {e['train_loss']:.4f}, val loss {e['val_loss']:.4f}, {e['seconds']:.1f} s"
        for k, e in enumerate(report["history"], 1)
    ]


def test_a_frozen_backbone_stays(tmp_path):
    recipe = toy(freeze_backbone=True, dropout=0.5, epochs=1, weight_decay=0.1)
    model, split = parts(recipe)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    loop.fit(recipe, model, split["train"], split["val"], "cpu", 0)
    changed = {key for key, value in model.module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}


def test_dropout_of_an_architecture_without_it_is_refused(tmp_path):
    with pytest.raises(RequestError, match="resnet18 has no dropout layers"):
        training.train(toy(architecture="resnet18", kwargs={}, dropout=0.1), tmp_path)


def test_half_precision_changes_training_only_a_little(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        report = training.train(toy(epochs=1, precision=precision), tmp_path / precision)
        losses.append([report["history"][0][name] for name in ("train_loss", "val_loss")])
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.02)


def test_a_sum_over_the_batch_scales_the_gradient_alone():
    sgd = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip": None, "schedule": "constant", "warmup": 0}
    recipes_ = toy(epochs=1, lr=0.08, **sgd), toy(epochs=1, lr=0.01, reduction="sum", **sgd)  # batches of 8
    heads, losses = [], []
    for recipe in recipes_:
        model, split = parts(recipe)
        fitted = loop.fit(recipe, model, split["train"], split["val"], "cpu", 0)
        heads.append(model.module.head.weight)
        losses.append(fitted.history[0]["train_loss"])
    assert torch.allclose(*heads, atol=1e-6) and math.isclose(*losses, rel_tol=1e-5)


def test_balanced_class_weights():
    _, split = parts(toy(class_weights="balanced"))
    train = split["train"]
    counts = np.bincount([sample.label for sample in train.samples], minlength=10)
    assert np.allclose(loop._class_weights(train).numpy() * counts, counts.mean())
    train.samples = [replace(sample, label=int(sample.label > 2)) for sample in train.samples]
    weights = loop._class_weights(train)
    assert weights[0] / weights[1] == pytest.approx(7 / 3) and (weights[2:] == 0).all()


def test_biases_and_norms_are_decayed_on_request():
    module = models.create(ARCHITECTURE, **KWARGS).module
    for decay in (True, False):
        groups = loop._optimizer(toy(decay_vectors=decay, weight_decay=0.3), module).param_groups
        assert [group["weight_decay"] for group in groups] == [0.3, 0.3 if decay else 0]
        assert {p.ndim <= 1 for p in groups[1]["params"]} == {True} and sum(len(g["params"]) for g in groups) == len(
            list(module.parameters())
        )


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_optimizers_are_pytorchs(name, kind):
    optimizer = loop._optimizer(toy(optimizer=name, momentum=0.3), models.create(ARCHITECTURE, **KWARGS).module)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == kind and 0.3 in (group.get("momentum"), group.get("betas", (0,))[0])


def scheduled(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_are_pytorchs():
    cosine = scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40), 40)
    assert np.allclose([loop.rate(toy(schedule="cosine", warmup=0), i, 40) for i in range(40)], cosine)
    cyclic = scheduled(
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1, 10, mode="triangular2", cycle_momentum=False), 40
    )
    recipe = toy(schedule="cyclic", cycles=2, lr_divisor=1000, warmup=0)
    assert np.allclose([loop.rate(recipe, i, 40) for i in range(40)], cyclic)
    warm = [loop.rate(toy(schedule="constant", warmup=0.1), i, 40) for i in range(5)]
    assert np.allclose(warm, [0.25, 0.5, 0.75, 1, 1])


def test_subset_takes_a_share_of_every_class():
    samples = [Sample(f"{label}/{i:03d}", label, "", "") for label, n in enumerate((100, 40, 3)) for i in range(n)]
    tenth = training.subset(samples, 0.1)
    assert [sum(s.label == label for s in tenth) for label in range(3)] == [10, 4, 1]
    assert [s.id for s in tenth] == sorted(s.id for s in tenth)
    for small, large in ((0.01, 0.1), (0.1, 0.5), (0.5, 1)):
        chosen = [{s.id for s in training.subset(samples, share)} for share in (small, large)]
        assert chosen[0] < chosen[1]
    assert training.subset(samples, 1.0) == samples
    assert {s.id for s in tenth} != {s.id for s in training.subset(samples, 0.1, seed=1)}


def test_without_a_validation_split_groups_of_the_training_split_are_held_out():
    data = datasets.get("digits", split="train", size=200)
    samples = [replace(sample, group=str(i // 2)) for i, sample in enumerate(data.samples)]
    held = training._held_out(training.Part(data, samples))
    groups = {name: {sample.group for sample in part.samples} for name, part in held.items()}
    assert not groups["train"] & groups["val"] and len(held["val"].samples) == 20  # one of each class, and its mate
    assert sorted(s.id for part in held.values() for s in part.samples) == [s.id for s in samples]


def test_a_regression_learns_standardised_values(tmp_path, monkeypatch):
    names = ["redness", "constant"]

    def targets(self):
        colours = [self.load(sample).image.mean((0, 1)) for sample in self.samples]
        return pd.DataFrame(
            {names[0]: [red - blue for red, _, blue in colours], names[1]: 3.0},
            index=[sample.id for sample in self.samples],
        )

    monkeypatch.setattr(type(datasets.get("digits")), "targets", property(targets), raising=False)
    recipe = toy(loss="huber", epochs=2)
    values = training._values(recipe, training.choose(recipe, None))
    assert np.allclose(values["train"].mean(), 0) and np.allclose(values["train"].std(ddof=0), [1, 0])
    assert np.allclose(values["test"]["constant"], 0) and abs(values["test"]["redness"].mean()) > 1e-3
    report = training.train(recipe, tmp_path)
    model, part = models.get(report["checkpoint"]), training.choose(recipe, None)["test"]
    assert model.class_names == tuple(names)
    outputs, targets = loop.predict(model, training.read(recipe, *part, model, values=values["test"]), "cpu")
    assert np.allclose(targets, values["test"]) and report["test"]["rmse"] == pytest.approx(
        report["test"]["mse"] ** 0.5
    )
    assert report["test"]["mse"] == pytest.approx(float(((outputs - targets) ** 2).mean()), rel=1e-5)
    assert report["history"][1]["train_loss"] < report["history"][0]["train_loss"]


PUBLISHED = """
    brocki2024_imagenet brocki2024_lidc brocki2024_lidc_biomarkers chung2024_kvasir_random chung2024_mura_mae
    goncalves2022 komorowski2023_cvprw
"""


@pytest.mark.parametrize("name", PUBLISHED.split())
def test_published_recipes_train_on_their_layouts(tmp_path, name):
    small = {"architecture": ARCHITECTURE, "kwargs": KWARGS, "init": "", "epochs": 2, "lr": 1e-3, "batch_size": 4}
    recipe = recipes.get(name, **small)
    dataset = recipe.dataset.partition("[")[0]
    root = layouts.make(dataset, tmp_path / dataset)
    for path in root.glob("train/n*/*.JPEG") if dataset == "imagenet" else ():  # one of each class cannot be divided
        path.with_name(f"more_{path.name}").write_bytes(path.read_bytes())
    report = training.train(recipe, tmp_path / "out", root)
    assert report["test"]["images"] > 0 and len(report["history"]) == 2
    loaded = models.get(report["checkpoint"])
    assert loaded.fingerprint == report["model_fingerprint"] and loaded.input_size == (32, 32)
    assert f"# {recipe.checkpoint_name}\n" in Path(report["checkpoint"]).with_suffix(".md").read_text()


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_wrong_fraction(tmp_path, fraction):
    with pytest.raises(RequestError, match="fraction"):
        training.train(toy(), tmp_path / "out", fraction=fraction)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "kwargs", "line"),
    [
        ("digit", {}, "Did you mean digits"),
        ("digits[epoch=3]", {}, "Did you mean epochs"),
        ("digits", {"weights": Path("x")}, "leave --weights out"),
        ("busi", {}, "needs --weights FILE"),
        (
            "digits[size=9,val_size=9,test_size=9,architecture=resnet18]",
            {},
            r"model 'resnet18' cannot be built with .*img_size.*: .*unexpected keyword",
        ),
        (
            "digits[size=9,val_size=9,test_size=9,kwargs={embed_dim: 25, num_heads: 2}]",
            {},
            "cannot be built with .*: dim should be divisible",
        ),
        ("digits[size=9,val_size=9,test_size=9,loss=huber]", {}, "has no values to learn"),
        ("digits[size=9,val_size=9,test_size=9,loss=cross_entropy,contrasts=[[a, b]]]", {}, "digits has no class 'a'"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path, spec, kwargs, line):
    with pytest.raises(RequestError, match=line):
        training.train(spec, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_digits_targets_are_presence():
    _, split = parts(toy(loss="bce"))
    for row, sample in enumerate(split["val"].samples):
        present = set(datasets.get("digits", split="val").draw(sample.source).roi) | {sample.label}
        assert set(np.flatnonzero(split["val"][row][1])) == present


def test_what_is_measured_is_of_full_precision():
    """CUDA would round the inputs of convolutions to 10 bits."""
    model, split = parts(toy())
    seen = []
    model.module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    loop.predict(model, split["val"], "cpu")
    assert seen == [False] and torch.backends.cudnn.allow_tf32
