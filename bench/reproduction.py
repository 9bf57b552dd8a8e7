"""Reproduce a source study: say what is missing, run what is there, and put the published table beside ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench import api, report, studies
from bench.studies.base import Done, Part, Section, Study, lacking
from explainer_bench import RequestError, write_atomically
from leaderboards import study_page


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Parameters
    ----------
    plan : DataFrame
        One row per part: ``part, data set, model, images planned, explainers, metrics, state``.
    missing : list of str
        What to get, one line each.
    failures : list of str
        One line for each explainer or metric with failed cells.
    sections : list of Section
        The tables and figures, in order; empty after a dry run.
    """

    plan: pd.DataFrame
    missing: list[str]
    failures: list[str]
    sections: list[Section]


def reproduce(
    study: str | Study,
    out: Path,
    *,
    data_root: Path | None = None,
    weights_root: Path | None = None,
    samples: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: Callable[..., None] = lambda *_: None,
) -> Reproduction:
    """Run the parts of a study that lack nothing, and write its tables and page.

    Parameters
    ----------
    study : str or Study
        A name, ``name[param=value,...]``, or a study.
    out : Path
        Folder of ``runs/PART/`` (as `bench.run` leaves them), one CSV file per table, figures and ``index.html``.
    data_root : Path, optional
        The folder that holds the data sets.
    weights_root : Path, optional
        The folder that holds the trained models.
    samples : int, optional
        Images per part, instead of the study's.
    device, batch_size, seed
        As for `bench.run`.
    dry_run : bool
        Only say what would be done and what is missing.
    progress : callable
        ``progress(what, done, total)``.

    Returns
    -------
    Reproduction

    Raises
    ------
    RequestError
        For an unknown study or parameter, and where nothing at all can be done, with what is missing.
    """
    study = studies.get(study) if isinstance(study, str) else study
    parts = study.parts(data_root)
    lacks, missing = lacking(parts, data_root, weights_root)
    plan = pd.DataFrame([_row(part, lacks[part.name], samples) for part in parts])
    if dry_run:
        return Reproduction(plan, missing, [], [])
    sections, failures = list(study.before(data_root, out)), []
    done: list[Done] = []
    for part in parts:
        if lacks[part.name]:
            continue
        folder = out / "runs" / part.name
        suite = part.suite(weights_root, samples, seed)
        result = api.run(
            suite,
            out=folder,
            data_root=data_root,
            device=device,
            batch_size=batch_size,
            progress=_named(progress, part.name),
        )
        failures += [f"{part.name}: {line}" for line in result.failures]
        assert result.report is not None
        (long,) = result.report.boards.long.values()
        ran = Done(part, folder, report.scores(folder), long, suite, data_root, device)
        done.append(ran._replace(measured=study.measure(ran, _named(progress, part.name))))
    sections += study.sections(done, out) if done else []
    if not sections:
        raise RequestError(f"{study.name}: nothing can be run. {' '.join(missing[:2])} (--dry-run lists all.)")
    write(study, sections, missing, out)
    return Reproduction(plan, missing, failures, sections)


def _named(progress: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda stage, *counts: progress(f"{name} {stage}", *counts)


def _row(part: Part, lacks: int, samples: int | None) -> dict[str, object]:
    return {
        "part": part.name,
        "data set": part.dataset.partition("[")[0],
        "model": part.weights.stem,
        "images planned": samples or part.samples,
        "explainers": len(part.explainers),
        "metrics": len(part.metrics),
        "state": f"lacks {lacks}" if lacks else "ready",
    }


def write(study: Study, sections: Sequence[Section], missing: Sequence[str], out: Path) -> None:
    """Write each table as CSV, and the page."""
    for section in sections:
        if section.table is not None:
            text = section.table.to_csv(index=False, float_format="%.10g", lineterminator="\n")
            write_atomically(out / f"{section.name}.csv", text.encode())
    study_page.write(study.title, study.reference, sections, missing, out)
