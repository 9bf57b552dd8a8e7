"""What the adapters need to know of a timm Vision Transformer, whatever its patch size, grid or prefix tokens."""

from __future__ import annotations

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adapters.recording import Recording, SinglePass
from explainer_bench import RequestError


class ViTExplainer(SinglePass):
    """Base of the explainers that look inside a timm `VisionTransformer`, bare or wrapped in other modules."""

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no Vision Transformer that can be looked into, or None."""
        return unsupported(model)


def unsupported(model: nn.Module) -> str | None:
    """Return why `model` has no Vision Transformer that can be looked into, or None."""
    found = [m for m in model.modules() if isinstance(m, VisionTransformer)]
    if not found:
        return "it has no timm VisionTransformer"
    if len(found) > 1:
        return f"it has {len(found)} timm VisionTransformers, not one"
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


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return height and width, in pixels, of the model's patches; 16 x 16 where it has none."""
    return tuple(find(model).patch_embed.patch_size) if unsupported(model) is None else (16, 16)


def token_grid(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Return rows and columns of patch tokens for these inputs.

    Raises
    ------
    RequestError
        If the patches would reach over the image's edge.
    """
    (height, width), (rows, columns) = inputs.shape[-2:], find(model).patch_embed.patch_size
    if height % rows or width % columns:
        raise RequestError(f"{height} x {width} pixels are no multiple of the model's {rows} x {columns} patches.")
    return height // rows, width // columns


def to_grid(seen: Recording, tokens: Tensor) -> Tensor:
    """Drop the prefix tokens of (N, tokens) scores and lay the rest out as (N, h, w).

    Raises
    ------
    RequestError
        If the model does not read its Vision Transformer's tokens as that one would, or they are no grid of patches.
    """
    transformer, (rows, columns) = find(seen.model), token_grid(seen.model, seen.inputs)
    if not seen.ran(transformer):
        raise RequestError("the model runs past its Vision Transformer's own forward: how it reads it is not known.")
    patches = tokens[:, transformer.num_prefix_tokens :]
    if patches.shape[1] != rows * columns:
        raise RequestError(f"the model has {patches.shape[1]} patch tokens, which are no {rows} x {columns} patches.")
    return patches.unflatten(1, (rows, columns))


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


def read_tokens(model: nn.Module, like: Tensor) -> Tensor:
    """Return the (R,) positions of the tokens that the head reads, with equal weights; `like` as for `readout`."""
    return readout(model, like).nonzero()[:, 0]


def latents(seen: Recording) -> Tensor:
    """Return (N, width), what the head's last layer receives; the model's `norm` must have been watched."""
    vit = find(seen.model)
    return vit.forward_head(seen.differentiable(vit.norm), pre_logits=True)


def resume(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits (N, K) that `model` would give these images if its last block put out `tokens`.

    Parameters
    ----------
    model : nn.Module
        With a Vision Transformer somewhere in it; what follows that one is not left out.
    images : Tensor
        (N, C, H, W), for what stands around the Vision Transformer.
    tokens : Tensor
        (N, tokens, width).
    """
    vit = find(model)
    vars(vit)["forward_features"] = lambda *_, **__: vit.norm(tokens)
    try:
        return model(images)
    finally:
        del vars(vit)["forward_features"]


def last_block(model: nn.Module, tokens: Tensor, normed: Tensor) -> Tensor:
    """Return the last block's output (N, tokens, width), computed only at the tokens that the head reads.

    Elsewhere it is the block's input. Exact up to rounding, in eval mode.

    Parameters
    ----------
    model : nn.Module
        With a Vision Transformer in it.
    tokens : Tensor
        (N, tokens, width), the block's input.
    normed : Tensor
        (N, tokens, width), what its attention receives in place of the normalised `tokens`.
    """
    block, positions = find(model).blocks[-1], read_tokens(model, tokens[..., 0])
    cheap = _foldable(block.attn) and len(positions) < block.attn.head_dim
    attended = _attend(block.attn, normed, positions) if cheap else block.attn(normed)[:, positions]
    read = tokens[:, positions] + block.ls1(attended)
    read = read + block.ls2(block.mlp(block.norm2(read)))
    return tokens.index_copy(1, positions, read)


def _foldable(layer: Attention) -> bool:
    plain = type(layer.qkv) is nn.Linear and isinstance(layer.k_norm, nn.Identity)
    return plain and isinstance(layer.q_norm, nn.Identity) and layer.gate is None


def _attend(layer: Attention, normed: Tensor, positions: Tensor) -> Tensor:
    """Return the layer's output at some positions, (N, R, width), without keys and values of all tokens.

    Both are linear in the tokens: the key's weights go to the query, the value's to the mean under the attention.
    """
    shape = (3, layer.num_heads, layer.head_dim)
    to_query, to_key, to_value = layer.qkv.weight.unflatten(0, shape)
    bias = torch.zeros_like(layer.qkv.weight[:, 0]) if layer.qkv.bias is None else layer.qkv.bias
    query_bias, _, value_bias = bias.unflatten(0, shape)  # a key bias shifts all scores of a row alike
    query = torch.einsum("nrc,hdc->nhrd", normed[:, positions], to_query) + query_bias[:, None]
    scores = torch.einsum("nhrd,hdc->nhrc", query * layer.scale, to_key).flatten(1, 2) @ normed.mT
    means = (scores.softmax(-1) @ normed).unflatten(1, (layer.num_heads, -1))
    mixed = torch.einsum("nhrc,hdc->nrhd", means, to_value) + value_bias
    return layer.proj(layer.norm(mixed.flatten(2)))
