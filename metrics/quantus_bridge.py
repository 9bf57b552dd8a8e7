"""Quantus 0.6.0, one sample at a time, with a model whose gradients stay on.

Quantus scores in batches, normalises attributions over the whole batch, draws from the global random generators and
predicts under `torch.no_grad`. Here every sample is a batch of its own, seeded with its own seed, on copies of the
arrays, so that a score depends on nothing else; and `GradientModel` keeps gradients on. Nothing in Quantus is patched.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

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


class QuantusMetric(Metric):
    """Base of the metrics that are Quantus's own.

    Parameters
    ----------
    engine : {"fast", "quantus"}
        "quantus": the full `__call__`, whose check of the attributions costs far more than most metrics, and which
        refuses maps that are negative throughout. "fast": the same numbers without that check.
    """

    quantus_name: ClassVar[str] = ""

    engine: Literal["fast", "quantus"] = "fast"

    def build(self, samples: Samples, row: int) -> Any:
        """Return a new Quantus metric for the sample at `row`, so that none sees what another left behind."""
        import quantus  # takes seconds: only when it is needed

        return getattr(quantus, self.quantus_name)(disable_warnings=True, **self.quantus_params(samples, row))

    def quantus_params(self, samples: Samples, row: int) -> dict[str, Any]:
        """Return the parameters of the Quantus metric that differ from its defaults."""
        return {}

    def fast(self, samples: Samples, row: int) -> float:
        """Return Quantus's score of one sample, from its own per-batch method, for metrics of the map and ROI alone."""
        metric = self.build(samples, row)
        with isolated(int(samples.seeds[row]), samples.inputs.device):
            maps = preprocess(metric, samples.maps[row])
            scores = metric.evaluate_batch(
                model=None, x_batch=maps, y_batch=None, a_batch=maps, s_batch=samples.roi[row][None, None]
            )
        return float(scores[0])

    def score(self, samples: Samples) -> np.ndarray:
        """Return (N,) float64."""
        rows = range(len(samples))
        if self.engine == "fast":
            return np.array([self.fast(samples, row) for row in rows])
        model = with_gradients(samples.model, samples.inputs)
        return np.array([evaluate(self.build(samples, row), samples, row, model) for row in rows], dtype=float)


def preprocess(metric: Any, attribution: np.ndarray) -> np.ndarray:
    """Return a copy (1, 1, H, W) of a map (H, W), normalised and rectified as the Quantus metric is set to do."""
    maps = np.array(attribution)[None, None]
    maps = metric.normalise_func(maps) if metric.normalise else maps
    return np.abs(maps) if metric.abs else maps
