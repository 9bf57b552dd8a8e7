"""Write explainers.md, one card per explainer, from what the explainers say of themselves."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import adapters
from adapters import Explainer, conformance

PAGE = Path(__file__).with_name("explainers.md")
HEAD = """# Explainers

One card per explainer, written by `python docs/cards.py` from the sources. *Cost* counts passes through the model per
image at the default parameters, a forward and a backward pass 1 each (forward equivalents, FE); what was measured is
in [What explainers cost](explainer-costs.md). *Serves* was found by asking each explainer about five small models: a
ViT, one with registers and a grid that is not square, one whose head reads the mean of its tokens, a distilled DeiT,
and a ResNet.
"""


HEADINGS = {
    "attention_gradient": "Attention and gradient",
    "cam": "Class activation maps",
    "cdam": "CDAM",
    "lrp": "Relevance propagation",
}


def card(explainer: Explainer) -> str:
    """Return one explainer's card in Markdown."""
    text = (inspect.getdoc(type(explainer)) or "").replace("``", "`")
    asked = {name: explainer.supports(conformance.build(name)) for name in conformance.MODELS}
    serves = ", ".join(name for name, reason in asked.items() if reason is None)
    reasons = {reason: [n for n, other in asked.items() if other == reason] for reason in asked.values() if reason}
    refused = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    facts = {
        "Map": _map(explainer),
        "Cost": f"{explainer.cost:.4g} FE",
        "Parameters": ", ".join(f"`{name}={value!r}`" for name, value in explainer.params.items()),
        "Serves": serves,
        "Refuses": refused,
        "Reference": explainer.reference,
        "Licence": explainer.licence,
    }
    lines = [f"- **{fact}**: {value}" for fact, value in facts.items() if value]
    return "\n".join([f"### {explainer.name}", "", text, "", *lines, ""])


def _map(explainer: Explainer) -> str:
    words = ["signed" if explainer.signed else "unsigned"]
    words += ["one per class" if explainer.class_discriminative else "the same for every class"]
    words += ["random, seeded per image"] * explainer.stochastic
    words += [f"{explainer.upsampling} upsampling"]
    words += [] if explainer.half_precision else ["computed in float32 also for half-precision models"]
    return ", ".join(words)


def page() -> str:
    """Return the whole page."""
    explainers = sorted((adapters.get(name) for name in adapters.registry.names()), key=lambda e: (e.family, e.name))
    parts = [HEAD]
    for family, members in itertools.groupby(explainers, key=lambda e: e.family):
        parts += [f"## {HEADINGS.get(family, family.capitalize())}\n", *map(card, members)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
