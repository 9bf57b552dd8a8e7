"""Layer-wise relevance propagation through a Vision Transformer, in batches."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adapters import vit
from adapters.base import target_gradients


class TransformerAttribution(vit.ViTExplainer):
    """Relevance times gradient of every attention, rolled out: the LRP of Chefer, Gur and Wolf.

    Relevance starts from the one-hot target at the head and follows the alpha = 1 rule (biases ignored); softmax,
    LayerNorm, LayerScale and GELU pass it on unchanged. Per block, ``mean_h((grad A * R_A)^+)``; the map is the
    read-out row of ``prod_l (I + that)`` from `start_layer` on, without row normalisation. The authors' notebooks
    use ``start_layer=0``, their evaluation scripts 1. Differs from their code only in that images do not mix.

    The rule for sums divides by the tokens themselves, some of which nearly vanish, so in float32 the last bits of the
    forward pass show: the same code on CPUs with other vector units moves a map by some per cent of its maximum.
    """

    name = "transformer_attribution"
    family = "lrp"
    upsampling = "bilinear"
    reference = "Chefer, Gur and Wolf, Transformer interpretability beyond attention visualization, CVPR 2021"
    start_layer: Annotated[int, Field(ge=0)] = 0

    def supports(self, model: nn.Module) -> str | None:
        """Return why the propagation rules do not cover `model`, or None."""
        if reason := super().supports(model):
            return reason
        blocks = vit.find(model).blocks
        if not all(type(block.mlp) is Mlp and block.attn.gate is None for block in blocks):
            return "its blocks have a gated MLP or gated attention, for which the method has no rule"
        if not isinstance(vit.find(model).head, nn.Linear):
            return "its head is not linear"
        return None

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) relevance, at least 0."""
        transformer = vit.find(model)
        with vit.recorded_attention(transformer) as attentions, _Tape(transformer) as tape:
            gradients = target_gradients(model, inputs, targets, attentions)
        with torch.no_grad():
            readout = vit.readout(transformer, attentions[-1])
            relevance = tape.head(targets, readout)
            row = readout.expand(len(inputs), 1, -1)
            for layer in reversed(range(self.start_layer, len(transformer.blocks))):
                relevance, of_attention = tape.block(layer, relevance, attentions[layer])
                row = row + row @ (gradients[layer] * of_attention).clamp(min=0).mean(1)
        return vit.to_grid(model, inputs, row[:, 0])


class _Tape:
    """The activations of one forward pass, and the relevance rules that walk back over them."""

    def __init__(self, transformer: VisionTransformer) -> None:
        self.vit = transformer
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Tape:
        parts = [self.vit.norm, self.vit.head]
        for b in self.vit.blocks:
            parts += [b.norm1, b.attn.qkv, b.attn.proj, b.drop_path1, b.norm2, b.mlp.fc1, b.mlp.fc2, b.drop_path2]
        self.handles = [part.register_forward_hook(self._record) for part in parts]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen[module] = inputs[0].detach(), output.detach()

    def linear(self, layer: nn.Linear, relevance: Tensor) -> Tensor:
        """Alpha = 1: positive contributions share the relevance of each output."""
        (inputs, _), weight = self.seen[layer], layer.weight
        up, down = inputs.clamp(min=0), inputs.clamp(max=0)
        grow, shrink = weight.clamp(min=0), weight.clamp(max=0)
        share = _divide(relevance, F.linear(up, grow) + F.linear(down, shrink))
        return up * (share @ grow) + down * (share @ shrink)

    def head(self, targets: Tensor, readout: Tensor) -> Tensor:
        """Relevance (N, tokens, width) of the last block's output."""
        one_hot = F.one_hot(targets, self.vit.head.out_features).to(self.vit.head.weight.dtype)
        pooled = self.linear(self.vit.head, one_hot)
        _, tokens = self.seen[self.vit.norm]
        parts = tokens * readout[:, None]
        return parts * _divide(pooled, parts.sum(1))[:, None]

    def block(self, layer: int, relevance: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance of a block's input (N, tokens, width) and of its attention (N, heads, tokens, tokens)."""
        block: Block = self.vit.blocks[layer]
        skip, branch = _add(self.seen[block.norm2][0], self.seen[block.drop_path2][1], relevance)
        branch = self.linear(block.mlp.fc1, self.linear(block.mlp.fc2, branch))
        relevance = skip + branch
        skip, branch = _add(self.seen[block.norm1][0], self.seen[block.drop_path1][1], relevance)
        of_input, of_attention = self.attention(block.attn, self.linear(block.attn.proj, branch), attention.detach())
        return skip + of_input, of_attention

    def attention(self, layer: Attention, relevance: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Split relevance between the operands of each product, half each, back to the layer's input."""
        projected = self.seen[layer.qkv][1].unflatten(-1, (3, layer.num_heads, layer.head_dim))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        query, key = layer.q_norm(query), layer.k_norm(key)
        relevance = relevance.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        of_attention, of_value = _product(attention, value, relevance)
        of_query, of_key = _product(query, key.mT, of_attention)
        joined = torch.stack([of_query, of_key.mT, of_value]).permute(1, 3, 0, 2, 4).flatten(2)
        return self.linear(layer.qkv, joined), of_attention


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    quotient = numerator / (denominator + 1e-9)
    return quotient.where((denominator != 0) & quotient.isfinite(), torch.zeros_like(quotient))


def _product(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both operands of ``left @ right``."""
    share = _divide(relevance, left @ right)
    return left * (share @ right.mT) / 2, right * (left.mT @ share) / 2


def _add(skip: Tensor, branch: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of both terms of a sum, each rescaled so that their totals stand as the terms' absolute sums do."""
    share = _divide(relevance, skip + branch)
    parts = skip * share, branch * share
    totals = [part.sum((1, 2), keepdim=True) for part in parts]
    whole = relevance.sum((1, 2), keepdim=True)
    weights = [_divide(total.abs(), totals[0].abs() + totals[1].abs()) * whole for total in totals]
    first, second = (part * _divide(w, total) for part, w, total in zip(parts, weights, totals, strict=True))
    return first, second
