"""Models: timm architectures with local weights, and the checkpoints that our training writes.

Nothing is ever downloaded, and no file is trusted: weights come from safetensors, or from PyTorch files read
with ``weights_only=True``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from explainer_bench import RequestError, parse_spec, write_atomically

WEIGHTS = Path(__file__).parent / "weights"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_HEADER = "explainer_bench"
_LOADING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass
class Model:
    """An image classifier with everything that its scores depend on.

    Parameters
    ----------
    name : str
        The checkpoint's own name, or the architecture.
    module : nn.Module
        Returns logits (N, K); in eval mode, its parameters frozen.
    input_size : tuple of int
        Height and width in pixels that `preprocess` resizes to.
    mean, std : tuple of float
        Per channel, of images in [0, 1].
    interpolation : str
        Pillow's name of the filter: nearest, bilinear, bicubic, lanczos, box or hamming.
    class_names : tuple of str
        One per logit.
    architecture : str
        A timm name.
    kwargs : dict
        What `timm.create_model` is given besides the name.
    meta : dict
        The checkpoint's header: its data, training and results; empty for other weights.
    """

    name: str
    module: nn.Module
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    class_names: tuple[str, ...]
    architecture: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width in pixels of a ViT's patch; without patches, the divisors nearest a 14th of the input."""
        grid = getattr(getattr(self.module, "patch_embed", None), "grid_size", None)
        height, width = self.input_size
        if grid:  # and not `patch_size`: a hybrid's is that on its backbone's features
            return height // grid[0], width // grid[1]
        return _fourteenth(height), _fourteenth(width)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of architecture, preprocessing and float32 weights, in 16 hex digits."""
        recipe = [self.architecture, self.kwargs, self.preprocessing]
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        for key, tensor in sorted(self.module.state_dict().items()):
            value = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{key}{tuple(tensor.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing as JSON can hold it."""
        lists = {key: list(getattr(self, key)) for key in ("input_size", "mean", "std")}
        return {**lists, "interpolation": self.interpolation}

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Resize an RGB image (H, W, 3) uint8 to `input_size`, the whole image and nothing cropped."""
        return self._resize(image, Image.Resampling[self.interpolation.upper()])

    def normalise(self, images: Tensor) -> Tensor:
        """Turn resized images (..., C, H, W) uint8 into what the module wants, float32."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Resize and normalise an RGB image.

        Parameters
        ----------
        image : ndarray
            (H, W, 3) uint8.

        Returns
        -------
        Tensor
            (3, H', W') float32 with (H', W') the `input_size`, on the CPU.
        """
        return self.normalise(torch.from_numpy(self.resize(image).transpose(2, 0, 1).copy()))

    def preprocess_roi(self, mask: np.ndarray) -> np.ndarray:
        """Bring a mask (H, W) bool to `input_size` by the geometry of `preprocess`, nearest neighbour."""
        return self._resize(mask.astype(np.uint8), Image.Resampling.NEAREST).astype(bool)

    def _resize(self, array: np.ndarray, filter_: Image.Resampling) -> np.ndarray:
        if array.shape[:2] == self.input_size:
            return array
        height, width = self.input_size
        return np.array(Image.fromarray(array).resize((width, height), filter_))


def shipped() -> dict[str, Path]:
    """Return the models that come with the package, by name."""
    return {path.stem: path for path in sorted(WEIGHTS.glob("*.safetensors"))}


def get(
    spec: str | Path,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    weights: str | Path | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    spec : str or Path
        A shipped model ("digits_vit"), a checkpoint of our training (a path), or a timm architecture with its
        weights: ``vit_tiny_patch16_224[weights=FILE]``.
    class_names : sequence of str, optional
        Those of the data set; the model must fit them.
    device : str or torch.device
        Where to put it.
    weights : str or Path, optional
        The weights of a timm architecture, instead of in the brackets.

    Raises
    ------
    RequestError
        For an unknown name, a missing, corrupt or unsafe file, weights of another architecture, or other classes
        than the data set's.
    """
    path = shipped().get(str(spec), Path(spec))
    if path.suffix in SUFFIXES or path.is_file():
        model = _from_checkpoint(path)
    else:
        model = _from_architecture(str(spec), weights)
    if class_names is not None:
        _check_classes(model, tuple(class_names))
    model.module.to(device)
    return model


def _from_checkpoint(path: Path) -> Model:
    state, header = read_weights(path)
    if not header:
        line = f"{path} does not say which architecture it is of: write ARCHITECTURE[weights={path}]"
        raise RequestError(f"{line}, such as vit_tiny_patch16_224[weights={path}].")
    try:
        return _from_header(header, state, path)
    except (KeyError, TypeError) as error:
        raise RequestError(
            f"{path} has a header that is not of our training ({_line(error)}): train it again."
        ) from error


def _from_header(header: dict[str, Any], state: Mapping[str, Tensor], path: Path) -> Model:
    if risky := sorted(_LOADING & set(header["kwargs"])):
        raise RequestError(f"{path} asks for {risky[0]}, which would load other files: it is refused.")
    module = _module(header["architecture"], header["kwargs"])
    load_strict(module, state, path, header["architecture"])
    given = {key: tuple(header["preprocessing"][key]) for key in ("input_size", "mean", "std")}
    return Model(
        name=header["name"],
        module=module,
        interpolation=header["preprocessing"]["interpolation"],
        class_names=tuple(header["class_names"]),
        architecture=header["architecture"],
        kwargs=header["kwargs"],
        meta=header,
        **given,
    )


def _fourteenth(side: int) -> int:
    return min((d for d in range(1, side + 1) if side % d == 0), key=lambda d: abs(d - side / 14))


def _from_architecture(spec: str, weights: str | Path | None) -> Model:
    name, params = parse_spec(spec)
    weights = weights or params.pop("weights", None)
    if params:
        raise RequestError(f"model {name!r} has no parameter {next(iter(params))!r}: it takes weights=FILE.")
    _check_name(name)
    if weights is None:
        raise RequestError(f"model {name!r} needs its weights, nothing is downloaded: write {name}[weights=FILE].")
    state, header = read_weights(Path(weights))
    if header and header["architecture"] == name:
        return _from_checkpoint(Path(weights))
    model = create(name, num_classes=_count_classes(name, state))
    load_strict(model.module, state, Path(weights), name)
    return model


def create(architecture: str, name: str = "", class_names: Sequence[str] = (), **kwargs: Any) -> Model:
    """Build an untrained model whose preprocessing is the one that timm states for the architecture.

    Parameters
    ----------
    architecture : str
        A timm name.
    name : str
        The model's own name; the architecture's by default.
    class_names : sequence of str
        Names of the logits; their numbers by default.
    **kwargs
        For `timm.create_model`, such as ``num_classes``.
    """
    if class_names:
        kwargs["num_classes"] = len(class_names)
    module = _module(architecture, kwargs)
    cfg = timm.data.resolve_data_config({}, model=module)
    size = getattr(getattr(module, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
    count = getattr(module, "num_classes", 0)
    return Model(
        name=name or architecture,
        module=module,
        input_size=(int(size[0]), int(size[1])),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        class_names=tuple(class_names) or tuple(map(str, range(count))),
        architecture=architecture,
        kwargs=kwargs,
    )


def load_backbone(model: Model, path: Path) -> None:
    """Load every weight but the classifier's, to fine-tune on other classes; strict otherwise."""
    state, _ = read_weights(path)
    head = _classifier(model.architecture)
    own = model.module.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    fresh = {key: value for key, value in own.items() if key.startswith(f"{head}.")}
    load_strict(model.module, {**kept, **fresh}, path, model.architecture)


def save(path: Path, model: Model, half: bool = False, **meta: Any) -> None:
    """Write a checkpoint that `get` reads: safetensors with a JSON header, complete or not at all.

    Parameters
    ----------
    path : Path
        Ends in ``.safetensors``.
    model : Model
        What to write.
    half : bool
        Store float16; `get` casts to float32, so the fingerprint of the loaded model is the file's.
    **meta
        JSON values for the header, such as the data's fingerprint and the training's summary.
    """
    header = {
        "name": model.name,
        "architecture": model.architecture,
        "kwargs": model.kwargs,
        "preprocessing": model.preprocessing,
        "class_names": list(model.class_names),
        **meta,
    }
    tensors = {key: _stored(value, half) for key, value in model.module.state_dict().items()}
    blob = safetensors.torch.save(tensors, metadata={_HEADER: json.dumps(header, sort_keys=True)})
    write_atomically(path, blob)


def _stored(tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if half and tensor.is_floating_point() else tensor


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, floats as float32, and our header ({} where there is none).

    Raises
    ------
    RequestError
        Where the file is missing, corrupt, holds code, or holds no weights.
    """
    if not path.is_file():
        raise RequestError(f"no such weights file: {path}.")
    state, header = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, header


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
        return safetensors.torch.load_file(path), header
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{path} is not a whole safetensors file ({_line(error)}): copy it again.") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler lets any kind through on rubbish
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
            raise RequestError(f"{path} holds code besides weights and is refused: save it as safetensors.") from error
        raise RequestError(f"{path} is not a readable PyTorch file ({_line(error)}): copy it again.") from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise RequestError(f"{path} does not hold a state dict of weights: save module.state_dict().")
    return dict(loaded)


def _line(error: Exception) -> str:
    """The first line of a message, at most 120 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".")


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


def _module(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a module, float32, frozen and in eval mode, without touching the global random state."""
    _check_name(architecture)
    with torch.random.fork_rng(devices=[]):
        module = timm.create_model(architecture, pretrained=False, **kwargs)
    return module.float().eval().requires_grad_(False)


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, [*shipped(), *timm.list_models()], n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the architectures."
    raise RequestError(f"unknown model {name!r}: neither shipped, nor a file, nor of timm. {hint}")


def _classifier(architecture: str) -> str:
    """The name of the classifier's layer, where timm states one."""
    cfg = timm.get_pretrained_cfg(architecture)
    name = cfg.classifier if cfg else None
    return name if isinstance(name, str) else "head"


def _count_classes(architecture: str, state: Mapping[str, Tensor]) -> int:
    """The number of classes that the weights were made for; 1000 where they do not tell."""
    bias = state.get(f"{_classifier(architecture)}.bias")
    return 1000 if bias is None else len(bias)


def _check_classes(model: Model, class_names: tuple[str, ...]) -> None:
    own = model.class_names
    anonymous = own == tuple(map(str, range(len(own))))
    if len(own) != len(class_names) or (not anonymous and own != class_names):
        wrong = f"model {model.name!r} tells {len(own)} classes ({_some(own)})"
        needed = f"the data set has {len(class_names)} ({_some(class_names)})"
        raise RequestError(f"{wrong}, {needed}: train one for it with explainer-bench train.")
    model.class_names = class_names


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if names[4:] else "")
