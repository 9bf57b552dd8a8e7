"""Training from the command line: what is told besides the numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import training
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
    again = command("train", SPEC, "--out", tmp_path, "--device", "cpu")
    assert again.code == 0 and "goes on" not in again.err


def test_an_out_that_cannot_be_written_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = command("train", SPEC, "--out", tmp_path / "file" / "out", "--device", "cpu")
    line = f"error: cannot write to {tmp_path / 'file' / 'out'} (Not a directory): name another folder."
    assert outcome.code == 2 and outcome.err.splitlines() == [line]
