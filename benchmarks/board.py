"""A board's perturbation metrics against Quantus: the same maps, images, model and threads, in one run.

Quantus is called as its users do, once per explainer and metric; it shares nothing, so its cost for E explainers is E
times that for one, and is measured on ``--quantus-explainers`` of them. The maps are averaged over the model's patches,
so that both sides remove the same 196 patches. Printed are: the cost of either side in processor time, the share of
ours that is spent inside the model, what 28 steps and bfloat16 change, and how the number of passes grows.

    python benchmarks/board.py --weights vit_tiny_patch16_224.safetensors --images FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import quantus
import scipy.integrate
import scipy.stats
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
import metrics
from metrics import Metric, Samples
from metrics.perturbation import passes, prefetch

EXPLAINERS = [
    "raw_attention",
    "gae",
    "cdam",
    "gradcam",
    "legrad",
    "rollout",
    "transformer_attribution",
    "saliency",
    "input_x_gradient",
    "random_token",
]
STEPPED = ["pixel_flipping", "region_perturbation", "selectivity", "lerf_auc"]
METRICS = [*STEPPED, "faithfulness_estimate", "faithfulness_correlation_pixels", "infidelity[largest=1]"]
IMPUTER = "black"  # what Quantus does by default
SIDE = 16
SAME = {  # how Quantus's results become the scores of ours that mean the same
    "pixel_flipping": lambda curve: scipy.integrate.trapezoid(curve) / (len(curve) - 1),
    "region_perturbation": np.mean,
    "faithfulness_estimate": float,
}


@dataclass
class Cost:
    """Processor seconds of something, those of them inside the model, and the images that went through it."""

    seconds: float = 0.0
    inside: float = 0.0
    images: int = 0


Run = tuple[pd.DataFrame, Cost, int]  # scores, cost, and for how many images x explainers


@contextmanager
def measured(model: nn.Module, device: torch.device) -> Iterator[Cost]:
    """Measure what happens inside the block; on CUDA the wall clock, with the device waited for."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    cost, starts = Cost(), []

    def enter(*_: object) -> None:
        starts.append(clock())

    def leave(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        cost.inside += clock() - starts.pop()
        cost.images += len(args[0])

    enter.observer = leave.observer = True  # type: ignore[attr-defined]  # they change nothing: see metrics.vit
    handles = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    begin = clock()
    try:
        yield cost
    finally:
        cost.seconds = clock() - begin
        for handle in handles:
            handle.remove()


def main() -> None:
    """Run the comparison."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model("vit_tiny_patch16_224").eval().requires_grad_(False)
    model.load_state_dict(load_file(options.weights))
    model.to(device)
    cells = samples_of(model, load(options.images, options.n).to(device), options.explainers, options.batch_size)
    sizes = f"{options.n} images, {len(cells)} explainers, {len(METRICS)} metrics"
    print(f"{device}, {torch.get_num_threads()} threads, {sizes}")
    exact = run(model, cells, 196, "fp32")
    theirs = run_quantus(model, cells, options) if options.quantus_explainers else None
    report("(a) 196 steps, fp32", exact, theirs, None)
    if options.bf16:
        report("(b) 196 steps, bf16", run(model, cells, 196, "bf16"), theirs, exact)
    for steps in options.steps:
        report(f"(c) {steps} steps, fp32", run(model, cells, steps, "fp32"), theirs, exact)
    growth(cells)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--n", type=int, default=16, help="images")
    parser.add_argument("--explainers", type=int, default=10)
    parser.add_argument("--quantus-explainers", type=int, default=1)
    parser.add_argument("--quantus-images", type=int, default=0, help="fewer, as its cost is linear in them")
    parser.add_argument("--quantus-batch", type=int, default=8, help="the images of one of Quantus's batches")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="*", default=[28])
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def load(folder: Path, n: int) -> Tensor:
    """Return the first n images of a folder (n, 3, 224, 224), scaled to [-1, 1]."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))[:n]
    images = [Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for file in files]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])


def samples_of(model: nn.Module, inputs: Tensor, n: int, batch_size: int) -> dict[str, Samples]:
    """Return the samples of each explainer, their maps averaged over patches."""
    with torch.no_grad():
        logits = model(inputs).double().cpu().numpy()
    targets, cells = logits.argmax(1), {}
    for name in EXPLAINERS[:n]:
        maps = adapters.get(name)(model, inputs, targets).astype(float)[:, 0]
        tokens = maps.reshape(len(maps), 14, SIDE, 14, SIDE).mean((2, 4))
        cells[name] = Samples(
            model=model,
            inputs=inputs,
            targets=targets,
            maps=np.kron(tokens, np.ones((SIDE, SIDE))),
            roi=np.ones(maps.shape, dtype=bool),
            logits=logits,
            seeds=np.arange(len(maps), dtype=np.uint32),
            patch=(SIDE, SIDE),
            batch_size=batch_size,
        )
    return cells


def scorers(steps: int) -> list[Metric]:
    """Return the metrics, those that walk along a curve with that many steps."""
    stepped = [metrics.get(name, steps=steps, imputer=IMPUTER, output="probability") for name in STEPPED]
    return stepped + [metrics.get(name, imputer=IMPUTER) for name in METRICS[len(STEPPED) :]]


def run(model: nn.Module, cells: dict[str, Samples], steps: int, precision: str) -> Run:
    """Return our scores, one row per explainer x metric x image, their cost, and how many images it is for."""
    shared: dict = {}
    asked = [
        (name, metric, replace(samples, shared=shared, precision=precision))
        for name, samples in cells.items()
        for metric in scorers(steps)
    ]
    n = len(next(iter(cells.values())))
    with measured(model, asked[0][2].inputs.device) as cost:
        prefetch((metric, samples) for _, metric, samples in asked)
        scores = [(name, metric.name, metric(samples).values) for name, metric, samples in asked]
    rows = [
        {"explainer": name, "metric": metric, "image": image, "score": score}
        for name, metric, values in scores
        for image, score in enumerate(values)
    ]
    return pd.DataFrame(rows), cost, n * len(cells)


class _ByPatch:
    """Quantus's metrics of single features, told to remove 768 of them at a time: the scalars of one patch."""

    def custom_preprocess(self, **_: object) -> None:
        """Leave out the check that 768 divides the pixels of one channel."""


class PixelFlipping(_ByPatch, quantus.PixelFlipping):
    """Quantus's."""


class FaithfulnessEstimate(_ByPatch, quantus.FaithfulnessEstimate):
    """Quantus's."""


def theirs_of(name: str) -> tuple[quantus.Metric, bool]:
    """Return the Quantus metric that costs and means what ours does, and whether it reads probabilities."""
    step, quiet = 3 * SIDE * SIDE, {"disable_warnings": True, "return_aggregate": False}
    regions = {"patch_size": SIDE, "regions_evaluation": 196}
    return {
        "pixel_flipping": lambda: (PixelFlipping(features_in_step=step, **quiet), True),
        "region_perturbation": lambda: (quantus.RegionPerturbation(order="morf", **regions, **quiet), True),
        "selectivity": lambda: (quantus.Selectivity(patch_size=SIDE, **quiet), True),
        "lerf_auc": lambda: (quantus.RegionPerturbation(order="lerf", **regions, **quiet), True),
        "faithfulness_estimate": lambda: (FaithfulnessEstimate(features_in_step=step, **quiet), False),
        "faithfulness_correlation_pixels": lambda: (quantus.FaithfulnessCorrelation(normalise=False, **quiet), False),
        "infidelity[largest=1]": lambda: (
            quantus.Infidelity(perturb_patch_sizes=[SIDE], n_perturb_samples=1, **quiet),
            False,
        ),
    }[name]()


def run_quantus(model: nn.Module, cells: dict[str, Samples], options: argparse.Namespace) -> Run:
    """Return Quantus's scores where they mean what ours do, its cost, and for how many images x explainers it is."""
    total, n, rows = Cost(), options.quantus_images or options.n, []
    for name, metric in itertools.product(list(cells)[: options.quantus_explainers], METRICS):
        samples = cells[name]
        quantus_metric, softmax = theirs_of(metric)
        with measured(model, samples.inputs.device) as cost:
            result = quantus_metric(
                model=model,
                x_batch=samples.inputs[:n].cpu().numpy(),
                y_batch=samples.targets[:n],
                a_batch=samples.maps[:n, None].copy(),
                softmax=softmax,
                device=str(samples.inputs.device),
                batch_size=options.quantus_batch,
            )
        print(f"  Quantus, {name}, {metric}: {described(cost, n)}")
        total = Cost(total.seconds + cost.seconds, total.inside + cost.inside, total.images + cost.images)
        if metric in SAME:
            scores = [SAME[metric](np.asarray(of_image)) for of_image in result]
            rows += [{"explainer": name, "metric": metric, "image": i, "score": s} for i, s in enumerate(scores)]
    return pd.DataFrame(rows), total, n * options.quantus_explainers


def described(cost: Cost, n: int) -> str:
    """Return a cost in words, per one of `n` images."""
    share = cost.inside / cost.seconds
    return f"{1000 * cost.seconds / n:.0f} ms and {cost.images / n:.0f} passes per image, {share:.1%} in the model"


def report(title: str, ours: Run, theirs: Run | None, exact: Run | None) -> None:
    """Print the cost of one of our runs against Quantus's, and how far its scores are from the exact ones."""
    scores, cost, n = ours
    print(f"\n{title}, per explainer: {described(cost, n)}")
    if theirs:
        each = theirs[1].seconds / theirs[2]
        print(f"  Quantus, per explainer: {described(theirs[1], theirs[2])}")
        print(f"  Quantus / ours: {each / (cost.seconds / n):.2f}")
    if theirs and not exact:
        print("Ours against Quantus's own numbers:")
        print(changes(scores, theirs[0])[["mean |error|", "max |error|"]].to_string(float_format="%.2e"))
    if exact:
        print(changes(scores, exact[0]).to_string(float_format="%.4f"))


def changes(scores: pd.DataFrame, exact: pd.DataFrame) -> pd.DataFrame:
    """Return per metric how far the scores, their means and the explainers' ranks are from the exact ones."""
    both = scores.merge(exact, on=["explainer", "metric", "image"], suffixes=("", "_exact"))
    both["error"] = (both["score"] - both["score_exact"]).abs()
    rows = {}
    for metric, rows_of in both.groupby("metric"):
        means = rows_of.groupby("explainer")[["score", "score_exact"]].mean()
        ranks = means.rank()
        rows[metric] = {
            "mean |error|": rows_of["error"].mean(),
            "max |error|": rows_of["error"].max(),
            "spread of scores": rows_of["score_exact"].std(),
            "max |error| of a mean": (means["score"] - means["score_exact"]).abs().max(),
            "rank correlation": scipy.stats.spearmanr(means["score"], means["score_exact"]).statistic,
            "ranks changed": float((ranks["score"] != ranks["score_exact"]).sum()),
        }
    return pd.DataFrame(rows).T


class Blind(nn.Module):
    """Looks at nothing: to count passes."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (N, 1000)."""
        return inputs.mean((1, 2, 3))[:, None].expand(-1, 1000)


def growth(cells: dict[str, Samples]) -> None:
    """Print how many images go through the model for more explainers, metrics and images."""
    print("\nPasses, counted on a model that computes nothing:")

    def count(explainers: int, names: list[str], images: int) -> int:
        shared: dict = {}
        chosen = [
            replace(samples.take(np.arange(images)), model=Blind(), shared=shared)
            for samples in list(cells.values())[:explainers]
        ]
        asked = [metric for name, metric in zip(METRICS, scorers(28), strict=True) if name in names]
        for metric, samples in itertools.product(asked, chosen):
            metric(samples)
        return passes(chosen[0]).computed

    n = min(4, len(next(iter(cells.values()))))
    some = min(5, len(cells) - 1)
    base = count(some, METRICS, n)
    print(f"  {some} explainers, {len(METRICS)} metrics, {n} images: {base}")
    print(f"  one more explainer: + {(count(some + 1, METRICS, n) - base) / n:.0f} per image")
    print(f"  one more image: + {base - count(some, METRICS, n - 1)}")
    for name in METRICS:
        others = [other for other in METRICS if other != name]
        print(f"  {name}, after the others: + {(base - count(some, others, n)) / n / some:.1f} per image and explainer")


if __name__ == "__main__":
    main()
