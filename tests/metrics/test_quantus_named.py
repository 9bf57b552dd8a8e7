"""Quantus's metrics by name: which of them work, one sample at a time, and how the others fail."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import quantus
import torch
from torch import nn

import metrics
from bench import api, models, suite
from bench.datasets.digits import Digits
from bench.store import identity
from explainer_bench import RequestError, split_specs
from metrics import Samples
from metrics.base import GROUPS
from metrics.quantus_bridge import GradientModel, mean_of, named

Make = Callable[..., Samples]
NAMES = [cls.__name__ for found in quantus.AVAILABLE_METRICS.values() for cls in found.values()]

CHEAP = {
    "FaithfulnessCorrelation": "nr_runs=5",
    "FaithfulnessEstimate": "features_in_step=64",
    "PixelFlipping": "features_in_step=64",
    "RegionPerturbation": "patch_size=4",
    "Monotonicity": "features_in_step=64",
    "MonotonicityCorrelation": "features_in_step=64,nr_samples=3",
    "Selectivity": "patch_size=4",
    "SensitivityN": "features_in_step=64",
    "ROAD": "percentages=[20,50]",
    "Infidelity": "perturb_patch_sizes=[4],n_perturb_samples=1",
    "Continuity": "nr_steps=2",
    "LocalLipschitzEstimate": "nr_samples=2",
    "MaxSensitivity": "nr_samples=2",
    "AvgSensitivity": "nr_samples=2",
    "RelativeInputStability": "nr_samples=2",
    "RelativeOutputStability": "nr_samples=2",
    "RelativeRepresentationStability": "nr_samples=2",
    "TopKIntersection": "k=20",
    "SmoothMPRT": "nr_samples=2",
}

# what Quantus 0.6.0 says of one RGB image of 16 pixels; all others give a finite number
FAILS = {
    "IROF": "shape of arr must be the same as the mask shape",  # masks of one channel
    "ROAD": "out of bounds",  # indices of three channels into a mask of one
}


def spec_of(name: str) -> str:
    return f"quantus:{name}[{CHEAP[name]}]" if name in CHEAP else f"quantus:{name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_scores_or_fails_with_one_clear_line(name: str, make_samples: Make) -> None:
    if name in ("SensitivityN", "Focus"):
        with pytest.raises(RequestError, match=r"^quantus:\w+ (correlates across|needs mosaics).*: use \w+\.$"):
            metrics.get(spec_of(name))
        return
    metric, samples = metrics.get(spec_of(name)), make_samples(2)
    assert metric.group in GROUPS and metrics.get(metric.spec).params == metric.params
    if name not in FAILS:
        scores = metric(samples)
        assert np.isfinite(scores.values).all() and scores.reasons == ["", ""]
        return
    with pytest.raises(RequestError, match=FAILS[name]) as failure:
        metric(samples)
    assert str(failure.value).startswith(f"quantus:{name}: ") and "\n" not in str(failure.value)


def test_the_table_names_real_metrics() -> None:
    assert {*FAILS, *CHEAP} <= set(NAMES) and len(NAMES) == 37


@pytest.mark.parametrize("name", ["ROAD", "IROF"])
def test_those_that_want_one_channel_work_on_one(name: str, make_samples: Make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4)).eval()
    grey = replace(make_samples(2, model=model), inputs=make_samples(2).inputs[:, :1])
    values = metrics.get(spec_of(name))(grey).values
    assert np.isfinite(values).all()


def test_scores_are_those_of_quantus(make_samples: Make) -> None:
    samples = make_samples(1)
    call: dict[str, Any] = {
        "x_batch": samples.inputs.numpy(),
        "y_batch": samples.targets,
        "a_batch": samples.maps[:, None],
    }
    estimate = quantus.FaithfulnessEstimate(features_in_step=32, abs=True, disable_warnings=True)
    expected = estimate(model=samples.model, softmax=True, **call)
    ours = metrics.get("quantus:FaithfulnessEstimate[features_in_step=32,abs=true,softmax=true]")(samples)
    np.testing.assert_allclose(ours.values, expected, atol=1e-12)
    curve = quantus.PixelFlipping(features_in_step=64, disable_warnings=True)(model=samples.model, **call)
    ours = metrics.get("quantus:PixelFlipping[features_in_step=64]")(samples)
    assert ours.values[0] == pytest.approx(np.mean(curve))


@pytest.mark.parametrize("name", ["FaithfulnessCorrelation", "MaxSensitivity", "RandomLogit", "EffectiveComplexity"])
def test_scores_do_not_depend_on_the_other_samples(name: str, make_samples: Make, subset: Callable) -> None:
    samples, metric = make_samples(4), metrics.get(spec_of(name))
    together = metric(samples).values
    assert len(set(together)) > 1 or name == "EffectiveComplexity"
    alone = [metric(subset(samples, [row])).values[0] for row in (2, 0)]
    np.testing.assert_allclose(alone, together[[2, 0]], atol=1e-6)


def test_what_quantus_refuses_is_nan_with_a_reason(make_samples: Make) -> None:
    samples = make_samples(4)
    maps, roi = samples.maps.copy(), samples.roi.copy()
    maps[1], maps[2], roi[3] = 0.5, -1 - np.abs(maps[2]), False
    changed = replace(samples, maps=maps, roi=roi)
    assert metrics.get("quantus:AUC")(changed).reasons[1:] == [
        "constant map",
        "all of the map is negative",
        "empty ROI",
    ]
    for name in ("AUC", "FaithfulnessCorrelation[nr_runs=3]"):
        metric = metrics.get(f"quantus:{name}")
        assert metric(changed).values[0] == pytest.approx(metric(samples).values[0])


def test_the_explainer_is_asked_for_the_right_sample_and_the_bare_model(make_samples: Make, hooked: nn.Module) -> None:
    asked = []

    def reexplain(model: nn.Module, images: torch.Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        asked.append((type(model), images.dtype, targets.shape, rows.tolist()))
        return np.random.default_rng(len(asked)).random((len(images), 16, 16))

    samples = make_samples(2, model=hooked, reexplain=reexplain)
    assert not isinstance(hooked, GradientModel)
    assert np.isfinite(metrics.get("quantus:MaxSensitivity[nr_samples=1]")(samples).values).all()
    assert asked == [(type(hooked), torch.float32, (1,), [row]) for row in (0, 1)]
    with pytest.raises(RequestError, match="no explainer"):
        metrics.get("quantus:MaxSensitivity")(replace(samples, reexplain=None))


def test_a_failure_of_one_sample_costs_that_one_alone(make_samples: Make) -> None:
    def reexplain(model: nn.Module, images: torch.Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        again = np.random.default_rng(0).random((len(images), 16, 16))
        return again - 2 * (rows[0] == 1)  # Quantus refuses a map that is negative throughout

    scores = metrics.get("quantus:MaxSensitivity[nr_samples=1]")(make_samples(3, reexplain=reexplain))
    assert np.isnan(scores.values).tolist() == [False, True, False]
    assert scores.reasons[1] == "Quantus fails on it, or gives no finite number"


def test_functions_are_given_by_name(make_samples: Make) -> None:
    samples = make_samples(3)
    default, named_so, other = (
        metrics.get(f"quantus:RandomLogit{params}")(samples).values
        for params in ("", "[similarity_func=ssim]", "[similarity_func=correlation_pearson,num_classes=4]")
    )
    np.testing.assert_array_equal(default, named_so)
    assert not np.allclose(default, other)


def test_direction_and_group_are_those_of_quantus() -> None:
    for name, group, higher in [
        ("Infidelity", "faithfulness", False),
        ("AUC", "localization", True),
        ("Complexity", "compactness", False),
        ("EfficientMPRT", "randomization", True),
        ("MaxSensitivity", "robustness", False),
        ("Completeness", "axiomatic", True),
    ]:
        cls = named(name)
        assert (cls.group, cls.higher_is_better) == (group, higher)
        assert cls.needs_roi == (group == "localization") and cls.bounds == (-np.inf, np.inf)
    assert named("Sparseness").sign_policy == "absolute" and named("AUC").sign_policy == "signed"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quantus:Infidelty", r"Quantus 0\.6\.0 has no metric 'Infidelty'\. Did you mean Infidelity"),
        ("quantus:", "has no metric ''"),
        ("quantus:Infidelity[n_perturb_sample=1]", "Did you mean n_perturb_samples"),
        ("quantus:Infidelity[n_perturb_samples=many]", "parameter 'n_perturb_samples"),
        ("quantus:AUC[return_aggregate=true]", "no parameter 'return_aggregate'"),
    ],
)
def test_wrong_requests_are_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as failure:
        metrics.get(spec)
    assert "\n" not in str(failure.value)


def test_specs_and_identity_survive() -> None:
    text = "quantus:Infidelity[perturb_patch_sizes=[4, 8],softmax=true],quantus:ROAD(percentages=[10,20])"
    built = [metrics.get(spec) for spec in split_specs(text)]
    assert built[0].params["perturb_patch_sizes"] == [4, 8] and built[0].params["softmax"] is True
    for metric in built:
        again = metrics.get(metric.spec)
        assert again.spec == metric.spec and identity(again) == identity(metric)
        assert type(again) is type(metric) and metric.version == "0.6.0"
        assert pickle.loads(pickle.dumps(metric)).spec == metric.spec
    assert identity(built[0]) != identity(metrics.get("quantus:Infidelity"))
    assert "quantus:AUC" not in metrics.registry.names()


def test_results_are_reduced_to_their_mean() -> None:
    assert mean_of({10: [1.0], 20: [0.0]}, "x") == 0.5
    assert mean_of(np.array([[1, 2], [3, 6]]), "x") == 3
    assert mean_of(True, "x") == 1
    for result in ("text", {"a": [1, 2], "b": 3}):
        with pytest.raises(RequestError, match=r"x returns .* which is no number"):
            mean_of(result, "x")


def test_a_run_scores_and_stores_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = models.create("vit_tiny_patch16_224", "tiny", Digits.class_names, **shape)
    for parameter in model.module.parameters():
        nn.init.normal_(parameter, std=0.4)
    models.save(tmp_path / "tiny.safetensors", model)
    specs = [
        "quantus:Infidelity[perturb_patch_sizes=[32],n_perturb_samples=1]",
        "quantus:MaxSensitivity[nr_samples=2]",
        "quantus:ROAD[percentages=[20]]",
        "sparseness",
    ]
    chosen = suite.load(
        "quickstart",
        models=[str(tmp_path / "tiny.safetensors")],
        explainers=["input_x_gradient", "random"],
        metrics=specs,
        samples=2,
    )
    result = api.run(chosen, out=tmp_path / "run", device="cpu")
    board = pd.read_csv(tmp_path / "run/leaderboards/digits.csv").set_index("explainer")
    assert np.isfinite(board[specs[:2]].to_numpy()).all()
    assert result.counts["scores failed"] == 2  # ROAD on RGB
    assert "quantus:ROAD" in " ".join(result.failures) and "out of bounds" in " ".join(result.failures)
    again = api.run(chosen, out=tmp_path / "run", device="cpu").counts
    assert again["scores found"] == 6 and "scores computed" not in again
