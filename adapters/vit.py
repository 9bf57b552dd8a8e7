"""What the adapters need to know of a timm Vision Transformer, whatever its patch size, grid or prefix tokens."""

from __future__ import annotations

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adapters.recording import Recording, SinglePass


class ViTExplainer(SinglePass):
    """Base of the explainers that look inside a timm `VisionTransformer`, bare or wrapped in other modules."""

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no Vision Transformer that can be looked into, or None."""
        return unsupported(model)


def unsupported(model: nn.Module) -> str | None:
    """Return why `model` has no Vision Transformer that can be looked into, or None."""
    found = [m for m in model.modules() if isinstance(m, VisionTransformer)]
    if len(found) != 1:
        return f"it holds {len(found)} timm VisionTransformers, not one"
    if not all(isinstance(block, Block) and isinstance(block.attn, Attention) for block in found[0].blocks):
        return "its blocks are not timm's plain Block with plain Attention"
    if found[0].attn_pool is not None or found[0].global_pool not in ("token", "avg"):
        return f"it pools its tokens by {found[0].global_pool!r}, not by class token or mean"
    return None


def too_deep(model: nn.Module, **layer: int) -> str | None:
    """Return that `model` has no such layer, given as its parameter's name and its number from 0, or None."""
    (name, number), depth = layer.popitem(), len(find(model).blocks)
    return None if number < depth else f"it has {depth} blocks, none for {name}={number}"


def find(model: nn.Module) -> VisionTransformer:
    """Return the only `VisionTransformer` in `model`."""
    return next(m for m in model.modules() if isinstance(m, VisionTransformer))


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return each block's module whose output is its attention (N, heads, tokens, tokens), after the softmax."""
    return [block.attn.attn_drop for block in find(model).blocks]


def token_grid(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Return rows and columns of patch tokens for these inputs."""
    height, width = find(model).patch_embed.patch_size
    return -(-inputs.shape[-2] // height), -(-inputs.shape[-1] // width)


def to_grid(seen: Recording, tokens: Tensor) -> Tensor:
    """Drop the prefix tokens of (N, tokens) scores and lay the rest out as (N, h, w)."""
    return tokens[:, find(seen.model).num_prefix_tokens :].unflatten(1, token_grid(seen.model, seen.inputs))


def readout(model: nn.Module, like: Tensor) -> Tensor:
    """Return the (tokens,) weights with which the head reads the last block.

    All on the class token; half each on the class and the distillation token, where there are two heads; or equal on
    the tokens whose mean is read. `like` (..., tokens) gives number, type and device.
    """
    vit, weights = find(model), like.new_zeros(like.shape[-1])
    if hasattr(vit, "head_dist"):
        weights[:2] = 1
    elif vit.global_pool == "token":
        weights[0] = 1
    else:
        weights[0 if vit.pool_include_prefix else vit.num_prefix_tokens :] = 1
    return weights / weights.sum()
