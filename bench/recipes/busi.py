"""Fine-tune a small ImageNet ViT on breast ultrasound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch import Tensor

from bench import datasets, models
from bench.datasets.base import Dataset, Item, Sample
from bench.datasets.busi import Busi
from bench.models import Model
from bench.recipes.base import Count, Rate, Recipe, Share
from explainer_bench import RequestError

ARCHITECTURE = "vit_tiny_patch16_224"
COUNTS = (437, 210, 133)  # images per class in the published archive
MALIGNANT = 1


class BusiRecipe(Recipe):
    """`vit_tiny_patch16_224` from local ImageNet weights, a new head for benign, malignant and normal.

    Classes are weighted by their inverse frequency in the archive. Images are mirrored, zoomed and shifted by
    up to a tenth, and changed in contrast and brightness.
    """

    name = "busi"
    model_name = "busi_vit_tiny"

    epochs: Count = 8
    batch_size: Count = 16
    lr: Rate = 4e-5
    warmup: Share = 0.1
    patience: Count = 4

    def dataset(self, split: str, root: Path | None) -> Dataset:
        """Return one split of BUSI under `root`."""
        return datasets.get("busi", root=root, split=split)

    def model(self, weights: Path | None) -> Model:
        """Return the architecture with the backbone of `weights` and a new head."""
        if weights is None:
            raise RequestError(f"recipe busi needs --weights FILE: a safetensors file of {ARCHITECTURE} from timm.")
        model = models.create(ARCHITECTURE, self.model_name, Busi.class_names)
        models.load_backbone(model, weights)
        return model

    def target(self, sample: Sample, item: Item) -> np.ndarray:
        """Return the class."""
        return np.array(sample.label)

    def augment(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """Mirror, zoom, shift, and change contrast and brightness, each image on its own."""
        n = len(images)
        flip = generator.choice([-1.0, 1.0], n)
        zoom, right, down = generator.uniform(0.9, 1.1, n), *generator.uniform(-0.1, 0.1, (2, n))
        contrast, brightness = generator.uniform(0.8, 1.2, n), generator.uniform(-25, 25, n)
        zero = np.zeros(n)
        matrix = np.array([[flip * zoom, zero, right], [zero, zoom, down]]).transpose(2, 0, 1)
        grid = F.affine_grid(torch.tensor(matrix, dtype=torch.float32), list(images.shape), align_corners=False)
        moved = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
        gain, offset = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1, 1) for v in (contrast, brightness))
        return (moved * gain + offset).clamp(0, 255)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, weighted by class."""
        weight = logits.new_tensor([sum(COUNTS) / len(COUNTS) / count for count in COUNTS])
        return F.cross_entropy(logits, targets, weight=weight)

    def measure(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Accuracy, balanced accuracy, AUROC one-vs-rest (macro), and of malignant among the lesions."""
        share = softmax(logits, axis=1)
        lesion = targets <= MALIGNANT
        margin = (logits[:, MALIGNANT] - logits[:, 0])[lesion]
        return {
            "accuracy": float(accuracy_score(targets, logits.argmax(1))),
            "balanced_accuracy": float(balanced_accuracy_score(targets, logits.argmax(1))),
            "auroc_macro": float(roc_auc_score(targets, share, multi_class="ovr")),
            "auroc_malignant_vs_benign": float(roc_auc_score(targets[lesion] == MALIGNANT, margin)),
        }
