"""Transformer attribution against its definition, written out a second time, image by image, through autograd."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import adapters
from explainer_bench import RequestError

from .conftest import build


def relprop(function: Callable[..., Tensor], operands: list[Tensor], relevance: Tensor) -> list[Tensor]:
    """Operand times gradient of the function, weighted by relevance over output."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in operands]
        output = function(*leaves)
        share = torch.where(output == 0, 0, relevance / (output + 1e-9)).detach()
        return [x.detach() * g for x, g in zip(leaves, torch.autograd.grad(output, leaves, share), strict=True)]


def linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    parts = relprop(lambda a, b: a @ plus.T + b @ minus.T, [x.clamp(min=0), x.clamp(max=0)], relevance)
    return parts[0] + parts[1]


def add(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    parts = relprop(lambda x, y: x + y, [a, b], relevance)
    sizes = [part.sum().abs() for part in parts]
    wanted = [size / (sizes[0] + sizes[1]) * relevance.sum() for size in sizes]
    return tuple(part * want / part.sum() for part, want in zip(parts, wanted, strict=True))  # type: ignore[return-value]


def reference(model: VisionTransformer, image: Tensor, target: int, start_layer: int) -> Tensor:
    """The map of one image for a ViT with a class token."""
    tokens, tape = model._pos_embed(model.patch_embed(image[None])), []
    for block in model.blocks:
        a = block.attn
        normed = block.norm1(tokens)
        q, k, v = a.qkv(normed).reshape(1, -1, 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * a.scale).softmax(-1)
        attention.retain_grad()
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        first = block.ls1(a.proj(mixed))
        middle = tokens + first
        hidden_in = block.norm2(middle)
        hidden = block.mlp.act(block.mlp.fc1(hidden_in))
        second = block.ls2(block.mlp.fc2(hidden))
        tape.append((block, tokens, normed, q, k, v, attention, mixed, first, middle, hidden_in, hidden, second))
        tokens = middle + second
    final = model.norm(tokens)
    model.head(final[:, 0])[0, target].backward()
    relevance = torch.zeros_like(final)
    one_hot = torch.eye(model.head.out_features, dtype=final.dtype)[target][None]
    relevance[:, 0] = linear(final[:, 0].detach(), model.head.weight, one_hot)
    chain = torch.eye(final.shape[1], dtype=final.dtype)
    for block, tokens, normed, q, k, v, attention, mixed, first, middle, hidden_in, hidden, second in tape[
        : start_layer - 1 if start_layer else None : -1
    ]:
        skip, branch = add(middle.detach(), second.detach(), relevance)
        branch = linear(hidden.detach(), block.mlp.fc2.weight, branch)
        relevance = skip + linear(hidden_in.detach(), block.mlp.fc1.weight, branch)
        skip, branch = add(tokens.detach(), first.detach(), relevance)
        branch = linear(mixed.detach(), block.attn.proj.weight, branch).reshape(1, -1, *q.shape[1::2]).transpose(1, 2)
        of_attention, of_value = (part / 2 for part in relprop(torch.matmul, [attention, v], branch))
        of_query, of_key = (part / 2 for part in relprop(lambda x, y: x @ y.mT, [q, k], of_attention))
        joined = torch.stack([of_query, of_key, of_value]).permute(1, 3, 0, 2, 4).flatten(2)
        relevance = skip + linear(normed.detach(), block.attn.qkv.weight, joined)
        chain = chain @ (
            torch.eye(len(chain), dtype=chain.dtype) + (attention.grad * of_attention).clamp(min=0).mean(1)[0]
        )
    return chain[0, model.num_prefix_tokens :].detach()


def test_equals_its_definition_for_any_start_layer_and_prefix() -> None:
    for shape in ("plain", "five_prefix", "non_square"):
        model = build(shape, depth=3).double().eval()
        for block in model.blocks:
            block.attn.fused_attn = False
        inputs = torch.rand(2, 3, *model.patch_embed.img_size, dtype=torch.double)
        for start in (0, 1, 2):
            maps = adapters.get("transformer_attribution", start_layer=start).explain(model, inputs, [1, 4])
            expected = torch.stack([reference(model, x, t, start) for x, t in zip(inputs, (1, 4), strict=True)])
            np.testing.assert_allclose(maps.flatten(1), expected, rtol=1e-5, atol=1e-6 * expected.max().item())


def test_gated_blocks_have_no_rule() -> None:
    from timm.layers import SwiGLU

    assert "gated" in adapters.get("transformer_attribution").supports(build(mlp_layer=SwiGLU))


@pytest.mark.parametrize("name", ["rollout", "transformer_attribution"])
def test_there_must_be_blocks_to_start_from(name: str) -> None:
    assert "2 blocks" in (adapters.get(name, start_layer=2).supports(build()) or "")
    assert adapters.get(name, start_layer=1).supports(build()) is None
    with pytest.raises(RequestError, match="greater than or equal to 0"):
        adapters.get(name, start_layer=-1)
