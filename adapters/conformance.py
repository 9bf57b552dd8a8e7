"""What every explainer must keep, checked on small random models; `explainer-bench check` runs it on a submission.

A check returns what is broken in one line, or "" where all is well. The models know nothing, so the maps mean nothing:
checked is how an explainer behaves, not how good it is.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adapters.base import CONTEXT, Explainer
from explainer_bench import Component, RequestError

_CLASSES = 5
_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": _CLASSES, "patch_size": 16}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(**_VIT, img_size=64),
    "vit_registers": lambda: VisionTransformer(**_VIT, img_size=(48, 80), reg_tokens=4, init_values=0.1),
    "vit_mean_pooled": lambda: VisionTransformer(**_VIT, img_size=64, global_pool="avg", qk_norm=True),
    "vit_distilled": lambda: VisionTransformerDistilled(**_VIT, img_size=64),
    "resnet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=_CLASSES, channels=(8, 8, 16, 16)),
}
_CONSTANTS = [*Component.__annotations__, *Explainer.__annotations__]
SIZES = dict.fromkeys(MODELS, (64, 64)) | {"vit_registers": (48, 80), "resnet": (96, 96)}


def build(name: str) -> nn.Module:
    """Return one of `MODELS` with random weights, always the same ones, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


@dataclass
class Case:
    """An explainer, a model, three images and the classes to explain.

    Parameters
    ----------
    explainer : Explainer
        What is checked.
    model : nn.Module
        With five classes.
    size : tuple of int
        Height and width of the images.
    """

    explainer: Explainer
    model: nn.Module
    size: tuple[int, int]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        blocks = F.interpolate(torch.rand(3, 3, 4, 4, generator=generator), size=self.size)
        self.inputs = blocks + 0.2 * torch.rand(3, 3, *self.size, generator=generator) - 0.6
        self.targets = torch.arange(3)

    def explain(self, model: nn.Module, inputs: Any, targets: Any, **options: Any) -> np.ndarray:
        """Return (N, 1, H, W) maps, with whatever context the explainer needs."""
        known = {"roi_prior": np.linspace(0, 1, self.size[1])[None].repeat(self.size[0], 0), "concept": self.inputs[:2]}
        context = {name: known[name] for name in self.explainer.needs}
        return self.explainer(model, inputs, targets, **context, **options)

    @cached_property
    def maps(self) -> np.ndarray:
        """The maps of the three images."""
        return self.explain(self.model, self.inputs, self.targets)

    def differs(self, maps: np.ndarray, what: str, tolerance: float = 1e-5) -> str:
        """Return that `maps` are not `self.maps`, if so, by more than a share of their largest value."""
        off, largest = float(np.abs(maps - self.maps).max()), float(np.abs(self.maps).max())
        if off <= tolerance * largest:
            return ""
        return f"{what}, the maps change by {off / (largest or 1):.1e} of their largest value"


def states_facts(case: Case) -> str:
    """Name, family, documentation and reference are there, and `needs` asks for what exists."""
    explainer = case.explainer
    facts = {"name": explainer.name, "family": explainer.family, "docstring": type(explainer).__doc__}
    if not explainer.trivial:
        facts["reference"] = explainer.reference
    if missing := [fact for fact, value in facts.items() if not value]:
        return f"it states no {' and no '.join(missing)}"
    stated = [name for name, value in vars(type(explainer)).items() if isinstance(value, (bool, int, float, str))]
    near = {name: difflib.get_close_matches(name, _CONSTANTS, cutoff=0.85) for name in stated}
    if typos := [f"{name!r}: did you mean {known[0]!r}" for name, known in near.items() if known and known[0] != name]:
        return f"it states {typos[0]}?"
    if isinstance(explainer.needs, str):
        return f"`needs` is a string: write ({explainer.needs!r},)"
    unknown = set(explainer.needs) - set(CONTEXT)
    return (
        f"`needs` holds {sorted(unknown)}, of which nothing is known: choose from {sorted(CONTEXT)}" if unknown else ""
    )


def returns_maps(case: Case) -> str:
    """One finite float32 map per image, at the image's size, also where the caller switched gradients off."""
    with torch.no_grad():
        shape, dtype = case.maps.shape, case.maps.dtype
    expected = (3, 1, *case.size)
    return "" if (shape, dtype) == (expected, np.float32) else f"its maps are {shape} {dtype}, not {expected} float32"


def ignores_company(case: Case) -> str:
    """An image's map does not depend on the batch that the image is in, nor on the order. In float64."""
    double = Case(case.explainer, copy.deepcopy(case.model).double(), case.size)
    alone = [double.explain(double.model, double.inputs[i : i + 1], double.targets[i : i + 1]) for i in range(3)]
    backwards = double.explain(double.model, double.inputs.flip(0).numpy(), double.targets.flip(0).numpy())[::-1]
    return double.differs(np.concatenate(alone), "one image at a time") or double.differs(
        backwards, "in reversed order"
    )


def is_seeded(case: Case) -> str:
    """The same seed gives the same map, another one another map exactly if `stochastic`; global generators stay."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    again = case.explain(case.model, case.inputs, case.targets)
    if not torch.equal(torch.get_rng_state(), states[0]) or (np.random.get_state()[1] != states[1]).any():  # type: ignore[index]
        return "it seeds or advances the global random generators in a way that outlives it"
    other = case.explain(case.model, case.inputs, case.targets, seed=1)
    if not np.array_equal(again, case.maps):
        return "asked twice with the same seed, it returns two different maps"
    if case.explainer.stochastic == np.array_equal(other, case.maps):
        return f"it says stochastic={case.explainer.stochastic}, but another seed shows the opposite: state it"
    return ""


def knows_its_target(case: Case) -> str:
    """Another class gives another map exactly if `class_discriminative`; nothing is known where all are 0, clipped."""
    other = case.explain(case.model, case.inputs, (case.targets + 1) % _CLASSES)
    if not case.maps.any() and not other.any():
        return ""
    if case.explainer.class_discriminative == np.array_equal(other, case.maps):
        return (
            f"it says class_discriminative={case.explainer.class_discriminative}, but another class shows the opposite"
        )
    return ""


def keeps_its_sign(case: Case) -> str:
    """Maps have negative values only if `signed`."""
    return (
        "it says signed=False, but some values are negative"
        if not case.explainer.signed and case.maps.min() < 0
        else ""
    )


def leaves_no_trace(case: Case) -> str:
    """Weights, gradients, mode, hooks, patched forwards and attributes are as they were."""
    before, weights = _state(case.model), copy.deepcopy(case.model.state_dict())
    case.explain(case.model, case.inputs, case.targets)
    if changed := [key for key, value in case.model.state_dict().items() if not torch.equal(value, weights[key])]:
        return f"it changes the model's {changed[0]}"
    after = _state(case.model)
    return "" if after == before else "it leaves hooks, gradients, attributes or another mode behind in the model"


def _state(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (
            m.training,
            sorted(vars(m)),
            m.__dict__.get("forward"),
            getattr(m, "fused_attn", None),
            getattr(m, "inplace", None),
        )
        for m in model.modules()
    ]
    hooks = [len(getattr(m, kind)) for m in model.modules() for kind in kinds]
    return [modules, hooks, [(p.requires_grad, p.grad) for p in model.parameters()]]


def runs_anywhere(case: Case) -> str:
    """The same maps in inference mode, from inputs that are no leaves of a graph, and from a wrapped model."""
    leaf = case.inputs.clone().requires_grad_()
    with torch.inference_mode():
        inside = case.explain(case.model, case.inputs, case.targets)
    wrapped = case.explain(nn.Sequential(nn.Identity(), case.model), case.inputs, case.targets)
    return (
        case.differs(inside, "inside torch.inference_mode")
        or case.differs(case.explain(case.model, leaf * 1, case.targets), "from inputs that are part of a graph")
        or case.differs(wrapped, "for the same model inside an nn.Sequential")
    )


def runs_in_half_precision(case: Case) -> str:
    """A bfloat16 model gets finite maps of the same shape."""
    half = Case(case.explainer, copy.deepcopy(case.model).bfloat16(), case.size)
    with torch.inference_mode():
        return returns_maps(half)


def runs_on_cuda(case: Case) -> str:
    """On CUDA, where there is one, the maps are the CPU's. In float64."""
    if not torch.cuda.is_available():
        return ""
    double = Case(case.explainer, copy.deepcopy(case.model).double(), case.size)
    there = double.explain(copy.deepcopy(double.model).cuda(), double.inputs, double.targets)
    return "" if case.explainer.stochastic else double.differs(there, "on CUDA")


def refuses_clearly(case: Case) -> str:
    """Asked for a model that `supports` refuses, it raises a RequestError with that reason."""
    reason = case.explainer.supports(case.model)
    try:
        case.explain(case.model, case.inputs, case.targets)
    except RequestError as error:
        return "" if reason and reason in str(error) else f"its error does not give the reason of `supports`: {error}"
    return "`supports` refuses the model, but it is explained"


CHECKS = (
    returns_maps,
    states_facts,
    ignores_company,
    is_seeded,
    knows_its_target,
    keeps_its_sign,
    leaves_no_trace,
    runs_anywhere,
    runs_in_half_precision,
    runs_on_cuda,
)


@dataclass(frozen=True)
class Finding:
    """One check on one model.

    Parameters
    ----------
    model : str
        One of `MODELS`.
    check : str
        One of `CHECKS`, by name.
    verdict : str
        "passed", "broken" or "refused".
    line : str
        What is broken, or why the explainer refuses the model.
    """

    model: str
    check: str
    verdict: str
    line: str = ""


def check(explainer: Explainer, models: tuple[str, ...] = tuple(MODELS)) -> Iterator[Finding]:
    """Check one explainer on each of the models; exceptions that it raises are findings, too."""
    for name in models:
        case = Case(explainer, build(name), SIZES[name])
        try:
            reason = explainer.supports(case.model)
        except Exception as error:
            yield Finding(name, "supports", "broken", f"`supports` raises {type(error).__name__}: {error}")
            continue
        if reason:
            line = refuses_clearly(case)
            yield Finding(name, "refuses_clearly", "broken" if line else "refused", line or reason)
            continue
        for function in CHECKS:
            yield (finding := _apply(name, function, case))
            if function is returns_maps and finding.verdict == "broken":
                break  # all others would fail for the same reason


def _apply(name: str, function: Callable[[Case], str], case: Case) -> Finding:
    try:
        line = function(case)
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
    return Finding(name, function.__name__, "broken" if line else "passed", line)
