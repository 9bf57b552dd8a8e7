"""What the command line says of explainers: the catalogue, and the check of a new one."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import adapters
from bench import tuning
from tests.acceptance.conftest import Outcome

Command = Callable[..., Outcome]

GOOD = '''
import torch
from adapters import Explainer

class Mine(Explainer):
    """Squared gradient."""

    name = "mine"
    family = "gradient"
    reference = "unpublished"
    power: int = 2

    def attribute(self, model, inputs, targets, **context):
        (gradient,) = torch.autograd.grad(model(inputs).gather(1, targets[:, None]).sum(), inputs)
        return (gradient**self.power).sum(1)
'''


def test_the_catalogue_names_every_explainer_with_its_facts(command: Command) -> None:
    outcome = command("list", "explainers", "--json")
    rows = {row["name"]: row for row in json.loads(outcome.out)}
    assert set(rows) == set(adapters.registry.names())
    for name, row in rows.items():
        explainer = adapters.get(name)
        assert row["cost"] == explainer.cost
        assert row["signed"] == explainer.signed
        assert row["licence"] == explainer.licence
        assert row["reference"] or explainer.trivial
    assert rows["rollout"]["parameters"] == "start_layer=0, fusion=mean, discard=0.0"
    table = command("list", "explainers").out
    assert all(name[:12] in table for name in rows)
    assert "licence note" in table


def test_explainers_cost_something_and_trivial_rows_nothing() -> None:
    for name, cls in adapters.registry.classes.items():
        assert (adapters.get(name).cost == 0) == cls.trivial, name


def test_a_good_explainer_passes_its_check(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    outcome = command("check", file)
    assert outcome.code == 0
    assert outcome.err == ""
    assert "resnet" in outcome.out


@pytest.mark.parametrize(
    ("change", "spec", "code", "line"),
    [
        (("power: int = 2", "power: int = 1"), "", 1, "keeps_its_sign: it says signed=False"),
        (("", ""), "[power=3]", 1, "keeps_its_sign"),
        (
            ("    def attr", "    def supports(self, model):\n        return 'no'\n\n    def attr"),
            "",
            2,
            "refuses every model",
        ),
        (("", ""), "[pover=3]", 2, "Did you mean power?"),
        (("import torch", "import torhc"), "", 2, "No module named 'torhc'"),
    ],
)
def test_what_is_wrong_is_said(
    command: Command, tmp_path: Path, change: tuple[str, str], spec: str, code: int, line: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD.replace(*change))
    outcome = command("check", f"{file}{spec}")
    assert outcome.code == code
    assert line in outcome.err
    assert "Traceback" not in outcome.err


def test_parameters_are_tuned_on_the_validation_split(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "--dataset",
        "digits",
        "--model",
        checkpoint,
        "--metric",
        "srg[steps=4]",
        "--samples",
        8,
        "--out",
        tmp_path,
    ]
    outcome = command("tune", "rollout[fusion=max]", "--grid", "start_layer=0,1", "--grid", "discard=0,0.5", *arguments)
    assert outcome.code == 0, outcome.err
    (board,) = [f for f in (tmp_path / "leaderboards").glob("*.csv") if not f.name.endswith(".long.csv")]
    rows = pd.read_csv(board)
    assert set(rows["dataset"]) == {"digits[split=val]"}
    assert len(rows) == 4
    assert rows["explainer"].str.contains("fusion=max").all()
    assert outcome.out.count("rollout[") == 5  # one line says which came first
    assert "First: rollout[" in outcome.out


def test_combinations_name_what_differs_and_leave_the_defaults_alone() -> None:
    assert tuning.combinations("gradcam_eigen_aug", {"sign": ["raw"]}) == ["gradcam_eigen_aug[sign=raw]"]
    assert tuning.combinations("integrated_cdam[at=norm1]", {"steps": [10, 50]}) == [
        "integrated_cdam[at=norm1,steps=10]",
        "integrated_cdam[at=norm1]",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--grid", "start_layer=0,1", "--dataset", "digits[split=test]"], "on the split 'val' alone, not on 'test'"),
        (["--grid", "start=0,1", "--dataset", "digits"], "Did you mean start_layer"),
        (["--grid", "start_layer=0,x", "--dataset", "digits"], "start_layer"),
        (["--grid", "start_layer", "--dataset", "digits"], "write it as PARAM=VALUE"),
    ],
)
def test_what_cannot_be_tuned_is_said(
    command: Command, checkpoint: Path, tmp_path: Path, arguments: list[str], line: str
) -> None:
    outcome = command("tune", "rollout", *arguments, "--model", checkpoint, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert line in outcome.err
    assert not (tmp_path / "run").exists()


def concept(folder: Path, value: int) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("one.png", "two.png"):
        Image.new("RGB", (50, 40), (value, len(name), 200)).save(folder / name)
    return folder


def test_a_concept_is_a_folder_of_images(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", checkpoint, "--metrics", "sparseness", "--samples", 4, "--out", tmp_path / "run"]
    spec = f"concept_cdam[folder={concept(tmp_path / 'stripes', 10)}]"
    outcome = command("run", "quickstart", "--explainers", f"{spec},cdam", *arguments)
    assert outcome.code == 0, outcome.err
    assert "explanations: 2 computed" in outcome.out
    concept(tmp_path / "stripes", 240)
    again = command("run", "quickstart", "--explainers", f"{spec},cdam", *arguments)
    assert "explanations: 1 computed, 1 found" in again.out


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("concept_cdam", "concept_cdam needs images of its concept: concept_cdam[folder=DIR]"),
        ("concept_cdam[folder=nowhere]", "finds no images in nowhere"),
    ],
)
def test_a_concept_without_images_is_refused(
    command: Command, checkpoint: Path, tmp_path: Path, spec: str, line: str
) -> None:
    outcome = command("run", "quickstart", "--explainers", spec, "--model", checkpoint, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert line in outcome.err
    assert not (tmp_path / "run").exists()
