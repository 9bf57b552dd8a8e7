"""The command line in process, and a tiny model on real images."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import cli, models
from bench.datasets.digits import Digits

TIMING = ["seconds_per_image", "utc"]


@dataclass
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run ``explainer-bench`` with these arguments."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["explainer-bench", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT for digits, small enough for a run to take seconds."""
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = models.create("vit_tiny_patch16_224", "tiny", Digits.class_names, **shape)
    for parameter in model.module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    models.save(path, model)
    return path


def tables(folder: Path, dataset: str = "digits") -> tuple[str, str]:
    """Both CSV files of a run, without the columns that tell the time."""
    names = f"{dataset}.csv", f"{dataset}.long.csv"
    frames = [pd.read_csv(folder / "leaderboards" / name, dtype=str) for name in names]
    wide, long = (f.drop(columns=[c for c in TIMING if c in f]).to_csv(index=False) for f in frames)
    return wide, long
