"""Choosing an explainer's parameters on the validation split; test images cannot be asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import adapters
from bench import api, datasets
from bench.suite import Suite
from explainer_bench import RequestError, parse_spec

SPLIT = "val"


def tune(
    explainer: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    dataset: str,
    model: str,
    metric: str = "srg",
    samples: int = 32,
    seed: int = 0,
    out: str | Path,
    **options: Any,
) -> api.Result:
    """Score an explainer with every combination of parameters on a data set's validation split.

    Parameters
    ----------
    explainer : str
        ``name`` or ``name[param=value,...]``; what is in the brackets stays.
    grid : mapping
        The values to try, by parameter.
    dataset, model, metric : str
        Specs.
    samples : int
        Images of the validation split.
    seed : int
        Decides which images, and every random draw.
    out : str or Path
        The folder of this run, resumable like any other.
    **options
        As for `bench.api.run`: ``data_root``, ``device``, ``batch_size``, ``progress``.

    Returns
    -------
    Result
        Its board ranks the combinations; those of one tie group are not told apart by so few images.

    Raises
    ------
    RequestError
        For an unknown parameter or value, a metric or data set that does not exist, or a data set without such a split.
    """
    specs = combinations(explainer, grid)
    name, given = parse_spec(dataset)
    if given.get("split", SPLIT) != SPLIT:
        raise RequestError(f"parameters are tuned on the split {SPLIT!r} alone, not on {given['split']!r}.")
    if SPLIT not in datasets.registry.find(name).splits:
        raise RequestError(f"data set {name!r} has no split {SPLIT!r} to tune parameters on.")
    pairs = ",".join(f"{key}={value}" for key, value in {**given, "split": SPLIT}.items())
    suite = Suite(
        name="tune",
        datasets=[f"{name}[{pairs}]"],
        models=[model],
        explainers=specs,
        metrics=[metric],
        samples=samples,
        seed=seed,
    )
    return api.run(suite, out=out, **options)


def combinations(explainer: str, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the spec of every combination, each checked to exist."""
    if not grid:
        raise RequestError("nothing to tune: give values to try, such as gamma_linear=0,0.05,0.1.")
    name, fixed = parse_spec(explainer)
    rows = ({**fixed, **dict(zip(grid, values, strict=True))} for values in itertools.product(*grid.values()))
    built = [adapters.get(name, **row) for row in rows]
    return list(dict.fromkeys(f"{name}{one.spec.removeprefix(one.name)}" for one in built))
