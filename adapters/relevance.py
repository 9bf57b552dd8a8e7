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
from adapters.recording import Recording


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
    half_precision = False
    passes = 6  # TODO
    reference = "Chefer, Gur and Wolf, Transformer interpretability beyond attention visualization, CVPR 2021"
    start_layer: Annotated[int, Field(ge=0)] = 0

    def supports(self, model: nn.Module) -> str | None:
        """Return why the propagation rules do not cover `model`, or None."""
        return (
            super().supports(model) or unsupported(vit.find(model)) or vit.too_deep(model, start_layer=self.start_layer)
        )

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return what relevance walks back through."""
        return _parts(vit.find(model))

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return every block's attention."""
        return vit.attentions(model)

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) relevance, at least 0."""
        tape, attentions = _Tape(seen), vit.attentions(seen.model)
        relevance, readout = tape.head(), tape.readout
        row = readout.expand(len(relevance), 1, -1)
        for layer in reversed(range(self.start_layer, len(attentions))):
            relevance, of_attention = tape.block(layer, relevance)
            row = row + row @ (seen.gradient(attentions[layer]) * of_attention).clamp(min=0).mean(1)
        return vit.to_grid(seen, row[:, 0])


def unsupported(transformer: VisionTransformer) -> str | None:
    """Return why the propagation rules do not cover a Vision Transformer, or None."""
    if not all(type(block.mlp) is Mlp and block.attn.gate is None for block in transformer.blocks):
        return "its blocks have a gated MLP or gated attention, for which the method has no rule"
    if not isinstance(transformer.head, nn.Linear):
        return "its head is not linear"
    return None


def _parts(transformer: VisionTransformer) -> list[nn.Module]:
    parts = [transformer.norm, transformer.head]
    for b in transformer.blocks:
        parts += [b.norm1, b.attn.qkv, b.attn.proj, b.drop_path1, b.norm2, b.mlp.fc1, b.mlp.fc2, b.drop_path2]
    return parts


class _Tape:
    """The activations of one forward pass, and the relevance rules that walk back over them."""

    def __init__(self, seen: Recording) -> None:
        self.seen, self.vit = seen, vit.find(seen.model)
        self.readout = vit.readout(seen.model, seen.output(vit.attentions(seen.model)[-1]))

    def linear(self, layer: nn.Linear, relevance: Tensor) -> Tensor:
        """Alpha = 1: positive contributions share the relevance of each output."""
        inputs, weight = self.seen.input(layer), layer.weight
        up, down = inputs.clamp(min=0), inputs.clamp(max=0)
        grow, shrink = weight.clamp(min=0), weight.clamp(max=0)
        share = _divide(relevance, F.linear(up, grow) + F.linear(down, shrink))
        return up * (share @ grow) + down * (share @ shrink)

    def head(self) -> Tensor:
        """Relevance (N, tokens, width) of the last block's output."""
        one_hot = F.one_hot(self.seen.targets, self.vit.head.out_features).to(self.vit.head.weight.dtype)
        pooled = self.linear(self.vit.head, one_hot)
        parts = self.seen.output(self.vit.norm) * self.readout[:, None]
        return parts * _divide(pooled, parts.sum(1))[:, None]

    def block(self, layer: int, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance of a block's input (N, tokens, width) and of its attention (N, heads, tokens, tokens)."""
        block: Block = self.vit.blocks[layer]
        skip, branch = _add(self.seen.input(block.norm2), self.seen.output(block.drop_path2), relevance)
        branch = self.linear(block.mlp.fc1, self.linear(block.mlp.fc2, branch))
        relevance = skip + branch
        skip, branch = _add(self.seen.input(block.norm1), self.seen.output(block.drop_path1), relevance)
        of_input, of_attention = self.attention(block.attn, self.linear(block.attn.proj, branch))
        return skip + of_input, of_attention

    def attention(self, layer: Attention, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Split relevance between the operands of each product, half each, back to the layer's input."""
        projected = self.seen.output(layer.qkv).unflatten(-1, (3, layer.num_heads, layer.head_dim))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        query, key = layer.q_norm(query), layer.k_norm(key)
        relevance = relevance.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        of_attention, of_value = _product(self.seen.output(layer.attn_drop), value, relevance)
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
