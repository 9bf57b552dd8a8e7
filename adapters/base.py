"""The contract of an explainer. The base class owns what authors get wrong, so that `attribute` is all they write."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.state import preserved, seeded
from explainer_bench import Component, RequestError, out_of_memory

Attribute = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], list[Tensor]]

# What a caller can tell an explainer besides images and targets, see `Explainer.needs`; how many of each there are.
CONTEXT = {"roi_prior": "one per sample or one for all", "concept": "(M, C, H, W), M images of the concept"}
_HALF = (torch.bfloat16, torch.float16)
_QUANTUS_EXTRAS = ("device", "method")  # Quantus injects these into every `explain_func` call


class ExplanationError(RuntimeError):
    """An explainer returned something that is no attribution map."""


class Explainer(Component):
    """Base of all explainers; an instance is a Quantus `explain_func`.

    A subclass states the constants below and implements `attribute`. Around it the base class re-enables
    gradients (also inside ``torch.no_grad`` and inside Quantus), keeps the model in eval mode with frozen
    parameters, restores its state even after an error, seeds every sample by its own content, bounds memory
    and checks and upsamples the maps.
    """

    family: ClassVar[str] = ""
    signed: ClassVar[bool] = False  # negative values are evidence against the target
    class_discriminative: ClassVar[bool] = True  # False: the map does not depend on the target
    stochastic: ClassVar[bool] = False
    shares_draws: ClassVar[bool] = False  # explains several targets of one image from the same draws or queries
    trivial: ClassVar[bool] = False  # a row that every explainer should beat
    needs: ClassVar[tuple[str, ...]] = ()  # names from CONTEXT that `attribute` takes as keywords
    upsampling: ClassVar[str] = "nearest"  # or "bilinear", where the method's definition says so
    batch_size: ClassVar[int] = 8  # rows per call of `attribute`; fixed, so that no option can change a map
    passes: ClassVar[float] = 0.0  # see `cost`
    half_precision: ClassVar[bool] = True  # False: rounding to 16 bits ruins the map, so it is computed in float32
    licence: ClassVar[str] = ""  # what users should know of licences and patents, besides this project's own
    asks: ClassVar[str] = ""  # "single_patches": what a metric of the same `asks` measures is how its map is made
    quick: ClassVar[str] = ""  # parameters that make it cheap, "n=1,m=2", for checks that do not look at quality

    @property
    def cost(self) -> float:
        """Passes through the model per image, a forward and a backward counted as 1 each, at 196 patch tokens."""
        return self.passes

    def files(self) -> list[Path]:
        """Return the images that the parameters name, sorted; their content decides the maps."""
        return []

    def fingerprint(self) -> str:
        """Return a hash of what is in `files`."""
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def supports(self, model: nn.Module) -> str | None:
        """Return why this explainer cannot explain `model`, or None where it can."""
        return None

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return one attribution map per row.

        Parameters
        ----------
        model : nn.Module
            Classifier returning logits, in eval mode.
        inputs : Tensor
            (N, C, H, W) float, requires gradients, on the model's device.
        targets : Tensor
            (N,) long, the classes to explain.
        **context : Tensor
            (N, ...) one per name in `needs`.

        Returns
        -------
        Tensor
            (N, H, W), or (N, h, w) on the model's own token grid.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `attribute`")

    def explain(self, model: nn.Module, inputs: Any, targets: Any, *, seed: int = 0, **context: Any) -> Tensor:
        """Return the maps on their native grid, (N, h, w) float32 on the CPU.

        Parameters
        ----------
        model : nn.Module
            Classifier returning logits; left exactly as it was.
        inputs : array or Tensor
            (N, C, H, W), normalised as the model wants them.
        targets : array or Tensor
            (N,) integer classes.
        seed : int
            With the content of each image, seeds its random draws.
        **context : array or Tensor
            What the explainer `needs`, (N, ...) or one for all samples.

        Raises
        ------
        RequestError
            If the explainer does not support the model or misses a context it needs.
        ExplanationError
            If `attribute` returns a wrong shape or values that are not finite.
        adapters.state.ModelChangedError
            If it changed the model's weights.
        """

        def attribute(model: nn.Module, images: Tensor, classes: Tensor, context: dict[str, Tensor]) -> list[Tensor]:
            return [self.attribute(model, images, classes, **context)]

        (maps,) = explain_all([self], attribute, model, inputs, targets, seed=seed, **context)
        return maps

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> np.ndarray:
        """Explain as Quantus's `explain_func` does: arrays in, (N, 1, H, W) float32 array out."""
        kwargs = {k: v for k, v in kwargs.items() if k not in _QUANTUS_EXTRAS}
        if unknown := set(kwargs) - {"seed", *CONTEXT}:
            given = f"{self.name} got unexpected arguments {sorted(unknown)}"
            raise TypeError(f"{given}: parameters go to adapters.get({self.name!r}, ...)")
        native = self.explain(model, inputs, targets, **kwargs)
        return self.upsample(native, tuple(np.shape(inputs)[-2:]))[:, None].numpy()

    def upsample(self, native: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring (N, h, w) maps to (N, H, W) by the explainer's `upsampling`."""
        if tuple(native.shape[-2:]) == size:
            return native
        mode = {"nearest": "nearest-exact"}.get(self.upsampling, self.upsampling)
        return F.interpolate(native[:, None], size=size, mode=mode)[:, 0]


def explain_all(
    explainers: Sequence[Explainer], attribute: Attribute, model: nn.Module, inputs: Any, targets: Any, **options: Any
) -> list[Tensor]:
    """Prepare everything that an explainer's `attribute` may count on, call it in chunks, and check what it returns.

    Parameters
    ----------
    explainers : sequence of Explainer
        Whose maps `attribute` returns, one (N, h, w) tensor each.
    attribute : callable
        From the model, images (N, C, H, W), targets (N,) and context to those tensors.
    model, inputs, targets
        As for `Explainer.explain`.
    **options
        ``seed``, and context.
    """
    for explainer in explainers:
        if reason := explainer.supports(model):
            raise RequestError(f"{explainer.name} cannot explain this model: {reason}.")
    reference = next(model.parameters(), torch.empty(0))
    dtype, device = reference.dtype, reference.device
    with ExitStack() as stack:
        if not all(explainer.half_precision for explainer in explainers):
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if dtype in _HALF:
                with torch.inference_mode(False):  # tensors made there would not be counted when they are changed
                    model, dtype = copy.deepcopy(model).float(), torch.float32
        stack.enter_context(preserved(model, " or ".join(explainer.name for explainer in explainers)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled graph runs past the hooks
        model.eval().requires_grad_(False)
        for module in model.modules():
            if getattr(module, "grad_checkpointing", False):  # which would run every hook twice
                module.grad_checkpointing = False  # type: ignore[assignment]
        inputs = torch.as_tensor(np.ascontiguousarray(inputs) if isinstance(inputs, np.ndarray) else inputs)
        batch = _Batch(explainers, attribute, model, inputs.to(device, dtype), targets, **options)
        chunks = [batch.explain(rows) for rows in batch.chunks()]
    return [torch.cat(maps) for maps in zip(*chunks, strict=True)]


class _Batch:
    """Samples to explain, in chunks that memory can hold."""

    def __init__(
        self,
        explainers: Sequence[Explainer],
        attribute: Attribute,
        model: nn.Module,
        inputs: Tensor,
        targets: Any,
        seed: int = 0,
        **context: Any,
    ) -> None:
        self.explainers, self.attribute, self.model, self.inputs, self.seed = explainers, attribute, model, inputs, seed
        self.targets = torch.as_tensor(targets, device=inputs.device).long()
        shaped = inputs.ndim == 4 and len(inputs) and self.targets.shape == inputs.shape[:1]
        if not shaped or (self.targets < 0).any():
            given = f"{tuple(inputs.shape)} and targets {tuple(self.targets.shape)}"
            raise RequestError(f"inputs {given}: give images (N, C, H, W), at least one, and for each a class from 0.")
        self.context = {name: self._given(name, context.get(name)) for e in explainers for name in e.needs}

    def _given(self, name: str, value: Any) -> Tensor:
        if name not in CONTEXT:
            raise RequestError(f"{self.explainers[0].name} needs {name!r}: known are {', '.join(CONTEXT)}.")
        if value is None:
            raise RequestError(f"{self.explainers[0].name} needs {name!r}: pass it as a keyword, {CONTEXT[name]}.")
        value = torch.as_tensor(value, dtype=self.inputs.dtype, device=self.inputs.device)
        return value.expand(len(self.inputs), *value.shape[-2:]) if name == "roi_prior" else value

    def chunks(self) -> Iterator[slice]:
        first, n = self.explainers[0], len(self.inputs)
        step = 1 if first.stochastic else first.batch_size
        start = 0
        while start < n:
            stop = min(start + step, n)
            while first.shares_draws and stop < n and torch.equal(self.inputs[stop], self.inputs[start]):
                stop += 1
            yield slice(start, stop)
            start = stop

    def explain(self, rows: slice) -> list[Tensor]:
        context = {name: value[rows] if name == "roi_prior" else value for name, value in self.context.items()}
        try:
            with seeded(self.inputs[rows.start], self.seed), torch.inference_mode(False), torch.enable_grad():
                images = self.inputs[rows].detach().clone().requires_grad_(True)
                maps = self.attribute(self.model, images, self.targets[rows].clone(), context)
            return [_checked(e, m, images) for e, m in zip(self.explainers, maps, strict=True)]
        except RuntimeError as error:
            if not out_of_memory(error) or rows.stop - rows.start == 1:
                raise
        middle = (rows.start + rows.stop) // 2
        halves = self.explain(slice(rows.start, middle)), self.explain(slice(middle, rows.stop))
        return [torch.cat(maps) for maps in zip(*halves, strict=True)]


def _checked(explainer: Explainer, maps: Tensor, inputs: Tensor) -> Tensor:
    name = explainer.name
    if explainer.upsampling not in ("nearest", "bilinear"):
        raise ExplanationError(f"{name} states the upsampling {explainer.upsampling!r}, not nearest or bilinear")
    if not isinstance(maps, Tensor) or maps.ndim != 3 or len(maps) != len(inputs):
        what = tuple(maps.shape) if isinstance(maps, Tensor) else f"a {type(maps).__module__}.{type(maps).__name__}"
        raise ExplanationError(f"{name} returned {what}, not a torch tensor ({len(inputs)}, height, width)")
    if 0 in maps.shape or any(native > full for native, full in zip(maps.shape[1:], inputs.shape[2:], strict=True)):
        raise ExplanationError(f"{name} returned {tuple(maps.shape)}: empty, or larger than the image")
    maps = maps.detach().float().cpu()
    if bad := int((~maps.isfinite()).flatten(1).any(1).sum()):
        raise ExplanationError(f"{name} returned NaN or infinite values in {bad} of {len(maps)} maps")
    return maps


def min_max(maps: Tensor) -> Tensor:
    """Scale each of (N, h, w) maps to [0, 1]; a constant one becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Raise a RequestError if these are no logits (N, K), or one of the targets is no class of them."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise RequestError(f"the model returns {what}, not logits (N, K); a Hugging Face ViT goes through `as_timm`.")
    if int(targets.max()) >= logits.shape[1]:
        raise RequestError(f"target {int(targets.max())} is no class: there are {logits.shape[1]}, counted from 0.")


def predict(model: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int = 64) -> Tensor:
    """Return logits (N, K) without a graph; with one only for models that register backward hooks in their forward."""
    chunks = inputs.detach().split(batch_size)
    try:
        with torch.no_grad():
            return torch.cat([model(chunk) for chunk in chunks])
    except RuntimeError as error:
        if out_of_memory(error) and (rows := min(batch_size, len(inputs))) > 1:
            return predict(model, inputs, rows // 2)
        if "doesn't require gradient" not in str(error):
            raise
    with torch.enable_grad():
        return torch.cat([model(chunk.clone().requires_grad_(True)).detach() for chunk in chunks])
