"""Relevance propagation against its definition, written out a second time, image by image, through autograd."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import adapters
from explainer_bench import RequestError

from .conftest import build


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0, numerator / (denominator + 1e-9))


def relprop(function: Callable[..., Tensor], operands: list[Tensor], relevance: Tensor) -> list[Tensor]:
    """Operand times gradient of the function, weighted by relevance over output."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in operands]
        output = function(*leaves)
        share = divide(relevance, output).detach()
        return [x.detach() * g for x, g in zip(leaves, torch.autograd.grad(output, leaves, share), strict=True)]


class Rules(NamedTuple):
    """Of one of the authors' two sets of layers."""

    linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], list[Tensor]]


def joint(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    parts = relprop(lambda a, b: a @ plus.T + b @ minus.T, [x.clamp(min=0), x.clamp(max=0)], relevance)
    return parts[0] + parts[1]


def apart(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    (first,) = relprop(lambda a: a @ plus.T, [x.clamp(min=0)], relevance)
    (second,) = relprop(lambda b: b @ minus.T, [x.clamp(max=0)], relevance)
    return first + second


def plain(a: Tensor, b: Tensor, relevance: Tensor) -> list[Tensor]:
    return relprop(lambda x, y: x + y, [a.detach(), b.detach()], relevance)


def rescaled(a: Tensor, b: Tensor, relevance: Tensor) -> list[Tensor]:
    parts = plain(a, b, relevance)
    sizes = [part.sum().abs() for part in parts]
    wanted = [size / (sizes[0] + sizes[1]) * relevance.sum() for size in sizes]
    return [part * want / part.sum() for part, want in zip(parts, wanted, strict=True)]


OURS, ORIGINAL = Rules(joint, rescaled), Rules(apart, plain)


class Walk:
    """Relevance of one image at every block's attention, and of the tokens that enter the blocks."""

    def __init__(self, model: VisionTransformer, image: Tensor, target: int, rules: Rules) -> None:
        self.model, self.image, self.rules, self.blocks = model, image, rules, []
        self.embedded = model._pos_embed(model.patch_embed(image[None]))
        tokens = self.embedded
        for block in model.blocks:
            tokens = self.forward(block, tokens)
        final = model.norm(tokens)
        model.forward_head(final)[0, target].backward()
        relevance = self.head(final.detach(), target)
        self.attentions: list[tuple[Tensor, Tensor]] = []
        for parts in reversed(self.blocks):
            relevance = self.backward(relevance, *parts)
        self.relevance = relevance

    def forward(self, block: torch.nn.Module, tokens: Tensor) -> Tensor:
        a = block.attn
        normed = block.norm1(tokens)
        q, k, v = a.qkv(normed).reshape(1, -1, 3, a.num_heads, a.head_dim).permute(2, 0, 3, 1, 4)
        q, k = a.q_norm(q), a.k_norm(k)
        attention = (q @ k.mT * a.scale).softmax(-1)
        attention.retain_grad()
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        first = block.ls1(a.proj(mixed))
        middle = tokens + first
        hidden_in = block.norm2(middle)
        hidden = block.mlp.act(block.mlp.fc1(hidden_in))
        second = block.ls2(block.mlp.fc2(hidden))
        parts = (tokens, normed, q, k, v, attention, mixed, first, middle, hidden_in, hidden, second)
        self.blocks.append((block, attention, *(part.detach() for part in parts)))
        return middle + second

    def head(self, final: Tensor, target: int) -> Tensor:
        model, one_hot = self.model, torch.eye(self.model.num_classes, dtype=final.dtype)[target][None]
        if not hasattr(model, "head_dist"):
            pool = model.pool
            pooled = self.rules.linear(model.fc_norm(pool(final)).detach(), model.head.weight, one_hot)
            return relprop(pool, [final], pooled)[0]
        relevance = torch.zeros_like(final)
        shares = self.rules.add(model.head(final[:, 0]), model.head_dist(final[:, 1]), one_hot)
        relevance[:, 0] = self.rules.linear(final[:, 0], model.head.weight, shares[0])
        relevance[:, 1] = self.rules.linear(final[:, 1], model.head_dist.weight, shares[1])
        return relevance

    def backward(self, relevance: Tensor, block: torch.nn.Module, graph: Tensor, *parts: Tensor) -> Tensor:
        tokens, normed, q, k, v, attention, mixed, first, middle, hidden_in, hidden, second = parts
        linear, add = self.rules
        skip, branch = add(middle, second, relevance)
        branch = linear(hidden, block.mlp.fc2.weight, branch)
        relevance = skip + linear(hidden_in, block.mlp.fc1.weight, branch)
        skip, branch = add(tokens, first, relevance)
        branch = linear(mixed, block.attn.proj.weight, branch).reshape(1, -1, *q.shape[1::2]).transpose(1, 2)
        of_attention, of_value = (part / 2 for part in relprop(torch.matmul, [attention, v], branch))
        self.attentions.insert(0, (graph.grad, of_attention))
        of_query, of_key = (part / 2 for part in relprop(lambda x, y: x @ y.mT, [q, k], of_attention))
        joined = torch.stack([of_query, of_key, of_value]).permute(1, 3, 0, 2, 4).flatten(2)
        return skip + linear(normed, block.attn.qkv.weight, joined)

    def readout(self) -> Tensor:
        """Weights of the tokens, as the pooling's gradient has them."""
        ones = torch.ones(1, self.embedded.shape[1], 1, dtype=self.image.dtype, requires_grad=True)
        read = ones[:, :2].mean() if hasattr(self.model, "head_dist") else self.model.pool(ones).sum()
        return torch.autograd.grad(read, ones)[0][0, :, 0]


def attribution(walk: Walk, start_layer: int) -> Tensor:
    """The rolled out map."""
    chain = torch.eye(walk.embedded.shape[1], dtype=walk.image.dtype)
    for gradient, relevance in walk.attentions[start_layer:]:
        chain = chain + (gradient * relevance).clamp(min=0).mean(1)[0] @ chain
    return (walk.readout() @ chain)[walk.model.num_prefix_tokens :]


def pixels(walk: Walk) -> Tensor:
    """The z^B rule, patch by patch, on the patch embedding."""
    model, prefix = walk.model, walk.model.num_prefix_tokens
    patches = model.patch_embed(walk.image[None]).detach()
    positional = walk.embedded.detach()[:, prefix:] - patches
    relevance, _ = plain(patches, positional, walk.relevance[:, prefix:])
    height, width = model.patch_embed.patch_size
    weight = model.patch_embed.proj.weight.flatten(1)
    low, high = walk.image.min(), walk.image.max()
    heat = torch.zeros_like(walk.image)
    for token, (row, column) in enumerate(np.ndindex(*model.patch_embed.grid_size)):
        window = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        x = walk.image[window].flatten()
        terms = x * weight - low * weight.clamp(min=0) - high * weight.clamp(max=0)
        share = relevance[0, token] / (terms.sum(1) + 1e-9)
        heat[window] = (share @ terms).reshape(heat[window].shape)
    return heat.sum(0)


def prepared(shape: str) -> tuple[VisionTransformer, Tensor]:
    if shape == "distilled":
        torch.manual_seed(0)
        model = VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, qkv_bias=False
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    else:
        model = build(shape, depth=3)
    model = model.double().eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model, torch.rand(2, 3, *model.patch_embed.img_size, dtype=torch.double) - 0.3


TARGETS = [1, 4]
ALL_SHAPES = pytest.mark.parametrize(
    "shape", ["plain", "five_prefix", "non_square", "no_prefix", "mean_pooled", "distilled"]
)


def same(spec: str, shape: str, definition: Callable[[VisionTransformer, Tensor, int], Tensor]) -> None:
    model, inputs = prepared(shape)
    maps = adapters.get(spec).explain(model, inputs, TARGETS)
    expected = torch.stack([definition(model, x, t) for x, t in zip(inputs, TARGETS, strict=True)]).detach().flatten(1)
    np.testing.assert_allclose(maps.flatten(1), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@ALL_SHAPES
@pytest.mark.parametrize("start", [0, 1, 2])
def test_transformer_attribution_equals_its_definition(shape: str, start: int) -> None:
    same(
        f"transformer_attribution[start_layer={start}]",
        shape,
        lambda model, image, target: attribution(Walk(model, image, target, OURS), start),
    )


@ALL_SHAPES
def test_partial_lrp_equals_its_definition(shape: str) -> None:
    def definition(model: VisionTransformer, image: Tensor, target: int) -> Tensor:
        walk = Walk(model, image, target, ORIGINAL)
        _, relevance = walk.attentions[-1]
        return walk.readout() @ relevance.clamp(min=0).mean(1)[0][:, model.num_prefix_tokens :]

    same("partial_lrp", shape, definition)


@ALL_SHAPES
def test_full_lrp_equals_its_definition(shape: str) -> None:
    same("full_lrp", shape, lambda model, image, target: pixels(Walk(model, image, target, ORIGINAL)))


def test_starting_from_the_last_block_leaves_its_attention_alone() -> None:
    model, inputs = prepared("plain")
    maps = adapters.get("transformer_attribution", start_layer=2).explain(model, inputs, TARGETS)
    for image, target, map_ in zip(inputs, TARGETS, maps, strict=True):
        gradient, relevance = Walk(model, image, target, OURS).attentions[-1]
        expected = (gradient * relevance).clamp(min=0).mean((0, 1))[0, 1:]
        np.testing.assert_allclose(map_.flatten(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["transformer_attribution", "partial_lrp", "full_lrp"])
def test_gated_blocks_have_no_rule(name: str) -> None:
    assert "gated" in (adapters.get(name).supports(build(mlp_layer=SwiGLU)) or "")


@pytest.mark.parametrize("name", ["transformer_attribution", "partial_lrp", "full_lrp"])
def test_there_must_be_a_head(name: str) -> None:
    assert "head" in (adapters.get(name).supports(build(num_classes=0)) or "")


@pytest.mark.parametrize("name", ["rollout", "transformer_attribution"])
def test_there_must_be_blocks_to_start_from(name: str) -> None:
    assert "2 blocks" in (adapters.get(name, start_layer=2).supports(build()) or "")
    assert adapters.get(name, start_layer=1).supports(build()) is None
    with pytest.raises(RequestError, match="greater than or equal to 0"):
        adapters.get(name, start_layer=-1)
