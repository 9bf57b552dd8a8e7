"""The loop that trains: images in, a model at its best epoch out; after any epoch it can be stopped and gone on with.

Whatever is random follows from the seed and, for the order and for dropout, the epoch, and for the variation of an
image also its id. So nothing depends on how images are read, and an epoch can be begun again.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.datasets.base import Dataset, Item, Sample
from bench.models import Model
from bench.precision import full_precision
from bench.recipes import Recipe
from bench.training import augmentation
from explainer_bench import RequestError, write_atomically

Progress = Callable[[int, int, str], None]
Tell = Callable[[str], None]
IN_MEMORY = 4 * 2**30  # bytes of a split's images, beyond which they are read batch by batch
WAY_OUT = "give another --out, or --fresh to start anew"


class Fit(NamedTuple):
    """What the loop found: the best epoch (from 1), and of each epoch the losses, the last rate and the seconds."""

    best_epoch: int
    history: list[dict[str, float]]


class Split(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples as uint8 images (3, H, W) at the model's input size and what the recipe's loss wants to know of them.

    They are read when asked for; after `keep`, from memory.

    Parameters
    ----------
    recipe, dataset, samples, model
        What reads them.
    workers : int
        Processes that read; 0 reads in this one.
    values : ndarray, optional
        (N, K) float32: what a regression learns.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        samples: list[Sample],
        model: Model,
        workers: int = 0,
        values: np.ndarray | None = None,
    ) -> None:
        self.recipe, self.samples, self.workers, self.values = recipe, samples, workers, values
        self._dataset, self._resize = dataset, model.resize
        self._kept: tuple[Tensor, Tensor] | None = None
        self.classes = len(dataset.class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        sample = self.samples[row]
        item = self._dataset.load(sample)
        image = np.ascontiguousarray(self._resize(item.image).transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(self._target(row, sample, item))

    def _target(self, row: int, sample: Sample, item: Item) -> np.ndarray:
        """Its class, the presence of every class (K,), or its values (K,)."""
        if self.values is not None:
            return self.values[row]
        if self.recipe.loss == "bce":
            return np.isin(np.arange(self.classes), [sample.label, *item.roi]).astype(np.float32)
        return np.array(sample.label)

    def keep(self) -> None:
        """Read everything into memory."""
        rows = torch.arange(len(self)).split(64)
        images, targets = zip(*self.batches(rows), strict=True)
        self._kept = torch.cat(images), torch.cat(targets)

    def batches(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, 3, H, W) uint8 and targets (B, ...) for each batch of rows."""
        if self._kept:
            images, targets = self._kept
            yield from ((images[part], targets[part]) for part in rows)
            return
        # A generator of its own: the loader would draw from the global one, which dropout uses.
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=[part.tolist() for part in rows], num_workers=self.workers, generator=torch.Generator()
        )
        try:
            yield from ((images, targets) for images, targets in loader)
        except RequestError as error:  # from a worker it comes with that one's traceback
            raise RequestError(
                str(error).strip().splitlines()[-1].partition("RequestError: ")[2] or str(error)
            ) from None


class State:
    """How far a training is, on disk: written whole after every epoch, removed at the end.

    Parameters
    ----------
    path : Path
        The file.
    request : dict
        Everything that the final weights follow from.
    """

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path, self.request = path, json.loads(json.dumps(request))
        self.epochs = 0  # that a later call need not train again

    def load(self) -> dict[str, Any] | None:
        """Return what was saved; None where there is nothing.

        Raises
        ------
        RequestError
            Where the file is of another request, or none of ours.
        """
        if not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            found = json.loads(content["request"])
        except Exception as error:  # the unpickler lets any kind through on rubbish
            raise RequestError(f"{self.path} is no state of a training: {WAY_OUT}.") from error
        check_same(self.path, found, self.request)
        self.epochs = len(content["history"])
        return content

    def save(self, content: dict[str, Any]) -> None:
        """Replace what was saved."""
        buffer = io.BytesIO()
        torch.save({**content, "request": json.dumps(self.request)}, buffer)
        write_atomically(self.path, buffer.getvalue())
        self.epochs = len(content["history"])

    def remove(self) -> None:
        """Forget what was saved."""
        self.path.unlink(missing_ok=True)


def check_same(path: Path, found: dict[str, Any], request: dict[str, Any]) -> None:
    """Refuse what `path` holds where it is of another request, both as JSON has them."""
    if found != request:
        what, had, has = _first_difference(found, request)
        raise RequestError(f"{path} is of a training with {what} {had}, not {has}: {WAY_OUT}.")


def _first_difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any]:
    """Name the innermost entry in which two nested dicts differ, with both values."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return name, one, other
    key = next(key for key in [*other, *one] if one.get(key) != other.get(key))
    return _first_difference(one.get(key), other.get(key), str(key) if name in ("", "params") else f"{name} {key}")


def _silent(*_: Any) -> None:
    pass


def fit(
    recipe: Recipe,
    model: Model,
    train: Split,
    val: Split,
    device: str,
    seed: int,
    progress: Progress | None = None,
    begin: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = _silent,
    tell: Tell = _silent,
) -> Fit:
    """Train `model` in place and leave it with the weights of the epoch of least validation loss, frozen.

    Parameters
    ----------
    recipe, model, train, val, device, seed, progress
        As for `train`.
    begin : dict, optional
        What `save` was given last, to go on from there.
    save : callable
        Given everything that the rest of the training follows from, after every epoch.
    tell : callable
        Given a line on every epoch.
    """
    with _deterministic(device):
        learner = Learner(recipe, model, train, device, seed)
        if begin:
            learner.restore(begin)
        while not learner.finished:
            learner.advance(val, progress or _silent)
            save(learner.state())
            tell(learner.line)
        model.module.load_state_dict(learner.best)
    model.module.eval().requires_grad_(False)
    return Fit(learner.best_epoch, learner.history)


class Learner:
    """A model, its optimiser, and how far they are.

    Parameters
    ----------
    recipe, model, train, device, seed
        As for `fit`.
    """

    def __init__(self, recipe: Recipe, model: Model, train: Split, device: str, seed: int) -> None:
        self.recipe, self.model, self.train, self.device, self.seed = recipe, model, train, device, seed
        self.module = model.module.to(device).requires_grad_(False)
        self.trained: nn.Module = self.module
        if recipe.freeze_backbone:
            self.trained = self.module.get_classifier()  # type: ignore[operator]
        self.trained.requires_grad_(True)
        _set_dropout(self.module, recipe)
        self.optimizer = _optimizer(recipe, self.trained)
        self.weight = _class_weights(train).to(device) if recipe.class_weights else None
        self.steps_per_epoch = math.ceil(len(train) / recipe.batch_size)
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """Everything that the rest follows from."""
        weights = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        return {**weights, "best_epoch": self.best_epoch, "history": self.history}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_epoch, self.history = state["best"], state["best_epoch"], state["history"]

    @property
    def finished(self) -> bool:
        """Whether the epochs, or the patience, are used up."""
        stalled = len(self.history) - self.best_epoch
        patience = self.recipe.patience
        return len(self.history) >= self.recipe.epochs or (patience is not None and stalled >= patience)

    @property
    def line(self) -> str:
        """What the last epoch came to."""
        last = self.history[-1]
        losses = f"train loss {last['train_loss']:.4f}, val loss {last['val_loss']:.4f}"
        return f"epoch {len(self.history)} of {self.recipe.epochs}: {losses}, {last['seconds']:.1f} s"

    def advance(self, val: Split, progress: Progress) -> None:
        """Train for one epoch, validate, and keep the weights if they are the best so far."""
        begun = time.perf_counter()
        epoch = len(self.history) + 1
        with seeded(_mix(self.seed, epoch)):
            losses = list(self._epoch(epoch, progress))
        entry = {"train_loss": float(np.mean(losses)), "val_loss": self.validate(val)}
        if not all(map(math.isfinite, entry.values())):
            raise RequestError(
                f"the loss is not finite in epoch {epoch}: take a smaller lr than {self.recipe.lr:g}, with --fresh."
            )
        entry |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(time.perf_counter() - begun, 1)}
        self.history.append(entry)
        if entry["val_loss"] <= min(past["val_loss"] for past in self.history):
            self.best_epoch = epoch
            self.best = {key: value.detach().clone() for key, value in self.module.state_dict().items()}

    def validate(self, val: Split) -> float:
        """The mean loss on a split."""
        outputs, targets = predict(self.model, val, self.device)
        weight = None if self.weight is None else self.weight.cpu()
        return loss_of(self.recipe, outputs, targets, weight).item()

    def _epoch(self, epoch: int, progress: Progress) -> Iterator[float]:
        """Yield the mean loss of each step."""
        self.module.train(not self.recipe.freeze_backbone)
        self.trained.train()
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.train)))
        rows = order.split(self.recipe.batch_size)
        for i, (images, targets) in enumerate(self.train.batches(rows)):
            step = (epoch - 1) * self.steps_per_epoch + i
            ids = [self.train.samples[row].id for row in rows[i].tolist()]
            loss = self._step(images, targets, augmentation.draws(ids, self.seed, epoch), step)
            progress(step + 1, self.recipe.epochs * self.steps_per_epoch, f"epoch {epoch}, loss {loss:.3f}")
            yield loss

    def _step(self, images: Tensor, targets: Tensor, uniform: np.ndarray, step: int) -> float:
        varied = augmentation.vary(images.to(self.device), self.recipe.augment, uniform)
        inputs = self.model.normalise(varied)
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            outputs = self.module(inputs)
        loss = loss_of(self.recipe, outputs.float(), targets.to(self.device), self.weight, self.recipe.reduction)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate(self.recipe, step, self.recipe.epochs * self.steps_per_epoch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.item() / (len(images) if self.recipe.reduction == "sum" else 1)


def _mix(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed`, and leave PyTorch's global random states as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On CUDA, take deterministic algorithms wherever PyTorch has one; on the CPU they are."""
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _set_dropout(module: nn.Module, recipe: Recipe) -> None:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    if recipe.dropout and not layers:
        raise RequestError(f"{recipe.architecture} has no dropout layers: leave dropout out of recipe {recipe.name}.")
    for layer in layers if recipe.dropout else []:
        layer.p = recipe.dropout


def _optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {
            "params": [p for p in module.parameters() if p.ndim <= 1],
            "weight_decay": recipe.weight_decay if recipe.decay_vectors else 0.0,
        },
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of a step (from 0) of `steps`, as a share of the recipe's `lr`."""
    warm = min(1.0, (step + 1) / max(1, round(recipe.warmup * steps)))
    if recipe.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    if recipe.schedule == "cyclic":
        cycle, place = divmod(recipe.cycles * step / steps, 1)
        low = 1 / recipe.lr_divisor
        return low + (1 - low) * (1 - abs(2 * place - 1)) / 2**cycle
    return warm


def _class_weights(train: Split) -> Tensor:
    """(K,) float32, inverse to the classes' frequency; 1 for a class as frequent as the average, 0 for none."""
    counts = np.bincount([sample.label for sample in train.samples], minlength=train.classes)
    return torch.tensor(np.divide(counts.mean(), counts, out=np.zeros(len(counts)), where=counts > 0)).float()


def loss_of(
    recipe: Recipe, outputs: Tensor, targets: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """The recipe's loss of outputs (B, K) against targets (B,) or (B, K), a scalar."""
    if recipe.loss == "cross_entropy":
        return F.cross_entropy(outputs, targets, weight=weight, reduction=reduction)
    if recipe.loss == "bce":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)
    return F.huber_loss(outputs, targets, reduction=reduction)


def predict(model: Model, split: Split, device: str, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Outputs (N, K) float32 and targets (N,) or (N, K) of a split, on the CPU."""
    model.module.eval()
    rows = torch.arange(len(split)).split(batch_size)
    outputs, known = [], []
    with torch.no_grad(), full_precision():
        for images, targets in split.batches(rows):
            outputs.append(model.module(model.normalise(images.to(device))).cpu())
            known.append(targets)
    return torch.cat(outputs), torch.cat(known)
