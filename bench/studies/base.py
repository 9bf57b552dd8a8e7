"""The contract of a source study: which parts it has, what each needs, and what its tables are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import pandas as pd

from bench import api, datasets, recipes
from bench.datasets.files import FileDataset
from bench.models import SUFFIXES, checkpoints
from bench.runner import Progress, Run
from bench.suite import Suite
from explainer_bench import Component, RequestError
from leaderboards import beside

PUBLISHED = Path(__file__).parent / "published"
# without the prior, for data of which few images, or none, have an ROI
NO_PRIOR = ("random", "random_token", "center_gaussian", "center_square", "sobel", "intensity", "constant")
TRIVIAL = (*NO_PRIOR, "roi_prior")


@dataclass(frozen=True)
class Weights:
    """A trained model that a part needs.

    Parameters
    ----------
    stem : str
        Name of its file under the weights' root, without the ending.
    how : str
        How to get it: a command, or where its authors offer it.
    architecture : str
        What it is, where the file does not say so itself.
    preprocessing : str
        A named variant; as the file says, or the architecture's own, where empty.
    """

    stem: str
    how: str
    architecture: str
    preprocessing: str = ""

    def find(self, root: Path | None) -> Path | None:
        """Return the file, wherever it lies under `root`; None where there is none.

        Raises
        ------
        RequestError
            Where there are several.
        """
        if root is None:
            return None
        found = [path for ending in SUFFIXES for path in sorted(root.rglob(f"{self.stem}{ending}"))]
        if len(found) > 1:
            raise RequestError(f"the weights {self.stem} are there twice, {found[0]} and {found[1]}: keep one of them.")
        return found[0] if found else None

    def spec(self, path: Path) -> str:
        """Return how `run` calls the model."""
        if checkpoints.header(path):  # written by our training: it says what it is
            return str(path)
        variant = f",preprocessing={self.preprocessing}" if self.preprocessing else ""
        return f"{self.architecture}[weights={path}{variant}]"


def training_of(recipe: str, options: str = "") -> str:
    """Return the command that trains a recipe, ready but for its FILE and DIRs, and what FILE is."""
    init = recipes.get(recipe).starts_from
    quoted = f'"{recipe}"' if "[" in recipe else recipe
    start, what = (" --weights FILE", f"; FILE: {init}") if init else ("", "")
    return f"explainer-bench train {quoted} --data-root DIR{start}{options} --out DIR{what}"


@dataclass(frozen=True)
class Part:
    """One model on one data set.

    Parameters
    ----------
    names : mapping
        What the published table calls it: ``{"dataset": "Kvasir", "model": "DINO"}``.
    dataset : str
        Its spec.
    weights : Weights
        The model.
    explainers, metrics : sequence of str
        Their specs.
    samples : int
        Images.
    target : "predicted", "label" or int
        The class explained.
    balanced : bool
        As many images of each class.
    """

    names: Mapping[str, str]
    dataset: str
    weights: Weights
    explainers: Sequence[str]
    metrics: Sequence[str]
    samples: int
    target: Literal["predicted", "label"] | int = "predicted"
    balanced: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^\w.-]+", "_", "-".join(self.names.values())).lower()

    def suite(self, weights_root: Path | None, samples: int | None, seed: int) -> Suite:
        """Return what to run; only for a part that lacks nothing."""
        path = self.weights.find(weights_root)
        assert path is not None
        return Suite(
            name=self.name,
            datasets=[self.dataset],
            models=[self.weights.spec(path)],
            explainers=list(self.explainers),
            metrics=list(self.metrics),
            samples=samples or self.samples,
            balanced=self.balanced,
            target=self.target,
            seed=seed,
        )


def lacking(
    parts: Sequence[Part], data_root: Path | None, weights_root: Path | None
) -> tuple[dict[str, int], list[str]]:
    """Look for what the parts need; each data set is opened once.

    Returns
    -------
    dict, list of str
        How many things each part lacks, by name; and one line for each data set, and for the weights that are to be
        had in one way: where they were looked for, and how to get them.
    """
    errors = {spec: _absence(spec, data_root) for spec in dict.fromkeys(part.dataset for part in parts)}
    weights = [part.weights for part in parts if not part.weights.find(weights_root)]
    stems = {how: list(dict.fromkeys(w.stem for w in weights if w.how == how)) for how in (w.how for w in weights)}
    where = f"under {weights_root}" if weights_root else "(give --weights-root)"
    lines = [line for line in dict.fromkeys(errors.values()) if line]
    lines += [f"no {_alternatives(names)}.safetensors or .pth {where}: {how}." for how, names in stems.items()]
    return {part.name: bool(errors[part.dataset]) + (part.weights in weights) for part in parts}, lines


def _alternatives(names: Sequence[str]) -> str:
    """Write several names as a shell does: ``a_{1,2}``."""
    first = commonprefix(names)  # noqa: RUF071 -- characters, not folders
    return names[0] if len(names) == 1 else f"{first}{{{','.join(name.removeprefix(first) for name in names)}}}"


def _absence(spec: str, root: Path | None) -> str:
    """Return why a data set cannot be used, or ""."""
    cls = datasets.registry.find(spec.partition("[")[0])
    try:
        dataset = datasets.get(spec, **({} if cls.where == "embedded" else {"root": root}))
        if isinstance(dataset, FileDataset):
            _ = dataset.found
    except RequestError as error:
        return str(error)
    return ""


class Done(NamedTuple):
    """A part that was run: its folder, every score (`bench.report.scores`), the long board, and what was asked for."""

    part: Part
    folder: Path
    scores: pd.DataFrame
    long: pd.DataFrame
    suite: Suite
    data_root: Path | None
    device: str = "cpu"
    measured: Any = None  # what `Study.measure` returned

    def open(self, device: str = "cpu") -> Run:
        """Return the run, for its images, predictions and stored maps; its model is on the CPU, or on `device`."""
        return Run(self.suite, self.folder, self.data_root, api.choose_device(device))


@dataclass(frozen=True)
class Section:
    """What a study's page shows under one heading; a table is written to a CSV file of the section's name, too.

    Parameters
    ----------
    name : str
        Name of the file.
    title, text : str
        Heading, and what to know in order to read it.
    table : DataFrame, optional
        Numbers as numbers.
    figures : mapping
        PNG files by caption.
    """

    name: str
    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    figures: Mapping[str, Path] = field(default_factory=dict)


class Study(Component):
    """Base of all studies."""

    title: ClassVar[str] = ""
    remarks: ClassVar[str] = ""  # what to know of the published numbers

    def parts(self, data_root: Path | None) -> list[Part]:
        """Return every part of the protocol; what is there of the data may decide parameters, never which parts."""
        raise NotImplementedError

    @property
    def published(self) -> pd.DataFrame:
        """The published table: ``dataset, model, metric, explainer, value, n, mark``, under our explainers' names."""
        return pd.read_csv(PUBLISHED / f"{self.name}.csv")

    def before(self, data_root: Path | None, out: Path) -> Iterator[Section]:
        """Yield what can be said without a model."""
        yield from ()

    def measure(self, done: Done, progress: Progress) -> Any:
        """Compute what a part needs besides its suite, for `sections` to find in `Done.measured`; nothing by default.

        What takes long is to be stored in the part's folder, so that a rerun finds it.
        """
        return None

    def sections(self, done: Sequence[Done], out: Path) -> Iterator[Section]:
        """Yield the tables and figures of the parts that were run; the published table beside ours comes first."""
        yield Section("beside", "Published and ours", self.remarks, self.beside(done))

    def beside(self, done: Sequence[Done]) -> pd.DataFrame:
        """Return the published table beside ours, see `leaderboards.beside.beside`."""
        long, each = (pd.concat(tables, ignore_index=True) for tables in zip(*map(_named, done), strict=True))
        return beside.beside(self.published, long, each, TRIVIAL)


def _named(done: Done) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Long board and scores of a part, under the published names."""
    return done.long.assign(**done.part.names), done.scores.assign(**done.part.names)
