"""The survey's CNNs: parameter counts as published, torchvision's weights, gates as defined, explainers that work."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import adapters
from bench import cli, models
from bench.models import cnns
from explainer_bench import RequestError

COUNTS = {
    "densenet121_goncalves": 7_054_210,
    "resnet50_goncalves": 23_512_130,
    "se_densenet121_goncalves": 7_357_314,
    "se_resnet50_goncalves": 26_027_074,
    "cbam_densenet121_goncalves": 7_360_706,
    "cbam_resnet50_goncalves": 26_044_722,
}
PLAIN = {"densenet121_goncalves": torchvision.models.densenet121, "resnet50_goncalves": torchvision.models.resnet50}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name: str, **kwargs: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    assert count(on_meta(name)) == COUNTS[name]


def test_deit_counts_more_than_published_which_left_the_bare_parameters_out():
    deit = on_meta("deit_tiny_patch16_224", num_classes=2)
    assert count(deit) == 5_524_802
    assert count(deit) - deit.pos_embed.numel() - deit.cls_token.numel() == 5_486_786


def test_the_documentation_has_the_counts():
    text = (Path(cnns.__file__).parents[2] / "docs" / "models.md").read_text()
    assert [name for name, number in COUNTS.items() if f"| `{name}` | {number:,} | {number:,} |" not in text] == []
    assert "| `deit_tiny_patch16_224` | 5,524,802 | 5,486,786 |" in text


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return a module whose BatchNorms, too, are not as they start."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(1 if "norm" in key and key.endswith("weight") else 0, 0.05, generator=generator)
    return module.eval().requires_grad_(False)


def old_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in state.items()}


@pytest.mark.parametrize("old", [False, True], ids=["today's keys", "norm.1"])
def test_torchvisions_densenet_loads_into_the_backbone(tmp_path, old):
    published = random(torchvision.models.densenet121())
    state = old_keys(published.state_dict()) if old else published.state_dict()
    assert ("features.denseblock1.denselayer1.norm.1.weight" in state) == old
    torch.save(state, tmp_path / "densenet121.pth")
    model = models.create("densenet121_goncalves", class_names="ab", img_size=64)
    models.load_backbone(model, tmp_path / "densenet121.pth")
    features = published.features(images())
    assert torch.equal(model.module.features(images()), features)
    expected = features.flatten(1) @ model.module.classifier.weight.T + model.module.classifier.bias
    torch.testing.assert_close(model.module(images()), expected)


def test_torchvisions_resnet_loads(tmp_path):
    published = random(torchvision.models.resnet50())
    torch.save(published.state_dict(), tmp_path / "resnet50.pth")
    model = models.get(f"resnet50_goncalves[weights={tmp_path / 'resnet50.pth'}]")
    assert len(model.class_names) == 1000 and torch.equal(model.module(images()), published(images()))


@pytest.mark.parametrize("name", [name for name in COUNTS if name not in PLAIN])
def test_gates_stay_new_where_the_weights_are_of_the_plain_network(tmp_path, name):
    plain = PLAIN[name.partition("_")[2]]()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = models.create(name, class_names="ab", img_size=64)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    models.load_backbone(model, tmp_path / "plain.pth")
    after, given = model.module.state_dict(), plain.state_dict()
    fresh = {key for key in after if key not in given or key.startswith(("classifier.", "fc."))}
    assert all(torch.equal(after[key], before[key] if key in fresh else given[key]) for key in after)
    gate = name.partition("_")[0]
    assert any(gate in key for key in fresh) and all(
        gate in key or key.startswith(("classifier", "fc")) for key in fresh
    )


def test_gates_that_the_weights_have_must_be_whole(tmp_path):
    model = models.create("se_resnet50_goncalves", class_names="ab", img_size=64)
    state = model.module.state_dict()
    assert "layer1.0.se.fc.0.weight" in state  # as in the weights that the survey started from
    torch.save({key: value for key, value in state.items() if key != "layer3.2.se.fc.2.weight"}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"layer3\.2\.se\.fc\.2\.weight is missing \(1 missing"):
        models.load_backbone(model, tmp_path / "w.pth")


def test_a_checkpoint_of_ours_comes_back(tmp_path):
    model = models.create("cbam_densenet121_goncalves", "mine", ("a", "b"), img_size=64)
    models.save(tmp_path / "w.safetensors", model)
    loaded = models.get(tmp_path / "w.safetensors", ("a", "b"))
    assert loaded.fingerprint == model.fingerprint and torch.equal(loaded.module(images()), model.module(images()))


@pytest.mark.parametrize("gate", ["se", "cbam"])
def test_gates_as_defined(gate):
    module = random(cnns._gate(gate, 32, 6))
    maps = torch.randn(2, 32, 6, 6)
    state = module.state_dict()
    if gate == "se":
        hidden = (maps.mean((2, 3)) @ state["fc.0.weight"].T).relu()
        expected = maps * (hidden @ state["fc.2.weight"].T).sigmoid()[:, :, None, None]
    else:

        def perceptron(pooled: Tensor) -> Tensor:
            hidden = (pooled @ state["mlp.0.weight"].T + state["mlp.0.bias"]).relu()
            return hidden @ state["mlp.2.weight"].T + state["mlp.2.bias"]

        channels = perceptron(maps.mean((2, 3))) + perceptron(maps.amax((2, 3)))
        scaled = maps * channels.sigmoid()[:, :, None, None]
        pair = torch.stack((scaled.amax(1), scaled.mean(1)), 1)
        conv = torch.nn.functional.conv2d(pair, state["spatial.0.weight"], padding=3)
        norm = (conv - state["spatial.1.running_mean"]) / (state["spatial.1.running_var"] + 1e-5).sqrt()
        expected = scaled * (norm * state["spatial.1.weight"] + state["spatial.1.bias"]).sigmoid()
    torch.testing.assert_close(module(maps), expected)


@pytest.mark.parametrize(("name", "number"), [("densenet121", 4), ("resnet50", 16)])
@pytest.mark.parametrize(("gate", "kind"), [("se", cnns.SE), ("cbam", cnns.CBAM)])
def test_number_and_places_of_the_gates(name, number, gate, kind):
    module = on_meta(f"{gate}_{name}_goncalves")
    found = [key for key, part in module.named_modules() if isinstance(part, kind)]
    assert len(found) == number
    if name == "densenet121":
        order = [key for key, _ in module.features.named_children()]
        assert [order[order.index(f"denseblock{i}") + 1] for i in range(1, 5)] == [f"{gate}{i}" for i in range(1, 5)]
        assert order[-2:] == [f"{gate}4", "norm5"]


@pytest.mark.parametrize("name", COUNTS)
def test_the_studys_explainers_work(name):
    torch.manual_seed(0)
    module = models.create(name, class_names="ab", img_size=64).module
    maps = {}
    for explainer in map(adapters.get, ("deeplift", "lrp_epsilon", "gradcam")):
        assert explainer.supports(module) is None
        maps[explainer.name] = explainer(module, images(), np.array([0, 1]))
        assert maps[explainer.name].shape == (2, 1, 64, 64) and np.isfinite(maps[explainer.name]).all()
    assert maps["deeplift"].std() > 0 and maps["lrp_epsilon"].std() > 0  # Grad-CAM's may be clipped away whole
    if name in PLAIN:  # with gates, DeepLIFT's maps do not sum to the difference
        difference = (module(images()) - module(torch.zeros(1, 3, 64, 64)))[[0, 1], [0, 1]]
        np.testing.assert_allclose(maps["deeplift"].sum((1, 2, 3)), difference.numpy(), rtol=1e-3, atol=1e-4)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(RequestError, match="img_size=100 is not a multiple of 32"):
        models.create("densenet121_goncalves", img_size=100)


def test_names_are_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["explainer-bench", "list", "models"])
    with pytest.raises(SystemExit):
        cli.main()
    listed = capsys.readouterr().out
    assert all(f"{name}[weights=FILE]" in listed for name in [*COUNTS]) and "dino_vits8" in listed
    with pytest.raises(RequestError, match="Did you mean se_densenet121_goncalves"):
        models.get("se_densnet121_goncalves")
