"""Axiomatic: properties that a map of a certain kind should have by definition, measured instead of assumed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metrics.base import Metric, Samples
from metrics.imputers import STATIC
from metrics.perturbation import Output, target_output
from metrics.quantus_bridge import with_gradients
from metrics.randomization import duplicate
from metrics.reexplaining import ReexplainingMetric, logits_of

Baseline = Literal["zero", "black", "mean", "black_pixel", "blur"]
ROUNDING = 1e-5  # of maps in float32


class CompletenessError(Metric):
    """How far the map's sum is from the output it should add up to, relative to that output (completeness).

    The output is that on the image less that on the baseline. Methods such as integrated gradients from the same
    baseline reach 0 but for their rounding; for most others, whose unit is arbitrary, the score says so and no more.
    A map that is constant within every patch has been brought up from tokens, and each patch counts once, not once
    per pixel. The baseline's forward pass serves all explainers.

    Parameters
    ----------
    baseline : {"zero", "black", "mean", "black_pixel", "blur"}
        The image without information, as the imputer of that name makes it.
    output : {"logit", "probability"}
        What is to be explained.
    """

    name = "completeness_error"
    group = "axiomatic"
    formula = "|sum of e(x) - (f(x) - f(baseline))| / |f(x) - f(baseline)|"
    rewards = "A score of 0: the attributions share out the model's output exactly."
    fooled_by = "Any map scaled to the right sum; a map whose sum is 0 scores 1, whatever it shows."
    deviation = "Quantus compares the sum of the normalised map for exact equality, which never holds."
    higher_is_better = False
    bounds = (0.0, np.inf)
    scale_invariant = False
    expensive = True
    undefined_reason = "the output on the baseline is that on the image"
    reference = "Sundararajan, Taly & Yan, ICML 2017 (arXiv:1703.01365)"

    baseline: Baseline = "zero"
    output: Output = "logit"

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        at_baseline = samples.once(("logits of baseline", self.baseline), self._at_baseline)
        outputs = [target_output(logits, samples.targets, self.output) for logits in (samples.logits, at_baseline)]
        due = outputs[0] - outputs[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(native_sums(samples) - due) / np.abs(due)

    def _at_baseline(self, samples: Samples) -> np.ndarray:
        images = STATIC[self.baseline](samples).expand_as(samples.inputs)
        return logits_of(with_gradients(samples.model, images), images)


def native_sums(samples: Samples) -> np.ndarray:
    """Return (N,) float64: the sum of each map, where every patch counts once if the map is constant within each."""
    (height, width), (down, across) = samples.maps.shape[1:], samples.patch
    total = samples.maps.sum(axis=(1, 2))
    if height % down or width % across:
        return total
    corners = samples.maps[:, ::down, ::across]
    of_tokens = (corners.repeat(down, 1).repeat(across, 2) == samples.maps).all(axis=(1, 2))
    return np.where(of_tokens, corners.sum(axis=(1, 2)), total)


class InputInvariance(ReexplainingMetric):
    """Relative change of the map when all images are shifted by a constant and the model makes up for it.

    The constant is added to every value of the image, and what it contributes is subtracted from the bias of the
    first layer, so that no output changes, and no reason for it. A change below 1e-5 is rounding and counts as 0.
    Costs one explanation per image. Undefined where the first layer pads with zeros, which do not shift with the
    image, or the model reads its input in another way.

    Parameters
    ----------
    shift : float
        The constant, in the units of the model's normalised inputs.
    """

    name = "input_invariance"
    group = "axiomatic"
    formula = "|e(x + c; model with f(x + c) = f(x)) - e(x; model)| / |e(x; model)|"
    rewards = "A score of 0: the map follows what the model computes, not the image's zero point."
    fooled_by = "Any map that takes no value of the image: gradients, attention, edges and fixed maps score 0, best."
    deviation = "Quantus fails on timm's patch embedding, and asks only whether any value changes by more than 1e-4."
    higher_is_better = False
    bounds = (0.0, np.inf)
    undefined_reason = "the shift cannot be compensated: the outputs change"
    reference = "Kindermans et al., 2019 (arXiv:1711.00867)"

    shift: float = 1.0

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        blocked = samples.once("why no shift", lambda whole: np.full(len(whole), _why_not(whole), dtype=object))
        return [reason or why for reason, why in zip(super().undefined(samples), blocked, strict=True)]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64, at least 0."""
        model, images = shifted(samples.model, samples.inputs, self.shift), samples.inputs + self.shift
        maps = self.explain(samples, model, images, np.arange(len(samples)))
        moved, size = (np.linalg.norm(each, axis=(1, 2)) for each in (maps - samples.maps, samples.maps))
        pairs = (model, images), (samples.model, samples.inputs)
        before, after = (logits_of(with_gradients(*pair), pair[1]) for pair in pairs)
        change = np.where(moved > ROUNDING * size, moved / size, 0)
        return np.where(np.isclose(before, after, rtol=1e-3, atol=1e-3).all(axis=1), change, np.nan)


def _why_not(samples: Samples) -> str:
    """Return why no bias can make up for a shift of the images, or ""."""
    _, layer = first_layer(samples.model, samples.inputs[:1])
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"the first layer is a {type(layer).__name__}, not a convolution or a linear layer"
    padded = isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid") and layer.padding_mode == "zeros"
    return "the first layer pads with zeros, which do not shift with the image" if padded else ""


def first_layer(model: nn.Module, image: Tensor) -> tuple[str, nn.Module]:
    """Return name and (a copy of) the module with parameters that the model calls first on `image` (1, C, H, W)."""
    model, called = duplicate(model), list[tuple[str, nn.Module]]()
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not any(module.children()):
            module.register_forward_pre_hook(lambda layer, _, name=name: called.append((name, layer)))
    with torch.no_grad():
        with_gradients(model, image)(image)
    return called[0] if called else ("", model)


def shifted(model: nn.Module, images: Tensor, shift: float) -> nn.Module:
    """Return a copy of the model that says of images shifted by a constant what it says of the images.

    Parameters
    ----------
    model : nn.Module
        Its first layer is a convolution or a linear layer without zero padding.
    images : Tensor
        (N, C, H, W); the first one is used to find that layer.
    shift : float
        Added to every value of the image.
    """
    name, _ = first_layer(model, images[:1])
    copied = duplicate(model)
    layer: Any = copied.get_submodule(name)
    with torch.inference_mode(False), torch.no_grad():
        weight = layer.weight
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
        layer.bias = nn.Parameter((bias.double() - shift * weight.double().flatten(1).sum(1)).to(weight.dtype))
    return copied
