"""Training recipes: one YAML file each; `bench.training.train("digits", out)`."""

from pathlib import Path
from typing import Any

import pydantic
import yaml

from bench.recipes.base import Augment, Recipe
from explainer_bench import RequestError, did_you_mean, parse_spec

_FOLDER = Path(__file__).parent
_SUFFIXES = (".yaml", ".yml")
_ELSEWHERE = {  # what others call our fields
    "learning_rate": "lr",
    "optim": "optimizer",
    "batch": "batch_size",
    "wd": "weight_decay",
    "max_epochs": "epochs",
    "early_stopping": "patience",
    "criterion": "loss",
    "model": "architecture",
}


def names() -> list[str]:
    """Return the recipes that come with the project, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def get(spec: str, **changes: Any) -> Recipe:
    """Return a recipe.

    Parameters
    ----------
    spec : str
        ``name``, ``name[field=value,...]``, or either with a ``FILE.yaml`` for the name.
    **changes
        More fields, instead of the file's.

    Raises
    ------
    RequestError
        For an unknown name or field (with the nearest known one), a value of the wrong type, or no YAML.
    """
    name, written = parse_spec(spec)
    content = {**_read(name), **written, **changes}
    known = [field for field in Recipe.model_fields if field != "name"]
    for key in content:
        if key not in known:
            meant = f" Did you mean {_ELSEWHERE[key]}?" if key in _ELSEWHERE else did_you_mean(str(key), known)
            raise RequestError(f"recipe {name!r} has no parameter {key!r}.{meant}")
    try:
        return Recipe(name=Path(name).stem if name.endswith(_SUFFIXES) else name, **content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = f", parameter {'.'.join(map(str, first['loc']))!r}" if first["loc"] else ""
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise RequestError(f"recipe {name!r}{where}: {said}.") from error


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(_SUFFIXES) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = did_you_mean(name, names()) if path.parent == _FOLDER else ""
        raise RequestError(f"unknown recipe {name!r}.{known}" if known else f"no such recipe file: {name}.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"recipe {path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise RequestError(f"recipe {path}: write it as a YAML mapping of fields, as `list recipes --json` shows them.")
    return content


__all__ = ["Augment", "Recipe", "get", "names"]
