"""LibraGrad: gradient methods on a backward pass that is balanced first."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from adapters import rules, vit
from adapters.base import Explainer
from adapters.recording import Recording


class LibraGrad(Explainer):
    """LibraGrad: a gradient method on a model made linear around each image by cutting backward paths.

    Attention weights, the gates of activations (GELU is x times a gate) and the standard deviations of LayerNorm are
    constants; no value of the forward pass changes. On these gradients, `on` is

    - "input_x_gradient": tokens that enter the first block (with positional embedding) times gradient, summed over the
      channels, ``sum_c t_c dt_c``, as in the authors' evaluation. With zero biases, all tokens sum to the logit. At the
      pixels it would be `cp_lrp` without the gamma rule.
    - "gradcam": tokens that enter the last attention (``blocks[-1].norm1``), weighted per channel by their gradient's
      mean over the patches, and summed. Not clipped at 0, as the authors' code does not.

    Differs from their evaluation in that they differentiate the probability, and here as everywhere it is the logit.
    Their tables hold GradCAM+, the sum over all blocks, not this single layer. Not verified: at which point of the
    block and over which tokens their Grad-CAM averages.
    """

    name = "libragrad"
    family = "gradient"
    signed = True
    reference = "Mehri, Soleymani Baghshah and Pilehvar, LibraGrad: balancing gradient flow, CVPR 2025"
    licence = "the authors' code has no licence; written from the paper"
    on: Literal["input_x_gradient", "gradcam"] = "input_x_gradient"

    @property
    def cost(self) -> float:
        """One forward, and a backward down to the tokens that are read."""
        return 2 if self.on == "input_x_gradient" else 1

    def supports(self, model: nn.Module) -> str | None:
        """Return which layer of `model` cannot be balanced, or None."""
        return rules.unsupported(model)

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) signed scores."""
        transformer = vit.find(model)
        layer = transformer.norm_pre if self.on == "input_x_gradient" else transformer.blocks[-1].norm1
        with rules.applied(transformer, query_key=0, value=1):
            seen = Recording(model, inputs, targets, [], [layer])
            tokens, gradient = seen.output(layer), seen.gradient(layer)
        if self.on == "gradcam":
            gradient = gradient[:, transformer.num_prefix_tokens :].mean(1, keepdim=True)
        return vit.to_grid(seen, (tokens * gradient).sum(-1))
