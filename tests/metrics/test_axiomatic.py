"""Axiomatic: explainers that satisfy an axiom reach the bound, and those that break it do not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import metrics
from explainer_bench import RequestError
from metrics import Samples
from metrics.axiomatic import first_layer, native_sums, shifted
from metrics.quantus_bridge import GradientModel

from .conftest import input_x_gradient

Make = Callable[..., Samples]
BASELINES = "zero", "black", "mean", "black_pixel", "blur"


class Additive(nn.Module):
    """Logits that are weighted sums of the values, and an offset."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Linear(3 * 16 * 16, classes)
        self.head.weight.data = torch.randn(self.head.weight.shape, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.flatten(1))

    def shares(self, change: Tensor, targets: np.ndarray) -> np.ndarray:
        """(N, H, W): what each pixel contributes to the target's logit."""
        weights = self.head.weight[torch.as_tensor(targets)].view(-1, *change.shape[1:])
        return (weights * change).sum(1).detach().double().numpy()


def additive(make_samples: Make, **changes: object) -> Samples:
    model = Additive()
    samples = make_samples(4, model=model)
    with torch.no_grad():
        logits = model(samples.inputs).double().numpy()
    return replace(samples, logits=logits, maps=model.shares(samples.inputs, samples.targets), **changes)


@pytest.mark.parametrize("baseline", BASELINES)
def test_exact_shares_of_the_change_from_the_baseline_score_zero(make_samples: Make, baseline: str) -> None:
    samples = additive(make_samples)
    fill = metrics.imputers.STATIC[baseline](samples)
    maps = samples.model.shares(samples.inputs - fill, samples.targets)
    metric = metrics.get("completeness_error", baseline=baseline)
    np.testing.assert_allclose(metric(replace(samples, maps=maps)).values, 0, atol=1e-4)
    others = metrics.get("completeness_error", baseline="zero" if baseline != "zero" else "black")
    assert (others(replace(samples, maps=maps)).values > 1e-2).any()


@given(factor=st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_error_is_linear_in_the_missing_share(factor: float) -> None:
    model = Additive()
    inputs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    maps = model.shares(inputs, targets := np.array([1, 2]))
    logits = model(inputs).detach().double().numpy()
    seeds = np.zeros(2, dtype=np.uint32)
    samples = Samples(model, inputs, targets, factor * maps, maps > 9, logits, seeds, (4, 4))
    scores = metrics.get("completeness_error")(samples).values
    if factor:
        np.testing.assert_allclose(scores, abs(factor - 1), atol=1e-4)
        assert (scores >= 0).all()


def test_map_that_sums_to_zero_scores_one(make_samples: Make) -> None:
    samples = make_samples()
    maps = samples.maps - samples.maps.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(metrics.get("completeness_error")(replace(samples, maps=maps)).values, 1)


def test_probability_is_what_is_explained_where_asked(make_samples: Make) -> None:
    samples = make_samples()
    with torch.no_grad():
        outputs = samples.model(samples.inputs), samples.model(0 * samples.inputs)
    chosen = [o.double().softmax(1).numpy()[np.arange(5), samples.targets] for o in outputs]
    due = chosen[0] - chosen[1]
    expected = np.abs(samples.maps.sum(axis=(1, 2)) - due) / np.abs(due)
    found = metrics.get("completeness_error[output=probability]")(samples).values
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_baseline_image_itself_is_undefined(make_samples: Make) -> None:
    samples = make_samples(2)
    inputs = samples.inputs * torch.tensor([1.0, 0.0])[:, None, None, None]
    with torch.no_grad():
        logits = samples.model(inputs).double().numpy()
    scores = metrics.get("completeness_error")(replace(samples, inputs=inputs, logits=logits))
    assert scores.reasons == ["", "the output on the baseline is that on the image"]


def test_baseline_is_asked_once_for_all_explainers(make_samples: Make) -> None:
    samples, passes = make_samples(), []
    handle = samples.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    for factor in (1, 2, 3):
        metrics.get("completeness_error")(replace(samples, maps=factor * samples.maps))
    handle.remove()
    assert sum(passes) == 5 + 1


def test_token_maps_count_each_token_once(make_samples: Make) -> None:
    tokens = np.random.default_rng(0).standard_normal((5, 4, 4))
    pixels = tokens.repeat(4, 1).repeat(4, 2)
    np.testing.assert_allclose(native_sums(make_samples(maps=pixels)), tokens.sum(axis=(1, 2)))
    touched = pixels.copy()
    touched[:, 5, 6] += 1e-3
    np.testing.assert_allclose(native_sums(make_samples(maps=touched)), touched.sum(axis=(1, 2)))
    assert native_sums(make_samples(maps=pixels, patch=(5, 5))) == pytest.approx(pixels.sum(axis=(1, 2)))


def gradient(model: nn.Module, images: Tensor, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    images = images.detach().clone().requires_grad_()
    chosen = model(images).gather(1, torch.as_tensor(targets)[:, None]).sum()
    (found,) = torch.autograd.grad(chosen, images)
    return found.abs().sum(1).double().numpy()


def own_maps(samples: Samples, explain: Callable[..., np.ndarray]) -> Samples:
    maps = explain(samples.model, samples.inputs, samples.targets, np.arange(len(samples)))
    return replace(samples, maps=maps, reexplain=explain)


def vit() -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    return VisionTransformer(**size).eval()


def unbiased() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 4)
    return nn.Sequential(*layers).eval()


def reflecting() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    return nn.Sequential(first, nn.GELU(), nn.Flatten(), nn.Linear(4 * 16 * 16, 4)).eval()


@pytest.mark.parametrize("build", [vit, unbiased, reflecting, Additive, lambda: GradientModel(vit())])
@pytest.mark.parametrize("shift", [1.0, -0.3])
def test_gradients_are_invariant_and_inputs_times_gradients_are_not(
    make_samples: Make, build: Callable[[], nn.Module], shift: float
) -> None:
    samples = make_samples(3, model=build())
    metric = metrics.get("input_invariance", shift=shift)
    np.testing.assert_allclose(metric(own_maps(samples, gradient)).values, 0, atol=1e-3)
    assert (metric(own_maps(samples, input_x_gradient)).values > 0.05).all()


def test_shift_of_an_additive_model_in_closed_form(make_samples: Make) -> None:
    samples = additive(make_samples, reexplain=input_x_gradient)
    expected = samples.model.shares(torch.full_like(samples.inputs, 0.7), samples.targets)
    ratio = np.linalg.norm(expected, axis=(1, 2)) / np.linalg.norm(samples.maps, axis=(1, 2))
    np.testing.assert_allclose(metrics.get("input_invariance[shift=0.7]")(samples).values, ratio, rtol=1e-4)


def test_outputs_on_real_images_stay_and_the_model_is_left_alone(shared: Path) -> None:
    folder, model = shared / "data/imagenet_samples", vit()
    files = [folder / name for name in ("catdog.png", "el2.png")]
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB").resize((16, 16)), np.float32) for f in files])
    images = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(shifted(model, images, 2.0)(images + 2), model(images), rtol=1e-4, atol=1e-5)
        assert (model(images + 2) - model(images)).abs().max() > 1e-3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class LooksTwice(nn.Module):
    """Reads its input past the first layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body = unbiased()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs) + 5 * inputs.mean((1, 2, 3))[:, None] * torch.arange(4.0)


REFUSED = {
    "pads with zeros": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(1024, 4)),
    "is a BatchNorm2d": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(768, 4)),
    "cannot be compensated": LooksTwice,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_without_exact_compensation_are_undefined_with_the_reason(make_samples: Make, reason: str) -> None:
    scores = metrics.get("input_invariance")(make_samples(3, model=REFUSED[reason]().eval()))
    assert np.isnan(scores.values).all() and all(reason in each for each in scores.reasons)


def test_first_layer_is_the_first_that_runs() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(4, 2), nn.Conv2d(3, 4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.stem(inputs).mean((2, 3)))

    assert first_layer(Reversed(), torch.zeros(1, 3, 4, 4))[0] == "stem"


def test_no_explainer_is_one_clear_line(make_samples: Make) -> None:
    with pytest.raises(RequestError, match="reexplain"):
        metrics.get("input_invariance")(make_samples(reexplain=None))
