"""AttnLRP and CP-LRP against their rules, written out as relevance, and the gamma rule against zennit."""

from typing import Any

import numpy as np
import pytest
import torch
import zennit.rules
from timm.layers import RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from adapters import rules
from explainer_bench import RequestError

from .conftest import build

TARGETS = [1, 4]
SHAPES = ["plain", "five_prefix", "non_square", "no_prefix", "mean_pooled", "distilled"]
GAMMAS = {"gamma_conv": 0.25, "gamma_linear": 0.1}
PLAIN = {"gamma_conv": 0.0, "gamma_linear": 0.0}


def prepared(shape: str) -> tuple[VisionTransformer, Tensor]:
    if shape == "distilled":
        torch.manual_seed(0)
        model = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    else:
        model = build(shape)
    return model.double().eval(), torch.rand(2, 3, *model.patch_embed.img_size, dtype=torch.double) - 0.3


def share(contributions: Tensor, output: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of inputs, in proportion to their contributions (..., outputs, inputs) to the output (..., outputs)."""
    return (contributions * (relevance / output)[..., None]).sum(-2)


def linear(x: Tensor, layer: nn.Module, relevance: Tensor, gamma: float = 0.0) -> Tensor:
    terms, bias = x[..., None, :] * layer.weight.flatten(1), layer.bias
    output = terms.sum(-1) + bias
    sign = output.sign()
    favoured = terms + gamma * terms.where(terms.sign() == sign[..., None], 0)
    return share(favoured, favoured.sum(-1) + bias + gamma * bias.where(bias.sign() == sign, 0), relevance)


def norm(x: Tensor, layer: nn.Module, relevance: Tensor) -> Tensor:
    if isinstance(layer, nn.Identity):
        return relevance
    width = x.shape[-1]
    centre = torch.eye(width, dtype=x.dtype) - 1 / width
    std = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
    contributions = x[..., None, :] * centre * (layer.weight / std)[..., None]
    return share(contributions, layer(x), relevance)


class Walk:
    """The rules, image by image, from the logit to the pixels."""

    def __init__(self, model: VisionTransformer, halves: bool, gamma_conv: float, gamma_linear: float) -> None:
        self.model, self.halves = model, halves
        self.gamma_conv, self.gamma_linear = gamma_conv, gamma_linear

    def explain(self, image: Tensor, target: int) -> Tensor:
        model = self.model
        patches = model.patch_embed(image[None])
        embedded = model._pos_embed(patches)
        inputs = [model.norm_pre(embedded)]
        for block in model.blocks:
            inputs.append(block(inputs[-1]))
        relevance = norm(inputs[-1], model.norm, self.head(model.norm(inputs[-1]), target))
        for block, tokens in zip(reversed(model.blocks), reversed(inputs[:-1]), strict=True):
            relevance = self.block(block, tokens, relevance)
        prefix = model.num_prefix_tokens
        relevance = (relevance / embedded)[:, prefix:] * patches
        return self.pixels(image, relevance[0])

    def head(self, tokens: Tensor, target: int) -> Tensor:
        model, relevance = self.model, torch.zeros_like(tokens)
        if hasattr(model, "head_dist"):
            for token, layer in enumerate((model.head, model.head_dist)):
                x = tokens[:, token]
                of_logit = torch.eye(model.num_classes, dtype=x.dtype)[target] * layer(x) / 2
                relevance[:, token] = linear(x, layer, of_logit, self.gamma_linear)
            return relevance
        pooled = model.pool(tokens)
        x = model.fc_norm(pooled)
        of_logit = torch.eye(model.num_classes, dtype=x.dtype)[target] * model.head(x)
        of_pooled = norm(pooled, model.fc_norm, linear(x, model.head, of_logit, self.gamma_linear))
        if model.global_pool == "token":
            relevance[:, 0] = of_pooled
        else:
            read = tokens[:, model.num_prefix_tokens :]
            relevance[:, model.num_prefix_tokens :] = read / read.shape[1] * (of_pooled / pooled)[:, None]
        return relevance

    def block(self, block: nn.Module, tokens: Tensor, relevance: Tensor) -> Tensor:
        branch = block.ls1(block.attn(block.norm1(tokens)))
        middle = tokens + branch
        hidden = block.mlp.fc1(block.norm2(middle))
        second = block.ls2(block.mlp(block.norm2(middle)))
        rest, of_branch = middle * relevance / (middle + second), second * relevance / (middle + second)
        of_branch = linear(block.mlp.act(hidden), block.mlp.fc2, of_branch, self.gamma_linear)
        of_branch = linear(block.norm2(middle), block.mlp.fc1, of_branch, self.gamma_linear)
        relevance = rest + norm(middle, block.norm2, of_branch)
        rest, of_branch = tokens * relevance / middle, branch * relevance / middle
        return rest + norm(tokens, block.norm1, self.attention(block.attn, block.norm1(tokens), of_branch))

    def attention(self, layer: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
        projected = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = projected
        q, k = layer.q_norm(query), layer.k_norm(key)
        scores = layer.scale * q @ k.mT
        attention = scores.softmax(-1)
        mixed = attention @ value
        of_mixed = linear(mixed.transpose(1, 2).flatten(2), layer.proj, relevance)
        rate = of_mixed.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) / mixed
        terms = torch.einsum("nhij,nhjd,nhid->nhijd", attention, value, rate)  # relevance of query i from key j
        of_value, of_attention = terms.sum(2), terms.sum(4)
        if self.halves:
            of_value, of_attention = of_value / 2, of_attention / 2
            of_scores = scores * (of_attention - attention * of_attention.sum(-1, keepdim=True))
            terms = layer.scale * torch.einsum("nhid,nhjd,nhij->nhijd", q, k, of_scores / scores) / 2
            of_query = norm(query, layer.q_norm, terms.sum(3))
            of_key = norm(key, layer.k_norm, terms.sum(2))
        else:
            of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
        joined = torch.stack([of_query, of_key, of_value]).permute(1, 3, 0, 2, 4).flatten(2)
        return linear(x, layer.qkv, joined)

    def pixels(self, image: Tensor, relevance: Tensor) -> Tensor:
        embed, heat = self.model.patch_embed, torch.zeros_like(image)
        height, width = embed.patch_size
        for token, (row, column) in enumerate(np.ndindex(*embed.grid_size)):
            window = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            patch = linear(image[window].flatten(), embed.proj, relevance[token], self.gamma_conv)
            heat[window] = patch.reshape(heat[window].shape)
        return heat.sum(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gammas", [PLAIN, GAMMAS], ids=["plain", "gamma"])
@pytest.mark.parametrize("name", ["attn_lrp", "cp_lrp"])
def test_equals_the_rules_written_out(name: str, gammas: dict[str, float], shape: str) -> None:
    model, inputs = prepared(shape)
    maps = adapters.get(name, **gammas).explain(model, inputs, TARGETS)
    with torch.no_grad():
        walk = Walk(model, halves=name == "attn_lrp", **gammas)
        expected = torch.stack([walk.explain(x, t) for x, t in zip(inputs, TARGETS, strict=True)])
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def unbiased(shape: str) -> tuple[VisionTransformer, Tensor]:
    """A model in which only the image can hold relevance."""
    model, inputs = prepared(shape)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "token", "pos_embed")):
            nn.init.zeros_(parameter)
    return model, inputs


@pytest.mark.parametrize("shape", ["plain", "five_prefix", "mean_pooled", "distilled"])
@pytest.mark.parametrize("gammas", [PLAIN, GAMMAS], ids=["plain", "gamma"])
def test_cp_lrp_conserves_the_logit_where_nothing_else_takes_part(gammas: dict[str, float], shape: str) -> None:
    model, inputs = unbiased(shape)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1  # tokens without content stay finite
    total = adapters.get("cp_lrp", **gammas).explain(model, inputs, TARGETS).sum((1, 2))
    logits = model(inputs)[[0, 1], TARGETS].detach()
    np.testing.assert_allclose(total, logits, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gamma_rule_is_zennits(kind: str, bias: bool, gamma: float) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(12, 7, bias=bias) if kind == "linear" else nn.Conv2d(3, 7, 4, 4, bias=bias)
    layer = layer.double()
    inputs = torch.randn((5, 12) if kind == "linear" else (2, 3, 8, 8), dtype=torch.double, requires_grad=True)
    relevance = torch.randn_like(layer(inputs))
    rule = zennit.rules.Gamma(gamma, stabilizer=1e-12)
    handle = rule.register(layer)
    (expected,) = torch.autograd.grad(layer(inputs), inputs, relevance)
    handle.remove()
    output = rules._gamma(gamma)(layer, inputs, layer(inputs))
    np.testing.assert_allclose(output.detach(), layer(inputs).detach(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(output, inputs, relevance / output.detach())
    np.testing.assert_allclose((inputs * gradient).detach(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_forward_pass_is_left_as_it_is(shape: str) -> None:
    model, inputs = prepared(shape)
    model, inputs = model.float(), inputs.float()
    with rules.applied(model, query_key=0.25, value=0.5, gamma_conv=0.25, gamma_linear=0.1):
        inside = model(inputs)
    assert torch.equal(inside, model(inputs))


@pytest.mark.parametrize("name", ["attn_lrp", "libragrad"])
def test_layers_that_work_in_place_change_nothing(name: str) -> None:
    model, inputs = prepared("five_prefix")
    for block in model.blocks:
        block.mlp.act = nn.SiLU()
    expected = adapters.get(name).explain(model, inputs, TARGETS)
    for block in model.blocks:
        block.mlp.act.inplace = block.ls1.inplace = block.ls2.inplace = True
    assert torch.equal(adapters.get(name).explain(model, inputs, TARGETS), expected)
    assert model.blocks[0].ls1.inplace


def test_an_error_inside_leaves_no_rule_behind() -> None:
    model, _ = prepared("plain")
    with pytest.raises(RuntimeError), rules.applied(model, query_key=0, value=1):
        model(torch.zeros(1, 5, 32, 32, dtype=torch.double))
    assert not any(module._forward_hooks for module in model.modules())


def test_zero_activations_and_images_stay_finite() -> None:
    model, inputs = prepared("plain")
    nn.init.zeros_(model.blocks[0].mlp.fc1.weight)
    nn.init.zeros_(model.blocks[0].mlp.fc1.bias)
    assert adapters.get("attn_lrp").explain(model, torch.zeros_like(inputs), TARGETS).abs().max() == 0


@pytest.mark.parametrize("name", ["attn_lrp", "cp_lrp", "libragrad"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_layer": RmsNorm}, "RmsNorm"),
        ({"mlp_layer": SwiGLU}, "gated"),
        ({"num_classes": 0}, "head is not linear"),
        ({"global_pool": "map", "class_token": False}, "pools its tokens"),
    ],
)
def test_layers_without_a_rule_are_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in (adapters.get(name).supports(build(**changes)) or "")


def test_gammas_are_not_negative() -> None:
    with pytest.raises(RequestError, match="greater than or equal to 0"):
        adapters.get("attn_lrp", gamma_linear=-1)


def test_cost_follows_the_gamma_rule() -> None:
    assert adapters.get("cp_lrp", gamma_linear=0).cost == 2
    assert adapters.get("cp_lrp").cost == pytest.approx(10 / 3)
