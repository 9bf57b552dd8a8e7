"""Attention maps read off a Vision Transformer, without gradients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from adapters import vit
from adapters.recording import Recording


class _Attention(vit.ViTExplainer):
    family = "attention"
    class_discriminative = False
    passes = 1

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return every block's attention."""
        return vit.attentions(model)


class RawAttention(_Attention):
    """Attention of the read-out token to the patches in the last block, mean over heads: ``mean_h A[h, 0, j]``.

    Where the head reads the mean of the patch tokens, the mean over their rows takes the class token's place.
    """

    name = "raw_attention"
    reference = "Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021"

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) attention, at least 0."""
        attention = seen.output(vit.attentions(seen.model)[self._block(seen.model)]).mean(1)
        return vit.to_grid(seen, vit.readout(seen.model, attention) @ attention)

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return the one block's attention."""
        return [vit.attentions(model)[self._block(model)]]

    def _block(self, model: nn.Module) -> int:
        return len(vit.find(model).blocks) - 1


class AttentionBlock(RawAttention):
    """Attention of the read-out token to the patches in block `k` (from 0), mean over heads."""

    name = "attention_block_k"
    k: Annotated[int, Field(ge=0)] = 0

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no block `k` that can be looked into, or None."""
        return super().supports(model) or vit.too_deep(model, k=self.k)

    def _block(self, model: nn.Module) -> int:
        return self.k


class Rollout(_Attention):
    """Attention rollout: the product over blocks of the row-normalised (A + I), read at the read-out token.

    ``prod_l N_l``, later blocks on the left, with ``N_l = (A_l + I)`` and each row divided by its sum.
    `fusion` joins the heads; then the share `discard` of each matrix's smallest entries is set to 0, all but the first
    token's attention to itself, as in the popular implementation (jacobgil/vit-explain). In that code the rows' sums
    divide the columns, as a ``keepdim`` is missing; here each row is divided by its own sum.
    """

    name = "rollout"
    reference = "Abnar and Zuidema, Quantifying attention flow in transformers, ACL 2020"
    start_layer: Annotated[int, Field(ge=0)] = 0
    fusion: Literal["mean", "min", "max"] = "mean"
    discard: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no attention to roll out, or None."""
        return super().supports(model) or vit.too_deep(model, start_layer=self.start_layer)

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) shares of the attention that flows from each patch, at least 0."""
        maps = [self._fused(seen.output(layer)) for layer in vit.attentions(seen.model)[self.start_layer :]]
        row = vit.readout(seen.model, maps[0]).expand(len(maps[0]), 1, -1)
        for attention in reversed(maps):
            row = row / (1 + attention.sum(-1))[:, None]
            row = row + row @ attention
        return vit.to_grid(seen, row[:, 0])

    def _fused(self, attention: Tensor) -> Tensor:
        fused = attention.mean(1) if self.fusion == "mean" else getattr(attention, f"a{self.fusion}")(1)
        count = int(self.discard * fused.shape[-1] ** 2)
        if not count:
            return fused
        flat = fused.flatten(1)
        kept = flat.scatter(1, flat.topk(count, largest=False).indices, 0)
        kept[:, 0] = flat[:, 0]
        return kept.view_as(fused)
