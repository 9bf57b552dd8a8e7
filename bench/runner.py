"""The runner: a plan of cells, and the stages that compute those that are not there yet."""

from __future__ import annotations

import inspect
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import adapters
import leaderboards
import metrics
from adapters import Explainer
from adapters.recording import explain_together, shareable
from adapters.state import ModelChangedError
from bench import datasets, models, mosaics
from bench.precision import full_precision
from bench.problem import Problem, Shard
from bench.store import Store, identity, key
from bench.suite import Suite
from explainer_bench import Component, RequestError
from metrics import Metric, Samples, perturbation
from metrics.base import Precision, Reexplain

STAGES = ("predict", "explain", "score")
# Explainers whose perturbed images go through the model in one stream. A GPU needs it to fill its batches; on the CPU
# nothing is gained, and more is lost when the run is killed: scores are stored once the stream has ended.
TOGETHER = {"cpu": 1, "cuda": 8}
Wanted = dict[str, tuple[Explainer, np.ndarray]]  # cell: whose maps for which classes
Progress = Callable[[str, int, int], None]  # stage, done, total: one step is one explainer on one shard


@dataclass(frozen=True)
class Known:
    """What the predictions of a shard decide.

    Parameters
    ----------
    logits : ndarray
        (n, K) float64.
    targets : ndarray
        (n,) int, the explained class.
    others : dict
        Per metric, (n, M) int: the further classes whose maps it compares.
    """

    logits: np.ndarray
    targets: np.ndarray
    others: dict[str, np.ndarray]

    def classes(self, explainer: Explainer, metric: Metric | None = None) -> list[np.ndarray]:
        """Return the (n,) classes to explain: the target's first, then the others of one metric, or of all."""
        if not explainer.class_discriminative:
            return [self.targets]
        others = [self.others[metric.spec]] if metric else list(self.others.values())
        columns = [self.targets, *(column for array in others for column in array.T)]
        return list({column.tobytes(): column for column in columns}.values())


@dataclass
class Run:
    """One suite, computed into one folder.

    Parameters
    ----------
    suite : Suite
        What to compute.
    out : Path
        The folder; finished cells found there are kept.
    data_root : Path, optional
        Where the data sets lie.
    device : torch.device
        Where the models run.
    batch_size : int
        Perturbed images per forward pass.
    shard : (int, int)
        ``(i, n)``: compute only every n-th shard of samples, starting with the i-th (from 1).
    fresh : bool
        Compute finished cells again.
    precision : "fp32" or "bf16"
        How perturbed images go through the model. Predictions and explanations are always fp32.

    Raises
    ------
    RequestError
        Before anything is written, for whatever in the suite does not exist or does not fit.
    """

    suite: Suite
    out: Path
    data_root: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 16
    shard: tuple[int, int] = (1, 1)
    fresh: bool = False
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        self.explainers = _unique([adapters.get(spec) for spec in self.suite.explainers])
        self.metrics = _unique([metrics.get(spec) for spec in self.suite.metrics])
        self.problems = list(self._problems())
        self._fingerprints = {explainer: explainer.fingerprint() for explainer in self.explainers}
        self._mosaics = {p: mosaics.Mosaics(p.dataset, p.model, self.suite.seed) for p in self.problems}
        self._refusals: dict[tuple[Problem, Explainer], str] = {}
        names = Counter(problem.names for problem in self.problems)
        if twice := [" / ".join(name) for name, n in names.items() if n > 1]:
            raise RequestError(
                f"{twice[0]} comes twice: name each data set once, and give each checkpoint its own name."
            )
        self._check()
        self.store = Store(self.out).prepare()
        self.done: Counter[str] = Counter()
        self.stages: dict[str, dict[str, float]] = {}
        self.forward_seconds = 0.0

    def _problems(self) -> Iterator[Problem]:
        if not self.suite.models:
            raise RequestError(f"suite {self.suite.name!r} names no model: give one with --model (see `list models`).")
        for dataset_spec in self.suite.datasets:
            cls = datasets.registry.find(dataset_spec.partition("[")[0])
            root = {"root": self.data_root} if self.data_root and cls.where != "embedded" else {}
            dataset = datasets.get(dataset_spec, **root)
            self._check_target(dataset.class_names)
            samples = dataset.samples  # tells of a wrong root before models are loaded
            for spec in self.suite.models:
                model = models.get(spec, class_names=dataset.class_names, device=self.device)
                n = min(self.suite.samples, len(samples))
                yield Problem(dataset, model, n, self.suite.seed, self.suite.balanced)

    def _check(self) -> None:
        for metric in self.metrics:
            if metric.group not in leaderboards.board.GROUPS:
                raise RequestError(
                    f"metric {metric.name!r} states the group {metric.group!r}: use one of "
                    f"{', '.join(leaderboards.board.GROUPS)}."
                )
            if odd := metric.misstated():
                raise RequestError(f"metric {metric.name!r}: {odd}.")
        for explainer in self.explainers:
            if "concept" in explainer.needs and not explainer.files():
                raise RequestError(f"{explainer.name} needs images of its concept: {explainer.name}[folder=DIR].")
        for problem in self.problems:
            self._check_regions(problem)
            if not self.supported(problem):
                reason = self.refusal(problem, self.explainers[0])
                raise RequestError(f"none of the explainers supports model {problem.model.name!r}: {reason}.")

    def _check_regions(self, problem: Problem) -> None:
        there = problem.dataset.regions
        for metric in self.metrics:
            if (wanted := metric.params.get("roi")) and wanted not in there:
                known = f"it has {', '.join(there)}" if there else "its ROI has no name, leave `roi` out"
                raise RequestError(
                    f"{metric.spec}: data set {problem.dataset.name!r} has no region {wanted!r}: {known}."
                )

    def _check_target(self, class_names: tuple[str, ...]) -> None:
        target = self.suite.target
        if isinstance(target, int) and not 0 <= target < len(class_names):
            raise RequestError(f"target {target} is no class: there are {len(class_names)}, counted from 0.")

    def shards(self, problem: Problem) -> range:
        """Return the indices of the shards that this run computes."""
        return range(self.shard[0] - 1, problem.n_shards, self.shard[1])

    def execute(self, stages: tuple[str, ...] = STAGES, progress: Progress = lambda *_: None) -> None:
        """Compute what is missing, one stage after the other.

        An explainer or metric that fails costs its own cells only, each recorded in the store.
        """
        work = {"predict": self._predict, "explain": self._explain, "score": self._score}
        for stage in stages:
            # Predictions decide which classes are explained, so every part of a divided run has them all.
            ranges = {p: range(p.n_shards) if stage == "predict" else self.shards(p) for p in self.problems}
            total = sum(len(shards) * self._steps(stage, problem) for problem, shards in ranges.items())
            with self._measured(stage), full_precision():
                progress(stage, 0, total)
                shards = ((problem, problem.shard(index)) for problem in ranges for index in ranges[problem])
                done = (step for problem, shard in shards for step in work[stage](problem, shard))
                for count, _ in enumerate(done, 1):
                    progress(stage, count, total)

    def _steps(self, stage: str, problem: Problem) -> int:
        return 1 if stage == "predict" else len(self.supported(problem))

    @contextmanager
    def _measured(self, stage: str) -> Iterator[None]:
        start, forward = time.perf_counter(), self.forward_seconds
        with _timed_forward([problem.model.module for problem in self.problems], self):
            yield
        self.stages[stage] = {
            "seconds": round(time.perf_counter() - start, 3),
            "seconds_in_forward": round(self.forward_seconds - forward, 3),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }

    def _predict(self, problem: Problem, shard: Shard) -> Iterator[None]:
        cell = self.prediction_cell(problem, shard)
        if not self._is_done("predictions", cell, "npz"):
            self._predict_cell(problem, shard, cell)
        yield

    def _predict_cell(self, problem: Problem, shard: Shard, cell: str) -> None:
        with torch.no_grad():
            logits = problem.module(shard.inputs.to(self.device)).detach().double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise RequestError(f"model {problem.model.name!r} returns NaN or infinite logits; check its weights.")
        self.store.write_arrays(cell, logits=logits)
        self.done["predictions computed"] += 1

    def _is_done(self, kind: str, cell: str, ending: str) -> bool:
        there = not self.fresh and self.store.exists(cell, ending)
        self.done[f"{kind} found"] += there
        return there

    def prediction_cell(self, problem: Problem, shard: Shard) -> str:
        """Return the cell of a shard's logits."""
        samples = [(sample.id, sample.label, sample.group, sample.digest) for sample in shard.samples]
        return self.store.path("predictions", *problem.names, key=key(samples, problem.identity))

    def known(self, problem: Problem, shard: Shard) -> Known:
        """Read a shard's predictions and decide which classes are explained."""
        cell = self.prediction_cell(problem, shard)
        if not self.store.exists(cell, "npz"):
            raise RequestError("the predictions are missing: run the stage `predict` first.")
        logits = self.store.read_arrays(cell)["logits"]
        labels = np.array([sample.label for sample in shard.samples])
        target = self.suite.target
        targets = {"predicted": logits.argmax(1), "label": labels}.get(str(target), np.full(len(labels), target))
        seeds = shard.seeds(self.suite.seed)
        return Known(logits, targets, {m.spec: _other_classes(m, logits, targets, seeds) for m in self.metrics})

    def explanation_cell(self, problem: Problem, shard: Shard, explainer: Explainer, classes: np.ndarray) -> str:
        """Return the cell of one explainer's maps of a shard, for one class per sample."""
        base = self.prediction_cell(problem, shard).rpartition("/")[2]
        context = [problem.dataset.fingerprint if "roi_prior" in explainer.needs else "", self._fingerprints[explainer]]
        hashed = key(base, identity(explainer), classes.tolist(), self.suite.seed, context)
        return self.store.path("explanations", *problem.names, explainer.spec, key=hashed)

    def _explain(self, problem: Problem, shard: Shard) -> Iterator[None]:
        known = self.known(problem, shard)
        for explainers in _companies(self.supported(problem)):
            cells = {
                self.explanation_cell(problem, shard, explainer, classes): (explainer, classes)
                for explainer in explainers
                for classes in known.classes(explainer)
            }
            missing = {cell: what for cell, what in cells.items() if not self._is_done("explanations", cell, "npz")}
            for wanted in _batches(missing):
                self._explain_cells(problem, shard, wanted)
            yield from (None for _ in explainers)

    def _explain_cells(self, problem: Problem, shard: Shard, wanted: Wanted) -> None:
        start, explainers = time.perf_counter(), {explainer for explainer, _ in wanted.values()}
        try:
            maps = self._maps(problem, shard, wanted)
        except ModelChangedError:
            raise
        except Exception as error:  # whatever a stranger's code raises costs its own cells only
            if len(explainers) > 1:  # find out whose it was
                for cell, what in wanted.items():
                    self._explain_cells(problem, shard, {cell: what})
                return
            for cell in wanted:
                self.store.fail(cell, error)
            self.done["explanations failed"] += len(wanted)
            return
        seconds = (time.perf_counter() - start) / len(explainers)
        for cell, of_cell in zip(wanted, maps, strict=True):
            self.store.write_arrays(cell, maps=of_cell.numpy(), seconds=np.array(seconds))
        self.done["explanations computed"] += len(wanted)

    def _maps(self, problem: Problem, shard: Shard, wanted: Wanted) -> list[Tensor]:
        """Return the maps of each cell: of several explainers for the same classes, or of one for several classes."""
        explainers, columns = zip(*wanted.values(), strict=True)
        module, seed = problem.model.module, self.suite.seed
        if len(set(explainers)) > 1:
            return explain_together(explainers, module, shard.inputs, columns[0], seed=seed)
        n = len(columns)
        inputs, classes = shard.inputs.repeat_interleave(n, 0), np.stack(columns, axis=1).ravel()
        context = problem.context(explainers[0], shard, n)
        maps = explainers[0].explain(module, inputs, classes, seed=seed, **context)
        return [maps[position::n] for position in range(n)]

    def supported(self, problem: Problem) -> list[Explainer]:
        """Return the explainers that can explain the problem's model."""
        return [explainer for explainer in self.explainers if not self.refusal(problem, explainer)]

    def refusal(self, problem: Problem, explainer: Explainer) -> str:
        """Return why an explainer cannot explain the problem's model, or ""; asked once, some trace the model."""
        if (problem, explainer) not in self._refusals:
            try:
                reason = explainer.supports(problem.model.module) or ""
            except Exception as error:  # a stranger's code
                reason = f"its `supports` raised {type(error).__name__}: {error}"
            self._refusals[problem, explainer] = reason
        return self._refusals[problem, explainer]

    def score_cell(self, problem: Problem, shard: Shard, explainer: Explainer, metric: Metric, known: Known) -> str:
        """Return the cell of one metric's scores of one explainer on a shard."""
        cells = [self.explanation_cell(problem, shard, explainer, c) for c in known.classes(explainer, metric)]
        maps = [cell.rpartition("/")[2] for cell in cells]
        context = [problem.dataset.fingerprint, inspect.getsource(mosaics)] if metric.needs_mosaics else []
        context += [self.precision] if metric.expensive and self.precision != "fp32" else []
        hashed = key(maps, identity(metric), self.suite.seed, problem.model.patch, context)
        return self.store.path("scores", *problem.names, explainer.spec, metric.spec, key=hashed)

    def _score(self, problem: Problem, shard: Shard) -> Iterator[None]:
        known = self.known(problem, shard)
        shared: dict[Any, Any] = {}
        explainers = self.supported(problem)
        together = TOGETHER[self.device.type]
        for start in range(0, len(explainers), together):
            some = explainers[start : start + together]
            jobs = [list(self._score_jobs(problem, shard, explainer, known, shared)) for explainer in some]
            if together > 1:
                # Whatever goes wrong here goes wrong again in the cell at fault, and is recorded there.
                with suppress(Exception):
                    perturbation.prefetch((metric, samples) for of_one in jobs for _, metric, samples in of_one)
            for of_one in jobs:
                for cell, metric, samples in of_one:
                    self._score_cell(cell, shard, metric, samples)
                yield

    def _score_jobs(
        self, problem: Problem, shard: Shard, explainer: Explainer, known: Known, shared: dict[Any, Any]
    ) -> Iterator[tuple[str, Metric, Samples]]:
        """Yield the scores that one explainer lacks on a shard, and what they are computed from."""
        cells = {self.score_cell(problem, shard, explainer, metric, known): metric for metric in self.metrics}
        missing = {c: metric for c, metric in cells.items() if not self._is_done("scores", c, "parquet")}
        if not missing:
            return
        try:
            samples = self.samples(problem, shard, explainer, known, shared)
        except FileNotFoundError:  # its maps failed, and so do its scores, older ones included
            self.store.drop(missing)
            self.done["scores failed"] += len(missing)
            return
        yield from ((cell, metric, samples) for cell, metric in missing.items())

    def _score_cell(self, cell: str, shard: Shard, metric: Metric, samples: Samples) -> None:
        try:
            values, reasons = metric(samples)
            columns = {
                "sample": [sample.id for sample in shard.samples],
                "group": [sample.group for sample in shard.samples],
                "value": values,
                "reason": reasons,
                "chance": metric.chance_level(samples),
            }
            table = pd.DataFrame(columns)
        except ModelChangedError:
            raise
        except Exception as error:
            self.store.fail(cell, error)
            self.done["scores failed"] += 1
            return
        self.store.write_table(cell, table)
        self.done["scores computed"] += 1

    def maps(self, problem: Problem, shard: Shard, explainer: Explainer, classes: np.ndarray) -> Tensor:
        """Read one explainer's maps of a shard for these classes, brought to the input's resolution."""
        native = self.store.read_arrays(self.explanation_cell(problem, shard, explainer, classes))["maps"]
        return explainer.upsample(torch.from_numpy(native), problem.model.input_size)

    def samples(
        self, problem: Problem, shard: Shard, explainer: Explainer, known: Known, shared: dict[Any, Any]
    ) -> Samples:
        """Return what the metrics may look at; the further classes' maps are read, never explained again."""
        stored = {
            c.tobytes(): (c, self.maps(problem, shard, explainer, c).double().numpy()) for c in known.classes(explainer)
        }
        by_class = [{int(c[row]): maps[row] for c, maps in stored.values()} for row in range(len(shard.samples))]
        target_maps = stored[known.targets.tobytes()][1]

        def explain(classes: np.ndarray) -> np.ndarray:
            if not explainer.class_discriminative:
                return target_maps
            return np.stack([maps[int(c)] for maps, c in zip(by_class, classes, strict=True)])

        return Samples(
            model=problem.module,
            inputs=shard.inputs_on(self.device),
            targets=known.targets,
            maps=target_maps,
            roi=shard.roi(known.targets),
            logits=known.logits,
            seeds=shard.seeds(self.suite.seed),
            patch=problem.model.patch,
            batch_size=self.batch_size,
            explain=explain,
            reexplain=self._reexplain(problem, shard, explainer),
            mosaics=lambda: self._mosaics[problem](shard, known.targets),
            labels=np.array([sample.label for sample in shard.samples]),
            roi_of=shard.roi,
            black=problem.model.normalise(torch.zeros(3, 1, 1)).flatten(),
            precision=self.precision,
            shared=shared,
        )

    def _reexplain(self, problem: Problem, shard: Shard, explainer: Explainer) -> Reexplain:
        def reexplain(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
            context = problem.context(explainer, shard)
            if "roi_prior" in context:
                context["roi_prior"] = context["roi_prior"][rows]
            classes = np.ascontiguousarray(targets)
            return explainer(model, images, classes, seed=self.suite.seed, **context)[:, 0].astype(float)

        return reexplain


def _companies(explainers: list[Explainer]) -> list[list[Explainer]]:
    """Put together those that share passes through the model, and leave each other one alone."""
    companies: dict[Any, list[Explainer]] = {}
    for explainer in explainers:
        company = (explainer.half_precision, explainer.batch_size) if shareable(explainer) else explainer
        companies.setdefault(company, []).append(explainer)
    return list(companies.values())


def _batches(missing: Wanted) -> list[Wanted]:
    """Split the cells of one company into what is computed at once."""
    batches: dict[Any, Wanted] = {}
    for cell, (explainer, classes) in missing.items():
        batch = explainer if explainer.shares_draws else classes.tobytes()
        batches.setdefault(batch, {})[cell] = explainer, classes
    return list(batches.values())


def _other_classes(metric: Metric, logits: np.ndarray, targets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    try:
        return metric.other_classes(logits, targets, seeds)
    except Exception:  # a stranger's code; asked again when it scores, it fails its own cells
        return np.empty((len(targets), 0), dtype=int)


def _unique(components: list[Any]) -> list[Any]:
    seen: dict[str, Component] = {}
    for component in components:
        if seen.setdefault(component.spec, component) is not component:
            raise RequestError(f"{component.spec!r} is asked for twice; name it once.")
    return components


@contextmanager
def _timed_forward(modules: list[torch.nn.Module], clock: Run) -> Iterator[None]:
    """Add the wall time of every forward pass to ``clock.forward_seconds``."""
    starts: list[float] = []

    def stop(*_: object) -> None:
        clock.forward_seconds += time.perf_counter() - starts.pop()

    def start(*_: object) -> None:
        starts.append(time.perf_counter())

    start.observer = stop.observer = True  # type: ignore[attr-defined]  # they change nothing: see metrics.vit
    handles = [m.register_forward_pre_hook(start) for m in set(modules)]
    handles += [m.register_forward_hook(stop, always_call=True) for m in set(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
