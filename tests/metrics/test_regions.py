"""Localization against a named region: the same metric of another mask, which counts as plausibility."""

from dataclasses import replace

import numpy as np
import pytest

import metrics
from explainer_bench import RequestError

NAMES = sorted(n for n, c in metrics.registry.classes.items() if "roi" in c.__dataclass_fields__)


@pytest.fixture
def two_regions(make_samples):
    """Samples whose region "marker" is another place than their ROI, and those with the marker for their ROI."""
    samples = make_samples()
    marker = np.roll(samples.roi, (3, 5), axis=(1, 2))
    marker[0] = False  # one image has none

    def roi_of(classes, region=""):
        return {"": samples.roi, "marker": marker}[region]

    both = replace(samples, roi_of=roi_of)
    return both, replace(samples, roi=marker)


def test_there_are_such_metrics():
    assert {"pointing_game", "relevance_mass_accuracy", "iou_top5", "average_precision"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_region_scores_as_if_it_were_the_roi(two_regions, name):
    both, marked = two_regions
    named, plain = metrics.get(name, roi="marker"), metrics.get(name)
    theirs, ours = plain(marked), named(both)
    assert np.array_equal(ours.values, theirs.values, equal_nan=True) and ours.reasons == theirs.reasons
    assert ours.reasons[0] == "empty ROI"
    assert np.array_equal(named.chance_level(both), plain.chance_level(marked), equal_nan=True)
    assert not np.array_equal(ours.values, plain(both).values, equal_nan=True)


def test_a_part_of_the_samples_scores_the_same(two_regions):
    both, _ = two_regions
    metric = metrics.get("relevance_mass_accuracy", roi="marker")
    rows = np.array([3, 1])
    assert np.array_equal(metric(both.take(rows)).values, metric(both).values[rows])


def test_a_named_region_is_plausibility_and_the_evidence_localization():
    assert metrics.get("pointing_game", roi="lung").group == "plausibility"
    assert metrics.get("pointing_game").group == "localization"


def test_regions_that_nobody_gives_are_asked_for(two_regions):
    both, _ = two_regions
    with pytest.raises(RequestError, match="named regions"):
        metrics.get("pointing_game", roi="marker")(replace(both, roi_of=None))
