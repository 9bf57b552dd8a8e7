"""Faithfulness against Quantus 0.6.0: the same numbers where it is right, and proof of what keeps us from it elsewhere.

Quantus's features are single channel values in the order of the map, or drawn at random. Driven with our features (the
same subsets, independent patches) it has to agree, on grey and RGB images, real maps and random ones.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import quantus
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import metrics
from metrics import Samples
from metrics.faithfulness import DropCorrelation
from metrics.quantus_bridge import evaluate

from .conftest import input_x_gradient

SIDE, PATCH = 32, 8
REAL = ["imagenet_samples/catdog.png", "imagenet_samples/el2.png", "Dataset_BUSI_with_GT/malignant/malignant (1).png"]
Make = Callable[..., Samples]


def small_vit(channels: int) -> VisionTransformer:
    torch.manual_seed(1)
    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = VisionTransformer(in_chans=channels, **size).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


def real_images(shared: Path, channels: int) -> torch.Tensor:
    mode = "L" if channels == 1 else "RGB"
    images = [Image.open(shared / "data" / name).convert(mode).resize((SIDE, SIDE)) for name in REAL]
    pixels = np.stack([np.asarray(image, np.float32).reshape(SIDE, SIDE, channels) for image in images])
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def of(model: nn.Module, inputs: torch.Tensor, maps: np.ndarray) -> Samples:
    with torch.no_grad():
        logits = model(inputs).double().numpy()
    n = len(inputs)
    return Samples(
        model=model,
        inputs=inputs,
        targets=logits.argmax(1),
        maps=maps,
        roi=np.zeros(maps.shape, dtype=bool),
        logits=logits,
        seeds=np.arange(n, dtype=np.uint32) + 5,
        patch=(PATCH, PATCH),
    )


@pytest.fixture(params=["random", "real"])
def samples(request: pytest.FixtureRequest, channels: int) -> Samples:
    """Three images: random ones with random maps, or real ones with the maps of input x gradient."""
    model = small_vit(channels)
    if request.param == "real":
        inputs = real_images(request.getfixturevalue("shared"), channels)
        targets = model(inputs).argmax(1).numpy()
        return of(model, inputs, input_x_gradient(model, inputs, targets, np.arange(3)))
    rng = np.random.default_rng(3)
    inputs = torch.as_tensor(rng.standard_normal((3, channels, SIDE, SIDE)), dtype=torch.float32)
    return of(model, inputs, rng.standard_normal((3, SIDE, SIDE)))


def flat_indices(samples: Samples, features: np.ndarray) -> np.ndarray:
    """Return where in a flattened image (C H W) the features of one version are."""
    if features.size != SIDE**2:
        features = features.reshape(SIDE // PATCH, -1).repeat(PATCH, 0).repeat(PATCH, 1)
    return np.flatnonzero(np.tile(features.ravel(), samples.inputs.shape[1]))


both = pytest.mark.parametrize("channels", [1, 3])


@pytest.mark.parametrize(
    ("channels", "side", "patch"), [(1, 16, (1, 16)), (1, 16, (4, 4)), (1, 8, (1, 1)), (3, 12, (4, 4))]
)
def test_estimate_equals_quantus_where_quantus_can_step_by_a_patch(
    make_samples: Make, channels: int, side: int, patch: tuple[int, int]
) -> None:
    """Maps constant over a patch: its pixels follow each other in Quantus's order, so a step is a patch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    rng = np.random.default_rng(2)
    tokens = rng.standard_normal((5, side // patch[0], side // patch[1]))
    samples = make_samples(
        model=model,
        inputs=torch.as_tensor(rng.standard_normal((5, channels, side, side)), dtype=torch.float32),
        maps=tokens.repeat(patch[0], 1).repeat(patch[1], 2),
        patch=patch,
    )
    theirs = quantus.FaithfulnessEstimate(features_in_step=channels * patch[0] * patch[1], disable_warnings=True)
    expected = [evaluate(theirs, samples, row, model) for row in range(5)]
    np.testing.assert_allclose(metrics.get("faithfulness_estimate")(samples).values, expected, atol=1e-5)


@both
@pytest.mark.parametrize(
    "spec",
    [
        "faithfulness_correlation[imputer=black,runs=30]",
        "faithfulness_correlation[imputer=black,runs=30,subset=0.6]",
        "faithfulness_correlation_pixels[runs=40]",
    ],
)
def test_correlation_equals_quantus_on_the_same_subsets(
    samples: Samples, channels: int, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = metrics.get(spec)
    assert isinstance(metric, DropCorrelation)
    scores = metric(samples).values
    for row in range(3):
        subsets = metric.removed(samples.take(np.array([row])))[0]
        drawn: Iterator[np.ndarray] = (flat_indices(samples, features) for features in subsets)
        monkeypatch.setattr(np.random, "choice", lambda n, size, replace, drawn=drawn: next(drawn))
        theirs = quantus.FaithfulnessCorrelation(
            nr_runs=len(subsets), normalise=False, return_aggregate=False, disable_warnings=True
        )
        assert scores[row] == pytest.approx(evaluate(theirs, samples, row, samples.model), abs=1e-5)


def test_correlation_over_pixels_is_distributed_as_that_of_quantus() -> None:
    """One image many times, every time with subsets of its own; one channel: there a value is a pixel."""
    n, runs, subset = 150, 20, 40
    rng = np.random.default_rng(8)
    image = torch.as_tensor(rng.standard_normal((1, 1, SIDE, SIDE)), dtype=torch.float32)
    model = small_vit(1)
    own = of(model, image.repeat(n, 1, 1, 1), np.repeat(rng.standard_normal((1, SIDE, SIDE)), n, axis=0))
    ours = metrics.get("faithfulness_correlation_pixels", runs=runs, subset=subset)(own).values
    np.random.seed(0)
    theirs = quantus.FaithfulnessCorrelation(
        nr_runs=runs, subset_size=subset, normalise=False, return_aggregate=False, disable_warnings=True
    )(model=model, x_batch=own.inputs.numpy(), y_batch=own.targets, a_batch=own.maps[:, None], batch_size=n)
    assert ks_2samp(ours, theirs).pvalue > 1e-3
    error = np.hypot(ours.std(), np.std(theirs)) / np.sqrt(n)
    assert abs(ours.mean() - np.mean(theirs)) < 4 * error and error < 0.04


def per_input(samples: Samples) -> np.ndarray:
    """Return maps that, times the change of the input summed over channels, are the samples' maps."""
    change = samples.inputs - samples.inputs.amin((1, 2, 3), keepdim=True)
    change = change.sum(1).double().numpy()
    return np.divide(samples.maps, change, out=np.zeros_like(change), where=change > 0)


def independent_patches(samples: Samples, row: int) -> Callable[..., np.ndarray]:
    """Return what Quantus calls to perturb, starting from the whole image every time."""
    whole = samples.inputs[row : row + 1].numpy().reshape(1, -1)

    def perturb(arr: np.ndarray, indices: np.ndarray, **_: object) -> np.ndarray:
        image = whole.copy()
        image[:, np.ravel(indices)] = whole.min()
        return image

    return perturb


def best_scaled(a: np.ndarray, b: np.ndarray, batched: bool) -> np.ndarray:
    """Yeh et al.'s scaling as a loss of Quantus: drops `a`, sums `b`."""
    scale = max(float((a * b).mean() / (b * b).mean()), 0)
    return ((a - scale * b) ** 2).mean(axis=-1)


@both
@pytest.mark.parametrize(("name", "loss"), [("infidelity_raw", "mse"), ("infidelity", best_scaled)])
def test_infidelity_equals_quantus_once_its_patches_are_independent(
    samples: Samples, channels: int, name: str, loss: str | Callable
) -> None:
    lowest = samples.inputs.amin((1, 2, 3), keepdim=True)
    maps = samples.maps * (samples.inputs > lowest).all(1).numpy()  # where nothing changes, nothing can be said
    scores = metrics.get(name, imputer="black", largest=1)(of(samples.model, samples.inputs, maps)).values
    given = of(samples.model, samples.inputs, per_input(of(samples.model, samples.inputs, maps)))
    for row in range(3):
        theirs = quantus.Infidelity(
            perturb_patch_sizes=[PATCH],
            perturb_func=independent_patches(samples, row),
            loss_func=loss,
            n_perturb_samples=1,
            disable_warnings=True,
        )
        assert evaluate(theirs, given, row, samples.model) == pytest.approx(scores[row], rel=1e-5)


@pytest.mark.parametrize("channels", [3])
def test_infidelity_of_quantus_piles_patches_up_and_repeats_itself(samples: Samples, channels: int) -> None:
    seen = []

    class Seen(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs.clone())
            return samples.model(inputs)

    def score(repeats: int) -> float:
        theirs = quantus.Infidelity(perturb_patch_sizes=[PATCH], n_perturb_samples=repeats, disable_warnings=True)
        return evaluate(theirs, samples, 0, Seen().eval())

    once = score(1)
    assert (seen[-1] == samples.inputs[0].min()).all()
    assert score(3) == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize("channels", [1])
def test_sensitivity_n_of_quantus_forgets_all_but_the_first_batch(samples: Samples, channels: int) -> None:
    theirs = [
        quantus.SensitivityN(features_in_step=64, return_aggregate=False, disable_warnings=True)(
            model=samples.model,
            x_batch=samples.inputs.numpy()[:n],
            y_batch=samples.targets[:n],
            a_batch=samples.maps[:n, None] / np.abs(samples.maps).max(),
            batch_size=2,
            softmax=False,
        )
        for n in (2, 3)
    ]
    assert len(theirs[0]) > 1
    np.testing.assert_allclose(*theirs, atol=1e-6)
