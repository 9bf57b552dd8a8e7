"""A converted model is the same model."""

import pytest
import torch
from torch import nn

import adapters
from adapters.huggingface import _renamed, as_timm
from explainer_bench import RequestError

transformers = pytest.importorskip("transformers", reason="needs Hugging Face's transformers")


def build(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    size = {"image_size": (24, 32), "patch_size": 8, "num_labels": 5}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**shape, **size, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "patch_size": 4, "layer_norm_eps": 1e-3}])
def test_the_logits_are_the_same(changes: dict[str, object]) -> None:
    model = build(**changes).double()
    inputs = torch.rand(3, 3, 24, 32, dtype=torch.float64)
    converted = as_timm(model)
    torch.testing.assert_close(converted(inputs), model(inputs).logits)
    assert not converted.training


def test_it_can_be_explained() -> None:
    maps = adapters.get("transformer_attribution")(as_timm(build()), torch.rand(2, 3, 24, 32), [0, 1])
    assert maps.shape == (2, 1, 24, 32)


def test_the_names_of_both_generations_are_known() -> None:
    old = {
        "vit.encoder.layer.1.attention.attention.query.weight": torch.zeros(2, 2),
        "vit.encoder.layer.1.attention.attention.key.weight": torch.ones(2, 2),
        "vit.encoder.layer.1.attention.attention.value.weight": torch.full((2, 2), 2.0),
        "vit.encoder.layer.1.attention.output.dense.bias": torch.zeros(2),
        "vit.encoder.layer.1.intermediate.dense.bias": torch.zeros(4),
        "vit.encoder.layer.1.output.dense.bias": torch.zeros(2),
    }
    renamed = _renamed(old)
    assert set(renamed) == {
        f"blocks.1.{k}" for k in ("attn.qkv.weight", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias")
    }
    assert renamed["blocks.1.attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_other_models_are_refused() -> None:
    with pytest.raises(RequestError, match="Linear is no Hugging Face"):
        as_timm(nn.Linear(2, 2))
    with pytest.raises(RequestError, match="'relu'"):
        as_timm(build(hidden_act="relu"))
