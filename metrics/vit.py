"""Cheaper forward passes of timm's plain Vision Transformers, with the same logits, and shorter sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from explainer_bench import RequestError


class TokenModel:
    """A Vision Transformer asked about patch tokens, so that perturbed images need no pixels.

    The patch embedding is left out (a patch embeds alone: the tokens of a perturbed image are put together from those
    of the image and of what fills it), and, where the head reads the class token alone, the last block computes
    nothing for the patch tokens but their keys and values. The logits are those of the model up to rounding.
    As a context manager it changes the model, and restores it.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self.embed: Callable[[Tensor], Tensor] = model.patch_embed.forward
        self._changed: list[nn.Module] = []

    @classmethod
    def of(cls, model: nn.Module, patch: tuple[int, int]) -> TokenModel | None:
        """Return the model, if it is known to the last detail and its patches are those of the metric."""
        if type(model) is not VisionTransformer or any(map(_altered, model.modules())):
            return None
        embed: Any = model.patch_embed
        plain = type(embed) is PatchEmbed and embed.proj.stride == embed.proj.kernel_size == tuple(patch)
        return cls(model) if plain and embed.flatten and not model.dynamic_img_size else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, K) of patch tokens (B, P, D)."""
        return self.model(tokens)

    def __enter__(self) -> TokenModel:
        self._change(self.model.patch_embed, lambda tokens: tokens)
        if _reads_prefix_alone(self.model):
            block = self.model.blocks[-1]
            self._change(block, lambda tokens: _prefix_only(block, tokens, self.model.num_prefix_tokens))
        return self

    def _change(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        module.forward = forward  # type: ignore[method-assign]
        self._changed.append(module)

    def __exit__(self, *_: object) -> None:
        while self._changed:
            del self._changed.pop().forward


def _altered(module: nn.Module) -> bool:
    """Tell whether the module does something else than its class says: by hooks, or by methods of its own.

    Hooks with the attribute `observer` only look.
    """
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    acts = any(not getattr(hook, "observer", False) for hook in hooks)
    return acts or any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())


def _reads_prefix_alone(model: VisionTransformer) -> bool:
    block = model.blocks[-1]
    plain = model.global_pool == "token" and model.attn_pool is None and model.num_prefix_tokens > 0
    plain = plain and type(block) is Block and type(block.attn) is Attention and block.attn.gate is None
    return plain and type(block.attn.qkv) is nn.Linear


def _prefix_only(block: Block, tokens: Tensor, prefix: int) -> Tensor:
    """Return the output (B, prefix, D) of a block at its first tokens alone."""
    attn, normed = block.attn, block.norm1(tokens)
    size = attn.num_heads * attn.head_dim
    weights = attn.qkv.weight.split([size, 2 * size])
    biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([size, 2 * size])
    query = F.linear(normed[:, :prefix], weights[0], biases[0]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    both = F.linear(normed, weights[1], biases[1]).unflatten(-1, (2, attn.num_heads, -1))
    key, value = both.permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value)
    seen = attn.proj_drop(attn.proj(attn.norm(seen.transpose(1, 2).flatten(2))))
    tokens = tokens[:, :prefix] + block.drop_path1(block.ls1(seen))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def drop_tokens(model: nn.Module, images: Tensor, kept: Tensor) -> Tensor:
    """Return the logits (B, K) where each image keeps only some of its patch tokens.

    The others leave the sequence after the positional embedding; class, distillation and register tokens stay.

    Parameters
    ----------
    model : nn.Module
        A timm Vision Transformer, or a module that runs one.
    images : Tensor
        (B, C, H, W).
    kept : Tensor
        (B, P) bool, as many in every row.

    Raises
    ------
    RequestError
        If the model is no such ViT.
    """
    vit = next((m for m in model.modules() if isinstance(m, VisionTransformer)), None)
    if vit is None or (vit.num_prefix_tokens == 0 and not kept.any()):
        raise RequestError("the imputer token_removal needs a timm ViT with a class token: choose another imputer.")
    places = kept.nonzero()[:, 1].view(len(kept), -1) + vit.num_prefix_tokens
    prefix = torch.arange(vit.num_prefix_tokens, device=places.device).expand(len(kept), -1)
    index = torch.cat([prefix, places], dim=1)[..., None]

    def leave(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0]
        if tokens.shape[1] != vit.num_prefix_tokens + kept.shape[1]:
            patches = tokens.shape[1] - vit.num_prefix_tokens
            raise RequestError(
                f"token_removal: the model has {patches} patch tokens, the metric {kept.shape[1]} patches."
            )
        return tokens.gather(1, index.expand(-1, -1, tokens.shape[-1])), *args[1:]

    handle = vit.blocks[0].register_forward_pre_hook(leave)
    try:
        return model(images)
    finally:
        handle.remove()
