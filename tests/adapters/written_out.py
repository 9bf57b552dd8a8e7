"""A Vision Transformer's forward pass written out for one image, slowly, with everything kept in the graph."""

from dataclasses import dataclass

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from .conftest import build

KINDS = ("plain", "non_square", "no_prefix", "five_prefix", "mean_pooled", "distilled")


@dataclass
class Step:
    """What happens in one block; heads first in `scores`, `attention` and `value`, no batch dimension."""

    block: Block
    tokens: Tensor
    scores: Tensor
    attention: Tensor
    value: Tensor
    output: Tensor


def make(kind: str, depth: int = 3, **changes: object) -> VisionTransformer:
    """Return a random ViT in float64 and eval mode."""
    if kind == "distilled":
        torch.manual_seed(0)
        model = VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    else:
        model = build(kind, depth=depth, **changes)
    return model.double().eval()


def images(model: VisionTransformer, n: int = 2) -> Tensor:
    """Return (n, 3, H, W) random images, the same each time."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, *model.patch_embed.img_size, generator=generator, dtype=torch.double) - 0.5


def run(model: VisionTransformer, image: Tensor, cut: bool = False) -> tuple[Tensor, list[Step]]:
    """Return the logits (K,) and every block's step; with `cut`, no gradient passes through an attention's input."""
    tokens, steps = model.norm_pre(model._pos_embed(model.patch_embed(image[None]))), []
    for block in model.blocks:
        layer = block.attn
        normed = block.norm1(tokens.detach() if cut else tokens)
        query, key, value = layer.qkv(normed)[0].unflatten(-1, (3, layer.num_heads, layer.head_dim)).permute(1, 2, 0, 3)
        scores = layer.q_norm(query) @ layer.k_norm(key).mT * layer.scale
        attention = scores.softmax(-1)
        middle = tokens + block.ls1(layer.proj((attention @ value).transpose(0, 1).flatten(1)))
        output = middle + block.ls2(block.mlp(block.norm2(middle)))
        steps.append(Step(block, tokens, scores, attention, value, output))
        tokens = output
    return model.forward_head(model.norm(tokens))[0], steps


def read_rows(model: VisionTransformer) -> list[int]:
    """Return the numbers of the tokens that the head reads."""
    if isinstance(model, VisionTransformerDistilled):
        return [0, 1]
    count = model.num_prefix_tokens + model.patch_embed.num_patches
    return [0] if model.global_pool == "token" else list(range(model.num_prefix_tokens, count))
