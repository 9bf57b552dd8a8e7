"""Layer-wise relevance propagation through a Vision Transformer, in batches."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from adapters import vit
from adapters.recording import Recording
from explainer_bench import RequestError


class _Relevance(vit.ViTExplainer):
    family = "lrp"
    half_precision = False
    batch_size = 4  # of ViT-B/16, whose activations are all kept, eight images would take 4 GB

    def supports(self, model: nn.Module) -> str | None:
        """Return why the propagation rules do not cover `model`, or None."""
        return super().supports(model) or unsupported(vit.find(model))

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return what relevance walks back through."""
        return _parts(vit.find(model))


class TransformerAttribution(_Relevance):
    """Relevance times gradient of every attention, rolled out: the LRP of Chefer, Gur and Wolf.

    Relevance starts from the one-hot target at the head and follows the alpha = 1 rule (biases ignored); softmax,
    LayerNorm, LayerScale and GELU pass it on unchanged. Per block, ``mean_h((grad A * R_A)^+)``; the map is the
    read-out row of ``prod_l (I + that)`` from `start_layer` on, without row normalisation. The authors' notebooks
    use ``start_layer=0``, their evaluation scripts 1. Differs from their code only in that images do not mix. Where
    two heads are averaged (distilled DeiT), the rule for sums shares the target's relevance between the two logits.

    The rule for sums divides by the tokens themselves, some of which nearly vanish, so in float32 the last bits of the
    forward pass show: the same code on CPUs with other vector units moves a map by some per cent of its maximum.
    """

    name = "transformer_attribution"
    upsampling = "bilinear"
    passes = 5  # one forward, one backward; the rule of a linear layer is three products of the layer's size
    reference = "Chefer, Gur and Wolf, Transformer interpretability beyond attention visualization, CVPR 2021"
    start_layer: Annotated[int, Field(ge=0)] = 0

    def supports(self, model: nn.Module) -> str | None:
        """Return why the propagation rules do not cover `model`, or None."""
        return super().supports(model) or vit.too_deep(model, start_layer=self.start_layer)

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the attention of the blocks that are rolled out."""
        return vit.attentions(model)[self.start_layer :]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) relevance, at least 0."""
        tape = _Tape(seen)
        relevance = tape.head()
        row = tape.readout.expand(len(relevance), 1, -1)
        for layer in reversed(range(self.start_layer, len(tape.blocks))):
            block = tape.block(layer, relevance)
            gradient = seen.gradient(tape.blocks[layer].attn.attn_drop)
            row = row + row @ (gradient * block.of_attention).clamp(min=0).mean(1)
            if layer > self.start_layer:
                relevance = block.of_input()
        return vit.to_grid(seen, row[:, 0])


class PartialLRP(_Relevance):
    """Partial LRP, as Chefer, Gur and Wolf compare with it: relevance of the last attention, positive, mean over heads.

    The read-out row of ``mean_h(R_A^+)`` in the last block, of the class's relevance propagated as in `full_lrp`. The
    original method (Voita et al.) keeps the most relevant heads only; this is what the published tables contain,
    ``method="last_layer"`` of the authors' ``ViT_orig_LRP``. Where all that relevance is negative, the map is zero;
    small random models show it often.
    """

    name = "partial_lrp"
    upsampling = "bilinear"
    passes = 1.25  # the linear rule is four products; three quarters of one of twelve blocks need it
    reference = "Voita et al., ACL 2019, as in Chefer, Gur and Wolf, CVPR 2021"

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) relevance, at least 0."""
        tape = _OriginalTape(seen)
        last = tape.block(len(tape.blocks) - 1, tape.head())
        return vit.to_grid(seen, tape.readout @ last.of_attention.clamp(min=0).mean(1))

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return what relevance walks back through: the head and the last block."""
        return _parts(vit.find(model), first=-1)


class FullLRP(_Relevance):
    """LRP down to the pixels, as Chefer, Gur and Wolf compare with it.

    The walk of `transformer_attribution` with the older rules of the authors' ``ViT_orig_LRP`` (``method="full"``): in
    linear layers the positive and the negative inputs' contributions have a denominator each (another version of their
    layers mixes the two), and sums share relevance in proportion, without rescaling. The part of the positional
    embedding is dropped, and the patch embedding follows the z^B rule between the image's smallest and largest value;
    the map is the sum over the channels. The authors use the z^B rule for three channels only, here it serves any.

    Without rescaling, tokens that nearly vanish make relevance explode (the authors' own maps of ViT-Ti/16 reach 3e10),
    and the last bits of the forward pass decide: on a CPU's other vector units, four maps of the same code moved by up
    to 58 % of their maximum. A row to compare with, not to rely on.
    """

    name = "full_lrp"
    signed = True
    passes = 5  # one forward; the rule of a linear layer is four products of the layer's size
    reference = "Binder et al., ICANN 2016, as in Chefer, Gur and Wolf, CVPR 2021"

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return what relevance walks back through, down to the image."""
        transformer = vit.find(model)
        embed = transformer.patch_embed
        return [*_parts(transformer), transformer.norm_pre, embed.norm, embed.proj]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, H, W) signed relevance."""
        tape = _OriginalTape(seen)
        relevance = tape.head()
        for layer in reversed(range(len(tape.blocks))):
            relevance = tape.block(layer, relevance).of_input()
        return tape.image(relevance)[..., : seen.inputs.shape[-2], : seen.inputs.shape[-1]].sum(1)


def unsupported(transformer: VisionTransformer) -> str | None:
    """Return why the propagation rules do not cover a Vision Transformer, or None."""
    if not all(type(block.mlp) is Mlp and block.attn.gate is None for block in transformer.blocks):
        return "its blocks have a gated MLP or gated attention, for which the method has no rule"
    if not all(isinstance(head, nn.Linear) for head in heads(transformer)):
        return "its head is not linear"
    return None


def heads(transformer: VisionTransformer) -> list[Any]:
    """Return the linear layer that ends in the logits, or the two whose mean they are."""
    return [getattr(transformer, name) for name in ("head", "head_dist") if hasattr(transformer, name)]


def _parts(transformer: VisionTransformer, first: int = 0) -> list[nn.Module]:
    parts = [transformer.norm, *heads(transformer)]
    for b in transformer.blocks[first:]:
        parts += [b.norm1, b.attn.qkv, b.attn.attn_drop, b.attn.proj, b.drop_path1]
        parts += [b.norm2, b.mlp.fc1, b.mlp.fc2, b.drop_path2]
    return parts


class _Tape:
    """The activations of one forward pass, and the relevance rules that walk back over them."""

    def __init__(self, seen: Recording) -> None:
        self.seen, self.vit = seen, vit.find(seen.model)
        self.blocks = self.vit.blocks
        if not (seen.ran(self.vit) and torch.equal(seen.output(self.vit), seen.logits)):
            raise RequestError("the model's logits are not its Vision Transformer's own, at which relevance starts.")
        self.readout = vit.readout(seen.model, seen.output(vit.attentions(seen.model)[-1]))

    def linear(self, layer: nn.Linear, relevance: Tensor) -> Tensor:
        """Alpha = 1: positive contributions share the relevance of each output."""
        inputs, weight, output = self.seen.input(layer), layer.weight, self.seen.output(layer)
        sizes, size = inputs.abs(), weight.abs()
        # Positive contributions are half of x w + |x| |w|, and the forward pass has computed x w already.
        contributions = F.linear(sizes, size) + (output if layer.bias is None else output - layer.bias)
        share = _divide(relevance, contributions / 2)
        return (inputs * (share @ weight) + sizes * (share @ size)) / 2

    def add(self, skip: Tensor, branch: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance of both terms of a sum, each rescaled so that their totals stand as the terms' absolute sums do."""
        share = _divide(relevance, skip + branch)
        parts = skip * share, branch * share
        totals = [part.sum((1, 2), keepdim=True) for part in parts]
        whole = relevance.sum((1, 2), keepdim=True)
        weights = [_divide(total.abs(), totals[0].abs() + totals[1].abs()) * whole for total in totals]
        first, second = (part * _divide(w, total) for part, w, total in zip(parts, weights, totals, strict=True))
        return first, second

    def head(self) -> Tensor:
        """Relevance (N, tokens, width) of the last block's output."""
        tokens = self.seen.output(self.vit.norm)
        ends = heads(self.vit)
        one_hot = F.one_hot(self.seen.targets, ends[0].out_features).to(tokens)
        if len(ends) == 1:
            parts = tokens * self.readout[:, None]
            return parts * _divide(self.linear(ends[0], one_hot), parts.sum(1))[:, None]
        relevance = torch.zeros_like(tokens)
        first, second = (self.seen.output(head)[:, None] for head in ends)
        shares = self.add(first, second, one_hot[:, None])
        for token, (head, share) in enumerate(zip(ends, shares, strict=True)):
            relevance[:, token] = self.linear(head, share[:, 0])
        return relevance

    def block(self, layer: int, relevance: Tensor) -> _BlockRelevance:
        """Relevance inside a block, from that of its output (N, tokens, width)."""
        block: Block = self.blocks[layer]
        skip, branch = self.add(self.seen.input(block.norm2), self.seen.output(block.drop_path2), relevance)
        relevance = skip + self.linear(block.mlp.fc1, self.linear(block.mlp.fc2, branch))
        skip, branch = self.add(self.seen.input(block.norm1), self.seen.output(block.drop_path1), relevance)
        return _BlockRelevance(self, block.attn, skip, self.linear(block.attn.proj, branch))


class _BlockRelevance:
    """Relevance of a block's attention (N, heads, tokens, tokens) and, on demand, of the block's input."""

    def __init__(self, tape: _Tape, layer: Attention, skip: Tensor, mixed: Tensor) -> None:
        self.tape, self.layer, self.skip = tape, layer, skip
        projected = tape.seen.output(layer.qkv).unflatten(-1, (3, layer.num_heads, layer.head_dim))
        self.query, self.key, self.value = projected.permute(2, 0, 3, 1, 4)
        mixed = mixed.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
        self.attention = tape.seen.output(layer.attn_drop)
        self.share = _divide(mixed, self.attention @ self.value)
        self.of_attention = self.attention * (self.share @ self.value.mT) / 2

    def of_input(self) -> Tensor:
        """Relevance (N, tokens, width): each product gives half to each of its operands."""
        query, key = self.layer.q_norm(self.query), self.layer.k_norm(self.key)
        share = _divide(self.of_attention, query @ key.mT)
        of_value = self.value * (self.attention.mT @ self.share) / 2
        of_query, of_key = query * (share @ key) / 2, key * (share.mT @ query) / 2
        joined = torch.stack([of_query, of_key, of_value]).permute(1, 3, 0, 2, 4).flatten(2)
        return self.skip + self.tape.linear(self.layer.qkv, joined)


class _OriginalTape(_Tape):
    """The rules of the authors' baselines."""

    def linear(self, layer: nn.Linear, relevance: Tensor) -> Tensor:
        """Alpha = 1, positive and negative inputs on their own."""
        inputs, weight = self.seen.input(layer), layer.weight
        up, down = inputs.clamp(min=0), inputs.clamp(max=0)
        grow, shrink = weight.clamp(min=0), weight.clamp(max=0)
        of_positive = up * (_divide(relevance, F.linear(up, grow)) @ grow)
        return of_positive + down * (_divide(relevance, F.linear(down, shrink)) @ shrink)

    def add(self, skip: Tensor, branch: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance of both terms of a sum, in proportion."""
        share = _divide(relevance, skip + branch)
        return skip * share, branch * share

    def image(self, relevance: Tensor) -> Tensor:
        """Relevance (N, C, H, W) of the pixels, from that of the tokens that enter the blocks."""
        embed, prefix = self.vit.patch_embed, self.vit.num_prefix_tokens
        patches = self.seen.output(embed.norm).reshape(len(relevance), -1, relevance.shape[-1])
        tokens = self.seen.input(self.vit.norm_pre)[:, prefix:]
        relevance = patches * _divide(relevance[:, prefix:], tokens)
        return _z_b(embed.proj, self.seen.input(embed.proj), relevance.mT)


def _z_b(layer: nn.Conv2d, images: Tensor, relevance: Tensor) -> Tensor:
    """The z^B rule of a first layer, for inputs between each image's smallest and largest value."""
    low, high = (bound((1, 2, 3), keepdim=True).expand_as(images) for bound in (images.amin, images.amax))
    operands = [(images, layer.weight), (-low, layer.weight.clamp(min=0)), (-high, layer.weight.clamp(max=0))]
    outputs = torch.stack([F.conv2d(x, w, None, layer.stride, layer.padding) for x, w in operands]).sum(0)
    share = relevance.unflatten(-1, outputs.shape[-2:]) / (outputs + 1e-9)
    parts = [x * conv2d_input(images.shape, w, share, layer.stride, layer.padding) for x, w in operands]
    return torch.stack(parts).sum(0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    quotient = numerator / (denominator + 1e-9)
    return quotient.where((denominator != 0) & quotient.isfinite(), torch.zeros_like(quotient))
