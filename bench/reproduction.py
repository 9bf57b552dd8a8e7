"""Reproduce a source study: say what is missing, run what is there, and put the published table beside ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench import api, report, studies
from bench.studies.base import Done, Part, Section, Study
from explainer_bench import RequestError, write_atomically
from leaderboards import study_page


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Parameters
    ----------
    plan : DataFrame
        One row per part: ``part, data set, model, images, explainers, metrics, state``.
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
    lacks = {part.name: part.missing(data_root, weights_root) for part in parts}
    plan = pd.DataFrame([_row(part, lacks[part.name], samples) for part in parts])
    missing = list(dict.fromkeys(line for lines in lacks.values() for line in lines))
    if dry_run:
        return Reproduction(plan, missing, [], [])
    sections, failures = list(study.before(data_root, out)), []
    done: list[Done] = []
    for part in parts:
        if lacks[part.name]:
            continue
        folder = out / "runs" / part.name
        result = api.run(
            part.suite(weights_root, samples, seed),
            out=folder,
            data_root=data_root,
            device=device,
            batch_size=batch_size,
            progress=lambda stage, *counts, name=part.name: progress(f"{name} {stage}", *counts),
        )
        failures += [f"{part.name}: {line}" for line in result.failures]
        assert result.report is not None
        (long,) = result.report.boards.long.values()
        done.append(Done(part, folder, report.scores(folder), long))
    sections += study.sections(done, out) if done else []
    if not sections:
        raise RequestError(f"{study.name}: nothing can be run. {' '.join(missing[:2])} (--dry-run lists all.)")
    write(study, sections, missing, out)
    return Reproduction(plan, missing, failures, sections)


def _row(part: Part, lacking: Sequence[str], samples: int | None) -> dict[str, object]:
    return {
        "part": part.name,
        "data set": part.dataset.partition("[")[0],
        "model": part.weights.stem,
        "images": samples or part.samples,
        "explainers": len(part.explainers),
        "metrics": len(part.metrics),
        "state": f"lacks {len(lacking)}" if lacking else "ready",
    }


def write(study: Study, sections: Sequence[Section], missing: Sequence[str], out: Path) -> None:
    """Write each table as CSV, and the page."""
    for section in sections:
        if section.table is not None:
            text = section.table.to_csv(index=False, float_format="%.10g", lineterminator="\n")
            write_atomically(out / f"{section.name}.csv", text.encode())
    study_page.write(study.title, study.reference, sections, missing, out)
