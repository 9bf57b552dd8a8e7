"""Train the small ViT that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench import datasets, models
from bench.datasets.base import Dataset, Item, Sample
from bench.datasets.digits import CANVAS, Digits
from bench.models import Model
from bench.recipes.base import Count, Rate, Recipe, Share
from explainer_bench import RequestError

PATCH = 8
SIDE = CANVAS // PATCH
WINDOW = 4  # patches across: room for one digit wherever it stands
SIZES = {"val": 512, "test": 1024}


class DigitsRecipe(Recipe):
    """A six-block ViT of 64 x 64 px in patches of 8 x 8, that tells which digits are present.

    Multi-label: one independent logit per digit. So that minutes suffice without pre-training, the patch
    tokens are trained along with the class token: the same head is to tell which share of the patch each
    digit's ROI covers (token labelling, Jiang et al., NeurIPS 2021), and the first epochs see only windows of
    4 x 4 patches, with their place in the grid, around a digit: a quarter of the cost, and few places to look.
    In the end only the class token classifies, and it sees the whole image.

    Parameters
    ----------
    size : int
        Training images.
    token_weight : float
        Weight of the patch tokens' loss beside the class token's.
    window_share : float
        Share of the steps that see a window only.
    """

    name = "digits"
    model_name = "digits_vit"
    half = True
    reference = "https://arxiv.org/abs/2104.10858"

    epochs: Count = 30
    batch_size: Count = 64
    lr: Rate = 1.5e-3
    hold: Share = 0.6
    patience: Count = 30
    size: Count = 8192
    token_weight: Rate = 0.5
    window_share: Share = 0.8

    def dataset(self, split: str, root: Path | None) -> Dataset:
        """Return one split; `root` is not needed."""
        return datasets.get("digits", split=split, size=SIZES.get(split, self.size))

    def model(self, weights: Path | None) -> Model:
        """Return the untrained ViT."""
        if weights is not None:
            raise RequestError("recipe digits trains from scratch: leave --weights out.")
        shape = {"img_size": CANVAS, "patch_size": PATCH, "embed_dim": 96, "depth": 6, "num_heads": 4}
        return models.create("vit_tiny_patch16_224", self.model_name, Digits.class_names, **shape)

    def target(self, sample: Sample, item: Item) -> np.ndarray:
        """Return (1 + patches, 10) float32: whether each digit is present, then its share of every patch."""
        target = np.zeros((1 + SIDE * SIDE, len(Digits.class_names)), np.float32)
        for digit, mask in item.roi.items():
            target[0, digit] = 1
            target[1:, digit] = mask.reshape(SIDE, PATCH, SIDE, PATCH).mean((1, 3)).ravel()
        return target

    def augment(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """Exchange the colour channels: every colour is equally likely in each."""
        return images[:, torch.from_numpy(generator.permutation(3))]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of the class token's logits."""
        return F.binary_cross_entropy_with_logits(logits, targets[:, 0])

    def training_loss(
        self, module: nn.Module, inputs: Tensor, targets: Tensor, done: float, generator: np.random.Generator
    ) -> Tensor:
        """Class token's and patch tokens' binary cross-entropy on windows, at last on whole images."""
        patches = targets[:, 1:]
        seen = (
            _windows(targets, generator) if done < self.window_share else torch.arange(SIDE**2).expand(len(inputs), -1)
        )
        seen = seen.to(inputs.device)
        inside = patches.gather(1, seen[..., None].expand(-1, -1, patches.shape[2]))
        visible = inside.sum(1) / patches.sum(1).clamp(min=1e-6)
        logits = _tokens(module, inputs, seen)
        tokens = F.binary_cross_entropy_with_logits(logits[:, 1:], inside)
        present = ((visible - 0.3) / 0.5).clamp(0, 1)
        return F.binary_cross_entropy_with_logits(logits[:, 0], present) + self.token_weight * tokens

    def measure(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Share of images whose top class is present, and whose present classes are all told and no other."""
        present = targets[:, 0] > 0.5
        top = present[np.arange(len(logits)), logits.argmax(1)]
        return {"top1_present": float(top.mean()), "all_labels": float(((logits > 0) == present).all(1).mean())}


def _windows(targets: Tensor, generator: np.random.Generator) -> Tensor:
    """For each image the patches (B, n) of a window around one of its digits, off centre by up to one patch."""
    draw = torch.from_numpy(generator.random(targets[:, 0].shape, np.float32)).to(targets.device)
    digit = (targets[:, 0] * draw).argmax(1)
    cover = targets[torch.arange(len(targets)), 1:, digit].unflatten(1, (SIDE, SIDE))
    places = torch.arange(SIDE, device=cover.device) + 0.5
    centre = torch.stack([cover.sum(2) @ places, cover.sum(1) @ places]) / cover.sum((1, 2))
    jitter = torch.from_numpy(generator.uniform(-1, 1, centre.shape)).to(centre)
    top, left = (centre - WINDOW / 2 + jitter).round().clamp(0, SIDE - WINDOW).long()
    steps = torch.arange(WINDOW, device=cover.device)
    return ((top[:, None] + steps)[:, :, None] * SIDE + (left[:, None] + steps)[:, None]).flatten(1)


def _tokens(module: nn.Module, inputs: Tensor, seen: Tensor) -> Tensor:
    """Logits (B, 1 + n, 10) of the class token and of the patches `seen` (B, n), the only ones there are."""
    vit = cast(VisionTransformer, module)
    patches = vit.patch_embed(inputs) + vit.pos_embed[:, 1:]
    patches = patches.gather(1, seen[..., None].expand(-1, -1, patches.shape[2]))
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(inputs), -1, -1)
    return vit.head(vit.norm(vit.blocks(torch.cat([first, patches], dim=1))))
