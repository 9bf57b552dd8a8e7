"""Bad input: one clear line, exit code 2, nothing written."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import Outcome

Command = Callable[..., Outcome]


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quikstart"], ["no suite 'quikstart'", "quickstart"]),
        (["quickstart", "--explainers", "rolout,lime"], ["unknown explainer 'rolout'", "rollout"]),
        (["quickstart", "--explainers", "rollout[startlayer=1]"], ["no parameter 'startlayer'", "start_layer"]),
        (["quickstart", "--explainers", "rollout[start_layer=x]"], ["'start_layer'", "valid integer"]),
        (["quickstart", "--explainers", "rollout[start_layer]"], ["param=value"]),
        (["quickstart", "--explainers", "rollout,rollout"], ["twice"]),
        (["quickstart", "--explainers", "missing.py"], ["no such file", "missing.py"]),
        (["quickstart", "--model", "digits_vit", "--model", "digits_vit"], ["digits_vit comes twice"]),
        (["quickstart", "--metrics", "pointing_games"], ["unknown metric", "pointing_game"]),
        (["quickstart", "--dataset", "digit"], ["unknown dataset", "digits"]),
        (
            ["quickstart", "--model", "vit_tinny_patch16_224[weights=x]"],
            ["vit_tinny_patch16_224", "vit_tiny_patch16_224"],
        ),
        (["quickstart", "--model", "missing.safetensors"], ["no such", "missing.safetensors"]),
        (["quickstart", "--shard", "3/2"], ["--shard", "i/n"]),
        (["quickstart", "--device", "tpu0"], ["no device 'tpu0'"]),
        (["quickstart", "--device", "meta"], ["no device 'meta'"]),
        (["quickstart", "--explainers", "rollout[start_layer={]"], ["cannot read the value"]),
        (["quickstart", "--explainers", "rollout[start_layer=6]"], ["none of the explainers supports", "6 blocks"]),
        (["busi", "--model", "digits_vit"], ["--data-root", "busi"]),
        (["busi", "--model", "digits_vit", "--data-root", "nowhere"], ["nowhere"]),
        (["busi"], ["no model", "--model"]),
    ],
)
def test_requests(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(command("run", *arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("datasets: [digits", "YAML"),
        ("- digits", "mapping"),
        ("datasets: [digits]\nexplainers: [cdam]", "metrics"),
        ("datasets: [digits]\nexplainers: [cdam]\nmetrics: [srg]\nsample: 3", "sample"),
        ("datasets: [digits]\nexplainers: [cdam]\nmetrics: [srg]\nsamples: 0", "samples"),
        ("datasets: [digits]\nmodels: [digits_vit]\nexplainers: [cdam]\nmetrics: [srg]\ntarget: 10", "target 10"),
    ],
)
def test_suites(command: Command, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    refused(command("run", tmp_path / "mine.yaml", "--out", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


def busi(root: Path) -> Path:
    """A tiny BUSI in the real layout."""
    rng = np.random.default_rng(0)
    for label in ("benign", "malignant", "normal"):
        folder = root / "Dataset_BUSI_with_GT" / label
        folder.mkdir(parents=True)
        for i in range(1, 9):
            Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(folder / f"{label} ({i}).png")
            mask = np.zeros((64, 80), dtype=np.uint8)
            mask[20:40, 20:50] = 255 * (label != "normal")
            Image.fromarray(mask).save(folder / f"{label} ({i})_mask.png")
    return root


@pytest.fixture
def lesions(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny BUSI and a model with its classes."""
    from bench import models

    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 1}
    model = models.create("vit_tiny_patch16_224", "tiny", ("benign", "malignant", "normal"), **shape)
    models.save(tmp_path / "tiny.safetensors", model)
    return busi(tmp_path / "data"), tmp_path / "tiny.safetensors"


def test_data_sets(command: Command, tmp_path: Path, lesions: tuple[Path, Path]) -> None:
    root, model = lesions
    arguments = ["run", "busi", "--model", model, "--data-root", root, "--out", tmp_path / "out"]
    broken = root / "Dataset_BUSI_with_GT/benign/benign (3).png"
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    refused(command(*arguments), "benign (3).png")
    broken.write_bytes(content)
    mask = root / "Dataset_BUSI_with_GT/malignant/malignant (2)_mask.png"
    Image.new("L", (10, 10)).save(mask)
    refused(command(*arguments), "malignant (2)_mask.png", "10")
    wrong = tmp_path / "wrong"
    (wrong / "cats").mkdir(parents=True)
    refused(command("data", "check", "busi", "--data-root", wrong), "Dataset_BUSI_with_GT", "cats", "scholar.cu.edu.eg")
    assert not (tmp_path / "out").exists()


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_checkpoints(command: Command, tmp_path: Path, lesions: tuple[Path, Path]) -> None:
    root, tiny = lesions
    arguments = ["run", "busi", "--data-root", root, "--out", tmp_path / "out", "--model"]
    refused(command(*arguments, "digits_vit"), "10", "3")
    other = f"vit_small_patch16_224[weights={tiny}]"
    refused(command(*arguments, other), "vit_small_patch16_224", "tiny.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(tiny.read_bytes()[:1000])
    refused(command(*arguments, tmp_path / "cut.safetensors"), "cut.safetensors")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    refused(command(*arguments, f"vit_tiny_patch16_224[weights={tmp_path / 'code.pth'}]"), "code.pth")
    torch.save({"head.weight": Payload(tmp_path / "owned")}, tmp_path / "code2.pth")
    refused(command(*arguments, f"vit_tiny_patch16_224[weights={tmp_path / 'code2.pth'}]"), "code2.pth")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_folders(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(command("run", "quickstart", "--samples", 1, "--out", tmp_path / "file"), "cannot write to", "file")
    refused(command("run", "quickstart", "--samples", 1, "--out", "/proc/nowhere"), "cannot write to", "/proc/nowhere")
    refused(command("board", tmp_path), "plan.json")


def test_a_submission_that_cannot_be_imported_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import nothing_of_the_kind\n")
    refused(command("run", "quickstart", "--explainers", tmp_path / "mine.py"), "mine.py", "nothing_of_the_kind")
    (tmp_path / "exit.py").write_text("import sys\nsys.exit(0)\n")
    refused(command("run", "quickstart", "--explainers", tmp_path / "exit.py"), "exit.py", "SystemExit")
    (tmp_path / "empty.py").write_text("x = 1\n")
    refused(command("run", "quickstart", "--explainers", tmp_path / "empty.py"), "empty.py")
