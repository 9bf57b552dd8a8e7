"""Attention maps read off a Vision Transformer, without gradients."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters import vit
from adapters.base import predict


class _Attention(vit.ViTExplainer):
    family = "attention"
    class_discriminative = False

    def attentions(self, model: nn.Module, inputs: Tensor) -> list[Tensor]:
        """Return each block's attention averaged over its heads, (N, tokens, tokens)."""
        with vit.recorded_attention(vit.find(model)) as maps:
            predict(model, inputs, batch_size=len(inputs))
        return [attention.detach().mean(1) for attention in maps[-len(vit.find(model).blocks) :]]


class RawAttention(_Attention):
    """Attention of the read-out token to the patches in the last block, mean over heads.

    Where the head reads the mean of the patch tokens, the mean over their rows takes the class token's place.
    """

    name = "raw_attention"
    reference = "Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) attention, at least 0."""
        last = self.attentions(model, inputs)[-1]
        return vit.to_grid(model, inputs, vit.readout(vit.find(model), last) @ last)


class Rollout(_Attention):
    """Attention rollout: the product over blocks of the row-normalised (A + I), read at the read-out token."""

    name = "rollout"
    reference = "Abnar and Zuidema, Quantifying attention flow in transformers, ACL 2020"
    start_layer: Annotated[int, Field(ge=0)] = 0

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) shares of the attention that flows from each patch, at least 0."""
        maps = self.attentions(model, inputs)[self.start_layer :]
        row = vit.readout(vit.find(model), maps[0]).expand(len(inputs), 1, -1)
        for attention in reversed(maps):
            mixed = attention + torch.eye(attention.shape[-1], device=attention.device, dtype=attention.dtype)
            row = row @ (mixed / mixed.sum(-1, keepdim=True))
        return vit.to_grid(model, inputs, row[:, 0])
