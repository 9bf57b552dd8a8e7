"""The twin of `phantom` in which the burnt-in marker gives the label away."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from bench.datasets.phantom import GLYPHS, Phantom, Plan, findings


class PhantomShortcut(Phantom):
    """The images of `phantom`, each with the letter of its label: L normal, R nodule, A infiltrate, S effusion.

    The letter gives the label away in every split, so a model can be right without reading the findings, and the
    shipped `phantom_marker` is: what it used is known. To make sure of that, it was trained on images whose
    findings were drawn whatever the label (`agreement=0`): its training says nothing for a finding.

    A map that is faithful to that model points at the marker, one that points at the finding is merely plausible.
    Localization metrics are measured against the marker for that model, and against the finding with ``roi=finding``.

    Parameters
    ----------
    agreement : float
        Share of the images that show what their label says; the others show any class, drawn at random.
    """

    name = "phantom_shortcut"
    shipped_model: ClassVar[str] = "phantom_marker"

    agreement: Annotated[float, Field(ge=0, le=1)] = 1.0

    def _plan(self, rng: np.random.Generator, label: int) -> Plan:
        agrees, other = int(rng.integers(1000)) < round(1000 * self.agreement), int(rng.integers(len(GLYPHS)))
        return Plan(findings(rng, label if agrees else other), label)
