"""Attention and its gradient: what a class makes of where a Vision Transformer looks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adapters import vit
from adapters.base import Explainer, min_max
from adapters.recording import Recording

_NO_LICENCE = "the authors' code has no licence file; written from the definition"


def _flow(state: Tensor, matrices: Iterable[Tensor]) -> Tensor:
    """Return ``state @ prod(I + matrix)``, the matrices (N, tokens, tokens) given from the last block to the first."""
    for matrix in matrices:
        state = state + state @ matrix
    return state


class _AttentionGradient(vit.ViTExplainer):
    family = "attention_gradient"
    passes = 2

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return every block's attention."""
        return vit.attentions(model)


class GAE(_AttentionGradient):
    """Generic attention explainability ("gradient attention rollout"), without relevance propagation.

    Per block, the mean over heads of the positive part of attention times its gradient, ``A_l = mean_h((dA * A)^+)``;
    the map is the read-out row of ``(I + A_L) ... (I + A_1)``, without row normalisation. Only that row is computed.
    The CDAM paper calls this map relevance propagation.
    """

    name = "gae"
    upsampling = "bilinear"
    reference = (
        "Chefer, Gur and Wolf, Generic attention-model explainability for interpreting bi-modal and encoder-decoder "
        "transformers, ICCV 2021"
    )

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) relevance, at least 0."""
        layers = vit.attentions(seen.model)
        row = vit.readout(seen.model, seen.output(layers[-1])).expand(len(seen.inputs), 1, -1)
        positive = ((seen.output(x) * seen.gradient(x)).clamp(min=0).mean(1) for x in reversed(layers))
        return vit.to_grid(seen, _flow(row, positive)[:, 0])


class GradCAMAttention(_AttentionGradient):
    """Grad-CAM on the last attention: the baseline of Chefer, Gur and Wolf, which no other paper defines.

    Every head's read-out row of the last attention is weighted by the mean of its gradient over the patch tokens;
    the mean over heads is clipped at 0 and scaled to [0, 1]. A map that is 0 everywhere stays so.
    """

    name = "gradcam_attention"
    passes = 1
    upsampling = "bilinear"
    reference = "Chefer, Gur and Wolf, Transformer interpretability beyond attention visualization, CVPR 2021"

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the last attention."""
        return vit.attentions(model)[-1:]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) maps in [0, 1]."""
        (last,) = self.differentiates(seen.model)
        readout = vit.readout(seen.model, seen.output(last))
        attention, gradient = readout @ seen.output(last), readout @ seen.gradient(last)
        weights = gradient[..., vit.find(seen.model).num_prefix_tokens :].mean(-1, keepdim=True)
        return min_max(vit.to_grid(seen, (weights * attention).mean(1).clamp(min=0)))


class LeGrad(_AttentionGradient):
    """Positive gradients of the attention, each block's taken of a logit read off that very block's tokens.

    ``sum_l mean_h,i (ds_l / dA_l[h, i, j])^+``, scaled to [0, 1], where ``s_l`` is the logit that the head gives to
    block l's output as if it were the last. The gradient of that logit at the block's attention is clipped at 0 and
    averaged over heads and query tokens; the sum over the blocks from `start_layer` on is scaled to [0, 1], before
    upsampling.

    The paper uses all blocks, as here; the authors' wrapper by default only the last two. It serves CLIP, and pools the
    mean of all tokens even where the model reads the class token: ``pool="mean"``. With ``pool="head"`` the head pools
    as it was trained to. Their cosine similarity with a text is here the logit of a class.
    """

    name = "legrad"
    reference = (
        "Bousselham et al., LeGrad: an explainability method for vision transformers via feature formation "
        "sensitivity, ICCV 2025 (arXiv 2404.03214)"
    )
    upsampling = "bilinear"
    start_layer: Annotated[int, Field(ge=0)] = 0
    pool: Literal["head", "mean"] = "head"

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no attention to differentiate, or None."""
        return super().supports(model) or vit.too_deep(model, start_layer=self.start_layer)

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks."""
        return list(vit.find(model).blocks)

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) maps in [0, 1]."""
        blocks = vit.find(seen.model).blocks[self.start_layer :]
        return min_max(vit.to_grid(seen, torch.stack([self._block(seen, block) for block in blocks]).sum(0)))

    def _block(self, seen: Recording, block: Block) -> Tensor:
        tokens = seen.differentiable(block)
        if self.pool == "mean":
            tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
        logits = vit.resume(seen.model, seen.inputs, tokens).gather(1, seen.targets[:, None])
        return seen.gradient_of(logits, block.attn.attn_drop).clamp(min=0).mean((1, 2))


class AttentionGuidedCAM(_AttentionGradient):
    """Sum over blocks and heads of the positive gradient of the attention times the sigmoid of its scores.

    Both at the rows of the tokens that the head reads: ``sum (dA)^+ * sigmoid(q k / sqrt(d))``. As in the paper, the
    gradient passes from block to block by the skip connection and the MLP only, not through the attention.
    """

    name = "attention_guided_cam"
    reference = (
        "Leem and Seo, Attention guided CAM: visual explanations of vision transformer guided by self-attention, "
        "AAAI 2024"
    )
    licence = _NO_LICENCE
    upsampling = "bilinear"

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return queries, keys, and what each block adds to and puts out."""
        blocks = vit.find(model).blocks
        return [m for b in blocks for m in (b.attn.q_norm, b.attn.k_norm, b.drop_path1, b)]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) maps, at least 0."""
        blocks = vit.find(seen.model).blocks
        onwards = seen.gradient_of(seen.logits.gather(1, seen.targets[:, None]), blocks[-1])
        maps = []
        for block in reversed(blocks):
            onwards = seen.gradient_of(onwards * seen.differentiable(block), block.drop_path1)
            gradient = seen.gradient_of(onwards * seen.differentiable(block.drop_path1), block.attn.attn_drop)
            maps.append((_read_rows(seen, gradient).clamp(min=0) * self._scores(seen, block).sigmoid()).sum(1).mean(1))
        return vit.to_grid(seen, torch.stack(maps).sum(0))

    @staticmethod
    def _scores(seen: Recording, block: Block) -> Tensor:
        layer = block.attn
        query = _read_rows(seen, seen.output(layer.q_norm))
        return query @ seen.output(layer.k_norm).mT * layer.scale


def _read_rows(seen: Recording, rows: Tensor) -> Tensor:
    """Choose the rows (..., R, width) of the tokens that the head reads out of (..., tokens, width)."""
    return rows[..., vit.read_tokens(seen.model, rows[..., 0]), :]


class AttCAT(_AttentionGradient):
    """Attentive class activation tokens: token times gradient, times the attention that the token receives.

    Summed over blocks: ``mean_h,i(A_l[h, i, j]) * sum_c(x_l[j, c] * dx_l[j, c])``, with ``x_l`` the input of block l.
    The paper takes the block's output tokens; the authors' code, followed here, its input. Their model is BERT, where
    that input is normalised; a Vision Transformer's is not.
    """

    name = "attcat"
    signed = True
    reference = "Qiang et al., AttCAT: explaining transformers via attentive class activation tokens, NeurIPS 2022"
    licence = _NO_LICENCE

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return every block's attention."""
        return vit.attentions(model)

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return what puts out each block's input."""
        transformer = vit.find(model)
        return [transformer.norm_pre, *transformer.blocks[:-1]]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) signed scores in units of the logit."""
        pairs = zip(self.differentiates(seen.model), vit.attentions(seen.model), strict=True)
        scores = [
            (seen.output(source) * seen.gradient(source)).sum(-1) * seen.output(attention).mean((1, 2))
            for source, attention in pairs
        ]
        return vit.to_grid(seen, torch.stack(scores).sum(0))


class _IntegratedAttention(Explainer):
    """Base of what weights a flow of attention by the last attention's gradient, averaged along a path of images.

    The path is ``alpha * image`` for `steps` values of alpha from 0 to 1, both included.
    """

    family = "attention_gradient"
    upsampling = "bilinear"
    licence = _NO_LICENCE
    quick = "steps=2"
    steps: Annotated[int, Field(ge=2)] = 20
    start_layer: Annotated[int, Field(ge=0)] | None = None

    @property
    def cost(self) -> float:
        """One forward pass for the flow and one for each step; the gradient stops at the last attention."""
        return self.steps + 1

    @property
    def published_start(self) -> int:
        """The block, from 0, at which the authors start."""
        raise NotImplementedError

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules that `flow` reads."""
        return vit.attentions(model)

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules at whose outputs `flow` needs the gradient of the target logit."""
        return []

    def flow(self, seen: Recording) -> Tensor:
        """Return (N, R, tokens): how much of each token reaches the tokens that the head reads."""
        raise NotImplementedError

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no attention to integrate, or None."""
        if reason := vit.unsupported(model):
            return reason
        return None if self.start_layer is None else vit.too_deep(model, start_layer=self.start_layer)

    def start(self, model: nn.Module) -> int:
        """Return the first block that the attention flows through."""
        if self.start_layer is None:
            return min(self.published_start, len(vit.attentions(model)) - 1)
        return self.start_layer

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) scores, at least 0."""
        weights = self._integrated(model, inputs, targets)
        seen = Recording(model, inputs, targets, self.watches(model), self.differentiates(model))
        return vit.to_grid(seen, (weights * self.flow(seen)).mean(1))

    def _integrated(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Positive part of the mean gradient, mean over heads, (N, R, tokens)."""
        last, gradients = vit.attentions(model)[-1], []
        for step in range(self.steps):
            seen = Recording(model, inputs * (step / (self.steps - 1)), targets, [], [last])
            gradients.append(_read_rows(seen, seen.gradient(last)))
        return torch.stack(gradients).mean(0).clamp(min=0).mean(1)


class TransitionAttention(_IntegratedAttention):
    """Transition attention maps: the last attention carried down the blocks, weighted by its integrated gradient.

    The read-out row of the last attention (mean over heads) goes through ``(I + A_l)`` for the blocks below it down to
    `start_layer`; it is multiplied by the positive part of the last attention's gradient, averaged over `steps`
    images from zero to the given one. `start_layer` is by default 4, as in the authors' scripts, or the last block
    where there are fewer; one of their two copies of the method defaults to 0.
    """

    name = "transition_attention"
    reference = (
        "Yuan et al., Explaining information flow inside vision transformers using Markov chain, "
        "NeurIPS workshop XAI4Debugging 2021"
    )

    @property
    def published_start(self) -> int:
        """The block, from 0, at which the authors start."""
        return 4

    def flow(self, seen: Recording) -> Tensor:
        """Return the states of the Markov chain, (N, R, tokens)."""
        *below, last = (seen.output(layer).mean(1) for layer in vit.attentions(seen.model))
        return _flow(_read_rows(seen, last), reversed(below[self.start(seen.model) :]))


class Bidirectional(_IntegratedAttention):
    """Attention perception, accumulated by tokens or by heads, times the integrated gradient of the last attention.

    The perception is the product of ``(I + P_l)`` over the blocks from `start_layer` on. With ``level="token"``, P is
    the mean attention with each column scaled by how much the block's value projection stretches that token,
    ``|W_o v_j| / |x_j|`` (no biases; with LayerScale, where a model has it). With ``level="head"``, P is the mean of
    the heads' attention, weighted by ``mean |A^T dA|``. The absolute value is multiplied by the positive part of the
    last attention's gradient, averaged over `steps` images from zero to the given one.

    By default `start_layer` is 5 for tokens and 3 for heads (6 and 4, counted from 1, in the authors' code), or the
    last block where there are fewer. Their code works on one image at a time: on more, heads of all images mix. For a
    model that reads the mean of the patch tokens it takes the mean over their rows, as here.
    """

    name = "bidirectional"
    reference = (
        "Chen et al., Beyond intuition: rethinking token attributions inside transformers, "
        "Transactions on Machine Learning Research 2023"
    )
    level: Literal["token", "head"] = "token"

    @property
    def cost(self) -> float:
        """Weights of heads take one more backward pass."""
        return super().cost + (self.level == "head")

    @property
    def published_start(self) -> int:
        """The block, from 0, at which the authors start."""
        return {"token": 5, "head": 3}[self.level]

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return attention, values and tokens of every block."""
        return [m for b in vit.find(model).blocks for m in (b.attn.attn_drop, b.attn.qkv, b.norm1)]

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the attentions, where heads are weighted by their gradients."""
        return vit.attentions(model)[self.start(model) :] if self.level == "head" else []

    def flow(self, seen: Recording) -> Tensor:
        """Return the perception (N, R, tokens), at least 0."""
        blocks = vit.find(seen.model).blocks[self.start(seen.model) :]
        perceived = ({"token": _by_token, "head": _by_head}[self.level](seen, block) for block in reversed(blocks))
        tokens = seen.input(blocks[-1].norm1)
        unit = torch.eye(tokens.shape[1], device=tokens.device, dtype=tokens.dtype).expand(len(tokens), -1, -1)
        return _flow(_read_rows(seen, unit), perceived).abs()


def _by_token(seen: Recording, block: Block) -> Tensor:
    layer = block.attn
    value = seen.output(layer.qkv).unflatten(-1, (3, -1))[:, :, 2]
    projected = block.ls1(F.linear(value, layer.proj.weight))
    stretch = projected.norm(dim=-1) / seen.input(block.norm1).norm(dim=-1)
    return seen.output(layer.attn_drop).mean(1) * stretch[:, None]


def _by_head(seen: Recording, block: Block) -> Tensor:
    attention, gradient = (get(block.attn.attn_drop) for get in (seen.output, seen.gradient))
    weights = (attention.mT @ gradient).abs().mean((2, 3))
    weights = F.normalize(weights, p=1, dim=1, eps=torch.finfo(weights.dtype).tiny)
    return torch.einsum("nh,nhij->nij", weights, attention)
