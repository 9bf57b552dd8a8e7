"""LibraGrad against a forward pass written with constants, and its completeness."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from adapters import rules
from adapters.recording import Recording

from .conftest import build

TARGETS = [1, 4]
SHAPES = ["plain", "five_prefix", "non_square", "no_prefix", "mean_pooled"]


def prepared(shape: str, **changes: object) -> tuple[VisionTransformer, Tensor]:
    model = build(shape, **changes).double().eval().requires_grad_(False)
    return model, torch.rand(2, 3, *model.patch_embed.img_size, dtype=torch.double) - 0.3


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Identity):
        return x
    deviation = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / deviation * layer.weight + layer.bias


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    query, key, value = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (layer.q_norm(query) @ layer.k_norm(key).mT * layer.scale).softmax(-1).detach()
    return layer.proj((weights @ value).transpose(1, 2).flatten(2))


def gelu(x: Tensor) -> Tensor:
    return x * (0.5 * (1 + torch.erf(x / 2**0.5))).detach()


def forward(model: VisionTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits from the tokens that enter the blocks, with gates held constant, and what the last attention received."""
    for block in model.blocks:
        entered = norm(block.norm1, tokens)
        tokens = tokens + block.ls1(attention(block.attn, entered))
        hidden = gelu(block.mlp.fc1(norm(block.norm2, tokens)))
        tokens = tokens + block.ls2(block.mlp.fc2(hidden))
    return model.head(norm(model.fc_norm, model.pool(norm(model.norm, tokens)))), entered


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_forward_pass_with_constant_gates(shape: str) -> None:
    model, inputs = prepared(shape)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(inputs))).requires_grad_()
    logits, entered = forward(model, tokens)
    np.testing.assert_allclose(logits.detach(), model(inputs), rtol=1e-9)
    gradients = torch.autograd.grad(logits[[0, 1], TARGETS].sum(), [tokens, entered])
    prefix = model.num_prefix_tokens
    products = (tokens * gradients[0]).sum(-1)[:, prefix:].detach()
    weights = gradients[1][:, prefix:].mean(1, keepdim=True)
    cam = (entered * weights).sum(-1)[:, prefix:].detach()
    for on, expected in {"input_x_gradient": products, "gradcam": cam}.items():
        maps = adapters.get("libragrad", on=on).explain(model, inputs, TARGETS).flatten(1)
        np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_all_tokens_have_the_logit_where_biases_are_zero(shape: str) -> None:
    model, inputs = prepared(shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    with rules.applied(model, query_key=0, value=1):
        seen = Recording(model, inputs, torch.tensor(TARGETS), [], [model.norm_pre])
        products = seen.output(model.norm_pre) * seen.gradient(model.norm_pre)
    np.testing.assert_allclose(products.sum((1, 2)), model(inputs)[[0, 1], TARGETS], rtol=1e-9)


def test_plain_gradients_are_not_complete() -> None:
    model, inputs = prepared("plain")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    seen = Recording(model, inputs, torch.tensor(TARGETS), [], [model.norm_pre])
    products = seen.output(model.norm_pre) * seen.gradient(model.norm_pre)
    logits = model(inputs)[[0, 1], TARGETS]
    assert ((products.sum((1, 2)) - logits).abs() > 0.1 * logits.abs()).all()


class Gated(nn.Module):
    """SiLU whose gate is a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.sigmoid(x).detach()


def test_any_activation_is_a_gate() -> None:
    model, inputs = prepared("plain", act_layer=nn.SiLU)
    maps = adapters.get("libragrad").explain(model, inputs, TARGETS)
    for block in model.blocks:
        block.mlp.act = Gated()
    np.testing.assert_allclose(maps, adapters.get("libragrad").explain(model, inputs, TARGETS), rtol=1e-5)


def test_grad_cam_costs_no_backward_pass() -> None:
    assert adapters.get("libragrad").cost == 2
    assert adapters.get("libragrad", on="gradcam").cost == 1
