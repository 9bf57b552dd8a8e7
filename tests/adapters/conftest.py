"""Small Vision Transformers of many shapes."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

SHAPES = {
    "plain": {"img_size": 32, "patch_size": 8},
    "non_square": {"img_size": (24, 48), "patch_size": (8, 16)},
    "no_prefix": {"img_size": 32, "patch_size": 16, "class_token": False, "global_pool": "avg"},
    "five_prefix": {"img_size": 32, "patch_size": 8, "reg_tokens": 4, "init_values": 0.1},
    "mean_pooled": {"img_size": 32, "patch_size": 8, "global_pool": "avg", "qk_norm": True},
}


def build(shape: str = "plain", **changes: object) -> VisionTransformer:
    """Return a random ViT of two blocks and five classes, in training mode with trainable parameters."""
    torch.manual_seed(0)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **SHAPES[shape], **changes}
    model = VisionTransformer(**size)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(params=SHAPES)
def vit(request: pytest.FixtureRequest) -> VisionTransformer:
    """Every shape in turn."""
    return build(request.param)


@pytest.fixture
def plain() -> VisionTransformer:
    """One shape."""
    return build()
