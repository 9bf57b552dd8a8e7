"""Layer-wise relevance propagation through convolutional networks: zennit's rules on a canonical copy of the model."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from zennit import types
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlusFlat, LayerMapComposite
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon, Norm, Pass

from adapters.base import Explainer
from adapters.canonical import Average, NoRuleError, canonical

_BACH = "Bach et al., On pixel-wise explanations by layer-wise relevance propagation, PLOS ONE 2015"
_ZENNIT = "zennit: Anders et al., 2021"
_AVERAGES = [(Average, Norm())]  # zennit knows only those that are PyTorch's modules


class _LRP(Explainer):
    family = "lrp"
    signed = True
    half_precision = False
    licence = "layer-wise relevance propagation is patented: check before you build a product on it; zennit is LGPL-3.0"
    epsilon: Annotated[float, Field(gt=0)] = 1e-6

    def supports(self, model: nn.Module) -> str | None:
        """Return what in `model` has no rule, or None."""
        try:
            canonical(model)
        except NoRuleError as error:
            return str(error)
        return None

    def composite(self, inputs: Tensor) -> Composite:
        """Return zennit's rules for these (N, C, H, W) images."""
        raise NotImplementedError

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) relevance, signed, summed over the channels, in units of the logit."""
        with self.composite(inputs).context(canonical(model)) as ruled:
            logits = ruled(inputs)
            start = logits.detach() * nn.functional.one_hot(targets, logits.shape[1])
            (relevance,) = torch.autograd.grad(logits, inputs, start)
        return relevance.sum(1)


class LRPEpsilonPlus(_LRP):
    """LRP with the z-plus rule for convolutions, epsilon for linear layers, flat for the first: EpsilonPlusFlat.

    Relevance starts as the target's logit (zennit's examples start with 1: the map divided by the logit). Layer by
    layer, each unit's goes to its inputs in proportion to ``z_j = x_j w_j`` over ``sum_j z_j``, with `epsilon` added
    to the size of that sum (epsilon rule, linear layers); to the positive ``z_j`` alone (z-plus, convolutions); in
    equal parts (flat, the first layer). Where a shortcut is added, and in average pooling, it goes by the epsilon rule
    with 1e-6; maximum pooling gives all to the winner; ReLU passes it on. Biases take a part, which is lost: only
    without them do the pixels sum to the logit, and only where no unit lacks positive ``z_j``.

    All this on a canonical copy of the model, whose logits are the same. BatchNorm is merged into the convolution or
    linear layer before it; where there is none, as in DenseNet, it passes relevance on unchanged, as in zennit (not
    merged into the layer behind it, as in Pahde et al. 2023). A gate, that is any product with the output of a sigmoid
    (SE, CBAM, ECA), counts as a constant: all relevance goes to what it scales. zennit's own canonizers are not used:
    they merge in the order in which layers are declared, which fails on a DenseNet, and know no gates.
    """

    name = "lrp_epsilon_plus"
    reference = f"{_BACH}; rules: Montavon et al., 2019; {_ZENNIT}"
    passes = 6

    def composite(self, inputs: Tensor) -> Composite:
        """Return EpsilonPlusFlat."""
        return EpsilonPlusFlat(epsilon=self.epsilon, layer_map=_AVERAGES)


class LRPEpsilonGammaBox(_LRP):
    """LRP with the gamma rule for convolutions, epsilon for linear layers, box for the first: EpsilonGammaBox.

    As `lrp_epsilon_plus`, but convolutions divide relevance by ``x_j (w_j + gamma w_j^+)``, generalised by zennit to
    inputs and outputs below 0, and the first layer by ``x_j w_j - l_j w_j^+ - h_j w_j^-``. There the box ``[l, h]``
    should hold what values a pixel can take. That depends on the normalisation, which an explainer is not told, so
    it is taken from each image: the least and the greatest value of each channel. It is the true box wherever the
    channel has both a black and a saturated pixel, else a smaller one.
    """

    name = "lrp_epsilon_gamma_box"
    reference = f"{_BACH}; rules: Montavon et al., 2019; {_ZENNIT}"
    passes = 12
    gamma: Annotated[float, Field(gt=0)] = 0.25

    def composite(self, inputs: Tensor) -> Composite:
        """Return EpsilonGammaBox with a box for each image and channel."""
        low, high = (bound[..., None, None] for bound in inputs.detach().flatten(2).aminmax(dim=-1))
        return EpsilonGammaBox(low, high, epsilon=self.epsilon, gamma=self.gamma, layer_map=_AVERAGES)


class LRPEpsilonAlpha2Beta1(_LRP):
    """LRP with the alpha-2-beta-1 rule for convolutions and epsilon for linear layers: EpsilonAlpha2Beta1.

    As `lrp_epsilon_plus`, but every convolution, the first too, hands down twice its relevance in proportion to the
    positive ``x_j w_j``, less once in proportion to the negative ones. A unit that has only positive ones doubles it.
    """

    name = "lrp_epsilon_alpha2_beta1"
    reference = f"{_BACH}; {_ZENNIT}"
    passes = 10

    def composite(self, inputs: Tensor) -> Composite:
        """Return EpsilonAlpha2Beta1."""
        return EpsilonAlpha2Beta1(epsilon=self.epsilon, layer_map=_AVERAGES)


class LRPEpsilon(_LRP):
    """LRP with the epsilon rule for everything: convolutions, linear layers, BatchNorm, sums and averages.

    Canonical copy and start as in `lrp_epsilon_plus`. The rules are the defaults of captum's LRP, which Goncalves et
    al. used, with its `epsilon`. On a model of modules alone the maps are captum's. But captum takes the gradient of
    whatever is no module, so that at a functional shortcut or gate its relevance is not conserved; here it is.
    """

    name = "lrp_epsilon"
    reference = f"{_BACH}; as used by Goncalves et al., 2022; {_ZENNIT}"
    passes = 4
    epsilon: Annotated[float, Field(gt=0)] = 1e-9

    def composite(self, inputs: Tensor) -> Composite:
        """Return the epsilon rule for everything."""
        return LayerMapComposite(
            [
                (types.Activation, Pass()),
                ((Sum, types.AvgPool, Average), Norm(self.epsilon)),
                ((types.Linear, types.BatchNorm), Epsilon(self.epsilon)),
            ]
        )
