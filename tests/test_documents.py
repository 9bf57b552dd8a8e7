"""The examples of the documents work as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import adapters
import metrics
from explainer_bench import split_specs

HOUSE = Path(adapters.__file__).parents[1]


def example(tmp_path, document, name):
    """Write the Python block that defines `name` to a file of its own."""
    blocks = re.findall(r"```python\n(.*?)```", (HOUSE / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f'name = "{name}"' in block]
    path = tmp_path / f"{name}.py"
    path.write_text(block)
    return path


def test_the_explainer_to_add(tmp_path):
    explainer = adapters.get(str(example(tmp_path, "CONTRIBUTING.md", "input_x_gradient")))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2, bias=False))
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = explainer(model, images, np.ones(5, dtype=int))
    weights = model[1].weight.detach()[1].view(3, 4, 4)
    assert np.allclose(maps[:, 0], (images * weights).sum(1), atol=1e-6)


def test_the_metric_to_add(tmp_path):
    path = example(tmp_path, "CONTRIBUTING.md", "top_share")
    maps = np.zeros((2, 4, 4))
    maps[0, 0] = [1, -2, 3, -4]
    maps[1] = 1 - 2 * np.eye(4)
    samples = metrics.Samples(
        model=torch.nn.Identity(),
        inputs=torch.zeros(2, 3, 4, 4),
        targets=np.zeros(2, dtype=int),
        maps=maps,
        roi=np.zeros((2, 4, 4), dtype=bool),
        logits=np.zeros((2, 2)),
        seeds=np.zeros(2, dtype=np.uint32),
        patch=(1, 1),
    )
    assert metrics.get(str(path), pixels=2)(samples).values == pytest.approx([0.7, 2 / 16])


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", (HOUSE / document).read_text())
    assert links
    assert [link for link in links if not (HOUSE / link).exists()] == []


def test_the_readme_names_only_real_parts():
    text = (HOUSE / "README.md").read_text()
    specs = [spec for chosen in re.findall(r'--explainers "(.*?)"', text) for spec in split_specs(chosen)]
    assert [adapters.get(spec).name for spec in specs if spec != "mine.py"]
    assert adapters.get("transformer_attribution", start_layer=1).spec in text
