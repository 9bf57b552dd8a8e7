"""Class activation maps: a layer's channels, weighted by what they do for a class, on the grid of that layer."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import pytorch_grad_cam
import scipy.linalg
import torch
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import vit
from adapters.base import Explainer, min_max
from adapters.recording import Recording, SinglePass
from adapters.state import preserved
from explainer_bench import RequestError

_last_maps: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _OfLayer(Explainer):
    """Base of all class activation maps: knows the layer they are read off."""

    family = "cam"
    upsampling = "bilinear"
    layer: str = ""

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no layer to read a map off, or None."""
        if self.layer:
            return _no_module(model, self.layer)
        if _holds_vit(model):
            return vit.unsupported(model)
        return None if last_map(model) else "no layer was found in it whose maps it pools: name one, layer=NAME"

    def target(self, model: nn.Module) -> nn.Module:
        """Return the layer to read the map off."""
        if not self.layer and _holds_vit(model):
            return vit.find(model).blocks[-1].norm1
        return model.get_submodule(self.layer or last_map(model))


def _holds_vit(model: nn.Module) -> bool:
    return any(isinstance(module, VisionTransformer) for module in model.modules())


def _no_module(model: nn.Module, layer: str) -> str | None:
    names = [name for name, _ in model.named_modules() if name]
    if layer in names:
        return None
    near = difflib.get_close_matches(layer, names) or [name for name, _ in model.named_children()]
    return f"it has no module {layer!r}; near are {', '.join(near)}"


def last_map(model: nn.Module) -> str:
    """Return the name of the last module to return maps of more than one position, or "" where these are not pooled.

    A black image finds it, once per model. What it returns must be followed by pooled features alone, not by tokens.
    """
    if model not in _last_maps:
        try:
            shapes = _returned(model)
        except (RuntimeError, ValueError, AssertionError, TypeError, StopIteration):  # it takes something else
            shapes = []
        _last_maps[model] = _pooled(shapes, _channels_last(model))
    return _last_maps[model]


def _returned(model: nn.Module) -> list[tuple[str, torch.Size]]:
    """Return name and shape of all tensors that modules return for a black image, in that order."""
    shapes: list[tuple[str, torch.Size]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: shapes.append((name, getattr(output, "shape", torch.Size())))

    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    image = first.weight.new_zeros(1, first.in_channels, *_image_size(model))
    with preserved(model), torch.no_grad():
        model.eval()
        for name, module in model.named_modules():
            module.register_forward_hook(note(name))
        model(image)
    return shapes


def _image_size(model: nn.Module) -> tuple[int, int]:
    """Return height and width of the images that a timm model is made for; of another, 224 each."""
    modules = list(model.modules())
    fixed = [module.img_size for module in modules if isinstance(module, PatchEmbed) and module.img_size]
    usual = [cfg["input_size"][1:] for module in modules if (cfg := getattr(module, "pretrained_cfg", None))]
    return [*fixed, *usual, (224, 224)][0]


def _pooled(shapes: list[tuple[str, torch.Size]], channels_last: bool) -> str:
    found = ""
    for name, shape in shapes:
        grid = shape[1:3] if channels_last else shape[2:]
        if len(shape) == 4 and grid.numel() > 1:
            found = name
        elif len(shape) == 3:
            found = ""
    return found


def _channels_last(model: nn.Module) -> bool:
    return any(getattr(module, "output_fmt", "") == "NHWC" for module in model.modules())  # timm's Swin


def _spatial(model: nn.Module, images: Tensor, values: Tensor) -> Tensor:
    """Return what a layer put out, tokens or maps, or the gradient there, as (N, C, h, w)."""
    if values.ndim == 4 and values[0].numel() > values.shape[-1 if _channels_last(model) else 1]:
        return values.movedim(-1, 1) if _channels_last(model) else values
    if values.ndim == 3 and vit.unsupported(model) is None:
        grid, prefix = vit.token_grid(model, images), vit.find(model).num_prefix_tokens
        if values.shape[1] == prefix + grid[0] * grid[1]:
            return values[:, prefix:].unflatten(1, grid).movedim(-1, 1)
    raise RequestError(f"the layer's output {tuple(values.shape)} has no map in it: name another, layer=NAME.")


def _clipped(maps: Tensor) -> Tensor:
    """Clip (N, h, w) maps at 0 and scale each to [0, 1]."""
    return min_max(maps.clamp(min=0))


class _SinglePassCAM(_OfLayer, SinglePass):
    """Base of the maps that are a sum over channels of one layer's activations, each weighted by the gradient there."""

    passes = 1

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the layer."""
        return [self.target(model)]

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Return what (N, C, h, w) activations are multiplied by, of a shape that broadcasts to theirs."""
        raise NotImplementedError

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) maps in [0, 1]."""
        layer = self.target(seen.model)
        activations = _spatial(seen.model, seen.inputs, seen.output(layer))
        gradients = _spatial(seen.model, seen.inputs, seen.gradient(layer))
        return _clipped((self.weights(activations, gradients) * activations).sum(1))


class GradCAM(_SinglePassCAM):
    """Grad-CAM: each channel of a layer weighted by the mean over positions of the target logit's gradient.

    ``(sum_c mean_ij(dA_c) A_c)^+``: the weighted channels are summed, clipped at 0, scaled to [0, 1] per image and
    resized bilinearly, as in pytorch-grad-cam, which scales once more after resizing: the same map but for a factor and
    an offset.

    The layer, here and in all maps of this family, is `layer`, a dotted name as in ``model.named_modules()``. By
    default it is ``blocks[-1].norm1`` in a timm Vision Transformer, its prefix tokens dropped, and elsewhere the last
    module that returns maps of more than one position, found by running one black image: ``layer4`` of a ResNet,
    ``features`` of a DenseNet. A model in which tokens rather than pooled features follow needs `layer`.
    """

    name = "gradcam"
    reference = "Selvaraju et al., Grad-CAM, ICCV 2017"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Return (N, C, 1, 1)."""
        return gradients.mean((2, 3), keepdim=True)


class GradCAMPlusPlus(_SinglePassCAM):
    """Grad-CAM++: the positive gradients g of each channel A summed with weights that stand for higher derivatives.

    The weight of a position is ``g^2 / (2 g^2 + sum(A) g^3)``, 0 where g is: equation 19 of the paper, which takes the
    exponential of the logit for the score. As in pytorch-grad-cam, 1e-6 is added to the denominator; gradients that
    are small against 1e-3 are damped by it. The rest, and the layer, are Grad-CAM's.
    """

    name = "gradcam_plus_plus"
    reference = "Chattopadhay et al., Grad-CAM++, WACV 2018"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Return (N, C, 1, 1)."""
        squares = gradients**2
        total = activations.sum((2, 3), keepdim=True)
        shares = torch.where(gradients != 0, squares / (2 * squares + total * squares * gradients + 1e-6), 0)
        return (gradients.clamp(min=0) * shares).sum((2, 3), keepdim=True)


class LayerCAM(_SinglePassCAM):
    """LayerCAM: every activation weighted by the positive part of its own gradient, ``(sum_c dA_c^+ A_c)^+``.

    The rest, and the layer, are Grad-CAM's.
    """

    name = "layercam"
    reference = "Jiang et al., LayerCAM, IEEE Transactions on Image Processing 2021"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Return (N, C, h, w)."""
        return gradients.clamp(min=0)


class HiResCAM(_SinglePassCAM):
    """HiResCAM: every activation weighted by its own gradient, ``(sum_c dA_c A_c)^+``; the rest is Grad-CAM's.

    The sum over channels is clipped at 0, as in pytorch-grad-cam. Where the layer's maps are averaged and read by a
    linear layer, it equals Grad-CAM.
    """

    name = "hirescam"
    reference = "Draelos and Carin, Use HiResCAM instead of Grad-CAM, arXiv 2011.08891, 2020"

    def weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Return (N, C, h, w)."""
        return gradients


def _component(maps: Tensor, sign: str, preference: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the positions of each of (N, C, h, w) maps on their first principal component, (N, h, w).

    Parameters
    ----------
    maps : Tensor
        (N, C, h, w); each image is computed by itself, on the CPU.
    sign : str
        "raw": what NumPy's singular value decomposition happens to give. "deterministic": in float64, and turned
        around where `preference` of it is negative.
    preference : callable
        From (N, h, w) to (N,).
    """
    if sign == "raw":
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))  # NumPy has no bfloat16
        return torch.from_numpy(get_2d_projection(wide.cpu().numpy()))
    projections = torch.stack([_principal(image.double().cpu()) for image in maps])
    return torch.where(preference(projections)[:, None, None] < 0, -projections, projections)


def _principal(channels: Tensor) -> Tensor:
    """Return the projection (h, w) of (C, h, w) on its first principal component; its sign is arbitrary."""
    points = channels.flatten(1)
    centred = (points - points.mean(1, keepdim=True)).numpy()
    few = centred if len(points) <= points.shape[1] else centred.T
    last = len(few) - 1
    (value,), vector = scipy.linalg.eigh(few @ few.T, subset_by_index=[last, last])
    projection = vector.T @ few if few is centred else vector.T * np.sqrt(max(value, 0))
    return torch.from_numpy(projection).view(channels.shape[1:])


class EigenCAM(_OfLayer, SinglePass):
    """Eigen-CAM: a layer's activations at each position, projected on their first principal component.

    It does not know the class. Activations are centred per channel first; the projection is clipped at 0, scaled to
    [0, 1] per image and resized bilinearly, all as in pytorch-grad-cam. The layer is Grad-CAM's.

    The sign of a principal component is arbitrary, and clipping keeps one half. With ``sign="deterministic"`` the
    value furthest from 0 is positive (Chung and Ying, Seg-Eigen-CAM, Applied Sciences 2025). With ``sign="raw"`` it is
    as NumPy's singular value decomposition leaves it, as in pytorch-grad-cam: the map may be its own opposite, and
    differ between machines.
    """

    name = "eigencam"
    class_discriminative = False
    reference = "Muhammad and Yeasin, Eigen-CAM, IJCNN 2020"
    passes = 1
    sign: Literal["deterministic", "raw"] = "deterministic"

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return the layer."""
        return [self.target(model)]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) maps in [0, 1]."""
        maps = _spatial(seen.model, seen.inputs, seen.output(self.target(seen.model)))
        return _clipped(_component(maps, self.sign, lambda found: found.amax((1, 2)) + found.amin((1, 2))))


class GradCAMEigenAug(_OfLayer):
    """Grad-CAM as Chung et al. use it: pytorch-grad-cam with its eigen_smooth and aug_smooth.

    The channels, weighted as in Grad-CAM, are not summed but projected on their first principal component
    (eigen_smooth); clipped at 0, scaled to [0, 1], resized bilinearly to the image and scaled again. The map is the
    mean of six such runs (aug_smooth): the image and its mirror image, each times 0.9, 1 and 1.1. The layer is
    Grad-CAM's; in the study it is ``blocks[-1].norm1``, and the target is class 1 whatever the label.

    The sign of a principal component is arbitrary, and clipping keeps one half. With ``sign="deterministic"`` each run
    takes the sign that correlates positively with the sum of the weighted channels, which is Grad-CAM before clipping.
    With ``sign="raw"`` it is as NumPy's singular value decomposition leaves it, as in the study: a run's map may be its
    own opposite, and differ between machines.
    """

    name = "gradcam_eigen_aug"
    reference = (
        "Chung et al., Evaluating visual explanations of attention maps for transformer-based medical imaging, "
        "iMIMIC at MICCAI 2024; pytorch-grad-cam (MIT)"
    )
    passes = 6
    sign: Literal["deterministic", "raw"] = "deterministic"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) maps in [0, 1]."""
        images = inputs.detach()
        plain = [self._run(model, images * factor, targets) for factor in (0.9, 1, 1.1)]
        mirrored = [self._run(model, images.flip(-1) * factor, targets).flip(-1) for factor in (0.9, 1, 1.1)]
        return torch.stack(plain + mirrored).mean(0)

    def _run(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        layer = self.target(model)
        seen = Recording(model, images, targets, [layer], [layer])
        weights = _spatial(model, images, seen.gradient(layer)).mean((2, 3), keepdim=True)
        weighted = weights * _spatial(model, images, seen.output(layer))
        total = weighted.sum(1).double().cpu()
        native = _clipped(_component(weighted, self.sign, lambda found: (found * total).sum((1, 2))))
        return _clipped(self.upsample(native, (images.shape[-2], images.shape[-1])))


class _Package(_OfLayer):
    """Base of the maps that pytorch-grad-cam computes, from one forward pass per channel of the layer."""

    batch_size = 1  # the package masks an image by all channels at once
    half_precision = False  # it works in NumPy, which has no bfloat16

    def method(self, model: nn.Module, layer: nn.Module, to_maps: Callable[[Tensor], Tensor]) -> BaseCAM:
        """Return the package's method; `to_maps` makes (N, C, h, w) of the layer's output."""
        raise NotImplementedError

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) maps in [0, 1]."""
        images = inputs.detach()
        # Cloned, because what follows the layer may work in place.
        method = self.method(model, self.target(model), lambda values: _spatial(model, images, values).clone())
        try:
            with redirect_stderr(StringIO()):  # a progress bar per image
                maps = method(images, targets=[ClassifierOutputTarget(target) for target in targets.tolist()])
        finally:
            method.activations_and_grads.release()
        return torch.from_numpy(maps)


class ScoreCAM(_Package):
    """Score-CAM: each channel weighted by the target logit of the image masked by that channel; no gradients.

    A channel becomes a mask by resizing it bilinearly to the image and scaling it to [0, 1]; the image is multiplied by
    it. The weights are the softmax over channels of the logits (the paper subtracts that of a baseline image, which
    the softmax cancels). As they are positive, and the activations behind a LayerNorm of both signs, the sum may be
    below 0 everywhere in a Vision Transformer, and the map empty. The rest, and the layer, are Grad-CAM's. It takes
    one forward pass per channel: 768 in a ViT-B.
    """

    name = "scorecam"
    reference = "Wang et al., Score-CAM, CVPR workshops 2020; pytorch-grad-cam (MIT)"
    passes = 769

    def method(self, model: nn.Module, layer: nn.Module, to_maps: Callable[[Tensor], Tensor]) -> BaseCAM:
        """Return pytorch-grad-cam's ScoreCAM."""
        return pytorch_grad_cam.ScoreCAM(model, [layer], to_maps)


class AblationCAM(_Package):
    """Ablation-CAM: each channel weighted by the share of the target logit that is lost when it is set to 0.

    The share is of the logit itself, ``(y - y_k) / y``, so that a negative logit turns all weights around: as in the
    paper. A channel is set to 0 at all positions, those of prefix tokens included. pytorch-grad-cam does so only where
    the layer's least value is 0, as behind a ReLU; elsewhere it sets the channel to 1e7 below the least value, which
    is not followed here. The rest, and the layer, are Grad-CAM's. It takes one forward pass per channel: 768 in a
    ViT-B.
    """

    name = "ablationcam"
    reference = "Desai and Ramaswamy, Ablation-CAM, WACV 2020; pytorch-grad-cam (MIT)"
    passes = 770

    def method(self, model: nn.Module, layer: nn.Module, to_maps: Callable[[Tensor], Tensor]) -> BaseCAM:
        """Return pytorch-grad-cam's AblationCAM."""
        return pytorch_grad_cam.AblationCAM(model, [layer], to_maps, _Zeroed(_channels_last(model)), batch_size=16)


class _Zeroed(AblationLayer):
    """What stands in for the layer: returns its output for one image, with another channel set to 0 in every copy."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last

    def set_next_batch(self, input_batch_index: int, activations: Tensor, num_channels_to_ablate: int) -> None:
        """Prepare the next copies."""
        image = activations[input_batch_index]
        copies = image.repeat(num_channels_to_ablate, *(1 for _ in image.shape))
        dimension = -1 if self.channels_last or image.ndim == 2 else 1
        copies.movedim(dimension, 1)[range(len(copies)), self.indices[: len(copies)]] = 0
        self.activations = copies

    def __call__(self, _: Tensor) -> Tensor:
        """Return the copies, in a graph for models that set hooks on it."""
        return self.activations.requires_grad_(torch.is_grad_enabled())
