"""Published checkpoint formats: files in exactly their key layout, made here, give the logits of what they came from.

The layouts are written out by hand, so that neither timm nor the loader says what a published file looks like.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import models
from bench.models import checkpoints
from bench.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from explainer_bench import RequestError, RequestWarning

State = dict[str, Tensor]
Layout = dict[str, tuple[int, ...]]
TINY = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
REGISTERS = {**SMALL, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}


def block(number: int, width: int, scaled: bool = False) -> Layout:
    wide, shapes = 4 * width, {}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    shapes |= {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)}
    shapes |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
    shapes |= {"mlp.fc1.weight": (wide, width), "mlp.fc1.bias": (wide,)}
    shapes |= {"mlp.fc2.weight": (width, wide), "mlp.fc2.bias": (width,)}
    shapes |= {"ls1.gamma": (width,), "ls2.gamma": (width,)} if scaled else {}
    return {f"blocks.{number}.{key}": shape for key, shape in shapes.items()}


def encoder(width: int, depth: int, patch: int, grid: int, norm: str = "norm", scaled: bool = False) -> Layout:
    shapes: Layout = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid**2, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for number in range(depth):
        shapes |= block(number, width, scaled)
    return {**shapes, f"{norm}.weight": (width,), f"{norm}.bias": (width,)}


def head(width: int, classes: int) -> Layout:
    return {"head.weight": (classes, width), "head.bias": (classes,)}


def dinov2(width: int, depth: int, patch: int, grid: int, registers: int = 4) -> Layout:
    tokens: Layout = {"register_tokens": (1, registers, width)} if registers else {}
    return {**encoder(width, depth, patch, grid, scaled=True), **tokens, "mask_token": (1, width)}


def decoder(width: int, patches: int) -> Layout:
    shapes: Layout = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 1 + patches, 16)}
    shapes |= {"decoder_embed.weight": (16, width), "decoder_embed.bias": (16,)}
    shapes |= {f"decoder_{key}": shape for key, shape in block(0, 16).items()}
    shapes |= {"decoder_norm.weight": (16,), "decoder_norm.bias": (16,)}
    return {**shapes, "decoder_pred.weight": (192, 16), "decoder_pred.bias": (192,)}


def shapes_of(state: State) -> Layout:
    return {key: tuple(value.shape) for key, value in state.items()}


def zeros(layout: Layout) -> State:
    return {key: torch.zeros(shape) for key, shape in layout.items()}


def source(architecture: str = TINY, classes: int = 5, **kwargs: object) -> nn.Module:
    """Return a timm model all of whose parameters are random, so that none may be lost unnoticed."""
    torch.manual_seed(0)
    module = timm.create_model(architecture, num_classes=classes, **kwargs).eval().requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def images(side: int = 32) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def without_head(module: nn.Module) -> State:
    return {key: value for key, value in module.state_dict().items() if not key.startswith("head.")}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "published.pth")
    return tmp_path / "published.pth"


def loaded(path: Path, module: nn.Module, pooling: str | None = None) -> nn.Module:
    """Load the file into a new model of the same kind, its classifier, where the file has none, from `module`."""
    kwargs = {"num_classes": 5, **SMALL}
    if module.fc_norm.__class__ is not nn.Identity and pooling is None:
        kwargs["global_pool"] = "avg"
    fresh = models.create(TINY, **kwargs).module
    state = checkpoints.adapt(checkpoints.read(path), fresh, pooling)
    own = {key: value for key, value in module.state_dict().items() if key.startswith("head.")}
    checkpoints.load_strict(fresh, {**own, **state}, path, TINY)
    return fresh


WRAPPERS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "data parallel": lambda state: {"state_dict": prefixed(state, "module.")},
    "model": lambda state: {"model": state},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_supervised_weights_of_timm_and_of_chungs_authors(tmp_path, wrapper):
    module = source(**SMALL)  # timm 0.5.4, which they used, has the same keys
    assert shapes_of(module.state_dict()) == {**encoder(24, 2, 8, 4), **head(24, 5)}
    path = saved(tmp_path, WRAPPERS[wrapper](module.state_dict()))
    assert checkpoints.read(path).format == "supervised"
    assert torch.equal(loaded(path, module)(images()), module(images()))


def test_supervised_safetensors(tmp_path):
    module = source(**SMALL)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(loaded(tmp_path / "w.safetensors", module)(images()), module(images()))


@pytest.mark.parametrize("nested", [False, True], ids=["DINO's file", "MAE's file"])
def test_a_bare_backbone(tmp_path, nested):
    module = source(**SMALL)
    state = without_head(module)
    assert shapes_of(state) == encoder(24, 2, 8, 4)
    path = saved(tmp_path, {"model": state} if nested else state)
    assert checkpoints.read(path).format == "backbone"
    assert torch.equal(loaded(path, module)(images()), module(images()))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_dinos_whole_training_state(tmp_path, prefix):
    module, student = source(**SMALL), zeros(encoder(24, 2, 8, 4))
    projection = {"head.mlp.0.weight": torch.ones(8, 24), "head.last_layer.weight_g": torch.ones(9, 1)}
    content = {
        "student": prefixed(prefixed(student, "backbone."), "module."),
        "teacher": prefixed({**prefixed(without_head(module), "backbone."), **projection}, prefix),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }
    path = saved(tmp_path, content)
    assert checkpoints.read(path).format == "dino"
    assert torch.equal(loaded(path, module)(images()), module(images()))


def test_mae_with_its_decoder(tmp_path):
    module = source(**SMALL)
    path = saved(tmp_path, {"model": {**without_head(module), **zeros(decoder(24, 16))}})
    assert checkpoints.read(path).format == "mae"
    assert torch.equal(loaded(path, module)(images()), module(images()))


@pytest.fixture
def mae(tmp_path) -> tuple[nn.Module, Path]:
    """A fine-tuned MAE and its file."""
    module = source(**SMALL, global_pool="avg")
    assert shapes_of(module.state_dict()) == {**encoder(24, 2, 8, 4, norm="fc_norm"), **head(24, 5)}
    return module, saved(tmp_path, {"model": module.state_dict()})


def tokens_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the tokens (N, T, C) after the last block, normalised by nothing."""
    captured: list[Tensor] = []
    handle = module.blocks[-1].register_forward_hook(lambda _, __, output: captured.append(output))
    module(inputs)
    handle.remove()
    return captured[0]


def test_mae_fine_tuned_averages_its_patches(mae):
    module, path = mae
    assert checkpoints.read(path).format == "mae_finetuned"
    tokens, state = tokens_of(module, images()), module.state_dict()
    pooled = F.layer_norm(tokens[:, 1:].mean(1), (24,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    expected = pooled @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(loaded(path, module)(images()), expected)


def test_mae_fine_tuned_as_chung_et_al_read_it(mae):
    module, path = mae
    tokens, state = tokens_of(module, images()), module.state_dict()
    cls = F.layer_norm(tokens, (24,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)[:, 0]
    expected = cls @ state["head.weight"].T + state["head.bias"]
    logits = loaded(path, module, pooling="cls")(images())
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, module(images()), atol=0.1)


def test_mae_fine_tuned_needs_a_choice_where_the_model_reads_the_cls_token(mae):
    reader = models.create(TINY, num_classes=2, **SMALL, preprocessing="chung2024_crop")
    with pytest.raises(RequestError, match="global_pool=avg, or choose pooling=cls"):
        models.load_backbone(reader, mae[1])
    models.load_backbone(reader, mae[1], pooling="cls")
    assert torch.equal(reader.module.norm.weight, mae[0].fc_norm.weight)
    averaging = models.create(TINY, num_classes=2, **SMALL, preprocessing="chung2024_crop", global_pool="avg")
    models.load_backbone(averaging, mae[1])
    assert torch.equal(averaging.module.fc_norm.weight, mae[0].fc_norm.weight)


@pytest.mark.parametrize("pooling", ["cls", "average"])
def test_pooling_is_for_a_fine_tuned_mae(tmp_path, pooling):
    module = source(**SMALL)
    with pytest.raises(RequestError, match=f"pooling={pooling}: only pooling=cls is known, for a fine-tuned MAE"):
        loaded(saved(tmp_path, module.state_dict()), module, pooling)


def published_dinov2(module: nn.Module) -> State:
    """Return weights as DINOv2 publishes them: the CLS token has a position, the registers have none."""
    state = without_head(module)
    own_position = torch.full((1, 1, 24), 0.3)
    state["pos_embed"] = torch.cat([own_position, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - own_position
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 24)
    return state


def test_dinov2_with_registers(tmp_path):
    module = source(**REGISTERS)
    state = published_dinov2(module)
    assert shapes_of(state) == dinov2(24, 2, 8, 4)
    path = saved(tmp_path, state)
    fresh = models.create(TINY, num_classes=5, **REGISTERS).module
    found = checkpoints.read(path)
    assert found.format == "dinov2"
    adapted = checkpoints.adapt(found, fresh)
    checkpoints.load_strict(fresh, {**module.state_dict(), **adapted}, path, TINY)
    torch.testing.assert_close(fresh(images()), module(images()))


@pytest.mark.parametrize("registers", [True, False])
def test_positions_are_resized_to_another_image_size(tmp_path, registers):
    kwargs = REGISTERS if registers else SMALL
    module, bigger = source(**kwargs), models.create(TINY, num_classes=5, **{**kwargs, "img_size": 56}).module
    path = saved(tmp_path, published_dinov2(module) if registers else without_head(module))
    with pytest.warns(RequestWarning, match=r"of 4 x 4 patches, resized to the model's 7 x 7: .* with img_size=32\.$"):
        positions = checkpoints.adapt(checkpoints.read(path), bigger)["pos_embed"]
    prefix = 0 if registers else 1
    grid = module.pos_embed[:, prefix:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (7, 7), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 49, 24)
    torch.testing.assert_close(positions[:, prefix:], resized)
    assert torch.equal(positions[:, :prefix], module.pos_embed[:, :prefix])
    assert positions.shape == bigger.pos_embed.shape


def test_positions_of_the_models_own_grid_pass_without_a_word(tmp_path, recwarn):
    module = source(**SMALL)
    loaded(saved(tmp_path, module.state_dict()), module)
    assert not [w for w in recwarn if w.category is RequestWarning]


@pytest.mark.parametrize("places", [-1, 1])
def test_positions_of_other_tokens_are_refused(tmp_path, places):
    """One less: no place for the CLS token; one more: that of a distilled DeiT's token."""
    module = source(**SMALL)
    state = {**module.state_dict(), "pos_embed": torch.zeros(1, 17 + places, 24)}
    with pytest.raises(RequestError, match=rf"pos_embed has shape \(1, {17 + places}, 24\) instead of \(1, 17, 24\)"):
        loaded(saved(tmp_path, state), module)


def test_a_distilled_deit_is_no_plain_vit(tmp_path):
    state = source("deit_tiny_distilled_patch16_224").state_dict()
    with pytest.raises(RequestError, match=r"not a checkpoint of deit_tiny_patch16_224: dist_token is unexpected"):
        models.get(f"deit_tiny_patch16_224[weights={saved(tmp_path, state)}]")


FULL: dict[str, tuple[str, dict[str, object], Layout, str]] = {
    "dino_vitbase16_pretrain": ("vit_base_patch16_224", {"num_classes": 0}, encoder(768, 12, 16, 14), "backbone"),
    "dino_deitsmall8_pretrain": ("vit_small_patch8_224", {"num_classes": 0}, encoder(384, 12, 8, 28), "backbone"),
    "mae_pretrain_vit_base": ("vit_base_patch16_224", {"num_classes": 0}, encoder(768, 12, 16, 14), "backbone"),
    "mae_finetuned_vit_base": (
        "vit_base_patch16_224",
        {"global_pool": "avg"},
        {**encoder(768, 12, 16, 14, norm="fc_norm"), **head(768, 1000)},
        "mae_finetuned",
    ),
    "dinov2_vitb14_reg4_pretrain": (
        "vit_base_patch14_reg4_dinov2",
        {"num_classes": 0},
        dinov2(768, 12, 14, 37),
        "dinov2",
    ),
    "dinov2_vitb14_reg4_pretrain at 224 px": (
        "vit_base_patch14_reg4_dinov2",
        {"num_classes": 0, "img_size": 224},
        dinov2(768, 12, 14, 37),
        "dinov2",
    ),
    "dinov2_vitb14_pretrain": ("vit_base_patch14_dinov2", {"num_classes": 0}, dinov2(768, 12, 14, 37, 0), "dinov2"),
    "timm's ViT-B": ("vit_base_patch16_224", {}, {**encoder(768, 12, 16, 14), **head(768, 1000)}, "supervised"),
    "deit_tiny": ("deit_tiny_patch16_224", {}, {**encoder(192, 12, 16, 14), **head(192, 1000)}, "supervised"),
}


@pytest.mark.parametrize("name", FULL)
def test_the_published_files_fit_at_full_size(name):
    architecture, kwargs, layout, format_ = FULL[name]
    with torch.device("meta"):
        module = timm.create_model(architecture, **kwargs)
        state = zeros(layout)
    found = checkpoints.Checkpoint(Path(name), state, {}, checkpoints._recognise(state, ""))
    assert found.format == format_
    checkpoints.load_strict(module, checkpoints.adapt(found, module), found.path, architecture)


def test_the_linear_head_that_cdam_trained_on_dinos_vits8(tmp_path):
    module = source("vit_small_patch8_224", classes=3).half()
    backbone = saved(tmp_path, without_head(module))
    assert shapes_of(without_head(module)) == encoder(384, 12, 8, 28)
    linear = {"module.linear.weight": module.head.weight, "module.linear.bias": module.head.bias}
    torch.save({"epoch": 10, "state_dict": linear, "best_acc": 77.0}, tmp_path / "head.pth")
    model = models.get(f"dino_vits8[weights={backbone},head={tmp_path / 'head.pth'}]", ["a", "b", "c"])
    assert model.name == "dino_vits8" and model.class_names == ("a", "b", "c")
    assert (model.preprocessing.mean, model.preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    inputs = images(224)[:1]
    assert torch.equal(model.module(inputs), module.float()(inputs))


@pytest.mark.parametrize("keys", [("linear.weight", "linear.bias"), ("weight", "bias"), ("head.weight", "head.bias")])
def test_other_spellings_of_a_linear_head(tmp_path, keys):
    tensors = torch.randn(3, 8), torch.randn(3)
    read = checkpoints.read_head(saved(tmp_path, dict(zip(keys, tensors, strict=True))))
    assert torch.equal(read["weight"], tensors[0]) and torch.equal(read["bias"], tensors[1])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Files of a ViT-Tiny: bare, a head on its CLS token, DINO's own head on four blocks, and MAE's fine-tuned."""
    folder, module = tmp_path_factory.mktemp("weights"), source(depth=12)
    pooled = {
        key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: v
        for key, v in module.state_dict().items()
    }
    contents = {
        "bare": without_head(module),
        "head": {"state_dict": prefixed({"weight": torch.ones(5, 192), "bias": torch.ones(5)}, "module.linear.")},
        "four blocks": {"linear.weight": torch.ones(5, 768), "linear.bias": torch.ones(5)},
        "not a head": {"linear1.weight": torch.ones(5, 192), "linear2.weight": torch.ones(5, 5)},
        "finetuned": {"model": pooled},
        "supervised": module.state_dict(),
        "rep layer": {**module.state_dict(), "pre_logits.fc.weight": torch.ones(192, 192)},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name.replace(' ', '_')}.pth")
    return {name: folder / f"{name.replace(' ', '_')}.pth" for name in contents}


def test_weights_without_a_classifier_normalise_as_imagenet(files):
    spec = f"weights={files['bare']},head={files['head']}"
    assert models.get(f"{TINY}[{spec}]").preprocessing.mean == IMAGENET_MEAN
    tagged = models.get(f"{TINY}.augreg_in21k[{spec}]")
    assert tagged.preprocessing.mean == (0.5,) * 3
    assert models.get(TINY, weights=files["supervised"]).preprocessing.mean == (0.5,) * 3


def test_a_fine_tuned_mae_by_name(files):
    averaging, reading = (models.get(f"{TINY}[weights={files['finetuned']}{more}]") for more in ("", ",pooling=cls"))
    assert averaging.module.global_pool == "avg" and reading.module.global_pool == "token"
    assert averaging.preprocessing.mean == reading.preprocessing.mean == IMAGENET_MEAN
    assert averaging.fingerprint != reading.fingerprint


def test_an_architecture_that_averages_by_itself_is_no_mae(tmp_path):
    module = source("vit_tiny_patch16_224.augreg_in21k_ft_in1k", global_pool="avg")
    path = saved(tmp_path, module.state_dict())
    before = torch.random.get_rng_state()
    assert checkpoints.read_for(path, TINY).format == "mae_finetuned"
    assert torch.equal(before, torch.random.get_rng_state())
    assert checkpoints.read_for(path, "vit_base_patch16_rpn_224").format == "supervised"


def test_a_checkpoint_of_ours_at_another_image_size(tmp_path):
    model = models.create(TINY, "mine", "ab", preprocessing="chung2024_crop")
    models.save(tmp_path / "w.safetensors", model)
    same = models.get(f"{TINY}[weights={tmp_path / 'w.safetensors'},preprocessing=chung2024_crop]")
    assert (same.name, same.fingerprint) == ("mine", model.fingerprint)
    with pytest.warns(RequestWarning, match="resized to the model's 6 x 6: .* with img_size=224"):
        smaller = models.get(f"{TINY}[weights={tmp_path / 'w.safetensors'},img_size=96]")
    assert smaller.preprocessing == model.preprocessing.scaled_to((96, 96))


def test_another_image_size_by_name(files):
    with pytest.warns(RequestWarning, match="resized to the model's 6 x 6"):
        model = models.get(f"{TINY}[weights={files['supervised']},img_size=96,preprocessing=timm]")
    assert model.input_size == (96, 96) and model.module(images(96)).shape == (3, 5)
    assert model.preprocessing.shortest_side == 106


def test_backbones_warn_where_the_model_normalises_otherwise(files):
    with pytest.warns(RequestWarning, match=r"with mean 0\.5, std 0\.5, but .* trained with mean 0\.485"):
        models.load_backbone(models.create(TINY, num_classes=2), files["bare"])
    with pytest.warns(RequestWarning, match=r"with mean 0\.485 .* trained with mean 0\.5"):
        models.load_backbone(models.create(TINY, num_classes=2, preprocessing="chung2024_crop"), files["supervised"])


@pytest.mark.parametrize(
    ("architecture", "options", "line"),
    [
        (TINY, "weights={bare}", r"has no classifier: join a linear one with head=FILE, or fine-tune it"),
        (TINY, "weights={bare},head={four blocks}", r"reads 768 features, the model has 192: DINO's own heads"),
        (TINY, "weights={bare},head={not a head}", r"is not a linear classifier: it holds linear1\.weight"),
        (TINY, "weights={bare},head={bare}", "is not a linear classifier"),
        (TINY, "weights={supervised},pooling=cls", "only pooling=cls is known, for a fine-tuned MAE"),
        (TINY, "weights={rep layer}", r"pre_logits\.fc\.weight is unexpected"),
        ("vit_small_patch16_224", "weights={supervised}", r"not a checkpoint of vit_small_patch16_224: .* has shape"),
        ("vit_small_patch8_224", "weights={supervised}", "not a checkpoint of vit_small_patch8_224"),
        ("resnet18", "weights={bare}", r"not a checkpoint of resnet18: conv1\.weight is missing"),
        ("dino_vits9", "weights={bare}", "Did you mean dino_vits8"),
        (TINY, "weights={supervised},img_size=100", "img_size=100 is not a multiple of the patch's 16 pixels"),
        (TINY, "weights={supervised},img_size=big", "img_size=big is not a number of pixels"),
        ("resnet18", "weights={supervised},img_size=96", "model 'resnet18' takes no img_size"),
        (TINY, "weights={supervised},preprocessing=3", "unknown preprocessing '3'"),
        (TINY, "weights={bare},heads=x", "no parameter 'heads'. Did you mean head"),
    ],
)
def test_misfits_are_refused_in_one_line(files, architecture, options, line):
    with pytest.raises(RequestError, match=line) as error:
        models.get(f"{architecture}[{options.format(**files)}]")
    assert "\n" not in str(error.value)


def test_patches_of_another_size_are_not_resampled(tmp_path):
    path = saved(tmp_path, source(**SMALL).state_dict())
    other = models.create(TINY, num_classes=5, **{**SMALL, "patch_size": 16, "img_size": 64}).module
    with pytest.raises(RequestError, match=r"patch_embed\.proj\.weight has shape \(24, 3, 8, 8\)"):
        checkpoints.load_strict(other, checkpoints.adapt(checkpoints.read(path), other), path, TINY)


def test_every_format_is_documented():
    text = (Path(checkpoints.__file__).parents[2] / "docs" / "models.md").read_text()
    for name, format_ in checkpoints.FORMATS.items():
        assert f"\n| {name} " in text
        assert format_.layout and (format_.mean is None) == (name in ("trained here", "supervised"))
