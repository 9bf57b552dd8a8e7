"""Models: loading, preprocessing, fingerprints, and one clear line for every file that is not what it should be."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from bench import datasets, models
from bench.models.preprocessing import Preprocessing
from explainer_bench import RequestError

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
CLASSES = ("a", "b", "c")


@pytest.fixture
def model() -> models.Model:
    torch.manual_seed(0)
    return models.create(ARCHITECTURE, "small", CLASSES, **SMALL)


@pytest.fixture
def checkpoint(tmp_path: Path, model: models.Model) -> Path:
    models.save(tmp_path / "small.safetensors", model, training={"seed": 3})
    return tmp_path / "small.safetensors"


def test_create_takes_preprocessing_from_the_architecture(model):
    assert model.input_size == (32, 48) and model.patch == (8, 8)
    assert model.preprocessing == Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert not model.module.training and not any(p.requires_grad for p in model.module.parameters())


def test_create_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    models.create(ARCHITECTURE, class_names=CLASSES, **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())


def test_preprocess_is_resize_scale_normalise(model):
    image = np.random.default_rng(0).integers(0, 256, (100, 70, 3)).astype(np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC))
    expected = (resized.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    out = model.preprocess(image)
    assert out.shape == (3, 32, 48) and out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)
    assert np.array_equal(model.resize(resized), resized)


def test_preprocess_roi_moves_with_the_image(model):
    mask = np.zeros((64, 96), bool)
    mask[10:30, 40:60] = True
    roi = model.preprocess_roi(mask)
    assert roi.dtype == bool and roi.shape == (32, 48)
    assert np.array_equal(roi, mask[::2, ::2])


def test_patch_of_a_network_without_patches():
    model = models.create("resnet18", class_names=CLASSES)
    assert model.patch == (16, 16) and model.input_size == (224, 224)


def test_checkpoint_round_trip(model, checkpoint):
    loaded = models.get(checkpoint, CLASSES)
    assert (loaded.name, loaded.class_names, loaded.input_size) == ("small", CLASSES, (32, 48))
    assert loaded.fingerprint == model.fingerprint and loaded.meta["training"] == {"seed": 3}
    x = model.preprocess(np.full((32, 48, 3), 90, np.uint8))[None]
    assert torch.equal(loaded.module(x), model.module(x))
    assert not loaded.module.training and not any(p.requires_grad for p in loaded.module.parameters())


def test_checkpoint_bytes_are_reproducible(tmp_path, model, checkpoint):
    models.save(tmp_path / "again.safetensors", model, training={"seed": 3})
    assert (tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"again.safetensors", "small.safetensors"}


def test_half_precision_is_cast_on_loading(tmp_path, model, checkpoint):
    half = tmp_path / "half.safetensors"
    models.save(half, model, half=True)
    loaded = models.get(half)
    assert half.stat().st_size < 0.7 * checkpoint.stat().st_size
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.fingerprint == models.get(half).fingerprint != model.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"mean": (0.4, 0.5, 0.5)}, {"interpolation": "bilinear"}, {"shortest_side": 50}, {"input_size": (32, 32)}],
)
def test_fingerprint_follows_the_preprocessing(model, change):
    assert replace(model, name="other").fingerprint == model.fingerprint
    changed = replace(model, preprocessing=replace(model.preprocessing, **change))
    assert changed.fingerprint != model.fingerprint == replace(changed, preprocessing=model.preprocessing).fingerprint


def test_fingerprint_follows_the_architecture(model):
    assert replace(model, architecture="x").fingerprint != model.fingerprint


def test_fingerprints_from_before_there_was_a_choice_of_geometry_hold():
    assert models.get("digits_vit").fingerprint == "902b0b20da16daeb"


def test_fingerprint_follows_the_weights(model):
    before = model.fingerprint
    model.module.head.bias[0] += 1e-3
    assert replace(model).fingerprint != before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_architecture_with_weights(tmp_path, suffix):
    torch.manual_seed(0)
    state = models.create(ARCHITECTURE, num_classes=5).module.state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    model = models.get(f"{ARCHITECTURE}[weights={path}]")
    assert model.name == ARCHITECTURE and model.class_names == tuple("01234")
    assert model.fingerprint == models.get(ARCHITECTURE, list("vwxyz"), weights=path).fingerprint
    assert torch.equal(model.module.state_dict()["norm.weight"], state["norm.weight"])


def test_load_backbone_keeps_the_new_head(tmp_path, model):
    other = models.create(ARCHITECTURE, num_classes=7, **SMALL)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(other.module.state_dict(), path)
    head = model.module.head.weight.clone()
    models.load_backbone(model, path)
    assert torch.equal(model.module.head.weight, head)
    assert torch.equal(model.module.norm.weight, other.module.norm.weight)
    assert torch.equal(model.module.patch_embed.proj.weight, other.module.patch_embed.proj.weight)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-ran"),))


def _bad_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / ("w.safetensors" if kind.startswith("safetensors") else "w.pth")
    if kind == "code":
        torch.save({"head.weight": torch.zeros(2), "x": Evil()}, path)
    elif kind == "raw pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "not a state dict":
        torch.save([torch.zeros(2)], path)
    elif kind == "safetensors cut":
        whole = safetensors.torch.save({"head.weight": torch.zeros(100)})
        path.write_bytes(whole[:-50])
    elif kind != "missing":
        path.write_bytes(b"rubbish" * 30)
    return path


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("code", "holds code besides weights and is refused"),
        ("raw pickle", "refused|not a readable PyTorch file"),
        ("not a state dict", "does not hold a state dict"),
        ("rubbish", "not a readable PyTorch file"),
        ("safetensors rubbish", "not a whole safetensors file"),
        ("safetensors cut", "not a whole safetensors file"),
        ("missing", "no such weights file"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, monkeypatch, kind, line):
    monkeypatch.chdir(tmp_path)
    path = _bad_file(tmp_path, kind)
    for spec in (str(path), f"{ARCHITECTURE}[weights={path}]"):
        with pytest.raises(RequestError, match=line) as error:
            models.get(spec)
        assert "\n" not in str(error.value) and path.name in str(error.value)
    assert not (tmp_path / "evil-ran").exists()


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("vit_tiny_patch16_223", "Did you mean vit_tiny_patch16_224"),
        ("digits_vitt", "Did you mean digits_vit"),
        (ARCHITECTURE, "needs its weights, nothing is downloaded"),
        (f"{ARCHITECTURE}[wieghts=x]", "no parameter 'wieghts'"),
    ],
)
def test_bad_requests(spec, line):
    with pytest.raises(RequestError, match=line):
        models.get(spec)


def test_another_architecture_names_the_first_key_and_counts(checkpoint):
    with pytest.raises(RequestError, match=r"is not a checkpoint of resnet18: conv1\.weight is missing \(\d+ missing"):
        models.get("resnet18", weights=checkpoint)
    wider = models.create(ARCHITECTURE, class_names=CLASSES, **{**SMALL, "embed_dim": 48})
    with pytest.raises(RequestError, match=r"cls_token has shape \(1, 1, 24\) instead of \(1, 1, 48\) \(0 missing"):
        models.load_backbone(wider, checkpoint)


def test_weights_without_header_need_their_architecture(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(RequestError, match="does not say which architecture"):
        models.get(tmp_path / "w.safetensors")


@pytest.mark.parametrize("names", [("a", "b"), ("a", "c", "b")])
def test_other_classes_than_the_data_sets(checkpoint, names):
    with pytest.raises(RequestError, match=r"tells 3 classes \(a, b, c\), the data set has"):
        models.get(checkpoint, names)


def test_shipped_digits_model():
    model = models.get("digits_vit", tuple("0123456789"))
    assert models.shipped()["digits_vit"].stat().st_size <= 4e6
    assert sum(p.numel() for p in model.module.parameters()) <= 2_000_000
    assert model.input_size == (64, 64) and model.patch == (8, 8)
    trained = model.meta["training"]
    images = datasets.get("digits", split="test", size=trained["data"]["test"]["images"])
    assert trained["data"]["test"]["fingerprint"] == images.fingerprint
    items = [images.load(sample) for sample in images.samples]
    inputs = torch.stack([model.preprocess(item.image) for item in items])
    top = torch.cat([model.module(part) for part in inputs.split(64)]).argmax(1).tolist()
    present = np.mean([label in item.roi for label, item in zip(top, items, strict=True)])
    assert present >= 0.97 and present == pytest.approx(trained["test"]["top1_present"], abs=0.002)


def test_imagenet_weights_classify(shared):
    weights = shared / "data" / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    model = models.get(ARCHITECTURE, weights=weights)
    image = Image.open(shared / "data" / "imagenet_samples" / "elephant-zebra.jpg").convert("RGB")
    top = model.module(model.preprocess(np.asarray(image))[None]).topk(5).indices[0].tolist()
    assert {340, 386, 385} & set(top)


@pytest.mark.parametrize(("name", "patch"), [("vit_tiny_patch16_224", 16), ("vit_tiny_r_s16_p8_224", 32)])
def test_the_patch_is_what_a_token_covers(name: str, patch: int) -> None:
    assert models.create(name, "any", CLASSES).patch == (patch, patch)
