"""The contract of an explainer. The base class owns what authors get wrong, so that `attribute` is all they write."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainer_bench import Component, RequestError, out_of_memory

CONTEXT = ("roi_prior",)  # what a caller can tell an explainer about each sample, see `Explainer.needs`
_QUANTUS_EXTRAS = ("device", "method")  # Quantus injects these into every `explain_func` call


class ExplanationError(RuntimeError):
    """An explainer returned something that is no attribution map."""


class ModelChangedError(RequestError):
    """An explainer changed the model's weights or buffers in place: nothing computed after it can be trusted."""


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
    shares_draws: ClassVar[bool] = False  # stochastic, and explains several targets of one image from the same draws
    trivial: ClassVar[bool] = False  # a row that every explainer should beat
    needs: ClassVar[tuple[str, ...]] = ()  # names from CONTEXT that `attribute` takes as keywords
    upsampling: ClassVar[str] = "nearest"  # or "bilinear", where the method's definition says so
    batch_size: ClassVar[int] = 8  # rows per call of `attribute`; fixed, so that no option can change a map

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
        raise NotImplementedError

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
        ModelChangedError
            If it changed the model's weights.
        """
        if reason := self.supports(model):
            raise RequestError(f"{self.name} cannot explain this model: {reason}.")
        reference = next(model.parameters(), torch.empty(0))
        if self.upsampling not in ("nearest", "bilinear"):
            raise ExplanationError(f"{self.name} states the upsampling {self.upsampling!r}, not nearest or bilinear")
        inputs = torch.as_tensor(np.ascontiguousarray(inputs) if isinstance(inputs, np.ndarray) else inputs)
        inputs = inputs.to(reference.device, reference.dtype)
        targets = torch.as_tensor(targets, device=reference.device).long()
        extras = {name: self._per_sample(name, context.get(name), inputs) for name in self.needs}
        with preserved(model):
            model.eval().requires_grad_(False)
            maps = [self._chunk(model, inputs, targets, extras, rows, seed) for rows in self._chunks(inputs)]
        return torch.cat(maps)

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> np.ndarray:
        """Explain as Quantus's `explain_func` does: arrays in, (N, 1, H, W) float32 array out."""
        kwargs = {k: v for k, v in kwargs.items() if k not in _QUANTUS_EXTRAS}
        if unknown := set(kwargs) - {"seed", *CONTEXT}:
            raise TypeError(f"{self.name} got unexpected arguments {sorted(unknown)}")
        native = self.explain(model, inputs, targets, **kwargs)
        return self.upsample(native, tuple(inputs.shape[-2:]))[:, None].numpy()

    def upsample(self, native: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring (N, h, w) maps to (N, H, W) by the explainer's `upsampling`."""
        if tuple(native.shape[-2:]) == size:
            return native
        mode = {"nearest": "nearest-exact"}.get(self.upsampling, self.upsampling)
        return F.interpolate(native[:, None], size=size, mode=mode)[:, 0]

    def _per_sample(self, name: str, value: Any, inputs: Tensor) -> Tensor:
        if value is None:
            raise RequestError(f"{self.name} needs {name!r}: pass it as a keyword, one per sample or one for all.")
        value = torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device)
        return value.expand(len(inputs), *value.shape[-2:])

    def _chunks(self, inputs: Tensor) -> Iterator[slice]:
        step = 1 if self.stochastic else self.batch_size
        start = 0
        while start < len(inputs):
            stop = min(start + step, len(inputs))
            while self.shares_draws and stop < len(inputs) and torch.equal(inputs[stop], inputs[start]):
                stop += 1
            yield slice(start, stop)
            start = stop

    def _chunk(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, extras: Mapping[str, Tensor], rows: slice, seed: int
    ) -> Tensor:
        context = {name: value[rows] for name, value in extras.items()}
        try:
            with seeded(inputs[rows.start], seed), torch.inference_mode(False), torch.enable_grad():
                images = inputs[rows].detach().clone().requires_grad_(True)
                maps = self.attribute(model, images, targets[rows].clone(), **context)
            return self._checked(maps, images)
        except RuntimeError as error:
            if not out_of_memory(error) or rows.stop - rows.start == 1:
                raise
        middle = (rows.start + rows.stop) // 2
        halves = slice(rows.start, middle), slice(middle, rows.stop)
        return torch.cat([self._chunk(model, inputs, targets, extras, half, seed) for half in halves])

    def _checked(self, maps: Tensor, inputs: Tensor) -> Tensor:
        if not isinstance(maps, Tensor) or maps.ndim != 3 or len(maps) != len(inputs):
            shape = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ExplanationError(f"{self.name} returned {shape}, not ({len(inputs)}, height, width)")
        if 0 in maps.shape or any(native > full for native, full in zip(maps.shape[1:], inputs.shape[2:], strict=True)):
            raise ExplanationError(f"{self.name} returned {tuple(maps.shape)}: empty, or larger than the image")
        maps = maps.detach().float().cpu()
        if bad := int((~maps.isfinite()).flatten(1).any(1).sum()):
            raise ExplanationError(f"{self.name} returned NaN or infinite values in {bad} of {len(maps)} maps")
        return maps


def predict(model: nn.Module, inputs: Tensor, batch_size: int = 64) -> Tensor:
    """Return logits (N, K) without a graph; with one only for models that register backward hooks in their forward."""
    chunks = inputs.detach().split(batch_size)
    try:
        with torch.no_grad():
            return torch.cat([model(chunk) for chunk in chunks])
    except RuntimeError as error:
        if "doesn't require gradient" not in str(error):
            raise
    with torch.enable_grad():
        return torch.cat([model(chunk.clone().requires_grad_(True)).detach() for chunk in chunks])


def target_gradients(model: nn.Module, inputs: Tensor, targets: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Run the model and return the gradients of each row's target logit with respect to what `tensors` then holds.

    `tensors` is a list that hooks fill during the forward pass.
    """
    logits = model(inputs)
    return torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), tensors)


@contextmanager
def seeded(image: Tensor, seed: int) -> Iterator[None]:
    """Seed every global generator from an image's content, and put their states back afterwards."""
    content = image.detach().float().cpu().contiguous().numpy().tobytes()
    value = int.from_bytes(hashlib.sha256(content + seed.to_bytes(8, "little", signed=True)).digest()[:4], "little")
    states = random.getstate(), np.random.get_state()
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(value)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(value)
        random.seed(value)
        np.random.seed(value)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes (mode, hooks, patched forwards, switches) and every parameter's gradient back.

    Raises
    ------
    ModelChangedError
        If the values of parameters or buffers were changed in place.
    """
    tensors = [*model.parameters(), *model.buffers()]
    versions = [tensor._version for tensor in tensors]
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(_restore_module, module, dict(vars(module)), _dicts(module))
        for parameter in model.parameters():
            stack.callback(_restore_parameter, parameter, parameter.requires_grad, parameter.grad)
            parameter.grad = None
        yield
    if versions != [tensor._version for tensor in tensors]:
        raise ModelChangedError("the explainer changed the model's weights or buffers: it must leave them alone.")


def _dicts(module: nn.Module) -> dict[str, dict]:
    return {name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)}


def _restore_module(module: nn.Module, attributes: dict[str, Any], dicts: dict[str, dict]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    for name, content in dicts.items():
        attributes[name].clear()
        attributes[name].update(content)


def _restore_parameter(parameter: nn.Parameter, requires_grad: bool, grad: Tensor | None) -> None:
    parameter.requires_grad_(requires_grad)
    parameter.grad = grad
