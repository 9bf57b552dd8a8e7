"""Class-discriminative attention maps."""

from __future__ import annotations

from torch import Tensor, nn

from adapters import vit
from adapters.recording import Recording


class CDAM(vit.ViTExplainer):
    """Class-discriminative attention map: token times gradient of the target logit, summed over the channels.

    The tokens are the input of the last attention, that is the output of ``blocks[-1].norm1``. The map is signed and
    neither clipped nor normalised.
    """

    name = "cdam"
    family = "cdam"
    signed = True
    passes = 1
    reference = "Brocki, Binda and Chung, Class-discriminative attention maps for vision transformers, TMLR 2024"
    licence = "the authors' first code has no licence, their later code Apache-2.0 or GPL-3.0; written from the paper"

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the last attention's input."""
        return [vit.find(model).blocks[-1].norm1]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) signed scores in units of the logit."""
        (norm,) = self.differentiates(seen.model)
        return vit.to_grid(seen, (seen.output(norm) * seen.gradient(norm)).sum(-1))
