"""Quantus 0.6.0, one sample at a time, with a model whose gradients stay on.

Quantus scores in batches, normalises attributions over the whole batch, draws from the global random generators and
predicts under `torch.no_grad`. Here every sample is a batch of its own, seeded with its own seed, on copies of the
arrays, so that a score depends on nothing else; and `GradientModel` keeps gradients on. Nothing in Quantus is patched.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from explainer_bench import RequestError, did_you_mean
from metrics.base import Metric, Samples


class GradientModel(nn.Module):
    """Model whose forward pass records gradients even where the caller switched them off.

    Some models register backward hooks in their forward pass (relevance propagation, attention gradients), which
    fails under `torch.no_grad` and in `torch.inference_mode`. Wrapped, they run there, with frozen parameters as
    well, and can be copied with `copy.deepcopy`:

    >>> quantus.evaluate(metrics, xai_methods, GradientModel(model), x, y)  # doctest: +SKIP

    Where the caller switched gradients off, the output is detached, and so are the tensors that the model's modules
    keep: their values stay, the graph is freed. A forward pass costs about a fifth more time, and the memory of a
    training step: see `with_gradients`.

    Parameters
    ----------
    module : nn.Module
        Image classifier returning logits; it is not copied, and the wrapper takes over its mode (train or eval).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (N, K) of `inputs` (N, C, H, W)."""
        wanted = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if not inputs.requires_grad:
                # an inference tensor cannot enter a graph, its clone can
                inputs = (inputs.clone() if inputs.is_inference() else inputs.detach()).requires_grad_()
            logits = self.module(inputs)
        if wanted:
            return logits
        self._release()
        return logits.detach()

    def _release(self) -> None:
        for part in self.modules():
            for name, value in vars(part).items():
                if isinstance(value, list):
                    value[:] = map(_detached, value)
                else:
                    vars(part)[name] = _detached(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientModel:
        self._release()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value


def bare(model: nn.Module) -> nn.Module:
    """Return the model without its `GradientModel`."""
    return model.module if isinstance(model, GradientModel) else model


def with_gradients(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return `model`, wrapped in `GradientModel` only if it cannot run without gradients.

    Parameters
    ----------
    model : nn.Module
        Image classifier.
    inputs : Tensor
        (N, C, H, W); the first image is used for one probing forward pass.
    """
    try:
        with torch.no_grad():
            model(inputs[:1])
    except RuntimeError as error:
        if "grad" not in str(error):
            raise
        return GradientModel(model)
    return model


@contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of numpy and torch, silence warnings, and restore all of it afterwards."""
    state = np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def evaluate(
    metric: Any, samples: Samples, row: int, model: nn.Module, explain_func: Callable | None = None, **call: Any
) -> Any:
    """Run any Quantus metric on one sample: its full `__call__` on a batch of one.

    Parameters
    ----------
    metric : quantus.Metric
        Built with ``return_aggregate=False`` where its per-sample score is wanted.
    samples : Samples
        Explained images.
    row : int
        Which of them.
    model : nn.Module
        The samples' model, or its `with_gradients`.
    explain_func : callable, optional
        Quantus's own: ``explain_func(model, inputs, targets, **kwargs)``, for metrics that explain again.
    **call
        Further arguments of the metric's `__call__`, such as ``softmax=True``.

    Returns
    -------
    object
        What the metric gives for the sample: a float, a curve, a mapping.
    """
    device = samples.inputs.device
    with isolated(int(samples.seeds[row]), device):
        result = metric(
            model=model,
            x_batch=samples.inputs[row : row + 1].detach().float().cpu().numpy().copy(),
            y_batch=np.array(samples.targets[row : row + 1]),
            a_batch=np.array(samples.maps[row])[None, None],
            s_batch=np.array(samples.roi[row])[None, None],
            channel_first=True,
            explain_func=explain_func,
            device=str(device),
            batch_size=1,
            **call,
        )
    return result[0] if isinstance(result, (list, np.ndarray)) and len(result) == 1 else result


class NamedMetric(Metric):
    """Base of Quantus's metrics by name, ``quantus:Name[param=value,...]``: whatever Quantus has, as Quantus has it.

    One sample at a time through `evaluate`, so that neither batches nor other samples matter; everything else is
    Quantus's own, faults included (see the page on deviations). A curve, mapping or array is reduced to its mean.

    Parameters
    ----------
    softmax : bool, optional
        Whether the metric sees probabilities; Quantus's default for each metric.
    """

    expensive = True
    scale_invariant = False
    undefined_reason = "Quantus fails on it, or gives no finite number"

    quantus_class: ClassVar[Any]

    def undefined(self, samples: Samples) -> list[str]:
        """Return for each sample why the metric is undefined on it, or ""."""
        reasons = super().undefined(samples)
        highest = samples.maps.max(axis=(1, 2)).tolist()
        return [
            r or ("all of the map is negative" if high < 0 else "") for r, high in zip(reasons, highest, strict=True)
        ]

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64, NaN where Quantus fails.

        Raises
        ------
        RequestError
            Where Quantus fails on every sample, with what it says, or returns something that is no number.
        """
        model = with_gradients(samples.model, samples.inputs)
        scores, failures = np.full(len(samples), np.nan), []
        for row in range(len(samples)):
            try:
                result = self._result(samples, row, model)
            except RequestError:
                raise
            except Exception as error:  # whatever it is, it is Quantus's
                failures.append(error)
            else:
                scores[row] = mean_of(result, self.name)
        if len(failures) == len(samples):
            said = " ".join(f"{type(failures[0]).__name__}: {failures[0]}".split())
            grey = " It takes images of one channel only." if self.quantus_class.__name__ in ("ROAD", "IROF") else ""
            raise RequestError(f"{self.name}: Quantus cannot score this ({said}).{grey}") from failures[0]
        return scores

    def _result(self, samples: Samples, row: int, model: nn.Module) -> Any:
        explain = explain_func(samples, row)
        return evaluate(self.build(samples), samples, row, model, explain, softmax=self.params["softmax"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.quantus_class.__name__, self.params)  # its class is not to be found in this module

    def build(self, samples: Samples) -> Any:
        """Return a new Quantus metric."""
        changed = {k: v for k, v in self.params.items() if k != "softmax" and v != getattr(type(self), k)}
        params = {k: _function(v) if k.endswith("_func") else v for k, v in changed.items()}
        if "num_classes" in self.params:
            params.setdefault("num_classes", samples.logits.shape[1])
        if "return_aggregate" in inspect.signature(self.quantus_class).parameters:
            params["return_aggregate"] = False
        return self.quantus_class(disable_warnings=True, **params)


_OURS = ("return_aggregate", "aggregate_func", "default_plot_func", "disable_warnings", "display_progressbar")
_NOT_BY_IMAGE = {
    "SensitivityN": "correlates across images, here each is scored alone: use sensitivity_n",
    "Focus": "needs mosaics: use focus",
}
_GROUPS = {"Localisation": "localization", "Complexity": "compactness", "Randomisation": "randomization"}


@cache
def named(name: str) -> type[NamedMetric]:
    """Return Quantus's metric called `name` (the name of its class) as one of ours.

    Its parameters are those of its ``__init__``, and `softmax`; functions are given by their name in Quantus. The
    number of classes is the model's unless it is given.

    Raises
    ------
    RequestError
        If Quantus has no such metric.
    """
    import quantus  # takes seconds: only when it is needed

    groups = {cls: group for group, found in quantus.AVAILABLE_METRICS.items() for cls in found.values()}
    classes: dict[str, Any] = {cls.__name__: cls for cls in groups}
    if name not in classes:
        hint = did_you_mean(name, list(classes))
        raise RequestError(f"Quantus {quantus.__version__} has no metric {name!r}.{hint}")
    if name in _NOT_BY_IMAGE:
        raise RequestError(f"quantus:{name} {_NOT_BY_IMAGE[name]}.")
    cls = classes[name]
    signature = inspect.signature(cls).parameters.values()
    defaults = {p.name: p.default for p in signature if p.kind is not p.VAR_KEYWORD and p.name not in _OURS}
    defaults = {key: None if callable(value) or key == "num_classes" else value for key, value in defaults.items()}
    defaults["softmax"] = inspect.signature(cls.__call__).parameters["softmax"].default
    constants = {
        "__module__": __name__,
        "__doc__": f"Quantus's {name}, as Quantus has it.",
        "name": f"quantus:{name}",
        "version": quantus.__version__,
        "reference": "Quantus: Hedstrom et al., JMLR 2023 (arXiv:2202.06861)",
        "group": _GROUPS.get(groups[cls], groups[cls].lower()),
        "higher_is_better": cls.score_direction.name == "HIGHER",
        "needs_roi": groups[cls] == "Localisation",
        "sign_policy": "absolute" if defaults["abs"] else "signed",
        "quantus_class": cls,
    }
    return type(f"Quantus{name}", (NamedMetric,), {**constants, **defaults, "__annotations__": _types(defaults)})


def _again(name: str, params: dict[str, Any]) -> NamedMetric:
    return named(name)(**params)


def _types(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each parameter may be, as far as its default tells: baselines are names or numbers, None is open."""
    known: dict[type, Any] = {bool: bool, int: int | float, float: int | float}
    return {key: known.get(type(value), Any) for key, value in defaults.items()}


def _function(value: Any) -> Any:
    """Return Quantus's function called `value`; what is no name of one is passed on."""
    from quantus.helpers import constants

    similar, perturb = constants.AVAILABLE_SIMILARITY_FUNCTIONS, constants.AVAILABLE_PERTURBATION_FUNCTIONS
    functions = {**similar, **perturb, **constants.AVAILABLE_NORMALISATION_FUNCTIONS}
    return functions.get(value, value) if isinstance(value, str) else value


def explain_func(samples: Samples, row: int) -> Callable[..., np.ndarray]:
    """Return Quantus's ``explain_func(model, inputs, targets, **kwargs)``: the explainer of the sample at `row`."""

    def explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        if samples.reexplain is None:
            raise RequestError("this metric explains again, and these samples have no explainer (`Samples.reexplain`).")
        images = torch.as_tensor(np.asarray(inputs)).to(samples.inputs)
        return samples.reexplain(bare(model), images, np.asarray(targets), np.full(len(images), row))[:, None]

    return explain


def mean_of(result: Any, name: str) -> float:
    """Return a Quantus result of one sample as one number, the mean over its curve, mapping or array."""
    values = list(result.values()) if isinstance(result, Mapping) else result
    try:
        return float(np.mean(np.asarray(values, dtype=float)))
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{name} returns {type(result).__name__} {str(result)[:80]!r}, which is no number."
        ) from error
