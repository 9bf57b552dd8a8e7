"""Write explainers.md, metrics.md and the pages of the data sets from what the components say of themselves."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import adapters
import metrics
from adapters import Explainer, conformance
from bench import datasets
from bench.datasets.base import facts as said_by
from explainer_bench import Component
from metrics import Metric
from metrics.base import GROUPS

FOLDER = Path(__file__).parent
EXPLAINERS = """# Explainers

One card per explainer, written by `python docs/cards.py` from the sources. *Cost* counts passes through the model per
image at the default parameters, a forward and a backward pass 1 each (forward equivalents, FE); what was measured is
in [What explainers cost](explainer-costs.md). *Serves* was found by asking each explainer about five small models: a
ViT, one with registers and a grid that is not square, one whose head reads the mean of its tokens, a distilled DeiT,
and a ResNet.
"""
METRICS = """# Metrics

One card per metric, written by `python docs/cards.py` from the sources. Every score belongs to one image; where a
metric is undefined it is NaN with a reason, never a number. *Chance* is the expected score of a random map.
[Which metrics to trust](which-metrics.md) says what they are worth, measured; [Deviations from
Quantus](quantus-deviations.md) shows where Quantus 0.6.0 computes something else and why we do not. Any other metric of
Quantus runs by its own name, such as `quantus:MaxSensitivity[nr_samples=5]`, one image at a time; at its own defaults
some take tens of thousands of passes per image.

What takes the place of removed pixels (*imputer*) is part of a metric's name where it is not the default: `mean` (the
image's mean colour), `zero` (zero after normalisation), `black` (the image's lowest value, which is what Quantus calls
black), `black_pixel` (a black pixel before normalisation), `blur` (the image blurred), `road` (noisy linear
interpolation from the pixels left) and, for Vision Transformers, `token_removal` (the token leaves the sequence after
the positional embedding, and the sequence really is shorter).
"""
DATASETS = """# Data sets

One page per data set, written by `python docs/cards.py` from the sources. Nothing is downloaded: get the archive,
unpack it, and say where it lies with `--data-root`. `explainer-bench data describe NAME` prints these facts,
`explainer-bench data check NAME --data-root DIR` reads every image and mask, counts, and names each file that cannot
be used. Your own images need no code ([folder](folder.md)), another layout about twenty lines ([Add a data
set](../how-to/add-a-data-set.md)).

| Data set | Classes | ROI | Licence |
|---|---|---|---|
"""
HEADINGS = {
    "attention_gradient": "Attention and gradient",
    "cam": "Class activation maps",
    "cdam": "CDAM",
    "lrp": "Relevance propagation",
    "class_sensitivity": "Class sensitivity",
}


def card(component: Component, facts: Mapping[str, str]) -> str:
    """Return one component's card in Markdown: its docstring, then a list of facts."""
    lines = [f"- **{fact}**: {value}".replace(": \n", ":\n") for fact, value in facts.items() if value]
    return "\n".join([_text(type(component), f"### {component.name}"), *lines, ""])


def of_explainer(explainer: Explainer) -> dict[str, str]:
    """Return the facts on an explainer's card."""
    asked = {name: explainer.supports(conformance.build(name)) for name in conformance.MODELS}
    serves = ", ".join(name for name, reason in asked.items() if reason is None)
    reasons = {reason: [n for n, other in asked.items() if other == reason] for reason in asked.values() if reason}
    refused = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return {
        "Map": _map(explainer),
        "Cost": f"{explainer.cost:.4g} FE",
        "Parameters": _parameters(explainer),
        "Serves": serves,
        "Refuses": refused,
        "Reference": explainer.reference,
        "Licence": explainer.licence,
    }


def of_metric(metric: Metric) -> dict[str, str]:
    """Return the facts on a metric's card."""
    low, high = (f"{bound:g}" for bound in metric.bounds)
    return {
        "Formula": f"`{metric.formula}`",
        "Better": f"{'higher' if metric.higher_is_better else 'lower'}, in [{low}, {high}]",
        "Chance": _chance(metric),
        "Rewards": metric.rewards,
        "Fooled by": metric.fooled_by,
        "Sign": {
            "signed": "negative attributions count as negative",
            "positive": "negative attributions count as zero",
            "absolute": "attributions count by their absolute value",
        }[metric.sign_policy],
        "Scale": "" if metric.scale_invariant else "the scale of the map matters",
        "Parameters": _parameters(metric),
        "Quantus": metric.deviation,
        "Reference": metric.reference,
        "Version": metric.version,
    }


def _parameters(component: Component) -> str:
    """Return a nested list of the parameters with their defaults and what the docstrings say of them."""
    said = {name: text for base in reversed(type(component).__mro__) for name, text in _documented(base).items()}
    lines = [f"    - `{name}={value!r}`{said.get(name, '')}" for name, value in component.params.items()]
    return "\n".join(["", *lines]) if any(name in said for name in component.params) else _in_a_row(component)


def _chance(metric: Metric) -> str:
    if metric.chance is not None:
        return f"{metric.chance:g}"
    known = type(metric).chance_level is not Metric.chance_level
    return "computed for each image" if known else "not known beforehand: compare with the random rows of a board"


def _in_a_row(component: Component) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in component.params.items())


def _documented(cls: type) -> dict[str, str]:
    """Return what a numpydoc docstring says of each parameter, as ": Text.", on one line."""
    section = (inspect.getdoc(cls) or "").partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^(\w+) : .*\n((?:    .*\n?)+)", section, re.MULTILINE)
    return {name: ": " + " ".join(text.replace("``", "`").split()) for name, text in entries}


def _map(explainer: Explainer) -> str:
    words = ["signed" if explainer.signed else "unsigned"]
    words += ["one per class" if explainer.class_discriminative else "the same for every class"]
    words += ["random, seeded per image"] * explainer.stochastic
    words += [f"{explainer.upsampling} upsampling"]
    words += [] if explainer.half_precision else ["computed in float32 also for half-precision models"]
    return ", ".join(words)


def of_dataset(name: str) -> str:
    """Return the page of a data set."""
    cls = datasets.registry.find(name)
    lines = [f"- **{heading[0].upper()}{heading[1:]}**: {_linked(text)}" for heading, text in said_by(cls).items()]
    root = "" if cls.where == "embedded" else " --data-root DIR"
    commands = ["```bash", f"explainer-bench data describe {name}", f"explainer-bench data check {name}{root}", "```"]
    parameters = textwrap.dedent(_parameters(cls())).strip()
    return "\n".join([_text(cls, f"# {name}"), *lines, "", "## Parameters", "", parameters, "", *commands, ""])


def _text(cls: type[Component], heading: str) -> str:
    """Return a heading and a class's docstring without its parameters."""
    text = (inspect.getdoc(cls) or "").partition("\n\nParameters\n---")[0].replace("``", "`")
    return f"{heading}\n\n{text}\n"


def _linked(text: str) -> str:
    """Turn addresses into links, and keep file names that look like Markdown as they are."""
    kinds = re.compile(r"(?P<code>`[^`]*`)|(?P<address>https?://[^\s)]+)|(?P<sign>[*_<])")
    forms = {"code": "{}", "address": "<{}>", "sign": "\\{}"}
    return kinds.sub(lambda found: forms[found.lastgroup or ""].format(found[0]), text)


def _row(name: str) -> str:
    said = said_by(datasets.registry.find(name))
    cells = [f"[{name}]({name}.md)", *(_linked(said.get(fact, "")) for fact in ("classes", "ROI", "licence"))]
    return f"| {' | '.join(cells)} |"


def pages() -> dict[Path, str]:
    """Return every page with its text."""
    explainers = sorted((adapters.get(name) for name in adapters.registry.names()), key=lambda e: (e.family, e.name))
    scored = sorted((metrics.get(name) for name in metrics.registry.names()), key=lambda m: GROUPS.index(m.group))
    return {
        FOLDER / "explainers.md": _page(EXPLAINERS, explainers, lambda e: e.family, of_explainer),
        FOLDER / "metrics.md": _page(METRICS, scored, lambda m: m.group, of_metric),
        FOLDER / "datasets" / "index.md": DATASETS + "\n".join(map(_row, datasets.registry.names())) + "\n",
        **{FOLDER / "datasets" / f"{name}.md": of_dataset(name) for name in datasets.registry.names()},
    }


def _page(head: str, components: list, heading: Callable, facts: Callable) -> str:
    parts = [head]
    for name, members in itertools.groupby(components, key=heading):
        parts += [f"## {HEADINGS.get(name, name.capitalize())}\n", *(card(member, facts(member)) for member in members)]
    return "\n".join(parts)


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
