"""Weights files: reading them without trusting them, and the layouts that published checkpoints have.

Nothing is downloaded. Files are safetensors, or PyTorch files read with ``weights_only=True``. Loading is strict:
what may differ from the module's own layout is what `FORMATS` says, and any other difference is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from bench.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from explainer_bench import RequestError, RequestWarning

HEADER = "explainer_bench"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_WRAPPERS = ("teacher", "state_dict", "model_state_dict", "model")
_DENSELAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)")  # of torchvision before 0.3


class Format(NamedTuple):
    """A layout of published checkpoints.

    Parameters
    ----------
    layout : str
        What is in the file.
    differs : str
        What of it is not the module's own, and what becomes of that.
    mean, std : tuple of float or None
        What the weights were trained with; None where the architecture or the file says it.
    """

    layout: str
    differs: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
FORMATS = {
    "trained here": Format("safetensors with a JSON header that states architecture, classes and preprocessing", ""),
    "supervised": Format(
        "timm's, torchvision's or DeiT's keys, with the classifier", "torchvision's old DenseNet keys"
    ),
    "backbone": Format(
        "a timm ViT's keys without a classifier: DINO's and MAE's pretrained files, the latter under `model`",
        "it has no classifier: join one with head=FILE, or fine-tune",
        *_IMAGENET,
    ),
    "dino": Format(
        "DINO's whole training state: `teacher` holds `backbone.*` and `head.*`, both perhaps after `module.`",
        "the teacher's backbone is taken; the projection head and the student are not",
        *_IMAGENET,
    ),
    "mae": Format(
        "MAE's pretrained encoder with its decoder, under `model`", "the decoder and the mask token go", *_IMAGENET
    ),
    "mae_finetuned": Format(
        "MAE fine-tuned, under `model`: `fc_norm` instead of `norm`, since the patch tokens are averaged",
        "the model averages its patch tokens, as trained; with pooling=cls it reads the CLS token through `fc_norm`",
        *_IMAGENET,
    ),
    "dinov2": Format(
        "DINOv2: `mask_token`, perhaps `register_tokens`, positions of 518 px",
        "the mask token goes; positions are added to the CLS token once and for all, as timm does for registers",
        *_IMAGENET,
    ),
}


class Checkpoint(NamedTuple):
    """A file's weights, unwrapped, floats as float32; its header, where it is ours; and its format."""

    path: Path
    state: dict[str, Tensor]
    header: dict[str, Any]
    format: str


def read(path: Path) -> Checkpoint:
    """Read a weights file of any of the `FORMATS`.

    Raises
    ------
    RequestError
        Where the file is missing, corrupt, holds code, or holds no weights.
    """
    if not path.is_file():
        raise RequestError(f"no such weights file: {path}.")
    said = header(path)
    if path.suffix == ".safetensors":
        with _whole(path):
            state, wrapper = safetensors.torch.load_file(path), ""
    else:
        state, wrapper = _read_torch(path)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if not said:
        state = _without_prefix(state)
    return Checkpoint(path, state, said, "trained here" if said else _recognise(state, wrapper))


def header(path: Path) -> dict[str, Any]:
    """Return what our training wrote at the head of a safetensors file; {} for any other file.

    Raises
    ------
    RequestError
        Where a safetensors file is not whole.
    """
    if path.suffix != ".safetensors":
        return {}
    with _whole(path), safetensors.safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(HEADER, "{}"))


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{path} is not a whole safetensors file ({first_line(error)}): copy it again.") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the state dict and what it was wrapped in."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the `args` of DINO's and MAE's training
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler lets any kind through on rubbish
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
            raise RequestError(f"{path} holds code besides weights and is refused: save it as safetensors.") from error
        raise RequestError(f"{path} is not a readable PyTorch file ({first_line(error)}): copy it again.") from error
    wrapper = ""
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded, wrapper = loaded[key], wrapper or key
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise RequestError(f"{path} does not hold a state dict of weights: save module.state_dict().")
    return dict(loaded), wrapper


def first_line(error: Exception) -> str:
    """The first line of a message, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".")


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take `module.` off, and where keys start with `backbone.`, keep those alone."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return backbone or state


def _recognise(state: Mapping[str, Tensor], wrapper: str) -> str:
    if wrapper == "teacher":
        return "dino"
    if "decoder_embed.weight" in state:
        return "mae"
    if "mask_token" in state:
        return "dinov2"
    if "fc_norm.weight" in state and "norm.weight" not in state:
        return "mae_finetuned"
    is_vit = "blocks.0.attn.qkv.weight" in state
    return "backbone" if is_vit and "head.weight" not in state else "supervised"


def read_for(path: Path, architecture: str) -> Checkpoint:
    """Read weights of an architecture; `fc_norm` tells of a fine-tuned MAE only where that has `norm` by itself."""
    found = read(path)
    if found.format == "mae_finetuned":
        with torch.device("meta"):
            own = timm.create_model(architecture).state_dict()
        return found._replace(format="supervised") if "fc_norm.weight" in own else found
    return found


def trained_with(found: Checkpoint, architecture: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std that weights were trained with: the header's, the format's, or timm's for the architecture.

    Parameters
    ----------
    found : Checkpoint
        What was read.
    architecture : str
        A name of timm's. A tag in it says whose weights they are, and timm then knows.
    """
    if found.header:
        return tuple(found.header["preprocessing"]["mean"]), tuple(found.header["preprocessing"]["std"])
    format_, cfg = FORMATS[found.format], timm.get_pretrained_cfg(architecture)
    tells = "." in architecture or (cfg and not cfg.num_classes)  # a tag, or weights that never had a classifier
    if format_.mean and format_.std and not tells:
        return format_.mean, format_.std
    return (tuple(cfg.mean), tuple(cfg.std)) if cfg else (IMAGENET_MEAN, IMAGENET_STD)


def read_head(path: Path) -> dict[str, Tensor]:
    """Read a linear classifier that was trained on a frozen backbone: DINO's file or a plain one.

    Returns
    -------
    dict
        ``weight`` (K, features) and ``bias`` (K,).

    Raises
    ------
    RequestError
        Where the file holds something else.
    """
    state = {re.sub(r"^(linear|head|fc)\.", "", key): value for key, value in read(path).state.items()}
    if set(state) != {"weight", "bias"} or state["weight"].ndim != 2:
        held = ", ".join(sorted(state)[:4])
        raise RequestError(f"{path} is not a linear classifier: it holds {held} instead of linear.weight and .bias.")
    return state


def check_head(module: nn.Module, state: Mapping[str, Tensor], classifier: str, path: Path, head: str | None) -> None:
    """Say what to do where nothing but a classifier on the model's own features is missing.

    Parameters
    ----------
    module : nn.Module
        What is to load `state`.
    state : mapping
        Adapted weights, a joined classifier included.
    classifier : str
        Name of the classifier's layer.
    path, head : Path, str or None
        The files of weights and classifier, for the message.

    Raises
    ------
    RequestError
        Where the classifier is missing or reads other features.
    """
    own = module.state_dict()
    if {key for key in own if key not in state} == {f"{classifier}.weight", f"{classifier}.bias"}:
        line = f"{path} has no classifier: join a linear one with head=FILE, or fine-tune it with explainer-bench train"
        raise RequestError(f"{line}.")
    weight = f"{classifier}.weight"
    if head is not None and state[weight].shape != own[weight].shape:
        line = f"{head} reads {state[weight].shape[1]} features, the model has {own[weight].shape[1]}"
        raise RequestError(f"{line}: DINO's own heads read several blocks or the mean patch, too; train one on CLS.")


def adapt(found: Checkpoint, module: nn.Module, pooling: str | None = None) -> dict[str, Tensor]:
    """Bring a checkpoint's weights into the layout of `module`, as `FORMATS` says; other differences stay.

    Parameters
    ----------
    found : Checkpoint
        What was read.
    module : nn.Module
        What is to load them. A timm ViT's position embeddings are resized to its grid by timm.
    pooling : {"cls"}, optional
        Load the `fc_norm` of a fine-tuned MAE as `norm`, which the CLS token passes; as Chung et al. 2024 did.

    Warns
    -----
    RequestWarning
        Where position embeddings are resized: the weights were trained at another image size.
    """
    if pooling not in (None, "cls") or (pooling and found.format != "mae_finetuned"):
        raise RequestError(f"pooling={pooling}: only pooling=cls is known, for a fine-tuned MAE, which has fc_norm.")
    if found.format == "mae_finetuned" and not pooling and "norm.weight" in module.state_dict():
        line = f"{found.path} averages the patch tokens, the model reads the CLS token"
        raise RequestError(f"{line}: build it with global_pool=avg, or choose pooling=cls as Chung et al. 2024 did.")
    state = {_DENSELAYER.sub(r"\1\2", key): value for key, value in found.state.items()}
    if found.format == "mae":
        state = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
    if found.format == "mae_finetuned" and pooling == "cls":
        state = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in state.items()}
    return _filtered(state, module, found.path) if isinstance(module, VisionTransformer) else state


def _filtered(state: dict[str, Tensor], module: VisionTransformer, path: Path) -> dict[str, Tensor]:
    """Let timm convert DINOv2's layout and resize positions, but not patches, which it would do silently."""
    own, patches = module.patch_embed.proj.weight, state.get("patch_embed.proj.weight")
    if patches is None or patches.shape != own.shape or not _resizable(state, module):
        return state
    _warn_of_resizing(_places(state, module), module, path)
    return checkpoint_filter_fn(state, module)


def _places(state: Mapping[str, Tensor], module: VisionTransformer) -> int:
    """The number of patches that position embeddings have a place for, as timm will count them."""
    others = 0 if module.no_embed_class else module.num_prefix_tokens
    return state["pos_embed"].shape[1] - others - ("register_tokens" in state)  # DINOv2's CLS place is given up then


def _warn_of_resizing(places: int, module: VisionTransformer, path: Path) -> None:
    if places == module.patch_embed.num_patches:
        return
    rows, columns = module.patch_embed.grid_size
    side, patch = math.isqrt(places), module.patch_embed.img_size[0] // rows
    line = f"{path} has position embeddings of {side} x {side} patches, resized to the model's {rows} x {columns}"
    warnings.warn(f"{line}: the weights were trained with img_size={side * patch}.", RequestWarning, stacklevel=2)


def _resizable(state: Mapping[str, Tensor], module: VisionTransformer) -> bool:
    positions, own = state.get("pos_embed"), module.pos_embed
    if any("pre_logits" in key for key in state):  # timm would drop a layer that the classifier was trained behind
        return False
    if positions is None or own is None or positions.ndim != 3 or positions.shape[-1] != own.shape[-1]:
        return False
    places = _places(state, module)
    return places == module.patch_embed.num_patches or (places > 0 and math.isqrt(places) ** 2 == places)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], path: Path, architecture: str) -> None:
    """Load `state`, or say in one line how it differs from the module's own.

    Raises
    ------
    RequestError
        Naming the first key that is missing, unexpected or of another shape, and how many of each there are.
    """
    own = module.state_dict()
    missing = [f"{key} is missing" for key in own if key not in state]
    unexpected = [f"{key} is unexpected" for key in state if key not in own]
    misshaped = [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    differences = missing + unexpected + misshaped
    if differences:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(misshaped)} of another shape"
        raise RequestError(f"{path} is not a checkpoint of {architecture}: {differences[0]} ({counts}).")
    module.load_state_dict(dict(state))
