"""Gradients of a Vision Transformer by the rules of relevance propagation, with the forward pass left as it is.

Relevance is input times gradient, if every layer's gradient is that of a function which is linear in its input, equals
the layer where it stands, and shares the output as the rule wants. Each rule below writes the layer's output as such a
product, with one factor held constant; what it computes twice must agree, so the values are taken from the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import relevance, vit

_LINEAR = (nn.Linear, nn.Conv2d, nn.Identity, nn.Dropout, DropPath, PatchDropout, LayerScale)
_Rule = Callable[[Any, Tensor, Tensor], Tensor]  # from a layer, its input and its output to a carrier of gradient


def unsupported(model: nn.Module) -> str | None:
    """Return which layer of `model` no rule covers, or None."""
    if reason := vit.unsupported(model) or relevance.unsupported(vit.find(model)):
        return reason
    activations = [block.mlp.act for block in vit.find(model).blocks]
    for module in vit.find(model).modules():
        known = isinstance(module, (*_LINEAR, nn.LayerNorm)) or module in activations
        if not known and not list(module.children()):
            return f"it has a {type(module).__name__}, for which the method has no rule"
    return None


@contextmanager
def applied(
    transformer: VisionTransformer,
    *,
    query_key: float,
    value: float,
    gamma_conv: float = 0.0,
    gamma_linear: float = 0.0,
) -> Iterator[None]:
    """Let forward passes record the gradients of the rules.

    LayerNorm divides by a constant, an activation multiplies by a constant, attention by `query_key` and `value`.

    Parameters
    ----------
    transformer : VisionTransformer
        Of a model that `unsupported` accepts.
    query_key, value : float
        What the gradients of an attention's queries and keys, and of its values, are multiplied by.
    gamma_conv : float
        Of the patch embedding, see `_gamma`; 0 for the plain gradient.
    gamma_linear : float
        Of the MLPs and the heads.
    """
    layers: list[tuple[nn.Module, _Rule]] = [(m, _norm) for m in transformer.modules() if isinstance(m, nn.LayerNorm)]
    linear = relevance.heads(transformer)
    for block in transformer.blocks:
        layers += [(block.mlp.act, _activation), (block.attn.qkv, _scaled(query_key, query_key, value))]
        linear += [block.mlp.fc1, block.mlp.fc2]
    if gamma_conv:
        layers.append((transformer.patch_embed.proj, _gamma(gamma_conv)))
    if gamma_linear:
        layers += [(layer, _gamma(gamma_linear)) for layer in linear]
    with ExitStack() as stack:
        for module in transformer.modules():
            if getattr(module, "inplace", False):  # it would overwrite what a rule reads
                module.inplace = False
                stack.callback(setattr, module, "inplace", True)
        for layer, rule in layers:
            stack.callback(layer.register_forward_hook(_hook(rule)).remove)
        yield


def _hook(rule: _Rule) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _Swap.apply(output, rule(layer, inputs[0], output)) if output.requires_grad else output

    return hook


class _Swap(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def _norm(layer: Any, inputs: Tensor, output: Tensor) -> Tensor:
    """Centred input times the constant weight over standard deviation; the bias is an input of its own."""
    variance, mean = torch.var_mean(inputs, -1, correction=0, keepdim=True)
    scale = (variance.detach() + layer.eps).rsqrt()
    return (inputs - mean) * (scale if layer.weight is None else scale * layer.weight)


def _activation(layer: Any, inputs: Tensor, output: Tensor) -> Tensor:
    """Input times the constant output over input."""
    return inputs * (output / inputs).detach().where(inputs != 0, 0)


def _scaled(query: float, key: float, value: float) -> _Rule:
    def rule(layer: Any, inputs: Tensor, output: Tensor) -> Tensor:
        factors = output.new_tensor([query, key, value]).repeat_interleave(output.shape[-1] // 3)
        return output * factors

    return rule


def _gamma(gamma: float) -> _Rule:
    """Favour the contributions that have the output's own sign by the factor 1 + `gamma`.

    With ``z = (1 + gamma / 2) y + (gamma / 2) sign(y) |x| |w|``, which is the output y with those contributions
    enlarged, ``z [y / z]`` shares y among the inputs as z is shared. The same as zennit's rule ``Gamma``, biases
    included, at one more product forwards and backwards.
    """

    def rule(layer: Any, inputs: Tensor, output: Tensor) -> Tensor:
        weight, bias = layer.weight.abs(), None if layer.bias is None else layer.bias.abs()
        if isinstance(layer, nn.Conv2d):
            sizes = F.conv2d(inputs.abs(), weight, bias, layer.stride, layer.padding)
        else:
            sizes = F.linear(inputs.abs(), weight, bias)
        enlarged = (1 + gamma / 2) * output + gamma / 2 * output.detach().sign() * sizes
        return enlarged * (output / enlarged).detach().where(enlarged != 0, 0)

    return rule
