"""`explainer-bench reproduce` as a user meets it."""

import pandas as pd
import pytest

STUDIES = ("chung2024", "komorowski2023", "brocki2024", "goncalves2022")


@pytest.mark.parametrize("study", STUDIES)
def test_a_dry_run_without_anything_says_what_to_get(command, tmp_path, study):
    done = command("reproduce", study, "--dry-run", "--data-root", tmp_path, "--out", tmp_path / "out")
    assert done.code == 0 and "lacks" in done.out
    lines = [line for line in done.err.splitlines() if line.startswith("missing: ")]
    assert lines and any("get it from https://" in line for line in lines)
    assert any("explainer-bench train" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_masks_only(command, shared, tmp_path):
    done = command("reproduce", "chung2024", "--masks-only", "--data-root", shared / "data", "--out", tmp_path)
    assert done.code == 0 and "best published" in done.out and done.err == ""
    table = pd.read_csv(tmp_path / "masks.csv").set_index(["score", "map"])
    assert table.loc[("pointing game", "image centre"), "Kvasir"] == 1
    assert "best published" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["chung2023"], "Did you mean chung2024"),
        (["chung2024"], "nothing can be run"),
        (["goncalves2022", "--masks-only"], "--masks-only is for chung2024"),
        (["chung2024", "--masks-only"], "no annotations in"),
    ],
)
def test_wrong_requests_are_one_line(command, tmp_path, arguments, line):
    done = command("reproduce", *arguments, "--data-root", tmp_path, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert line in done.err
