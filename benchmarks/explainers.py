"""What explainers cost, in forward equivalents (FE): time per image over that of a forward pass of the same model.

The forward pass is a float32 one in a batch of 8, measured right before and after each explainer in the same run, so
that a busy machine slows both. On the CPU time is that of all threads together, which other processes do not change.

    python benchmarks/explainers.py                                        # every explainer, as a Markdown table
    python benchmarks/explainers.py --explainers cdam,gae --model vit_base_patch16_224
    python benchmarks/explainers.py --together                             # single passes one by one, and shared
    python benchmarks/explainers.py --memory --model vit_base_patch16_224  # peak memory, a process for each
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import pandas as pd
import timm
import torch
import typer
from torch import Tensor, nn

import adapters
from adapters import Explainer
from adapters.recording import explain_together, shareable
from explainer_bench import split_specs

BATCH = 8
SLOW = 20  # passes per image, from which on one image and one repeat must do
SHARED = ["raw_attention", "rollout", "gradcam", "cdam", "gae", "saliency", "input_x_gradient"]


def now(device: torch.device) -> float:
    """Seconds: of this process's threads on the CPU, of the wall clock on CUDA."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class Bench:
    """A model, a batch, and a clock.

    Parameters
    ----------
    architecture : str
        A timm name; weights are random, which costs as much as trained ones.
    device : str
        Where it runs.
    """

    def __init__(self, architecture: str, device: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = timm.create_model(architecture, num_classes=1000).eval().requires_grad_(False).to(self.device)
        size = self.model.pretrained_cfg["input_size"][1:]
        self.inputs = torch.randn(BATCH, 3, *size).to(self.device)
        self.targets = torch.arange(BATCH)

    def seconds(self, work: Callable[[], object]) -> float:
        """Time one call."""
        start = now(self.device)
        work()
        return now(self.device) - start

    def forward(self) -> None:
        """Run the unit of all costs, on the whole batch."""
        with torch.no_grad():
            self.model(self.inputs)

    def explain(self, explainer: Explainer, n: int) -> Tensor:
        """Explain the first n images."""
        context = {"roi_prior": torch.zeros(self.inputs.shape[-2:]), "concept": self.inputs[:2]}
        needed = {name: context[name] for name in explainer.needs}
        return explainer.explain(self.model, self.inputs[:n], self.targets[:n], **needed)

    def equivalents(self, work: Callable[[], object], n: int, repeats: int) -> list[float]:
        """Return the FE per image of explaining n images, once per repeat."""
        found = []
        for _ in range(repeats):
            before, spent, after = self.seconds(self.forward), self.seconds(work), self.seconds(self.forward)
            found.append(spent / n / ((before + after) / 2 / BATCH))
        return found


@contextmanager
def inside(bench: Bench) -> Iterator[list[float]]:
    """Collect the seconds spent in forward passes of the model, or of its parts where they are run alone."""
    spent: list[float] = []
    depth, start = 0, 0.0

    def enter(*_: object) -> None:
        nonlocal depth, start
        if not depth:
            start = now(bench.device)
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            spent.append(now(bench.device) - start)

    parts: list[nn.Module] = [bench.model, *bench.model.children(), *getattr(bench.model, "blocks", [])]
    handles = [part.register_forward_pre_hook(enter) for part in parts]
    handles += [part.register_forward_hook(leave, always_call=True) for part in parts]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def measure(bench: Bench, spec: str, repeats: int) -> dict[str, object]:
    """Return one row of the table."""
    explainer = adapters.get(spec)
    if reason := explainer.supports(bench.model):
        return {"explainer": spec, "note": reason}
    slow = explainer.cost >= SLOW
    n, repeats = (1, 1) if slow else (BATCH, repeats)
    if not slow:
        bench.explain(explainer, n)
    found = bench.equivalents(lambda: bench.explain(explainer, n), n, repeats)
    row = {"explainer": spec, "images": n, "repeats": repeats, "passes": f"{explainer.cost:.4g}"}
    row |= {"FE": f"{statistics.median(found):.2f}", "least": f"{min(found):.2f}", "most": f"{max(found):.2f}"}
    if slow:
        with inside(bench) as spent:
            whole = bench.seconds(lambda: bench.explain(explainer, n))
        row["in forward"] = f"{sum(spent) / whole:.1%}"
    return row


def together(bench: Bench, repeats: int) -> None:
    """Compare the explainers of `SHARED` one by one with all of them at once."""
    explainers = [adapters.get(name) for name in SHARED]
    assert all(shareable(explainer) for explainer in explainers)

    def one_by_one() -> None:
        for explainer in explainers:
            bench.explain(explainer, BATCH)

    def at_once() -> None:
        explain_together(explainers, bench.model, bench.inputs, bench.targets)  # type: ignore[arg-type]

    one_by_one()
    pairs = [
        (bench.equivalents(one_by_one, BATCH, 1)[0], bench.equivalents(at_once, BATCH, 1)[0]) for _ in range(repeats)
    ]
    alone, shared = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{', '.join(SHARED)}: {alone:.2f} FE one by one, {shared:.2f} FE at once, {ratio:.2f} times cheaper")


def peak(model: str, device: str, spec: str) -> str:
    """Return the peak memory of a process of its own that explains one batch."""
    command = [sys.executable, __file__, "--model", model, "--device", device, "--once", spec]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


def once(bench: Bench, spec: str) -> None:
    """Explain a batch, or one image where they are explained one by one, and print the memory.

    Where an explainer only repeats itself, its quick parameters do.
    """
    explainer = adapters.get(spec)
    if explainer.cost >= SLOW:
        explainer = adapters.quick(spec)
    if reason := explainer.supports(bench.model):
        print(reason)
        return
    alone = explainer.stochastic or explainer.batch_size == 1
    bench.explain(explainer, 1 if alone else BATCH)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if bench.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(bench.device) / 2**30
    print(f"{used:.2f} GiB ({explainer.spec})")


def main(
    explainers: Annotated[str, typer.Option(help="Specs; every explainer by default.")] = "",
    model: Annotated[str, typer.Option(help="A timm architecture.")] = "vit_tiny_patch16_224",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="On the CPU.")] = 1,
    repeats: Annotated[int, typer.Option(help="Of what is fast.")] = 5,
    compare: Annotated[bool, typer.Option("--together", help="Compare single passes with shared ones.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory instead of time.")] = False,
    only: Annotated[str, typer.Option("--once", hidden=True)] = "",
) -> None:
    """Measure what explainers cost."""
    torch.set_num_threads(threads)
    specs = split_specs(explainers) or [name for name, cls in adapters.registry.classes.items() if not cls.trivial]
    if memory:
        for spec in specs:
            print(f"| {spec} | {peak(model, device, spec)} |", flush=True)
        return
    bench = Bench(model, device)
    if only:
        once(bench, only)
        return
    print(f"{model}, {device}, {threads} threads, batch {BATCH}, torch {torch.__version__}\n", flush=True)
    bench.forward()
    if compare:
        together(bench, repeats)
        return
    rows = []
    for spec in specs:
        rows.append(measure(bench, spec, repeats))
        print(rows[-1], file=sys.stderr, flush=True)
    print(pd.DataFrame(rows, dtype=object).fillna("").to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
