"""AttnLRP and CP-LRP: relevance of the pixels as input times a gradient that follows propagation rules."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters import rules, vit
from adapters.base import Explainer


class AttnLRP(Explainer):
    """AttnLRP: relevance of every pixel, with rules for attention, as input times a modified gradient.

    The rules: LayerNorm divides by a constant standard deviation, its mean is linear; GELU multiplies by the constant
    f(x) / x; a product of two matrices gives half to each, so a quarter of the gradient reaches queries and keys and
    half of it the values; softmax keeps its gradient, its Taylor rule. The map is the sum over the channels of image
    times gradient, signed, in units of the logit; biases and the Taylor remainder of the softmax keep their part.

    `gamma_linear` is the gamma rule's in the MLPs and the heads, `gamma_conv` in the patch embedding, 0 is the plain
    (epsilon) rule. Queries, keys, values and the attention's output projection have the plain rule: so it is in the
    authors' vision recipe, where the gamma rule does not reach them. That recipe (LXT, ``vit_torch``) is `cp_lrp`; this
    is the full rule set, which they ship for language models. They name no best gamma and say to tune, over
    ``gamma_conv`` in .1, .25, 100 and ``gamma_linear`` in 0, .01, .05, .1, 1: the defaults are the middle of that grid,
    and ``explainer-bench tune`` searches any grid on the validation split, never on test images.
    """

    name = "attn_lrp"
    family = "lrp"
    signed = True
    reference = "Achtibat et al., AttnLRP: attention-aware layer-wise relevance propagation for transformers, ICML 2024"
    licence = "the authors' LXT is Clear BSD: no patent licence, and a patent may exist; written from the paper's rules"
    batch_size = 4  # the gamma rule keeps several tensors of every MLP: of ViT-B/16, eight images would take 4 GB
    factors: ClassVar[tuple[float, float]] = (0.25, 0.5)  # of the gradient that reaches queries and keys, and values
    gamma_conv: Annotated[float, Field(ge=0)] = 0.25
    gamma_linear: Annotated[float, Field(ge=0)] = 0.05

    @property
    def cost(self) -> float:
        """A forward and a backward; the gamma rule doubles the MLPs, two thirds of the work."""
        return 2 if self.gamma_linear == 0 else 2 + 4 / 3

    def supports(self, model: nn.Module) -> str | None:
        """Return which layer of `model` no rule covers, or None."""
        return rules.unsupported(model)

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) signed relevance in units of the logit."""
        query_key, value = self.factors
        gammas = {"gamma_conv": self.gamma_conv, "gamma_linear": self.gamma_linear}
        with rules.applied(vit.find(model), query_key=query_key, value=value, **gammas):
            logits = model(inputs)
        (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), inputs)
        return (inputs * gradient).sum(1)


class CPLRP(AttnLRP):
    """CP-LRP: as `attn_lrp`, but attention is a constant, so all relevance follows the values.

    Nothing is lost in the softmax: up to what biases, embeddings and registers keep, the map sums to the logit. With
    the rules of AttnLRP outside attention, as in the authors' vision recipe (LXT, ``vit_torch``), where it is "easier
    to tune for gamma"; Ali et al., who proposed it, left the activations' gradient as it is.
    """

    name = "cp_lrp"
    reference = "Ali et al., XAI for transformers: better explanations through conservative propagation, ICML 2022"
    factors = (0.0, 1.0)
