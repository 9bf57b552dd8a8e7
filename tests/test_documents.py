"""The examples of the documents work as they stand."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

import adapters
import metrics
from adapters import conformance
from adapters.recording import shareable
from bench import cli, datasets, models, studies, suite
from bench.datasets.base import facts
from bench.datasets.lidc_idri import BIOMARKERS
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


def test_the_commands_of_training(tmp_path, monkeypatch):
    document = "docs/how-to/train-a-model.md"
    blocks = re.findall(r"```yaml\n(.*?)```", (HOUSE / document).read_text(), re.DOTALL)
    for name, recipe in zip(("mine", "photos"), blocks, strict=True):
        (tmp_path / f"{name}.yaml").write_text(recipe)
    for i in range(20):
        (folder := tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 9 * i, np.uint8)).save(folder / f"{i}.png")
    start = models.create("vit_tiny_patch16_224").module.state_dict()
    safetensors.torch.save_file(start, tmp_path / "vit_tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    assert follow(document, monkeypatch) == 4
    written = {path.name for path in Path("checkpoints").rglob("*.md")}
    assert written == {"digits_vit.md", "digits_vit_0.1.md", "mine.md", "photos.md"}


def test_the_commands_of_reproducing_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert follow("docs/how-to/reproduce-a-study.md", monkeypatch) == len(studies.registry.names()) == 4
    assert list(tmp_path.iterdir()) == [] and "goncalves2022: 84 parts" in capsys.readouterr().out


def test_reproducing_a_study_names_the_folders_that_are_looked_for():
    text = (HOUSE / "docs/how-to/reproduce-a-study.md").read_text()
    for part in [part for name in studies.registry.names() for part in studies.get(name).parts(None)]:
        cls = datasets.registry.find(part.dataset.partition("[")[0])
        assert f"  {cls.folder or cls.required[0].partition('/')[0]}/" in text, cls.name


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


def test_every_data_set_has_a_page_in_the_navigation():
    pages = {path.stem for path in (HOUSE / "docs/datasets").glob("*.md")} - {"index"}
    assert pages == set(datasets.registry.names())
    assert pages == set(re.findall(r"datasets/(?!index)(\w+)\.md", (HOUSE / "mkdocs.yml").read_text()))


def test_describe_prints_what_is_on_the_page(capsys, monkeypatch):
    for name, cls in datasets.registry.classes.items():
        if cls.where != "embedded":
            monkeypatch.setattr(sys, "argv", ["explainer-bench", "data", "describe", name])
            with pytest.raises(SystemExit):
                cli.main()
            printed = capsys.readouterr().out
            assert [text for text in facts(cls).values() if text not in printed] == []
            assert {"licence", "where", "tree", "counts", "splits", "labels", "ROI", "known faults"} <= set(facts(cls))


DATASET = "docs/how-to/add-a-data-set.md"


def test_the_data_set_to_add(tmp_path, monkeypatch, capsys):
    example(tmp_path, DATASET, "leaves")
    for number in range(40):
        name = f"photos/{('healthy', 'diseased')[number % 2]}/tree{number // 4}_{number}"
        path = tmp_path / "leaves-2026" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (9, 9 * (number % 2), number)).save(path)
        if number % 2:
            mask = tmp_path / "leaves-2026" / "masks" / f"{path.stem}.png"
            mask.parent.mkdir(exist_ok=True)
            Image.new("L", (12, 10), 255).save(mask)
    monkeypatch.chdir(tmp_path)
    assert follow(DATASET, monkeypatch) == 1
    assert "diseased" in capsys.readouterr().out
    parts = [datasets.get("leaves.py", root=tmp_path, split=split).samples for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 40 and min(map(len, parts)) > 0
    trees = [{sample.group for sample in part} for part in parts]
    assert not trees[0] & trees[1] | trees[0] & trees[2] | trees[1] & trees[2]


class _Scan:
    """A stand-in for pylidc's: 0.5 x 0.5 x 2 mm voxels, a bright ball of 6 mm, four annotations that differ."""

    patient_id = "LIDC-IDRI-0007"
    pixel_spacing, slice_spacing = 0.5, 2.0
    annotations = ((4, 5.0), (5, 6.0), (5, 6.0), (3, 9.0))

    @staticmethod
    def ball(radius):
        mm = np.indices((120, 120, 40)) * np.array([0.5, 0.5, 2.0]).reshape(3, 1, 1, 1)
        return ((mm - np.array([30, 30, 40]).reshape(3, 1, 1, 1)) ** 2).sum(0) <= radius**2

    def load_all_dicom_images(self, verbose):
        stored = np.where(self.ball(6.0), 1074, 224)  # 50 and -800 HU
        slices = [stored[:, :, k] for k in range(40)]
        return [SimpleNamespace(pixel_array=one, RescaleSlope="1", RescaleIntercept="-1024") for one in slices]

    def cluster_annotations(self, verbose):
        markers = dict.fromkeys(BIOMARKERS, 2)
        rated = [SimpleNamespace(malignancy=rating, radius=radius, **markers) for rating, radius in self.annotations]
        return [rated[:2], rated]


def _consensus(annotations, clevel):
    masks = np.mean([_Scan.ball(annotation.radius) for annotation in annotations], axis=0) >= clevel
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(masks))
    return masks[box], box, None


def test_the_script_that_prepares_lidc(tmp_path, monkeypatch):
    pylidc, utils = ModuleType("pylidc"), ModuleType("pylidc.utils")
    pylidc.Scan = SimpleNamespace(patient_id="patient_id")
    pylidc.query = lambda scan: SimpleNamespace(order_by=lambda column: [_Scan(), _Scan()])
    utils.consensus = _consensus
    monkeypatch.setitem(sys.modules, "pylidc", pylidc)
    monkeypatch.setitem(sys.modules, "pylidc.utils", utils)
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", (HOUSE / "docs/how-to/prepare-lidc.md").read_text(), re.DOTALL)
    exec(script, {})
    parts = [datasets.get("lidc_idri", root=tmp_path, split=split) for split in ("train", "val", "test")]
    ((dataset, sample),) = [(part, sample) for part in parts for sample in part.samples]
    assert (sample.id, sample.group, sample.label) == ("LIDC-IDRI-0007_1", "LIDC-IDRI-0007", 1)
    assert dataset.targets.loc[sample.id].tolist() == [2.0] * 8
    item = dataset.load(sample)
    ball = (np.indices((32, 32)) - 16) ** 2
    inside = ball.sum(0) <= 36
    assert (item.roi[1] ^ inside).mean() < 0.02
    assert item.image[16, 16].tolist() == [191] * 3  # 50 HU
    assert item.image[0, 0].tolist() == [36] * 3  # -800 HU


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
