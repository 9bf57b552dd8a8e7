"""Gradients of the target logit with respect to the image, and what is made of many of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Annotated

import captum.attr
import torch
from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
from pydantic import Field
from torch import Tensor, fx, nn

from adapters.base import Explainer
from adapters.recording import Recording, SinglePass

_ROWS = 16  # images at a time in a forward and backward pass: 3 GB in all with a ViT-B
_LINEAR = (
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d),
)
_EXACT = {  # functions whose gradient is their exact share of a difference; products are, of a gate held constant
    *("add", "iadd", "add_", "sub", "cat", "concat", "mul", "imul", "mul_", "mean", "sum", "avg_pool2d"),
    *("adaptive_avg_pool2d", "flatten", "view", "reshape", "squeeze", "unsqueeze", "expand", "expand_as", "permute"),
    *(
        "transpose",
        "contiguous",
        "getitem",
        "chunk",
        "split",
        "size",
        "getattr",
        "eq",
        "_assert",
        "batch_norm",
        "pad",
        "dropout",
    ),
}


class _Gradient(SinglePass):
    family = "gradient"
    of_image = True
    passes = 2


class Saliency(_Gradient):
    """Absolute gradient of the target logit by the image, the largest over the colour channels: ``max_c |df/dx_c|``."""

    name = "saliency"
    reference = "Simonyan, Vedaldi and Zisserman, Deep inside convolutional networks, ICLR workshops 2014"

    def read(self, seen: Recording) -> Tensor:
        """Return (N, H, W) sizes of gradients, at least 0."""
        return seen.image_gradient.abs().amax(1)


class InputXGradient(_Gradient):
    """Image times gradient of the target logit, summed over the colour channels: ``sum_c x_c df/dx_c``.

    The image is the normalised one that the model receives. The CDAM paper takes the mean over the channels: the same
    map divided by their number, as in all maps of this family that are sums.
    """

    name = "input_x_gradient"
    signed = True
    reference = "Shrikumar et al., Not just a black box, arXiv 1605.01713, 2016"

    def read(self, seen: Recording) -> Tensor:
        """Return (N, H, W) signed scores in units of the logit."""
        return (seen.inputs.detach() * seen.image_gradient).sum(1)


class _Captum(Explainer):
    """Base of the methods that captum computes; their scores are summed over the colour channels."""

    family = "gradient"
    signed = True

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return captum's scores (N, C, H, W)."""
        raise NotImplementedError

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) scores."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum tells of each hook it sets
            return self.scores(model, inputs, targets).sum(1)


class IntegratedGradients(_Captum):
    """Integrated gradients of the target logit from a zero baseline (in normalised space), summed over the channels.

    ``x * mean_k df/dx(a_k x)``, weighted: the path integral is captum's Gauss-Legendre sum over `n_steps` points. The
    map sums to the logit's difference from the baseline's, but for the error of that sum.
    """

    name = "integrated_gradients"
    reference = "Sundararajan, Taly and Yan, Axiomatic attribution for deep networks, ICML 2017; captum (BSD)"
    quick = "n_steps=4"
    n_steps: Annotated[int, Field(ge=1)] = 50

    @property
    def cost(self) -> float:
        """A forward and a backward pass per step."""
        return 2 * self.n_steps

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return signed scores that sum to the logit's difference from the baseline's."""
        method = captum.attr.IntegratedGradients(model)
        return method.attribute(images, target=targets, n_steps=self.n_steps, internal_batch_size=_ROWS)


class _Sampled(_Captum):
    stochastic = True
    quick = "samples=3"
    samples: Annotated[int, Field(ge=1)] = 50

    @property
    def cost(self) -> float:
        """A forward and a backward pass per sample."""
        return 2 * self.samples


def _widened(model: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return model and images with at least float32 between them, in which captum draws."""
    wide = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return lambda copies: model(copies.to(images.dtype)), wide


class SmoothGrad(_Sampled):
    """Gradient of the target logit, averaged over noisy copies of the image and summed over the channels.

    ``mean_k df/dx(x + n_k)``. The sign is kept, as the paper leaves open and the CDAM paper does. The noise is
    Gaussian; its standard deviation is `noise` times the range of the image's values. `samples` copies: 50, as in the
    paper.
    """

    name = "smoothgrad"
    reference = "Smilkov et al., SmoothGrad, arXiv 1706.03825, 2017; captum (BSD)"
    kind = "smoothgrad"
    noise: Annotated[float, Field(ge=0)] = 0.15

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return what captum's NoiseTunnel makes of the gradients."""
        forward, wide = _widened(model, images)
        return captum.attr.NoiseTunnel(captum.attr.Saliency(forward)).attribute(
            wide,
            nt_type=self.kind,
            nt_samples=self.samples,
            nt_samples_batch_size=_ROWS,
            stdevs=self.noise * float(wide.max() - wide.min()),
            target=targets,
            abs=False,
        )


class SmoothGradSquared(SmoothGrad):
    """Squared gradient of the target logit, averaged over noisy copies of the image and summed over the channels.

    ``mean_k (df/dx(x + n_k))^2``; the copies are those of `smoothgrad`.
    """

    name = "smoothgrad_squared"
    signed = False
    reference = "Hooker et al., A benchmark for interpretability methods, NeurIPS 2019; captum (BSD)"
    kind = "smoothgrad_sq"


class VarGrad(SmoothGrad):
    """Variance of the gradient of the target logit over noisy copies of the image, summed over the channels.

    ``mean_k g_k^2 - (mean_k g_k)^2`` with ``g_k = df/dx(x + n_k)``, over the copies of `smoothgrad`.
    """

    name = "vargrad"
    signed = False
    reference = "Adebayo et al., Local explanation methods lack sensitivity, ICLR workshops 2018; captum (BSD)"
    kind = "vargrad"

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return variances; rounding must not make them negative."""
        return super().scores(model, images, targets).clamp(min=0)


class ExpectedGradients(_Sampled):
    """Expected gradients from baselines of uniform noise, summed over the channels.

    The mean over `samples` draws of ``(x - b)`` times the target logit's gradient at a random point between b and x.
    Erion et al. draw the baseline b from the training data, which an explainer here does not have. Instead, every
    value of b is uniform between the least and the largest of its channel in the image: Sturmfels et al.'s uniform
    baseline, averaged over. The map's expected sum is the logit's difference from its mean over such baselines. captum
    computes it, as GradientShap without noise in the image. `gradient_shap` differs in both: one baseline, zero, and
    noise in the image.
    """

    name = "expected_gradients"
    reference = (
        "Erion et al., Improving performance of deep learning models with axiomatic attribution priors and expected "
        "gradients, Nature Machine Intelligence 2021; baselines: Sturmfels et al., Distill 2020; captum (BSD)"
    )

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return captum's mean over the samples."""
        forward, wide = _widened(model, images)
        method, total = captum.attr.GradientShap(forward), torch.zeros_like(wide)
        for part in torch.arange(self.samples).split(_ROWS):
            drawn = method.attribute(wide, self.baselines(wide, len(part)), len(part), self.deviation(wide), targets)
            total += len(part) * drawn
        return total / self.samples

    def baselines(self, images: Tensor, count: int) -> Tensor:
        """Return images (count, C, H, W), of which each sample takes one at random."""
        low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
        return low + (high - low) * torch.rand(count, *images.shape[1:], dtype=images.dtype, device=images.device)

    def deviation(self, images: Tensor) -> float:
        """Return the standard deviation of the noise that is added to the images."""
        return 0.0


class GradientSHAP(ExpectedGradients):
    """GradientSHAP: image times gradient at random points between a zero baseline and noisy copies of the image.

    The mean over `samples` draws, summed over the channels. The baseline is zero in normalised space; the noise is
    Gaussian, its standard deviation `noise` times the range of the image's values. Both are choices of this project:
    captum has no default baseline, and by default no noise.
    """

    name = "gradient_shap"
    reference = "Lundberg and Lee, A unified approach to interpreting model predictions, NIPS 2017; captum (BSD)"
    noise: Annotated[float, Field(ge=0)] = 0.15

    def baselines(self, images: Tensor, count: int) -> Tensor:
        """Return the one zero image."""
        return torch.zeros_like(images)

    def deviation(self, images: Tensor) -> float:
        """Return the standard deviation of the noise that is added to the images."""
        return self.noise * float(images.max() - images.min())


class DeepLIFT(_Captum):
    """DeepLIFT with the Rescale rule, from a zero baseline (in normalised space), summed over the channels.

    Differences from the baseline take the place of gradients wherever a module is not linear; the map sums to the
    logit's difference from the baseline's. For that captum must see every such step as a module, used once, of a kind
    it has a rule for: ReLU and its kin, sigmoid, maximum pooling. Anything else (attention, LayerNorm, GELU, a ReLU
    that is called as a function or used twice, as in torchvision's ResNet) would silently count as linear, and is
    refused. Two things are not refused, though the sum is lost with them: a gate whose sigmoid is a module (some SE
    blocks, not timm's), as the rule says nothing of products and their gradient is taken; and more than one maximum
    pooling (VGG), where captum's rule is not exact.
    """

    name = "deeplift"
    reference = (
        "Shrikumar, Greenside and Kundaje, Learning important features through propagating activation differences, "
        "ICML 2017; captum (BSD)"
    )
    passes = 4

    def supports(self, model: nn.Module) -> str | None:
        """Return what in `model` captum's rules do not reach, or None."""
        return _beyond_rules(model)

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return signed scores that sum to the logit's difference from the baseline's."""
        return captum.attr.DeepLift(model).attribute(images, target=targets)


def _beyond_rules(model: nn.Module, activations: tuple[type, ...] = tuple(SUPPORTED_NON_LINEAR)) -> str | None:
    """Return what in `model` is no module of a kind that is linear or one of `activations`, used once, or None."""
    try:
        nodes = list(fx.Tracer().trace(model).nodes)
    except Exception as error:  # whatever its forward raises when traced
        return f"torch.fx cannot follow its forward ({str(error).splitlines()[0]})"
    called = {getattr(n.target, "__name__", n.target) for n in nodes if n.op in ("call_function", "call_method")}
    if found := sorted(called - _EXACT):
        return f"it calls {found[0]} as a function, where captum cannot apply a rule"
    uses = Counter(str(node.target) for node in nodes if node.op == "call_module")
    for node in (node for node in nodes if node.op == "call_module"):
        name, kind = str(node.target), type(model.get_submodule(str(node.target)))
        if kind not in (*_LINEAR, *activations):
            return f"it has {kind.__name__}, for which captum has no rule"
        if kind in activations and uses[name] > 1:
            return f"it uses {name!r} {uses[name]} times, and captum takes a module that is used once"
        if kind in activations and len(node.all_input_nodes[0].users) > 1:
            return f"what {name!r} receives is read elsewhere, too, whose gradient captum would change as well"
    return None


class GuidedBackprop(_Captum):
    """Guided backpropagation: the gradient, of which every ReLU passes on what is positive, summed over the channels.

    Only ReLUs that are modules of their own are guided, so models with other activations, or with ReLUs that are called
    as functions or used twice, are refused. It resembles an edge detector and depends little on the class (Adebayo et
    al., 2018).
    """

    name = "guided_backprop"
    reference = "Springenberg et al., Striving for simplicity, ICLR workshops 2015; captum (BSD)"
    passes = 2

    def supports(self, model: nn.Module) -> str | None:
        """Return that `model` has no ReLU, or other activations, or None."""
        if not any(isinstance(module, nn.ReLU) for module in model.modules()):
            return "it has no nn.ReLU, without which guided backpropagation is the plain gradient"
        return _beyond_rules(model, (nn.ReLU, nn.MaxPool2d))

    def scores(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Return signed scores."""
        return captum.attr.GuidedBackprop(model).attribute(images, target=targets)
