"""Preprocessing: held to torchvision's and timm's own transforms; the published variants; warnings on misuse."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

from bench import cli, models
from bench.models import preprocessing
from bench.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, VARIANTS, Preprocessing
from explainer_bench import RequestError, RequestWarning

SHAPES = [(300, 451), (451, 300), (256, 320), (256, 256), (97, 131), (224, 224), (1000, 257)]
TINY = "vit_tiny_patch16_224"
TRAINED = f"{TINY}.augreg_in21k_ft_in1k.safetensors"


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def of_torchvision(geometry: list[object], how: Preprocessing, image: np.ndarray) -> torch.Tensor:
    steps = [*geometry, transforms.ToTensor(), transforms.Normalize(how.mean, how.std)]
    return transforms.Compose(steps)(Image.fromarray(image))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["chung2024_crop", "brocki2024_imagenet", "komorowski2023"])
def test_resize_and_crop_are_torchvisions(name, shape):
    how = VARIANTS[name].preprocessing
    expected = of_torchvision([transforms.Resize(256), transforms.CenterCrop(224)], how, picture(*shape))
    torch.testing.assert_close(how(picture(*shape)), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["chung2024_resize", "goncalves2022", "brocki2024_lidc"])
def test_squashing_is_torchvisions(name, shape):
    how = VARIANTS[name].preprocessing
    torch.testing.assert_close(
        how(picture(*shape)), of_torchvision([transforms.Resize((224, 224))], how, picture(*shape))
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [None, 256, 224])
def test_a_roi_moves_with_its_image(side, shape):
    how = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD, shortest_side=side)
    mask = picture(*shape)[..., 0] > 128
    nearest = transforms.InterpolationMode.NEAREST
    geometry = (
        [transforms.Resize(side, nearest), transforms.CenterCrop(224)]
        if side
        else [transforms.Resize((224, 224), nearest)]
    )
    expected = np.asarray(transforms.Compose(geometry)(Image.fromarray(mask.astype(np.uint8)))).astype(bool)
    roi = how.preprocess_roi(mask)
    assert roi.dtype == bool and np.array_equal(roi, expected)
    as_image = replace(how, interpolation="nearest").resize(np.repeat(mask[..., None], 3, 2).astype(np.uint8))
    assert np.array_equal(roi, as_image[..., 0].astype(bool))


def test_an_image_of_the_right_size_is_not_resampled():
    how = VARIANTS["chung2024_crop"].preprocessing
    image = picture(256, 300)
    assert np.array_equal(how.resize(image), image[16:240, 38:262])
    assert np.array_equal(VARIANTS["chung2024_resize"].preprocessing.resize(image[:224, :224]), image[:224, :224])


@pytest.mark.parametrize("architecture", [TINY, "densenet121", "deit_tiny_patch16_224", "resnet50"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_timms_own_evaluation(architecture, shape):
    with torch.device("meta"):
        module = timm.create_model(architecture)
    cfg = timm.data.resolve_data_config({}, model=module)
    how = preprocessing.of_timm(cfg, cfg["input_size"][1:])
    expected = timm.data.create_transform(**cfg)(Image.fromarray(picture(*shape)))
    torch.testing.assert_close(how(picture(*shape)), expected)
    assert models._choose("timm", module) == how


def test_a_crop_mode_of_timm_that_is_not_known_is_refused():
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "border"}
    with pytest.raises(RequestError, match="crop mode 'border'"):
        preprocessing.of_timm(cfg, (224, 224))
    assert preprocessing.of_timm({**cfg, "crop_mode": "squash", "crop_pct": 1}, (224, 224)).shortest_side is None


@pytest.mark.parametrize(
    ("name", "mean", "std", "side"),
    [
        ("chung2024_resize", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None),
        ("chung2024_crop", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256),
        ("komorowski2023", (0.56,) * 3, (0.21,) * 3, 256),
        ("komorowski2023_validation", (0.58,) * 3, (0.21,) * 3, 224),
        ("brocki2024_imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256),
        ("brocki2024_lidc", (364.5 / 1400,) * 3, (357.7 / 1400,) * 3, None),
        ("goncalves2022", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None),
    ],
)
def test_the_published_variants(name, mean, std, side):
    how, source = VARIANTS[name]
    assert how.input_size == (224, 224) and how.interpolation == "bilinear" and how.shortest_side == side
    assert how.mean == pytest.approx(mean) and how.std == pytest.approx(std)
    assert source and preprocessing.find(name) is how


def test_the_documentation_names_every_variant():
    text = (Path(preprocessing.__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name in [*VARIANTS, preprocessing.OF_TIMM] if f"| `{name}` |" not in text] == []


def test_lidc_normalises_hounsfield_units():
    hu = torch.tensor([-1000.0, -635.5, 0.0, 400.0])
    stored = ((hu + 1000) / 1400 * 255).expand(3, 1, 4)
    expected = ((hu + 635.5) / 357.7).expand(3, 1, 4)
    torch.testing.assert_close(preprocessing.from_hounsfield(-635.5, 357.7).normalise(stored), expected)


def test_json():
    crop, squash = VARIANTS["chung2024_crop"].preprocessing, VARIANTS["chung2024_resize"].preprocessing
    for how in (crop, squash):
        assert Preprocessing.from_json(json.loads(json.dumps(how.to_json()))) == how
    assert set(crop.to_json()) - set(squash.to_json()) == {"shortest_side"}


def test_a_shortest_side_below_what_is_cut_out_is_refused():
    with pytest.raises(RequestError, match="shortest side 200 has no centre of 224 x 224"):
        Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD, shortest_side=200)


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(RequestError, match=r"unknown preprocessing 'chung_crop'.*chung2024_crop"):
        models.create(TINY, preprocessing="chung_crop", img_size=32, depth=1)


def test_a_model_of_one_size_scales_the_variant_and_its_name_does_not_change():
    small = models.create(TINY, "small", preprocessing="chung2024_crop", img_size=112, depth=1)
    assert small.preprocessing == Preprocessing((112, 112), IMAGENET_MEAN, IMAGENET_STD, shortest_side=128)
    assert small.name == "small" and small.preprocess(picture(150, 200)).shape == (3, 112, 112)
    any_size = models.create("resnet18", preprocessing="chung2024_crop")
    assert any_size.preprocessing == VARIANTS["chung2024_crop"].preprocessing


def test_the_geometry_survives_a_checkpoint(tmp_path):
    model = models.create(TINY, "small", "ab", preprocessing="chung2024_crop", img_size=32, depth=1)
    models.save(tmp_path / "w.safetensors", model)
    loaded = models.get(tmp_path / "w.safetensors")
    assert loaded.preprocessing == model.preprocessing and loaded.fingerprint == model.fingerprint


def test_another_normalisation_than_the_headers_is_warned_about(tmp_path):
    path = tmp_path / "w.safetensors"
    models.save(path, models.create(TINY, "small", "ab", img_size=32, depth=1))
    with warnings.catch_warnings(action="error"):
        models.get(path)
        assert models.get(f"{path}[preprocessing=timm]").preprocessing.shortest_side == 35
    with pytest.warns(RequestWarning, match=r"with mean 0.485 0.456 0.406, std .* were trained with mean 0.5, std 0.5"):
        model = models.get(f"{path}[preprocessing=goncalves2022]")
    assert model.name == "small[preprocessing=goncalves2022]" and model.preprocessing.mean == IMAGENET_MEAN
    assert model.preprocess(picture(40, 50)).shape == (3, 32, 32)


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    def run_(model: str) -> list[str]:
        asked = ["run", "quickstart", "--model", model, "--samples", "1", "--explainers", "random"]
        asked += ["--metrics", "sparseness", "--out", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["explainer-bench", *asked])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return [line for line in capfd.readouterr().err.splitlines() if "warn" in line.lower()]

    return run_


def test_the_command_line_warns_in_one_line(run):
    (line,) = run("digits_vit[preprocessing=chung2024_crop]")
    assert line.startswith("warning: digits_vit[preprocessing=chung2024_crop] normalises images with mean 0.485")
    assert run("digits_vit") == []


def test_other_warnings_stay_pythons(capfd):
    with warnings.catch_warnings(record=True) as pythons, cli._warnings_in_one_line():
        for text, kind in (("twice", RequestWarning), ("twice", RequestWarning), ("of a library", UserWarning)):
            warnings.warn(text, kind, stacklevel=1)
    assert capfd.readouterr().err.splitlines() == ["warning: twice"]
    assert [str(warning.message) for warning in pythons] == ["of a library"]


def test_wrong_preprocessing_of_real_weights_costs_confidence(shared):
    weights = shared / "data" / "weights" / TRAINED
    names = {"n02125311": 286, "n02127052": 287, "n02412080": 348, "n02493509": 382, "n03240683": 540, "n03764736": 653}
    files = sorted((shared / "data" / "imagenet_samples").iterdir())
    chosen = [(file, names[file.name[:9]]) for file in files if file.name[:9] in names]
    images = [np.asarray(Image.open(file).convert("RGB")) for file, _ in chosen]

    def confidence(model: models.Model) -> float:
        shares = torch.stack([model.module(model.preprocess(image)[None]).softmax(1)[0] for image in images])
        return float(shares[range(len(chosen)), [label for _, label in chosen]].mean())

    with warnings.catch_warnings(action="error", category=RequestWarning):
        right = models.get(TINY, weights=weights)
    with pytest.warns(RequestWarning, match=r"were trained with mean 0\.5, std 0\.5"):
        wrong = models.get(f"{TINY}[preprocessing=chung2024_resize]", weights=weights)
    assert len(chosen) == 6 and confidence(right) > confidence(wrong) + 0.1
