"""Suites: what a run computes, as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic
import yaml

from explainer_bench import RequestError, did_you_mean

_FOLDER = Path(__file__).parent / "suites"


class Suite(pydantic.BaseModel):
    """Data sets x models x explainers x metrics, each spelled ``name[param=value,...]``.

    Parameters
    ----------
    samples : int
        Images per data set, from its test split, in an order that `seed` decides; all where there are fewer.
    balanced : bool
        Take as many images of each class, as far as there are.
    target : "predicted", "label" or int
        The class to explain.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str
    description: str = ""
    datasets: list[str] = pydantic.Field(min_length=1)
    models: list[str] = []
    explainers: list[str] = pydantic.Field(min_length=1)
    metrics: list[str] = pydantic.Field(min_length=1)
    samples: int = pydantic.Field(64, gt=0)
    balanced: bool = False
    target: Literal["predicted", "label"] | int = "predicted"
    seed: int = 0


def names() -> list[str]:
    """Return the suites that come with the project."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(name: str, **changes: object) -> Suite:
    """Return the suite called `name`, or read from the YAML file `name`, with `changes` that are not None.

    Raises
    ------
    RequestError
        For an unknown name, or a file that is no suite: the first field that is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        hint = did_you_mean(name, names()) if path.parent == _FOLDER else ""
        raise RequestError(f"no suite {name!r}.{hint}")
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise RequestError(f"suite {path}: write it as a YAML mapping (fields: {', '.join(Suite.model_fields)}).")
        given = {key: value for key, value in changes.items() if value is not None}
        return Suite(**{"name": path.stem, **content, **given})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"suite {path} is no YAML: {' '.join(str(error).split())}.") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise RequestError(f"suite {name}, field {'.'.join(map(str, first['loc']))!r}: {first['msg']}.") from error
