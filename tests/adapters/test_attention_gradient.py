"""Attention times gradient against the definitions, image by image, with full matrices."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from explainer_bench import RequestError

from .written_out import KINDS, Step, images, make, read_rows, run

TARGETS = (1, 4)


def gradients(scalar: Tensor, at: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar, list(at), retain_graph=True)


def unit(step: Step) -> Tensor:
    return torch.eye(step.attention.shape[-1], dtype=torch.double)


def min_max(scores: Tensor) -> Tensor:
    return torch.nan_to_num((scores - scores.min()) / (scores.max() - scores.min()))  # 0 where nothing is positive


def gae(model: VisionTransformer, image: Tensor, target: int) -> Tensor:
    logits, steps = run(model, image)
    relevance = unit(steps[0])
    for step, gradient in zip(steps, gradients(logits[target], [s.attention for s in steps]), strict=True):
        relevance = relevance + (step.attention * gradient).clamp(min=0).mean(0) @ relevance
    return relevance[read_rows(model)].mean(0)


def gradcam(model: VisionTransformer, image: Tensor, target: int) -> Tensor:
    logits, steps = run(model, image)
    (gradient,) = gradients(logits[target], [steps[-1].attention])
    rows, total = read_rows(model), 0
    for attention, slope in zip(steps[-1].attention, gradient, strict=True):
        total = total + attention[rows].mean(0) * slope[rows].mean(0)[model.num_prefix_tokens :].mean()
    scores = (total / len(gradient)).clamp(min=0)[model.num_prefix_tokens :]
    return torch.cat([torch.zeros(model.num_prefix_tokens), min_max(scores)])


def legrad(model: VisionTransformer, image: Tensor, target: int, mean: bool = False, start: int = 0) -> Tensor:
    _, steps = run(model, image)
    total = torch.zeros(steps[0].attention.shape[-1])
    for step in steps[start:]:
        tokens = step.output.mean(1, keepdim=True).repeat(1, len(total), 1) if mean else step.output
        logit = model.forward_head(model.norm(tokens))[0, target]
        total = total + gradients(logit, [step.attention])[0].clamp(min=0).mean(0).mean(0)
    scores = total[model.num_prefix_tokens :]
    return torch.cat([torch.zeros(model.num_prefix_tokens), min_max(scores)])


def attention_guided_cam(model: VisionTransformer, image: Tensor, target: int) -> Tensor:
    logits, steps = run(model, image, cut=True)
    total = 0
    for step, gradient in zip(steps, gradients(logits[target], [s.attention for s in steps]), strict=True):
        total = total + (gradient.clamp(min=0) * step.scores.sigmoid()).sum(0)
    return total[read_rows(model)].mean(0)


def attcat(model: VisionTransformer, image: Tensor, target: int) -> Tensor:
    logits, steps = run(model, image)
    total = 0
    for step, gradient in zip(steps, gradients(logits[target], [s.tokens for s in steps]), strict=True):
        total = total + (step.tokens * gradient)[0].sum(-1) * step.attention.mean(0).mean(0)
    return total


def integrated(model: VisionTransformer, image: Tensor, target: int, count: int) -> Tensor:
    total = 0
    for alpha in np.linspace(0, 1, count):
        logits, steps = run(model, image * alpha)
        total = total + gradients(logits[target], [steps[-1].attention])[0]
    return (total / count).clamp(min=0).mean(0)


def transition(model: VisionTransformer, image: Tensor, target: int, start: int, count: int) -> Tensor:
    _, steps = run(model, image)
    state = steps[-1].attention.mean(0)
    for step in reversed(steps[start:-1]):
        state = state @ step.attention.mean(0) + state
    return (state * integrated(model, image, target, count))[read_rows(model)].mean(0)


def bidirectional(model: VisionTransformer, image: Tensor, target: int, start: int, count: int, level: str) -> Tensor:
    logits, steps = run(model, image)
    slopes = gradients(logits[target], [s.attention for s in steps])
    perception = unit(steps[0])
    for step, gradient in list(zip(steps, slopes, strict=True))[start:]:
        if level == "token":
            value = step.value.transpose(0, 1).flatten(1) @ step.block.attn.proj.weight.T
            stretch = step.block.ls1(value).norm(dim=-1) / step.tokens[0].norm(dim=-1)
            mixing = step.attention.mean(0) @ torch.diag(stretch)
        else:
            weights = torch.stack([(a.T @ g).abs().mean() for a, g in zip(step.attention, gradient, strict=True)])
            mixing = sum(w / weights.sum() * a for w, a in zip(weights, step.attention, strict=True))
        perception = perception + mixing @ perception
    return (perception.abs() * integrated(model, image, target, count))[read_rows(model)].mean(0)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "gae": gae,
    "gradcam_attention": gradcam,
    "legrad": legrad,
    "legrad[pool=mean,start_layer=1]": lambda *args: legrad(*args, mean=True, start=1),
    "attention_guided_cam": attention_guided_cam,
    "attcat": attcat,
    "transition_attention[steps=3]": lambda *args: transition(*args, start=2, count=3),
    "transition_attention[steps=2,start_layer=0]": lambda *args: transition(*args, start=0, count=2),
    "bidirectional[steps=3]": lambda *args: bidirectional(*args, start=2, count=3, level="token"),
    "bidirectional[steps=2,start_layer=1]": lambda *args: bidirectional(*args, start=1, count=2, level="token"),
    "bidirectional[steps=2,level=head,start_layer=0]": lambda *args: bidirectional(
        *args, start=0, count=2, level="head"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", REFERENCES)
def test_equals_its_definition(kind: str, spec: str) -> None:
    model = make(kind)
    pairs = list(zip(images(model), TARGETS, strict=True))
    expected = torch.stack([REFERENCES[spec](model, *pair) for pair in pairs])[:, model.num_prefix_tokens :]
    maps = adapters.get(spec).explain(model, images(model), TARGETS).flatten(1)
    assert expected.abs().max() > 0
    np.testing.assert_allclose(maps, expected.detach(), rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("spec", "start"), [("transition_attention", 4), ("bidirectional", 5), ("bidirectional[level=head]", 3)]
)
def test_starts_where_the_authors_do_if_there_are_that_many_blocks(spec: str, start: int) -> None:
    method = adapters.get(spec)
    assert method.start(make("plain", depth=7)) == start
    assert method.start(make("plain", depth=2)) == 1
    with pytest.raises(RequestError, match="none for start_layer=2"):
        adapters.get(spec.partition("[")[0], start_layer=2).explain(
            make("plain", depth=2), torch.rand(1, 3, 32, 32), [0]
        )


@pytest.mark.parametrize("name", ["gradcam_attention", "legrad"])
def test_where_nothing_matters_the_map_is_0(name: str) -> None:
    model = make("plain")
    nn.init.zeros_(model.head.weight)
    assert adapters.get(name).explain(model, images(model), TARGETS).eq(0).all()


def test_legrad_reads_the_logits_of_the_whole_model() -> None:
    model = make("plain")
    flipped = nn.Sequential(model, nn.Linear(5, 5, bias=False).double())
    flipped[1].weight.data = torch.eye(5).double().flip(0)
    maps = adapters.get("legrad").explain(flipped, images(model), (3, 0))
    assert torch.equal(maps, adapters.get("legrad").explain(model, images(model), TARGETS))


def test_a_path_needs_both_ends() -> None:
    with pytest.raises(RequestError, match="greater than or equal to 2"):
        adapters.get("transition_attention", steps=1)
