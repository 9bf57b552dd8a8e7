"""Metrics that explain again, on every explainer there is: they run, repeat, and leave the model as it was."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapters
import metrics
from adapters.conformance import Case, build
from metrics import Samples

MODELS = "vit", "resnet"
METRICS = (
    "mprt[stages=2]",
    "smooth_mprt[stages=1,draws=1]",
    "efficient_mprt",
    "max_sensitivity[draws=2]",
    "avg_sensitivity[draws=2]",
    "local_lipschitz[draws=1]",
    "relative_input_stability[draws=2]",
    "relative_output_stability[draws=2]",
    "input_invariance",
)
ALONE = "mprt[stages=2]", "max_sensitivity[draws=2]"
FIXED = "center_gaussian", "center_square", "roi_prior"  # the same map for every image
OF_THE_IMAGE = "intensity", "sobel", "edges_variance", "random", "random_token", "superpixel_random"
INVARIANT = {"saliency": True, "raw_attention": True, "sobel": True, "input_x_gradient": False}
SIZES = {"vit": (64, 64), "resnet": (64, 64)}


@cache
def case_of(name: str, model: str) -> Case | None:
    explainer = adapters.quick(name)
    # in double precision, so that what changes with the batch is no rounding
    case = Case(explainer, build(model).eval().double(), SIZES[model])
    return None if explainer.supports(case.model) else case


def samples_of(case: Case, n: int = 2) -> Samples:
    """Samples of one explainer, as the runner hands them over."""

    def reexplain(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return case.explain(model, images, targets)[:, 0].astype(float)

    inputs, targets = case.inputs[:n].double(), case.targets[:n].numpy()
    with torch.no_grad():
        logits = case.model(inputs).double().numpy()
    maps = reexplain(case.model, inputs, targets, np.arange(n))
    seeds = np.arange(5, 5 + n, dtype=np.uint32)
    return Samples(
        case.model, inputs, targets, maps, maps > np.inf, logits, seeds, (16, 16), batch_size=3, reexplain=reexplain
    )


def state(model: nn.Module) -> list[Any]:
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    of_modules = [
        (m.training, sorted(vars(m)), m.__dict__.get("forward"), *(len(getattr(m, kind)) for kind in hooks))
        for m in model.modules()
    ]
    return [of_modules, [(p.requires_grad, p.grad, p._version) for p in model.parameters()]]


def generators() -> list[Any]:
    numpy = np.random.get_state()
    return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", adapters.registry.names())
def test_every_explainer_is_scored(name: str, model: str) -> None:
    case = case_of(name, model)
    if case is None:
        pytest.skip(f"{name} does not explain this model")
    samples = samples_of(case)
    before, weights, drawn = state(case.model), {k: v.clone() for k, v in case.model.state_dict().items()}, generators()
    alone = replace(samples.take(np.array([1])), shared={}, batch_size=1)
    found = {}
    for spec in METRICS:
        metric = metrics.get(spec)
        found[spec] = scores = metric(samples)
        low, high = metric.bounds
        known = scores.values[np.isfinite(scores.values)]
        assert ((known >= low - 1e-9) & (known <= high + 1e-9)).all(), spec
        assert [bool(reason) for reason in scores.reasons] == np.isnan(scores.values).tolist()
    for spec in ALONE:
        values = metrics.get(spec)(alone).values
        np.testing.assert_allclose(values, found[spec].values[1:], rtol=1e-3, atol=1e-4, err_msg=spec)
    assert state(case.model) == before
    assert all(torch.equal(weights[key], value) for key, value in case.model.state_dict().items())
    assert generators() == drawn


@pytest.mark.parametrize("name", [*FIXED, *OF_THE_IMAGE])
def test_maps_that_do_not_come_from_the_model_fail_the_randomisation_test(name: str) -> None:
    samples = samples_of(case_of(name, "vit") or pytest.fail("a trivial explainer refuses a model"))
    np.testing.assert_allclose(metrics.get("mprt")(samples).values, 1)
    assert (metrics.get("efficient_mprt")(samples).values == 0).all()
    still = metrics.get("max_sensitivity[draws=2]")(samples).values == 0
    assert still.all() == (name in FIXED)


def test_maps_of_the_model_pass_the_randomisation_test_better() -> None:
    samples = samples_of(case_of("input_x_gradient", "vit") or pytest.fail("gradients refuse a model"))
    assert (metrics.get("mprt")(samples).values < 0.5).all()


def test_integrated_gradients_are_complete_and_gradients_are_not() -> None:
    metric = metrics.get("completeness_error")
    errors = {}
    for name in ("integrated_gradients[n_steps=400]", "saliency"):
        case = Case(adapters.get(name), build("vit").eval().double(), SIZES["vit"])
        errors[name] = metric(samples_of(case)).values
    assert (errors["integrated_gradients[n_steps=400]"] < 0.02).all()
    assert (errors["saliency"] > 0.1).all()


def test_a_shift_that_the_model_makes_up_for_moves_inputs_times_gradients_only() -> None:
    metric = metrics.get("input_invariance")
    scores = {name: metric(samples_of(case_of(name, "vit") or pytest.fail(name))).values for name in INVARIANT}
    for name, invariant in INVARIANT.items():
        assert ((scores[name] < 1e-4) == invariant).all(), name
    padded = metric(samples_of(case_of("saliency", "resnet") or pytest.fail("gradients refuse a model")))
    assert all("pads with zeros" in reason for reason in padded.reasons)
