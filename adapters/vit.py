"""What the adapters need to know of a timm Vision Transformer, whatever its patch size, grid or prefix tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adapters.base import Explainer


class ViTExplainer(Explainer):
    """Base of the explainers that look inside a timm `VisionTransformer`, bare or wrapped in other modules."""

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no Vision Transformer that can be looked into, or None."""
        if reason := unsupported(model):
            return reason
        depth, start = len(find(model).blocks), getattr(self, "start_layer", 0)
        return None if start < depth else f"it has {depth} blocks, none from start_layer={start} on"


def unsupported(model: nn.Module) -> str | None:
    """Return why `model` has no Vision Transformer that can be looked into, or None."""
    found = [m for m in model.modules() if isinstance(m, VisionTransformer)]
    if len(found) != 1:
        return f"it holds {len(found)} timm VisionTransformers, not one"
    if not all(isinstance(block, Block) and isinstance(block.attn, Attention) for block in found[0].blocks):
        return "its blocks are not timm's plain Block with plain Attention"
    if found[0].attn_pool is not None or found[0].global_pool not in ("token", "avg"):
        return f"it pools its tokens by {found[0].global_pool!r}, not by class token or mean"
    if hasattr(found[0], "head_dist"):
        return "it reads its logits from two tokens"
    return None


def find(model: nn.Module) -> VisionTransformer:
    """Return the only `VisionTransformer` in `model`."""
    return next(m for m in model.modules() if isinstance(m, VisionTransformer))


def token_grid(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Return rows and columns of patch tokens for these inputs."""
    height, width = find(model).patch_embed.patch_size
    return -(-inputs.shape[-2] // height), -(-inputs.shape[-1] // width)


def to_grid(model: nn.Module, inputs: Tensor, tokens: Tensor) -> Tensor:
    """Drop the prefix tokens of (N, tokens) scores and lay the rest out as (N, h, w)."""
    return tokens[:, find(model).num_prefix_tokens :].unflatten(1, token_grid(model, inputs))


def readout(vit: VisionTransformer, attention: Tensor) -> Tensor:
    """Return the (tokens,) weights with which the head reads the last block: the class token, or the mean."""
    weights = attention.new_zeros(attention.shape[-1])
    if vit.global_pool == "token":
        weights[0] = 1
    else:
        weights[0 if vit.pool_include_prefix else vit.num_prefix_tokens :] = 1
    return weights / weights.sum()


@contextmanager
def recorded(*modules: nn.Module, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect what the modules return (or receive) in the forward passes inside, in the order of their calls."""
    tensors: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _, x, y: tensors.append(x[0] if inputs else y)) for m in modules]
    try:
        yield tensors
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_attention(vit: VisionTransformer) -> Iterator[list[Tensor]]:
    """Collect each block's attention (N, heads, tokens, tokens), after softmax and dropout, with fused kernels off."""
    fused = [block.attn.fused_attn for block in vit.blocks]
    try:
        for block in vit.blocks:
            block.attn.fused_attn = False
        with recorded(*(block.attn.attn_drop for block in vit.blocks)) as maps:
            yield maps
    finally:
        for block, was in zip(vit.blocks, fused, strict=True):
            block.attn.fused_attn = was
