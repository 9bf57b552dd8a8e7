"""The command line."""

from __future__ import annotations

import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import rich.progress
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from explainer_bench import Component, RequestError, RequestWarning, __version__, parse_spec, split_specs

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data_app = typer.Typer(no_args_is_help=True, help="Look at a data set.")
app.add_typer(data_app, name="data")
_WIDTH = None if sys.stdout.isatty() else 160  # tables in files and pipes are not folded to 80 columns
out, err = Console(width=_WIDTH), Console(stderr=True)

INTERRUPTED = 130  # what Typer exits with on Ctrl-C

DataRoot = Annotated[Path | None, typer.Option(help="Folder that holds the data set.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class StoppedError(Exception):
    """Ctrl-C, and in words what is kept."""


class Kind(StrEnum):
    """What `list` can list."""

    explainers = "explainers"
    metrics = "metrics"
    datasets = "datasets"
    models = "models"
    suites = "suites"
    recipes = "recipes"


class Stage(StrEnum):
    """What `run` can be limited to."""

    predict = "predict"
    explain = "explain"
    score = "score"


class Precision(StrEnum):
    """What perturbed images are computed in."""

    fp32 = "fp32"
    bf16 = "bf16"


def main() -> None:
    """Run the command line: exit code 0 = done, 1 = some cells failed, 2 = the request was wrong."""
    try:
        with _warnings_in_one_line():
            app()
    except (RequestError, OSError) as error:
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except StoppedError as stopped:
        err.print(f"interrupted; {stopped}.", markup=False, highlight=False, soft_wrap=True)
        sys.exit(INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            err.print("interrupted; finished cells are kept, and the same command goes on from here.")
        raise


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print a `RequestWarning` as the user's own matter, each once, and every other warning as Python does."""
    told: set[str] = set()
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
            if not issubclass(category, RequestWarning):
                usual(message, category, *place, **rest)
            elif str(message) not in told:
                told.add(str(message))
                err.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)

        warnings.simplefilter("always", RequestWarning)
        warnings.showwarning = show
        yield


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Which explanation method should I trust for this model and this data, and how sure are we?"""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or a YAML file.")],
    dataset: Annotated[list[str] | None, typer.Option(help="Instead of the suite's data sets; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Instead of the suite's models; repeatable.")] = None,
    explainers: Annotated[str | None, typer.Option(help="Comma-separated, instead of the suite's.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated, instead of the suite's.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Images per data set.")] = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    precision: Annotated[Precision, typer.Option(help="Of the perturbed images' forward passes.")] = Precision.fp32,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Perturbed images per forward pass, 16 or on CUDA 256; no score changes.")
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: compute only the i-th of n parts, for job arrays.")] = "1/1",
    output: Annotated[Path | None, typer.Option("--out", help="Folder; runs/SUITE by default.")] = None,
    stage: Annotated[Stage | None, typer.Option(help="Compute only this stage.")] = None,
    fresh: Annotated[bool, typer.Option(help="Compute finished cells again.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the suite's seed.")] = None,
) -> None:
    """Compute a suite, or what is missing of it, and print its boards."""
    from bench import api
    from bench import suite as suites

    chosen = suites.load(
        suite,
        datasets=dataset,
        models=model,
        explainers=None if explainers is None else split_specs(explainers),
        metrics=None if metrics is None else split_specs(metrics),
        samples=samples,
        seed=seed,
    )
    folder = output or Path("runs") / chosen.name
    with _bars("steps") as progress:
        result = api.run(
            chosen,
            out=folder,
            data_root=data_root,
            device=device,
            batch_size=batch_size,
            shard=_fraction(shard),
            stages=(stage.value,) if stage else None,
            fresh=fresh,
            precision=precision.value,
            progress=progress,
        )
    out.print(_counts(result.counts), highlight=False)
    out.print(_costs(result.stages), highlight=False)
    if result.report:
        _print_boards(result.report)
        out.print(f"Boards: {folder / 'leaderboards'} (page: {folder / 'leaderboards' / 'index.html'})", soft_wrap=True)
    _fail(result.failures)


@app.command()
def tune(
    explainer: Annotated[str, typer.Argument(help="See `list explainers`.")],
    grid: Annotated[list[str], typer.Option(help="PARAM=VALUE,VALUE,...: what to try; repeatable.")],
    dataset: Annotated[str, typer.Option(help="Its validation split is used, never its test images.")],
    model: Annotated[str, typer.Option(help="As for `run`.")],
    metric: Annotated[str, typer.Option(help="What to choose by.")] = "srg",
    samples: Annotated[int, typer.Option(min=1, help="Images.")] = 32,
    data_root: DataRoot = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: Annotated[Path | None, typer.Option("--out", help="Folder; runs/tune-EXPLAINER by default.")] = None,
) -> None:
    """Choose an explainer's parameters on held-out images: the validation split, which no leaderboard shows."""
    from bench import tuning

    choices = dict(_choices(text) for text in grid)
    folder = output or Path("runs") / f"tune-{explainer.partition('[')[0]}"
    with _bars("steps") as progress:
        result = tuning.tune(
            explainer,
            choices,
            dataset=dataset,
            model=model,
            metric=metric,
            samples=samples,
            seed=seed,
            out=folder,
            data_root=data_root,
            device=device,
            progress=progress,
        )
    if result.report:
        _print_boards(result.report)
        ((_, wide),) = result.report.boards.wide.items()
        equal = int((wide["tie_group"] == wide["tie_group"].iloc[0]).sum()) - 1
        best = f"First: {wide['explainer'].iloc[0]}; not told apart from it: {equal} others."
        out.print(best, markup=False, highlight=False, soft_wrap=True)
        out.print(f"Boards: {folder / 'leaderboards'}", soft_wrap=True)
    _fail(result.failures)


def _choices(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not (equals and values):
        raise RequestError(f"--grid {text!r}: write it as PARAM=VALUE,VALUE,...")
    return name.strip(), [parse_spec(f"x[v={value}]")[1]["v"] for value in values.split(",")]


def _fail(lines: list[str]) -> None:
    for line in lines:
        err.print(f"failed: {line}", markup=False, highlight=False, soft_wrap=True)
    if lines:
        raise typer.Exit(1)


def _fraction(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise RequestError(f"--shard {text!r}: write it as i/n with 1 <= i <= n, such as 2/8.")
    return int(first), int(last)


def _counts(counts: dict[str, int]) -> str:
    kinds = ("predictions", "explanations", "scores")
    parts = []
    for kind in kinds:
        found, computed, failed = (counts.get(f"{kind} {what}", 0) for what in ("found", "computed", "failed"))
        parts.append(f"{kind}: {computed} computed, {found} found" + (f", {failed} failed" if failed else ""))
    return "Cells. " + "; ".join(parts) + "."


def _costs(stages: dict[str, dict[str, float]]) -> str:
    shares = {name: cost["seconds_in_forward"] / max(cost["seconds"], 1e-9) for name, cost in stages.items()}
    parts = [f"{name} {cost['seconds']:.1f} s ({shares[name]:.0%} in the model)" for name, cost in stages.items()]
    return f"Time. {'; '.join(parts)}. Peak memory {max(cost['peak_memory_mb'] for cost in stages.values()):.0f} MiB."


def _print_boards(report: Any) -> None:
    import leaderboards

    for name, wide in report.boards.wide.items():
        summary = leaderboards.summary(wide, report.boards.trivial)
        _print_table(summary, f"{name} (lower mean rank is better; rank with its 95 % interval)")
        for row in wide[wide["status"] == "unsupported"].itertuples():
            line = f"unsupported: {row.explainer} on {row.model}: {row.info}"
            err.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in report.undefined:
        out.print(f"undefined: {line}", markup=False, highlight=False, soft_wrap=True)
    if report.missing:
        out.print(f"{report.missing} cells of the plan are not computed yet.")


def _print_table(table: Any, title: str) -> None:
    shown = Table(title=title, title_justify="left")
    for column in table.columns:
        shown.add_column(str(column), overflow="fold", no_wrap=column == "explainer")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text("" if value is None or value != value else str(value)) for value in row))
    out.print(shown)


class _Rate(rich.progress.ProgressColumn):
    """Steps per second so far."""

    def render(self, task: rich.progress.Task) -> Text:
        """Return the text of the column."""
        return Text(f"{task.speed:.2f}/s," if task.speed else "")


@contextmanager
def _bars(unit: str) -> Iterator[Callable[..., None]]:
    """Show a bar per task with rate and time left on a terminal; elsewhere a line per finished task."""
    columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), unit)
    times = (_Rate(), rich.progress.TimeElapsedColumn(), "elapsed,", rich.progress.TimeRemainingColumn(), "left")
    with rich.progress.Progress(*columns, *times, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}
        starts: dict[str, float] = {}

        def update(task: str, done: int, total: int, note: str = "") -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
                starts[task] = time.perf_counter()
            bars.update(tasks[task], completed=done, description=f"{task} {note}")
            if done == total and not err.is_terminal:
                err.print(f"{task}: {total} {unit} in {time.perf_counter() - starts[task]:.1f} s", highlight=False)

        yield update


@app.command()
def board(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output folder of a run.")],
    output: Annotated[Path | None, typer.Option("--out", help="RUN_DIR/leaderboards by default.")] = None,
) -> None:
    """Make the boards again from whatever scores a run has stored."""
    from bench import report

    result = report.read(folder)
    target = output or folder / "leaderboards"
    report.write(result, folder, target)
    _print_boards(result)
    out.print(f"Boards: {target}", soft_wrap=True)
    _fail(result.failures)


@app.command("check")
def check_explainer(
    spec: Annotated[str, typer.Argument(metavar="FILE.py[:Class]", help="Or the name of an explainer.")],
) -> None:
    """Check that an explainer keeps the contract, on small models: the first thing to do with a new one."""
    import adapters
    from adapters import conformance

    explainer = adapters.quick(spec)
    findings = list(conformance.check(explainer))
    _print_table(_verdicts(findings), f"{explainer.spec}: {len(conformance.CHECKS)} checks on each model")
    broken = {finding.check: finding for finding in reversed(findings) if finding.verdict == "broken"}
    for name, finding in broken.items():
        err.print(f"{name}: {finding.line} (first on {finding.model})", markup=False, highlight=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)
    if all(finding.verdict == "refused" for finding in findings):
        raise RequestError(f"{explainer.spec} refuses every model, so nothing was checked: see its `supports`.")


def _verdicts(findings: list[Any]) -> Any:
    import pandas as pd

    table = pd.DataFrame(findings)
    counts = table.groupby("model", sort=False)["verdict"].value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=["passed", "broken"], fill_value=0)
    refused = table[table["verdict"] == "refused"].set_index("model")["line"]
    return counts.assign(refused=refused).fillna("").reset_index()


@app.command("list")
def list_(kind: Kind, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List what there is, with what each takes."""
    rows = _catalogue(kind)
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    columns = _BRIEF.get(kind) or {name: name for name in (rows[0] if rows else ["name"])}
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(Text(_words(row[name]), no_wrap=name == "name") for name in columns))
    out.print(table)


# They are many, and have more facts than fit the width of a screen; `--json` and the documentation have all.
_BRIEF = {
    Kind.recipes: {"name": "name", "dataset": "data set", "architecture": "architecture", "description": "what"},
    Kind.metrics: {"name": "name", "group": "group", "higher_is_better": "higher is better", "what": "what"},
    Kind.explainers: {
        "name": "name",
        "family": "family",
        "signed": "signed",
        "class_discriminative": "class-discriminative",
        "cost": "cost (FE)",
        "reference": "paper",
        "licence": "licence note",
    },
}


def _words(value: Any) -> str:
    return {"True": "yes", "False": "no"}.get(str(value), f"{value:.4g}" if isinstance(value, float) else str(value))


def _catalogue(kind: Kind) -> list[dict[str, Any]]:
    import adapters
    import metrics
    from bench import datasets, models, recipes, suite

    if kind is Kind.suites:
        return [{"name": s.name, "description": s.description} for s in map(suite.load, suite.names())]
    if kind is Kind.models:
        return models.catalogue()
    if kind is Kind.recipes:
        return [recipes.get(name).model_dump(mode="json") for name in recipes.names()]
    registries = {"explainers": adapters, "metrics": metrics, "datasets": datasets}
    facts = {
        "explainers": (
            "family",
            "signed",
            "class_discriminative",
            "stochastic",
            "trivial",
            "cost",
            "reference",
            "licence",
        ),
        "metrics": ("group", "higher_is_better", "bounds", "sign_policy"),
        "datasets": ("licence", "where"),
    }
    classes = registries[kind].registry.classes.values()  # type: ignore[attr-defined]
    rows = [_facts(cls, facts[kind]) for cls in classes]
    return sorted(rows, key=lambda row: row.get("family", ""))


def _facts(cls: type[Component], names: tuple[str, ...]) -> dict[str, Any]:
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    component = cls()
    parameters = ", ".join(f"{k}={v}" for k, v in component.params.items())
    return {"name": cls.name, **{n: getattr(component, n) for n in names}, "parameters": parameters, "what": summary}


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="NAME or FILE.yaml, with [FIELD=VALUE,...]; see `list recipes`.")],
    data_root: DataRoot = None,
    weights: Annotated[Path | None, typer.Option(help="Local pre-trained weights to start from.")] = None,
    fraction: Annotated[float, typer.Option(help="Share of the training split to use, in (0, 1].")] = 1.0,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    fresh: Annotated[bool, typer.Option(help="Start anew, whatever a training left there.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images; no number changes.")] = 0,
    output: Annotated[Path | None, typer.Option("--out", help="Folder; checkpoints/RECIPE by default.")] = None,
) -> None:
    """Train a recipe's model and measure it on the held-out split; after an interruption, go on."""
    from bench import api, training

    folder = output or Path("checkpoints") / Path(recipe.partition("[")[0]).stem
    chosen = str(api.choose_device(device))
    with _bars("steps") as update:
        try:
            report = training.train(
                recipe,
                folder,
                data_root,
                weights,
                fraction,
                chosen,
                seed,
                lambda done, total, note: update("train", done, total, note),
                fresh,
                workers,
                lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
            )
        except KeyboardInterrupt as stop:
            raise StoppedError(str(stop) or "nothing was trained yet") from None
    shown = ("model", "checkpoint", "best_epoch", "val", "test", "seconds")
    out.print_json(json.dumps({key: report[key] for key in shown}))
    out.print(f"Card: {folder / report['model']}.md", soft_wrap=True, highlight=False)


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="chung2024, komorowski2023, brocki2024 or goncalves2022.")],
    data_root: Annotated[Path | None, typer.Option(help="Folder that holds the study's data sets.")] = None,
    weights_root: Annotated[Path | None, typer.Option(help="Folder that holds its trained models.")] = None,
    masks_only: Annotated[bool, typer.Option(help="chung2024: trivial maps on the annotations alone.")] = False,
    samples: Annotated[int | None, typer.Option(min=1, help="Images per part, instead of the study's.")] = None,
    device: Device = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="As for `run`.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be done, and what is missing.")] = False,
    output: Annotated[Path | None, typer.Option("--out", help="Folder; runs/STUDY by default.")] = None,
) -> None:
    """Run a source study's whole protocol and put its published table beside ours."""
    from bench import reproduction, studies

    if masks_only and "masks_only" not in studies.registry.find(study.partition("[")[0]).__dataclass_fields__:
        raise RequestError(f"--masks-only is for chung2024, whose annotations are published; {study} has none.")
    chosen = studies.get(study, **({"masks_only": True} if masks_only else {}))
    folder = output or Path("runs") / chosen.name
    with _bars("steps") as progress:
        result = reproduction.reproduce(
            chosen,
            folder,
            data_root=data_root,
            weights_root=weights_root,
            samples=samples,
            device=device,
            batch_size=batch_size,
            seed=seed,
            dry_run=dry_run,
            progress=progress,
        )
    if dry_run:
        _print_table(result.plan, f"{chosen.name}: {len(result.plan)} parts")
    for section in result.sections:
        if section.table is not None and len(section.table) <= _MOST_ROWS:
            _print_table(section.table.map(_rounded), section.title)
    for line in result.missing:
        err.print(f"missing: {line}", markup=False, highlight=False, soft_wrap=True)
    if not dry_run:
        out.print(f"Tables: {folder} (page: {folder / 'index.html'})", soft_wrap=True)
        _fail(result.failures + _lacking(result.plan))


_MOST_ROWS = 60  # longer tables are in the files


def _rounded(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) and value == value else value


def _lacking(plan: Any) -> list[str]:
    lacking = int(plan["state"].ne("ready").sum()) if len(plan) else 0
    return [f"{lacking} of {len(plan)} parts lack data or weights"] if lacking else []


@data_app.command()
def check(name: Annotated[str, typer.Argument(help="See `list datasets`.")], data_root: DataRoot = None) -> None:
    """Read every sample of a data set, count, and name every file that cannot be used."""
    from bench import datasets
    from bench.datasets.base import check as check_samples

    result = check_samples(datasets.get(name, **({"root": data_root} if data_root else {})))
    table = result.table if result.table["class"].nunique() <= _MOST_CLASSES else _by_split(result.table)
    _print_table(table.round({"roi_area": 4}), name)
    for line in result.errors:
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    if result.errors:
        raise typer.Exit(1)


_MOST_CLASSES = 20


def _by_split(table: Any) -> Any:
    """One row per split instead of one per class."""
    table = table.assign(classes=table["images"] > 0, roi_area=table["roi_area"] * table["with_roi"])
    total = table.groupby("split", sort=False).agg(
        {
            "classes": "sum",
            "images": "sum",
            "groups": "sum",
            "with_roi": "sum",
            "roi_area": "sum",
            "fingerprint": "first",
        }
    )
    classes = table.groupby("split")["class"].nunique()
    total["classes"] = [f"{n} of {classes[split]}" for split, n in total["classes"].items()]
    return total.assign(roi_area=total["roi_area"] / total["with_roi"]).reset_index()


@data_app.command()
def describe(name: Annotated[str, typer.Argument(help="See `list datasets`.")]) -> None:
    """Say what a data set is: where to get it, licence, layout, splits, labels, ROI, parameters, known faults."""
    from bench import datasets
    from bench.datasets.base import facts

    cls = datasets.registry.find(name)
    out.print(inspect.getdoc(cls), markup=False, highlight=False)
    out.print()
    for heading, text in facts(cls).items():
        out.print(f"{heading}: {text}", markup=False, highlight=False, soft_wrap=True)
    if model := getattr(cls, "shipped_model", ""):
        _print_interventions(cls(), model)


def _print_interventions(dataset: Any, name: str) -> None:
    from bench import interventions, models

    table = interventions.table(dataset, models.get(name, dataset.class_names))
    _print_table(table.round(3), f"What {name} uses: its accuracy on the same images, changed in one respect")
    out.print(
        "accuracy: the top class is the label, or another finding of the unchanged image; chance: that of a guess at "
        "random. same_class: the top class is that of the unchanged image. A model that reads a swapped letter names "
        "the next class, so its accuracy falls below chance.",
        highlight=False,
    )
