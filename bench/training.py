"""Training: one seeded loop for every recipe, a checkpoint and a report, written complete or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench import models
from bench.datasets.base import Dataset, Sample
from bench.models import Model
from bench.recipes import Arrays, Recipe, registry
from explainer_bench import RequestError, __version__, write_atomically

Progress = Callable[[int, int, str], None]


class Fit(NamedTuple):
    """What the loop found: the best epoch (from 1) and each epoch's losses and seconds."""

    best_epoch: int
    history: list[dict[str, float]]


def train(
    recipe: str | Recipe,
    out: Path,
    data_root: Path | None = None,
    weights: Path | None = None,
    fraction: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a recipe's model, measure it on the test split, write checkpoint and report.

    Parameters
    ----------
    recipe : str or Recipe
        A name, ``name[param=value,...]``, or a recipe.
    out : Path
        Folder of ``NAME.safetensors`` and ``NAME.report.json``.
    data_root : Path, optional
        Where the data are, for recipes that need some.
    weights : Path, optional
        Local pre-trained weights, for recipes that start from some.
    fraction : float
        Share of the training split to use, class by class, in (0, 1].
    device : str
        Where to train.
    seed : int
        Of the new weights, the order and the augmentation: the same seed gives the same numbers on one machine.
    progress : callable, optional
        ``progress(steps done, steps in all, what is going on)``.

    Returns
    -------
    dict
        The report: recipe and parameters, data, losses per epoch, figures on the val and test splits, seconds.

    Raises
    ------
    RequestError
        For an unknown recipe or parameter, a wrong fraction, or unusable data or weights.
    """
    if not 0 < fraction <= 1:
        raise RequestError(f"fraction {fraction} is not a share of the training data: give one in (0, 1].")
    recipe = registry.get(recipe) if isinstance(recipe, str) else recipe
    begun = time.perf_counter()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = recipe.model(weights)
        data = {split: recipe.dataset(split, data_root) for split in ("train", "val", "test")}
        chosen = {split: subset(part.samples, fraction if split == "train" else 1) for split, part in data.items()}
        arrays = {split: read(recipe, data[split], chosen[split], model) for split in data}
        fitted = fit(recipe, model, arrays["train"], arrays["val"], device, seed, progress or (lambda *_: None))
    if recipe.half:
        model.module.half().float()  # what is measured below is what the checkpoint will hold
    model.name += "" if fraction == 1 else f"_{fraction:g}"
    report = {
        "model": model.name,
        "recipe": recipe.name,
        "params": recipe.params,
        "fraction": fraction,
        "seed": seed,
        "device": device,
        "data": {s: {"images": len(chosen[s]), "fingerprint": data[s].fingerprint} for s in data},
        "best_epoch": fitted.best_epoch,
        "history": fitted.history,
        "val": evaluate(recipe, model, arrays["val"], device),
        "test": evaluate(recipe, model, arrays["test"], device),
        "torch": torch.__version__,
        "explainer_bench": __version__,
    }
    return {**_write(out, recipe, model, report), "seconds": round(time.perf_counter() - begun, 1)}


def _write(out: Path, recipe: Recipe, model: Model, report: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint, then the report with the fingerprint of what the checkpoint holds."""
    checkpoint = Path(out) / f"{model.name}.safetensors"
    models.save(checkpoint, model, half=recipe.half, training=report)
    report = {**report, "model_fingerprint": models.get(checkpoint).fingerprint, "checkpoint": checkpoint.name}
    content = json.dumps(report, indent=1, sort_keys=True).encode()
    write_atomically(checkpoint.with_name(f"{model.name}.report.json"), content)
    return {**report, "checkpoint": str(checkpoint)}


def subset(samples: list[Sample], fraction: float) -> list[Sample]:
    """Choose a share of every class, at least one sample each, by the hash of the ids."""
    order = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    chosen: list[Sample] = []
    for label in sorted({sample.label for sample in samples}):
        mine = [sample for sample in order if sample.label == label]
        chosen += mine[: max(1, round(fraction * len(mine)))]
    return sorted(chosen, key=lambda sample: sample.id)


def read(recipe: Recipe, dataset: Dataset, samples: list[Sample], model: Model) -> Arrays:
    """Read samples into memory, images as uint8 at the model's input size."""
    images = np.empty((len(samples), *model.input_size, 3), np.uint8)
    targets = []
    for row, sample in enumerate(samples):
        item = dataset.load(sample)
        images[row] = model.resize(item.image)
        targets.append(recipe.target(sample, item))
    return Arrays(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(np.stack(targets)))


def fit(recipe: Recipe, model: Model, train: Arrays, val: Arrays, device: str, seed: int, progress: Progress) -> Fit:
    """Train `model` in place and leave it with the weights of the epoch of least validation loss, frozen."""
    module = model.module.to(device).requires_grad_(True)
    generator = np.random.default_rng(seed)
    steps, done = recipe.epochs * math.ceil(len(train.images) / recipe.batch_size), 0
    optimizer, scheduler = _optimizer(recipe, module, steps)
    best: dict[str, Tensor] = {}
    fitted = Fit(0, [])
    for epoch in range(1, recipe.epochs + 1):
        begun = time.perf_counter()
        losses = []
        module.train()
        for rows in _batches(len(train.images), recipe.batch_size, generator):
            inputs = model.normalise(recipe.augment(train.images[rows], generator).to(device))
            targets = train.targets[rows].to(device)
            loss = recipe.loss(module(inputs), targets)
            losses.append(_step(module, loss, optimizer, scheduler))
            done += 1
            progress(done, steps, f"epoch {epoch}, loss {losses[-1]:.3f}")
        val_loss = _validate(recipe, model, val, device)
        seconds = round(time.perf_counter() - begun, 1)
        fitted.history.append({"train_loss": float(np.mean(losses)), "val_loss": val_loss, "seconds": seconds})
        if val_loss <= min(entry["val_loss"] for entry in fitted.history):
            fitted = fitted._replace(best_epoch=epoch)
            best = {key: value.detach().clone() for key, value in module.state_dict().items()}
        if epoch - fitted.best_epoch >= recipe.patience:
            break
    module.load_state_dict(best)
    module.eval().requires_grad_(False)
    return fitted


def _optimizer(recipe: Recipe, module: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with a linear warm-up and a cosine decay; vectors (biases, norms) are not decayed."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    warm = max(1, round(recipe.warmup * steps))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batches(count: int, size: int, generator: np.random.Generator) -> Iterator[Tensor]:
    yield from torch.from_numpy(generator.permutation(count)).split(size)


def _step(module: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, scheduler: Any) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.item()


def predict(model: Model, images: Tensor, device: str, batch_size: int = 64) -> Tensor:
    """Logits (N, K) float32 on the CPU, of images (N, 3, H, W) uint8 at the input size."""
    model.module.eval()
    with torch.no_grad():
        return torch.cat([model.module(model.normalise(part.to(device))).cpu() for part in images.split(batch_size)])


def _validate(recipe: Recipe, model: Model, val: Arrays, device: str) -> float:
    return recipe.loss(predict(model, val.images, device), val.targets).item()


def evaluate(recipe: Recipe, model: Model, split: Arrays, device: str) -> dict[str, float]:
    """The recipe's figures of merit on a split, and its number of images."""
    logits = predict(model, split.images, device).double().numpy()
    return {"images": len(split.images), **recipe.measure(logits, split.targets.numpy())}
