"""Training from the command line: what is told besides the numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import training
from bench.training import loop
from tests.acceptance.conftest import Outcome

Command = Callable[..., Outcome]

SPEC = "digits[size=20,val_size=20,test_size=20,epochs=2,batch_size=10]"


class StoppedError(Exception):
    """What an impatient user raises."""


def test_going_on_is_told(command: Command, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        training.train(SPEC, tmp_path, progress=stop)
    line = f"digits_vit goes on after epoch 1 of 2 ({tmp_path / 'digits_vit.state.pt'})."
    outcome = command("train", SPEC, "--out", tmp_path, "--device", "cpu")
    assert outcome.code == 0 and line in outcome.err.splitlines()
    assert any(line.startswith("epoch 2 of 2: train loss ") for line in outcome.err.splitlines())
    again = command("train", SPEC, "--out", tmp_path, "--device", "cpu")
    assert again.code == 0 and "digits_vit is there already, nothing is trained" in again.err
    assert json.loads(again.out.partition("Card")[0])["test"] == json.loads(outcome.out.partition("Card")[0])["test"]


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (1, "interrupted; no epoch was finished, so nothing is kept."),
        (3, "interrupted; the training is kept up to epoch 1, and the same command without --fresh goes on from here."),
    ],
)
def test_ctrl_c_says_what_is_kept(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, line: str
) -> None:
    real = loop.Learner._step

    def stop(self: loop.Learner, images: Any, targets: Any, uniform: Any, number: int) -> float:
        if number + 1 == step:
            raise KeyboardInterrupt
        return real(self, images, targets, uniform, number)

    monkeypatch.setattr(loop.Learner, "_step", stop)
    outcome = command("train", SPEC, "--out", tmp_path, "--device", "cpu")
    assert outcome.code == 130 and outcome.err.splitlines()[-1] == line


def test_an_out_that_cannot_be_written_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = command("train", SPEC, "--out", tmp_path / "file" / "out", "--device", "cpu")
    line = f"error: cannot write to {tmp_path / 'file' / 'out'} (Not a directory): name another folder."
    assert outcome.code == 2 and outcome.err.splitlines() == [line]
