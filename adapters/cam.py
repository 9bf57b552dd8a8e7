"""Class activation maps, through pytorch-grad-cam."""

from __future__ import annotations

import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from adapters import vit


class GradCAM(vit.ViTExplainer):
    """Grad-CAM on the tokens that enter the last block (``blocks[-1].norm1``), prefix tokens dropped.

    As pytorch-grad-cam defines it: channels weighted by their mean gradient, summed, clipped at 0, scaled to [0, 1]
    per image and resized bilinearly.
    """

    name = "gradcam"
    family = "cam"
    reference = "Selvaraju et al., Grad-CAM, ICCV 2017; pytorch-grad-cam (MIT)"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W) scores in [0, 1]."""
        tokens_of = vit.find(model)
        grid, prefix = vit.token_grid(model, inputs), tokens_of.num_prefix_tokens

        def reshape(tokens: Tensor) -> Tensor:
            return tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)

        method = pytorch_grad_cam.GradCAM(model, [tokens_of.blocks[-1].norm1], reshape_transform=reshape)
        try:
            maps = method(inputs, targets=[ClassifierOutputTarget(int(target)) for target in targets])
        finally:
            method.activations_and_grads.release()
        return torch.from_numpy(maps)
