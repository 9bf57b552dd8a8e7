"""Class-discriminative attention maps."""

from __future__ import annotations

from torch import Tensor, nn

from adapters import vit
from adapters.base import target_gradients


class CDAM(vit.ViTExplainer):
    """Class-discriminative attention map: token times gradient of the target logit, summed over the channels.

    The tokens are the input of the last attention, that is the output of ``blocks[-1].norm1``. The map is signed and
    neither clipped nor normalised. The first release carries no licence; this follows the paper's equation.
    """

    name = "cdam"
    family = "attention_gradient"
    signed = True
    reference = "Brocki, Binda and Chung, Class-discriminative attention maps for vision transformers, TMLR 2024"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) signed scores in units of the logit."""
        with vit.recorded(vit.find(model).blocks[-1].norm1) as tokens:
            (gradients,) = target_gradients(model, inputs, targets, tokens)
        return vit.to_grid(model, inputs, (tokens[0] * gradients).sum(-1))
