"""Models: timm architectures and the survey's CNNs with local weights, and the checkpoints that our training writes."""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from bench.models import checkpoints, cnns, preprocessing
from bench.models.checkpoints import SUFFIXES as SUFFIXES
from bench.models.checkpoints import Checkpoint, load_strict
from bench.models.preprocessing import Preprocessing
from explainer_bench import RequestError, RequestWarning, did_you_mean, parse_spec, write_atomically

WEIGHTS = Path(__file__).parents[1] / "weights"
ALIASES = {  # names that studies use, and timm's
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
}

_LOADING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
_OF_CHECKPOINT = ["preprocessing"]
_OF_ARCHITECTURE = ["weights", "preprocessing", "head", "pooling", "img_size"]


@dataclass
class Model:
    """An image classifier with everything that its scores depend on.

    Parameters
    ----------
    name : str
        The checkpoint's own name, or the architecture.
    module : nn.Module
        Returns logits (N, K); in eval mode, its parameters frozen.
    preprocessing : Preprocessing
        How an image becomes its input.
    class_names : tuple of str
        One per logit.
    architecture : str
        A timm name, or one of `bench.models.cnns`.
    kwargs : dict
        What `timm.create_model` is given besides the name.
    meta : dict
        The checkpoint's header: its data, training and results; empty for other weights.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    architecture: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of what `preprocess` returns."""
        return self.preprocessing.input_size

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
        recipe = [self.architecture, self.kwargs, self.preprocessing.to_json()]
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        for key, tensor in sorted(self.module.state_dict().items()):
            value = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{key}{tuple(tensor.shape)}".encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Bring an RGB image (H, W, 3) uint8 to `input_size`: `Preprocessing.resize`."""
        return self.preprocessing.resize(image)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn resized images (..., C, H, W) uint8 into what the module wants, float32."""
        return self.preprocessing.normalise(images)

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Turn an RGB image (H, W, 3) uint8 into a tensor (3, H', W') float32 on the CPU."""
        return self.preprocessing(image)

    def preprocess_roi(self, mask: np.ndarray) -> np.ndarray:
        """Bring a mask (H, W) bool to `input_size` by the geometry of `preprocess`, nearest neighbour."""
        return self.preprocessing.preprocess_roi(mask)


def shipped() -> dict[str, Path]:
    """Return the models that come with the package, by name."""
    return {path.stem: path for path in sorted(WEIGHTS.glob("*.safetensors"))}


def catalogue() -> list[dict[str, str]]:
    """Return what `get` knows: a name and a line each."""
    rows = dict.fromkeys(shipped(), "shipped with the package")
    rows["FILE.safetensors"] = "a checkpoint of `explainer-bench train`"
    rows["NAME[weights=FILE]"] = "any timm image classifier, with local weights"
    rows |= {f"{name}[weights=FILE,head=FILE]": f"timm's {timm_name}" for name, timm_name in ALIASES.items()}
    rows |= {f"{name}[weights=FILE]": line for name, line in cnns.catalogue().items()}
    return [{"name": name, "what": line} for name, line in rows.items()]


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
        A shipped model ("digits_vit"), a checkpoint of our training (a path), or an architecture with its
        weights: ``vit_tiny_patch16_224[weights=FILE]``. Each takes ``preprocessing=NAME``, one of
        `bench.models.preprocessing.VARIANTS` or "timm"; an architecture also ``head=FILE``, a linear classifier on the
        CLS token for weights without one, ``img_size=PIXELS`` for a ViT, and ``pooling=cls`` for a fine-tuned MAE.
    class_names : sequence of str, optional
        Those of the data set; the model must fit them.
    device : str or torch.device
        Where to put it.
    weights : str or Path, optional
        The weights of an architecture, instead of in the brackets.

    Raises
    ------
    RequestError
        For an unknown name, a missing, corrupt or unsafe file, weights of another architecture, or other classes
        than the data set's.

    Warns
    -----
    RequestWarning
        Where the preprocessing normalises otherwise than the weights were trained with.
    """
    name, options = _split(str(spec))
    path = shipped().get(name, Path(name))
    if path.suffix in SUFFIXES or path.is_file():
        _check_options(name, options, _OF_CHECKPOINT)
        model = _from_checkpoint(checkpoints.read(path), **options)
    else:
        _check_options(name, options, _OF_ARCHITECTURE)
        model = _from_architecture(name, **{**options, **({"weights": weights} if weights else {})})
    if class_names is not None:
        _check_classes(model, tuple(class_names))
    model.module.to(device)
    return model


def _split(spec: str) -> tuple[str, dict[str, Any]]:
    is_file = spec in shipped() or Path(spec).is_file()
    return (spec, {}) if is_file else parse_spec(spec)


def _check_options(name: str, options: Mapping[str, Any], known: list[str]) -> None:
    for option in options:
        if option not in known:
            raise RequestError(f"model {name!r} has no parameter {option!r}.{did_you_mean(option, known)}")


def _from_checkpoint(found: Checkpoint, preprocessing: str | None = None) -> Model:
    path = found.path
    if not found.header:
        line = f"{path} does not say which architecture it is of: write ARCHITECTURE[weights={path}]"
        raise RequestError(f"{line}, such as vit_tiny_patch16_224[weights={path}].")
    try:
        return _named(_from_header(found), preprocessing, found)
    except (KeyError, TypeError) as error:
        line = f"{path} has a header that is not of our training ({checkpoints.first_line(error)}): train it again."
        raise RequestError(line) from error


def _from_header(found: Checkpoint) -> Model:
    header = found.header
    if risky := sorted(_LOADING & set(header["kwargs"])):
        raise RequestError(f"{found.path} asks for {risky[0]}, which would load other files: it is refused.")
    module = _module(header["architecture"], header["kwargs"])
    load_strict(module, found.state, found.path, header["architecture"])
    return Model(
        name=header["name"],
        module=module,
        preprocessing=Preprocessing.from_json(header["preprocessing"]),
        class_names=tuple(header["class_names"]),
        architecture=header["architecture"],
        kwargs=header["kwargs"],
        meta=header,
    )


def _named(model: Model, name: str | None, found: Checkpoint) -> Model:
    """Give a model of these weights another preprocessing, and its name with it."""
    if name is None:
        return model
    chosen = _choose(name, model.module, model.preprocessing)
    if chosen == model.preprocessing:
        return model
    model = replace(model, name=f"{model.name}[preprocessing={name}]", preprocessing=chosen)
    _warn_of_normalisation(model, found)
    return model


def _warn_of_normalisation(model: Model, found: Checkpoint) -> None:
    mean, std = checkpoints.trained_with(found, model.architecture)
    if not model.preprocessing.normalises_as(mean, std):
        own = f"mean {_numbers(model.preprocessing.mean)}, std {_numbers(model.preprocessing.std)}"
        theirs = f"mean {_numbers(mean)}, std {_numbers(std)}"
        line = f"{model.name} normalises images with {own}, but the weights {found.path} were trained with {theirs}."
        warnings.warn(line, RequestWarning, stacklevel=2)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in (values if len(set(values)) > 1 else values[:1]))


def _fourteenth(side: int) -> int:
    return min((d for d in range(1, side + 1) if side % d == 0), key=lambda d: abs(d - side / 14))


def _from_architecture(
    name: str,
    weights: str | Path | None = None,
    preprocessing: str | None = None,
    head: str | None = None,
    pooling: str | None = None,
    img_size: int | None = None,
) -> Model:
    architecture = ALIASES.get(name, name)
    _check_name(architecture)
    if weights is None:
        raise RequestError(f"model {name!r} needs its weights, nothing is downloaded: write {name}[weights=FILE].")
    found = checkpoints.read_for(Path(str(weights)), architecture)
    if found.header.get("architecture") == architecture and not (head or pooling or img_size):
        return _from_checkpoint(found, preprocessing)
    classifier = _classifier(architecture)
    if head is not None:
        joined = {f"{classifier}.{key}": value for key, value in checkpoints.read_head(Path(str(head))).items()}
        found = found._replace(state={**found.state, **joined})
    kwargs = _sized(architecture, img_size)
    if found.format == "mae_finetuned" and pooling is None:
        kwargs["global_pool"] = "avg"
    model = create(architecture, name, num_classes=_count_classes(found.state, classifier), **kwargs)
    if found.header:
        model.preprocessing = Preprocessing.from_json(found.header["preprocessing"]).scaled_to(model.input_size)
    mean, std = checkpoints.trained_with(found, architecture)
    model.preprocessing = replace(model.preprocessing, mean=mean, std=std)
    state = checkpoints.adapt(found, model.module, pooling)
    checkpoints.check_head(model.module, state, classifier, found.path, head)
    load_strict(model.module, state, found.path, name)
    return _named(model, preprocessing, found)


def _sized(architecture: str, img_size: object) -> dict[str, Any]:
    """Refuse an image size that an architecture has no parameter for or that its patches do not divide."""
    if img_size is None:
        return {}
    if not isinstance(img_size, int) or img_size < 1:
        raise RequestError(f"img_size={img_size} is not a number of pixels.")
    try:
        with torch.device("meta"):
            module = timm.create_model(architecture, img_size=img_size)
    except TypeError as error:
        raise RequestError(f"model {architecture!r} takes no img_size: leave it out.") from error
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", (1, 1))
    if img_size % patch[0] or img_size % patch[1]:
        raise RequestError(f"img_size={img_size} is not a multiple of the patch's {patch[0]} pixels.")
    return {"img_size": img_size}


def create(
    architecture: str,
    name: str = "",
    class_names: Sequence[str] = (),
    preprocessing: str | Preprocessing | None = None,
    **kwargs: Any,
) -> Model:
    """Build an untrained model.

    Parameters
    ----------
    architecture : str
        A timm name, one of `bench.models.cnns`, or one of `ALIASES`.
    name : str
        The model's own name; the architecture's by default.
    class_names : sequence of str
        Names of the logits; their numbers by default.
    preprocessing : str or Preprocessing, optional
        A name of `bench.models.preprocessing.VARIANTS`, or "timm" for what timm's own evaluation does, scaled to the
        input size of a model that takes but one. By default what timm states for the architecture (mean, std,
        interpolation), with the whole image squashed to the input size.
    **kwargs
        For `timm.create_model`, such as ``num_classes``.

    Raises
    ------
    RequestError
        For an unknown architecture or preprocessing, or parameters that the architecture does not have.
    """
    name, architecture = name or architecture, ALIASES.get(architecture, architecture)
    if class_names:
        kwargs["num_classes"] = len(class_names)
    module = _built(architecture, kwargs)
    count = getattr(module, "num_classes", 0)
    return Model(
        name=name,
        module=module,
        preprocessing=_choose(preprocessing, module),
        class_names=tuple(class_names) or tuple(map(str, range(count))),
        architecture=architecture,
        kwargs=kwargs,
    )


def _choose(
    wanted: str | Preprocessing | None, module: nn.Module, default: Preprocessing | None = None
) -> Preprocessing:
    cfg = timm.data.resolve_data_config({}, model=module)
    height, width = (default.input_size if default else None) or _only_size(module) or cfg["input_size"][1:]
    size = int(height), int(width)
    if wanted is None:
        return default or preprocessing.whole_image(cfg, size)
    if wanted == preprocessing.OF_TIMM:
        return preprocessing.of_timm(cfg, size)
    chosen = wanted if isinstance(wanted, Preprocessing) else preprocessing.find(str(wanted))
    return chosen.scaled_to(size) if default or _only_size(module) else chosen


def _only_size(module: nn.Module) -> tuple[int, int] | None:
    """The one input size that a module takes, or None."""
    return getattr(getattr(module, "patch_embed", module), "img_size", None)


def load_backbone(model: Model, path: Path, pooling: str | None = None) -> None:
    """Load every weight but the classifier's, to fine-tune on other classes; strict otherwise.

    Attention gates (SE, CBAM) stay new where the file, one of the plain CNN, has none.

    Parameters
    ----------
    model : Model
        Changed in place.
    path : Path
        A file of any of `bench.models.checkpoints.FORMATS`.
    pooling : {"cls"}, optional
        As for `bench.models.checkpoints.adapt`.

    Warns
    -----
    RequestWarning
        Where the model's preprocessing normalises otherwise than the weights were trained with.
    """
    found = checkpoints.read_for(Path(path), model.architecture)
    own, state = model.module.state_dict(), checkpoints.adapt(found, model.module, pooling)
    fresh = [f"{_classifier(model.architecture)}.", *cnns.gates(own, state)]
    kept = {key: value for key, value in state.items() if not key.startswith(tuple(fresh))}
    new = {key: value for key, value in own.items() if key.startswith(tuple(fresh))}
    load_strict(model.module, {**kept, **new}, found.path, model.architecture)
    _warn_of_normalisation(model, found)


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
        "preprocessing": model.preprocessing.to_json(),
        "class_names": list(model.class_names),
        **meta,
    }
    tensors = {key: _stored(value, half) for key, value in model.module.state_dict().items()}
    blob = safetensors.torch.save(tensors, metadata={checkpoints.HEADER: json.dumps(header, sort_keys=True)})
    write_atomically(path, blob)


def _stored(tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if half and tensor.is_floating_point() else tensor


def _module(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a module, float32, frozen and in eval mode, without touching the global random state."""
    _check_name(architecture)
    with torch.random.fork_rng(devices=[]):
        module = timm.create_model(architecture, pretrained=False, **kwargs)
    return module.float().eval().requires_grad_(False)


def _built(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a module from what a user wrote."""
    _check_name(architecture)
    try:
        return _module(architecture, kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # whatever the architecture makes of it
        said, given = checkpoints.first_line(error), json.dumps(kwargs, default=str)
        raise RequestError(f"model {architecture!r} cannot be built with {given}: {said}.") from error


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    known = [*shipped(), *ALIASES, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the architectures."
    raise RequestError(f"unknown model {name!r}: neither shipped, nor a file, nor of timm. {hint}")


def _classifier(architecture: str) -> str:
    """The name of the classifier's layer, where timm states one."""
    cfg = timm.get_pretrained_cfg(architecture)
    name = cfg.classifier if cfg else None
    return name if isinstance(name, str) else "head"


def _count_classes(state: Mapping[str, Tensor], classifier: str) -> int:
    """The number of classes that the weights were made for; 1000 where they do not tell."""
    bias = state.get(f"{classifier}.bias")
    return 1000 if bias is None else len(bias)


def _check_classes(model: Model, class_names: tuple[str, ...]) -> None:
    own = model.class_names
    anonymous = own == tuple(map(str, range(len(own))))
    if len(own) != len(class_names) or (not anonymous and own != class_names):
        wrong = f"model {model.name!r} tells {len(own)} classes ({_some(own)})"
        needed = f"the data set has {len(class_names)} ({_some(class_names)})"
        imagenet = len(own) == 1000 and not model.meta
        other = " (or put the images in val/WNID/ and take --dataset imagenet)" if imagenet else ""
        raise RequestError(f"{wrong}, {needed}: train one for it with explainer-bench train{other}.")
    model.class_names = class_names


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if names[4:] else "")
