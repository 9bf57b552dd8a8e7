"""Hugging Face's `ViTForImageClassification` as the timm model that computes the same."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from explainer_bench import RequestError

# The names of transformers 4 and, where they differ, of transformers 5.
_RENAMED = (
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def as_timm(model: Any) -> VisionTransformer:
    """Return the timm Vision Transformer with the weights of a Hugging Face one, so that every explainer serves it.

    Parameters
    ----------
    model : transformers.ViTForImageClassification
        Is left as it is; transformers itself is not imported.

    Returns
    -------
    VisionTransformer
        Takes images (N, C, H, W) and returns logits (N, K), on the same device and in the same precision and mode.

    Raises
    ------
    RequestError
        If `model` is something else, or has an activation that timm's ViT has not.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") != "vit" or not hasattr(model, "classifier"):
        raise RequestError(f"{type(model).__name__} is no Hugging Face ViTForImageClassification: give one.")
    if config.hidden_act != "gelu":
        raise RequestError(f"the model's activation is {config.hidden_act!r}: only gelu can be converted.")
    reference = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        transformer = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.num_channels,
            num_classes=model.classifier.out_features,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            qkv_bias=config.qkv_bias,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        )
    transformer.load_state_dict(_renamed(model.state_dict()))
    return transformer.to(reference).train(model.training)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [renamed.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return renamed
