"""Quantus per sample: parity of the two engines, and models that need gradients in their forward pass."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from torch import Tensor, nn

import metrics
from metrics import Samples
from metrics.maps import QuantusMapMetric
from metrics.quantus_bridge import GradientModel, evaluate, with_gradients

Make = Callable[..., Samples]
SHARED = [name for name, cls in metrics.registry.classes.items() if issubclass(cls, QuantusMapMetric)]


def gradient_map(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
    """A minimal `explain_func`."""
    with torch.enable_grad():
        x = torch.as_tensor(inputs).requires_grad_()
        model(x).gather(1, torch.as_tensor(targets)[:, None]).sum().backward()
    assert x.grad is not None
    return x.grad.sum(1, keepdim=True).numpy()


@pytest.mark.parametrize("name", SHARED)
def test_fast_engine_gives_the_numbers_of_the_full_call(make_samples: Make, name: str) -> None:
    samples = make_samples(8)
    fast, full = (metrics.get(name, engine=engine)(samples) for engine in ("fast", "quantus"))
    np.testing.assert_allclose(fast.values, full.values, rtol=1e-9)
    assert np.isfinite(full.values).all()


def test_any_metric_runs_per_sample_whatever_the_others(make_samples: Make) -> None:
    samples = make_samples(4)
    kwargs: dict[str, Any] = {"return_aggregate": False, "disable_warnings": True}
    built = [
        lambda: quantus.FaithfulnessCorrelation(nr_runs=5, subset_size=32, **kwargs),
        lambda: quantus.MaxSensitivity(nr_samples=2, **kwargs),
        lambda: quantus.AUC(**kwargs),
        lambda: quantus.EfficientMPRT(**kwargs),
    ]
    for build in built:
        scores = [evaluate(build(), samples, row, samples.model, gradient_map) for row in range(4)]
        alone = evaluate(build(), samples.take(np.array([2])), 0, samples.model, gradient_map)
        assert np.isfinite(scores).all()
        assert scores[2] == pytest.approx(alone)


def test_curves_and_mappings_come_through(make_samples: Make) -> None:
    samples = make_samples(2)
    curve = evaluate(quantus.PixelFlipping(features_in_step=64), samples, 1, samples.model, gradient_map)
    assert np.shape(curve) == (12,)
    layers = evaluate(quantus.MPRT(skip_layers=True), samples, 1, samples.model, gradient_map)
    assert isinstance(layers, dict) or np.ndim(layers) <= 1


def test_warnings_and_arrays_are_left_alone(make_samples: Make) -> None:
    samples = make_samples()
    before = samples.maps.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(quantus.Complexity(abs=False, normalise=False), samples, 0, samples.model)
    np.testing.assert_array_equal(samples.maps, before)


def test_model_that_needs_gradients_fails_in_quantus_and_runs_wrapped(make_samples: Make, hooked: nn.Module) -> None:
    samples = make_samples(model=hooked)
    metric = quantus.FaithfulnessEstimate(features_in_step=64, disable_warnings=True)
    with pytest.raises(RuntimeError, match="hook"):
        evaluate(metric, samples, 0, hooked)
    assert np.isfinite(evaluate(metric, samples, 0, with_gradients(hooked, samples.inputs)))


@pytest.mark.parametrize("frozen", [False, True])
def test_quantus_evaluate_runs_with_a_wrapped_model(make_samples: Make, hooked: nn.Module, frozen: bool) -> None:
    samples = make_samples(3)
    model: Any = GradientModel(hooked.requires_grad_(not frozen))
    quiet: dict[str, Any] = {"disable_warnings": True}
    results: Any = quantus.evaluate(
        metrics={
            "estimate": quantus.FaithfulnessEstimate(features_in_step=64, **quiet),
            "max": quantus.MaxSensitivity(nr_samples=2, **quiet),
            "logit": quantus.RandomLogit(num_classes=4, **quiet),
            "mprt": quantus.EfficientMPRT(**quiet),
        },
        xai_methods={"gradient": gradient_map},
        model=model,
        x_batch=samples.inputs.numpy().copy(),
        y_batch=samples.targets,
        explain_func_kwargs={},
    )
    assert len(results["gradient"]) == 4
    for scores in results["gradient"].values():
        assert len(scores) == 3 and np.isfinite(scores).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_wrapped_model_gives_the_same_logits_everywhere(make_samples: Make, hooked: nn.Module, context: Any) -> None:
    inputs = make_samples().inputs
    expected = hooked(inputs).detach()
    with context():
        logits = GradientModel(hooked)(inputs * 1.0)
        assert torch.equal(logits, expected)
        assert logits.requires_grad == torch.is_grad_enabled()


def test_gradients_reach_the_callers_input(make_samples: Make, hooked: nn.Module) -> None:
    inputs = make_samples().inputs.requires_grad_()
    GradientModel(hooked)(inputs).sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def test_what_the_model_keeps_is_detached_not_lost(make_samples: Make, hooked: nn.Module) -> None:
    with torch.no_grad():
        GradientModel(hooked)(make_samples().inputs)
    assert isinstance(hooked.attention, Tensor) and not hooked.attention.requires_grad
    assert not hooked.history[0].requires_grad  # type: ignore[union-attr, index]


def test_wrapped_model_can_be_copied_with_a_graph_alive(make_samples: Make, hooked: nn.Module) -> None:
    inputs = make_samples().inputs
    model = GradientModel(hooked)
    logits = model(inputs)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(hooked)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(inputs), logits) and not copied.training
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert torch.equal(model(inputs), logits)
    logits.sum().backward()


def test_only_models_that_need_it_are_wrapped(make_samples: Make, hooked: nn.Module) -> None:
    samples = make_samples()
    assert with_gradients(samples.model, samples.inputs) is samples.model
    wrapped = with_gradients(hooked, samples.inputs)
    assert isinstance(wrapped, GradientModel) and wrapped.module is hooked
    with pytest.raises(RuntimeError, match="mat1"):
        with_gradients(nn.Linear(5, 2), samples.inputs)


def test_training_mode_is_taken_over(hooked: nn.Module) -> None:
    assert GradientModel(hooked.train()).training and not GradientModel(hooked.eval()).training


def test_engine_metrics_score_a_model_that_needs_gradients(make_samples: Make, hooked: nn.Module) -> None:
    samples = make_samples(model=hooked)
    wrapped = replace(samples, model=GradientModel(hooked), shared={})
    for name in ("srg", "faithfulness_estimate"):
        np.testing.assert_allclose(metrics.get(name)(samples).values, metrics.get(name)(wrapped).values, atol=1e-6)
