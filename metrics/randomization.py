"""Randomization: does the map change when the model forgets what it has learned?

The parameters are drawn anew stage by stage, and each time the same images are explained again. A map that stays as
it was cannot have explained the model.

Every parameter is drawn from a normal distribution with mean 0 and the root mean square of its own values, which
works for weights, biases, tokens, positional embeddings and layer scales alike and keeps the scale of activations;
normalisation layers start afresh (weight 1, bias 0, running mean 0, running variance 1). Other buffers stay. Each
draw is seeded with the parameter's name, so that no two are alike.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.stats import entropy, rankdata
from torch import Tensor, nn

from metrics.base import Samples, pearson
from metrics.class_sensitivity import map_ssim
from metrics.maps import minmax_scaled
from metrics.quantus_bridge import GradientModel, bare
from metrics.reexplaining import ReexplainingMetric, noisy

Order = Literal["cascading_top_down", "cascading_bottom_up", "independent"]
Similarity = Literal["spearman", "pearson", "ssim"]
_FRESH = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@dataclass(frozen=True)
class Stage:
    """What is randomised together: a name, and the full names of parameters and normalisation statistics."""

    name: str
    tensors: list[str]


def find_stages(model: nn.Module) -> list[Stage]:
    """Return the stages of a model from its input to its output; every parameter is in exactly one.

    Stages are the children of the model, of its `nn.Sequential`s, and of whatever holds a stack of blocks: of a
    Vision Transformer the embedding (patch projection, prefix tokens, positional embedding), each block, and the
    head. Normalisations between stages and parameters that hang directly on a module join the stage before them, or
    the first one. Order is that of registration.
    """
    known = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    heads, found, waiting, last = _heads(model), list[Stage](), list[str](), False
    for name, part, names in _parts(*_unwrapped(model)):
        tensors = [tensor for tensor in names if tensor in known]  # a shared parameter counts where it comes first
        if not tensors:
            continue
        joins = part is None or _is_normalisation(part) or (last and part in heads)
        last = part in heads
        if joins and found:
            found[-1].tensors.extend(tensors)
        elif joins:
            waiting += tensors
        else:
            found.append(Stage(name, waiting + tensors))
            waiting = []
    return found or [Stage("all", waiting)]


def _heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules that timm's models call their classifier; of distilled ones there are two."""
    found: list[nn.Module] = []
    for module in model.modules():
        if callable(getter := getattr(module, "get_classifier", None)):
            classifier = getter()
            found += classifier if isinstance(classifier, tuple) else [classifier]
    return found


def _unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the first module inside the model that is more than a wrapper, and the prefix of its tensors' names."""
    prefix = ""
    while len(children := _children(model)) == 1 and not _direct(model) and any(children[0][1].children()):
        ((name, model),) = children
        prefix += f"{name}."
    return model, prefix


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module | None, list[str]]]:
    """Yield name, module and tensor names of what is not taken apart, and without a module what hangs in between."""
    if direct := _direct(module):
        yield prefix, None, [prefix + name for name in direct]
    for name, child in _children(module):
        listed = isinstance(child, nn.Sequential) and any(child.children())
        if listed or any(map(_is_stack, child.modules())):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child, [f"{prefix}{name}.{tensor}" for tensor in _names(child)]


def _is_stack(module: nn.Module) -> bool:
    """Tell whether the module lists blocks: composite modules of one class."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return False
    kinds = [type(child) for child in module if any(child.children()) and not isinstance(child, nn.Sequential)]
    return len(set(kinds)) < len(kinds)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if _names(child)]


def _direct(module: nn.Module) -> list[str]:
    """Return the names of what hangs directly on a module: parameters, and a normalisation's statistics."""
    statistics = [name for name, _ in module.named_buffers(recurse=False) if name in _FRESH] if is_norm(module) else []
    return [*dict(module.named_parameters(recurse=False)), *statistics]


def _names(module: nn.Module) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in _direct(part)]


def _is_normalisation(module: nn.Module) -> bool:
    return all(is_norm(part) for part in module.modules() if _direct(part))


def is_norm(module: nn.Module) -> bool:
    """Tell a normalisation layer by the name of its class, as PyTorch's and timm's have no base in common.

    One that owns a matrix is a layer that normalises besides, such as a cosine classifier.
    """
    plain = isinstance(module, nn.LayerNorm) or all(p.ndim < 2 for p in module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and plain


def redraw(model: nn.Module, stage: Stage, seed: int) -> None:
    """Randomise one stage of the model in place, see the top of this file.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    stage : Stage
        One of its `find_stages`.
    seed : int
        With a parameter's name, seeds its draw.
    """
    for name in stage.tensors:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        tensor: Tensor = getattr(owner, key)
        with torch.no_grad():
            if is_norm(owner) and key in _FRESH:
                tensor.fill_(_FRESH[key])
            elif tensor.is_floating_point():
                tensor.copy_(_drawn(tensor, f"{seed} {name}"))


def _drawn(tensor: Tensor, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return draw * float(tensor.double().square().mean().sqrt())


def duplicate(model: nn.Module) -> nn.Module:
    """Return a copy of the model, also of one that keeps tensors with a graph, as hooked attention does."""
    with torch.inference_mode(False):
        copied = copy.deepcopy(GradientModel(model)).module
    return bare(copied)


def randomised(model: nn.Module, order: Order, seed: int, stages: int | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name of the stage randomised last, and the model with it randomised: one copy, changed on the way.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    order : {"cascading_top_down", "cascading_bottom_up", "independent"}
        From the output to the input or the other way round, each stage on top of those before; or each alone.
    seed : int
        See `redraw`.
    stages : int, optional
        Yield only so many, evenly spaced, the last one among them.
    """
    copied = duplicate(model)
    found = find_stages(copied)
    wanted = set(np.ceil(np.linspace(len(found), 0, min(stages or len(found), len(found)), endpoint=False)).astype(int))
    alone = order == "independent"
    for place, stage in enumerate(found if order == "cascading_bottom_up" else found[::-1], 1):
        if alone and place not in wanted:
            continue
        before = {n: t.clone() for n, t in copied.state_dict().items() if n in stage.tensors} if alone else {}
        redraw(copied, stage, seed)
        if place in wanted:
            yield stage.name, copied
        if alone:
            copied.load_state_dict(before, strict=False)


def similarities(a: np.ndarray, b: np.ndarray, kind: Similarity, window: int = 7) -> np.ndarray:
    """Return (N,) float64 in [-1, 1]: how similar two sets of maps (N, H, W) are; NaN where one is constant.

    Parameters
    ----------
    a, b : ndarray
        (N, H, W) float64.
    kind : {"spearman", "pearson", "ssim"}
        Correlation of ranks or values, or SSIM as of `random_logit`.
    window : int
        Odd width of SSIM's windows in pixels.
    """
    if kind == "ssim":
        varied = (np.ptp(a, axis=(1, 2)) > 0) & (np.ptp(b, axis=(1, 2)) > 0)
        return np.array([map_ssim(one, two, window) if v else np.nan for v, one, two in zip(varied, a, b, strict=True)])
    pair = (maps.reshape(len(maps), -1) for maps in (a, b))
    return pearson(*((rankdata(maps, axis=1) for maps in pair) if kind == "spearman" else pair))


class Mprt(ReexplainingMetric):
    """Mean similarity of the map with those of the model whose stages are randomised (model parameter randomisation).

    Costs one explanation per image and stage: of a ViT with 12 blocks 14, of a ResNet-50 18. A stage after which the
    map is constant, so that no similarity is defined, is left out of the mean; the unrandomised model is not in it
    either. A stochastic explainer draws the same on the same image, whatever the model.

    Parameters
    ----------
    order : {"cascading_top_down", "cascading_bottom_up", "independent"}
        From the head to the embedding or the other way round, each stage on top of those before; or each alone.
    similarity : {"spearman", "pearson", "ssim"}
        Correlation of ranks or of values, or SSIM in windows of two patches and a pixel, see `random_logit`.
    absolute : bool
        Compare sizes of attributions; otherwise signed maps.
    stages : int, optional
        Explain after so many stages only, evenly spaced, the last one among them; all without it.
    seed : int
        Of the random parameters, which are the same for all samples and explainers.
    """

    name = "mprt"
    group = "randomization"
    formula = "mean over stages s of similarity(|e(x; model)|, |e(x; model with stages up to s randomised)|)"
    rewards = "A low score: the map depends on what the model has learned."
    fooled_by = (
        "Noise that depends on the weights; not by maps of the image alone, such as edges, which score 1, worst."
    )
    deviation = (
        "Quantus averages the unrandomised model in, resets normalisations only where it counts them as layers of "
        "their own, and never randomises class tokens, positional embeddings and the qkv of nn.MultiheadAttention; "
        "its layers of one shape all get the same weights."
    )
    higher_is_better = False
    bounds = (-1.0, 1.0)
    sign_policy = "absolute"
    undefined_reason = "constant map at every stage"
    reference = "Adebayo et al., NeurIPS 2018 (arXiv:1810.03292)"

    order: Order = "cascading_top_down"
    similarity: Similarity = "spearman"
    absolute: bool = True
    stages: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    def maps_of(self, samples: Samples, model: nn.Module) -> np.ndarray:
        """Return (N, H, W) float64: the maps of a randomised model."""
        return self.explain(samples, model, samples.inputs, np.arange(len(samples)))

    def reference_maps(self, samples: Samples) -> np.ndarray:
        """Return (N, H, W) float64: the maps that they are compared with."""
        return samples.maps

    def by_stage(self, samples: Samples) -> dict[str, np.ndarray]:
        """Return for each stage (N,) float64, the similarity after it is randomised; NaN where a map is constant."""
        signed = (lambda maps: maps) if not self.absolute else np.abs
        original, window = signed(self.reference_maps(samples)), 2 * max(samples.patch) + 1
        return {
            stage: similarities(original, signed(self.maps_of(samples, model)), self.similarity, window)
            for stage, model in randomised(samples.model, self.order, self.seed, self.stages)
        }

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64 in [-1, 1]."""
        values = np.stack(list(self.by_stage(samples).values()))
        known = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


class SmoothMprt(Mprt):
    """The randomisation test on maps averaged over noisy copies of the image, which rids them of shattered gradients.

    The map of the unrandomised model is averaged as well. Costs `draws` explanations per image, for each stage and
    once more.

    Parameters
    ----------
    order, similarity, absolute, stages, seed
        As for `mprt`; signs are dropped after averaging. The authors go from the input to the output.
    draws : int
        Noisy copies per image (authors 50, for which gradients are cheap).
    noise : float
        Standard deviation of the Gaussian noise, over the range of the image's values.
    """

    name = "smooth_mprt"
    formula = "mprt with e(x) = mean over draws of e(x + noise), noise normal with deviation .1 (max x - min x)"
    deviation = (
        "Quantus ignores the explainer it is given and explains with a gradient of its own, averages the unrandomised "
        "model in, and counts the image without noise as one of the draws."
    )
    reference = "Hedstrom et al., 2024 (arXiv:2405.02383)"

    order: Order = "cascading_bottom_up"
    draws: Annotated[int, Field(ge=1)] = 10
    noise: Annotated[float, Field(ge=0)] = 0.1

    def maps_of(self, samples: Samples, model: nn.Module) -> np.ndarray:
        """Return (N, H, W) float64: the averaged maps of any model."""
        return np.stack([self._averaged(samples, model, row) for row in range(len(samples))])

    def _averaged(self, samples: Samples, model: nn.Module, row: int) -> np.ndarray:
        image = samples.inputs[row]
        size = self.noise * float(image.max() - image.min())
        images = noisy(samples, row, "gaussian", size, self.draws)
        return self.explain(samples, model, images, np.full(self.draws, row)).mean(axis=0)

    def reference_maps(self, samples: Samples) -> np.ndarray:
        """Return (N, H, W) float64: the averaged maps of the unrandomised model."""
        return self.maps_of(samples, samples.model)


class EfficientMprt(ReexplainingMetric):
    """Relative rise of the map's complexity when the whole model is randomised.

    Complexity is the entropy of the histogram of the signed map's values. Costs one explanation per image. A map
    that becomes constant has complexity 0 and scores -1.

    Parameters
    ----------
    bins : int
        Bins of the histogram, equally wide from the map's lowest to its largest value.
    seed : int
        Of the random parameters, which are the same for all samples and explainers.
    """

    name = "efficient_mprt"
    group = "randomization"
    formula = "(H(e(x; randomised model)) - H(e(x; model))) / H(e(x; model)), H the entropy of a histogram"
    rewards = "A high score: the explanation is simpler than that of a model that knows nothing."
    fooled_by = "A sharp map with a few outliers, whatever they are, as long as noise follows with random weights."
    deviation = "Quantus leaves some parameters as they are, see mprt; the score of two given maps is the same."
    bounds = (-1.0, np.inf)
    reference = "Hedstrom et al., 2024 (arXiv:2405.02383)"

    bins: Annotated[int, Field(ge=2)] = 100
    seed: int = 0

    def complexity(self, maps: np.ndarray) -> np.ndarray:
        """Return (N,) float64 in [0, ln bins], in nats."""
        scaled = (minmax_scaled(values) if np.ptp(values) > 0 else values for values in maps)
        return np.array([entropy(np.histogram(values, bins=self.bins)[0]) for values in scaled])

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64, at least -1."""
        ((_, model),) = randomised(samples.model, "cascading_top_down", self.seed, stages=1)
        after = self.explain(samples, model, samples.inputs, np.arange(len(samples)))
        before = self.complexity(samples.maps)
        return (self.complexity(after) - before) / before
