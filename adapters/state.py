"""What explaining may disturb, and how it is put back: random generators, and everything a model holds."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from explainer_bench import RequestError


class ModelChangedError(RequestError):
    """An explainer changed the model's weights or buffers in place: nothing computed after it can be trusted."""


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
def preserved(model: nn.Module, who: str = "the explainer") -> Iterator[None]:
    """Put every module's attributes (mode, hooks, patched forwards, switches) and every parameter's gradient back.

    Raises
    ------
    ModelChangedError
        If the values of parameters or buffers were changed in place.
    """
    before = _content(model)
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(_restore_module, module, dict(vars(module)), _dicts(module))
        for parameter in model.parameters():
            stack.callback(_restore_parameter, parameter, parameter.requires_grad, parameter.grad)
            parameter.grad = None
        yield
    if _content(model) != before:
        raise ModelChangedError(f"{who} changed the model's weights or buffers: it must leave them alone.")


def _content(model: nn.Module) -> tuple[list[int], bytes]:
    """Return what changes with a tensor's values, also where they are changed behind autograd's back."""
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        norms = [tensor.float().norm() for tensor in tensors]
        sizes = torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else torch.empty(0)
    return [tensor._version for tensor in tensors], sizes.cpu().numpy().tobytes()


def _dicts(module: nn.Module) -> list[tuple[dict, dict]]:
    """Pair each of its dicts with a copy; most are empty, and there are many."""
    return [(value, value.copy() if value else {}) for value in vars(module).values() if isinstance(value, dict)]


def _restore_module(module: nn.Module, attributes: dict[str, Any], dicts: list[tuple[dict, dict]]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    for mine, before in dicts:
        if mine or before:
            mine.clear()
            mine.update(before)


def _restore_parameter(parameter: nn.Parameter, requires_grad: bool, grad: Tensor | None) -> None:
    parameter.requires_grad_(requires_grad)
    parameter.grad = grad
