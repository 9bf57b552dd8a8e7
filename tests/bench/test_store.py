"""Cells: written whole, keyed by what determines them, failures apart."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import adapters
from bench.store import Store, identity, key


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_tables_and_arrays_come_back(store: Store) -> None:
    table = pd.DataFrame({"sample": ["a", "b"], "value": [0.1, np.nan]})
    store.write_table("scores/x", table)
    pd.testing.assert_frame_equal(store.read_table("scores/x"), table)
    store.write_arrays("maps/x", maps=np.eye(3, dtype=np.float32))
    assert store.exists("maps/x", "npz") and not store.exists("maps/y", "npz")
    np.testing.assert_array_equal(store.read_arrays("maps/x")["maps"], np.eye(3))


def test_a_failure_is_no_result_and_goes_when_there_is_one(store: Store) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        store.fail("scores/x", error)
    assert store.failure("scores/x") == "ValueError: two lines"
    assert "test_store.py" in store.read_json("failures/scores/x.json")["traceback"]
    assert not store.exists("scores/x", "parquet")
    store.write_table("scores/x", pd.DataFrame({"value": [1.0]}))
    assert store.failure("scores/x") == ""


def test_keys_follow_everything_that_determines_a_result() -> None:
    first = adapters.get("rollout")
    assert key(identity(first)) == key(identity(adapters.get("rollout", start_layer=0)))
    assert key(identity(first)) != key(identity(adapters.get("rollout", start_layer=1)))
    assert key(identity(first)) != key(identity(adapters.get("raw_attention")))
    assert key("a", ["b"]) != key(["a", "b"])


def test_names_stay_inside_the_folder(store: Store) -> None:
    path = store.path("scores", "../up", "..", "a/b[x=1,y=../..]", key="k")
    assert path.count("/") == 4
    assert ".." not in path.split("/")
    assert (store.root / path).resolve().is_relative_to(store.root.resolve())
