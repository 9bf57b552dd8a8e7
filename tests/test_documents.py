"""The examples of the documents work as they stand."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import adapters
import metrics
from adapters import conformance
from adapters.recording import shareable
from bench import cli, suite
from explainer_bench import split_specs

HOUSE = Path(adapters.__file__).parents[1]


def example(tmp_path, document, name):
    """Write the Python block that defines `name` to a file of its own."""
    blocks = re.findall(r"```python\n(.*?)```", (HOUSE / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f'name = "{name}"' in block]
    path = tmp_path / f"{name}.py"
    path.write_text(block)
    return path


HOW_TO = "docs/how-to/add-an-explainer.md"


def test_the_explainer_to_add(tmp_path):
    explainer = adapters.get(str(example(tmp_path, HOW_TO, "squared_gradient")))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2, bias=False))
    maps = explainer(model, torch.randn(5, 3, 4, 4), np.ones(5, dtype=int))
    weights = model[1].weight.detach()[1].view(3, 4, 4)
    assert np.allclose(maps[:, 0], (weights**2).mean(0), atol=1e-6)
    power = adapters.get(str(tmp_path / "squared_gradient.py"), power=4)
    assert np.allclose(power(model, torch.randn(1, 3, 4, 4), [1])[0, 0], (weights**4).mean(0), atol=1e-6)


def test_the_vision_transformer_method_to_add(tmp_path):
    explainer = adapters.get(str(example(tmp_path, HOW_TO, "last_block")))
    assert [finding for finding in conformance.check(explainer) if finding.verdict == "broken"] == []
    assert shareable(explainer)


def follow(document, monkeypatch):
    """Run the commands of a document, and return how many there were."""
    commands = re.findall(r"```bash\n(.*?)```", (HOUSE / document).read_text(), re.DOTALL)
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, command
    return len(commands)


def test_the_commands_of_adding_an_explainer(tmp_path, monkeypatch):
    example(tmp_path, HOW_TO, "squared_gradient").rename(tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert follow(HOW_TO, monkeypatch) == 2
    board = pd.read_csv("runs/mine/leaderboards/digits.csv").set_index("explainer")
    assert board.loc["squared_gradient", "rank_low"] >= 1


def test_the_commands_of_choosing_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert follow("docs/how-to/choose-parameters.md", monkeypatch) == 2
    (board,) = [path for path in Path("runs/tune/leaderboards").glob("*.csv") if ".long" not in path.name]
    assert len(pd.read_csv(board)) == 6


def test_the_examples_of_other_models(capsys):
    pytest.importorskip("transformers", reason="needs Hugging Face's transformers")
    blocks = re.findall(r"```python\n(.*?)```", (HOUSE / "docs/how-to/explain-other-models.md").read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out == "it has no timm VisionTransformer\nNone\n"
    assert names["maps"].shape == (2, 1, 224, 224)
    assert len(names["several"]) == 5


def test_the_cards_are_those_of_the_sources(monkeypatch):
    monkeypatch.syspath_prepend(HOUSE / "docs")
    import cards

    for page, text in cards.pages().items():
        assert page.read_text() == text, "write them again: python docs/cards.py"


def test_every_explainer_has_a_measured_cost():
    text = (HOUSE / "docs/explainer-costs.md").read_text()
    names = [name for name, cls in adapters.registry.classes.items() if not cls.trivial]
    assert [name for name in names if f"| {name} " not in text] == []


METRIC = "docs/how-to/add-a-metric.md"


def samples_of(maps, model, patch):
    n, height, width = maps.shape
    inputs = torch.arange(n * 3 * height * width).view(n, 3, height, width) / 7.0
    return metrics.Samples(
        model=model,
        inputs=inputs,
        targets=np.zeros(n, dtype=int),
        maps=maps,
        roi=np.zeros(maps.shape, dtype=bool),
        logits=model(inputs).detach().double().numpy(),
        seeds=np.zeros(n, dtype=np.uint32),
        patch=patch,
    )


def test_the_metric_to_add(tmp_path):
    maps = np.zeros((2, 4, 4))
    maps[0, 0] = [1, -2, 3, -4]
    maps[1] = 1 - 2 * np.eye(4)
    samples = samples_of(maps, torch.nn.Flatten(), (1, 1))
    top_share = metrics.get(str(example(tmp_path, METRIC, "top_share")), pixels=2)
    assert top_share(samples).values == pytest.approx([0.7, 2 / 16])


def test_the_metric_with_perturbed_images_to_add(tmp_path):
    maps = np.kron(np.random.default_rng(0).random((2, 2, 2)), np.ones((16, 16)))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(12, 2)).requires_grad_(
        False
    )
    samples = samples_of(maps, model, (16, 16))
    drop = metrics.get(str(example(tmp_path, METRIC, "top_patch_drop")), imputer="zero")
    images = samples.inputs.clone()
    images[torch.as_tensor(maps == maps.max((1, 2), keepdims=True))[:, None].expand_as(images)] = 0
    before, after = (model(batch).double().softmax(1)[:, 0] for batch in (samples.inputs, images))
    assert drop(samples).values == pytest.approx((1 - after / before).numpy())


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", (HOUSE / document).read_text())
    assert links
    folder = (HOUSE / document).parent
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_readme_lists_every_explainer():
    table = (HOUSE / "README.md").read_text().partition("| Family | Explainers |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == adapters.registry.names()


def test_the_readme_and_the_suite_of_all_metrics_list_every_metric():
    table = (HOUSE / "README.md").read_text().partition("| Group | Metrics |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == metrics.registry.names()
    assert sorted(suite.load("all_metrics").metrics) == metrics.registry.names()


def test_every_metric_has_a_measured_reliability():
    text = (HOUSE / "docs/which-metrics.md").read_text()
    assert [name for name in metrics.registry.names() if f"| {name} " not in text] == []


def test_the_readme_names_only_real_parts():
    text = (HOUSE / "README.md").read_text()
    specs = [spec for chosen in re.findall(r'--explainers "(.*?)"', text) for spec in split_specs(chosen)]
    assert [adapters.get(spec).name for spec in specs if spec != "mine.py"]
    section = text.partition("## Metrics")[2].partition("\n## ")[0]
    assert [metrics.get(spec) for spec in re.findall(r"`([\w:]+\[.*?\])`", section)]
    assert adapters.get("transformer_attribution", start_layer=1).spec in text
