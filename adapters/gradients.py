"""Gradient methods, through captum."""

from __future__ import annotations

import captum.attr
from torch import Tensor, nn

from adapters.base import Explainer


class IntegratedGradients(Explainer):
    """Integrated gradients of the target logit from a zero baseline (in normalised space), summed over the channels.

    The path integral is captum's Gauss-Legendre sum over `n_steps` points.
    """

    name = "integrated_gradients"
    family = "gradient"
    signed = True
    reference = "Sundararajan, Taly and Yan, Axiomatic attribution for deep networks, ICML 2017"
    quick = "n_steps=4"
    n_steps: int = 50

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) signed scores that sum to the logit's difference from the baseline's."""
        method = captum.attr.IntegratedGradients(model)
        scores = method.attribute(inputs, target=targets, n_steps=self.n_steps, internal_batch_size=4 * len(inputs))
        return scores.sum(1)
