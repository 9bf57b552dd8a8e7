"""CDAM and its variants against the whole model, run forward and backward once per copy, and their identities."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from adapters import vit
from adapters.cdam import concept_latent
from adapters.state import seeded
from explainer_bench import RequestError

from .written_out import KINDS, images, make, run

Change = Callable[[Tensor], Tensor]


def same(tokens: Tensor) -> Tensor:
    return tokens


def naive(
    model: VisionTransformer, image: Tensor, score: Change, before: Change = same, after: Change = same
) -> Tensor:
    """CDAM of ``score(output)``, the last block's input changed by `before`, its first norm's output by `after`."""
    block, seen = model.blocks[-1], []
    handles = [
        block.register_forward_pre_hook(lambda _, args: (before(args[0]),)),
        block.norm1.register_forward_hook(
            lambda *args: seen.append(after(args[2]).detach().requires_grad_()) or seen[0]
        ),
    ]
    try:
        (gradient,) = torch.autograd.grad(score(model(image[None])), seen)
    finally:
        for handle in handles:
            handle.remove()
    return (seen[0] * gradient)[0].sum(-1).detach()[model.num_prefix_tokens :]


def logit(target: int) -> Change:
    return lambda logits: logits[0, target]


def explain(spec: str, model: nn.Module, n: int = 2, targets: tuple[int, ...] = (1, 4), **context: Tensor) -> Tensor:
    return adapters.get(spec).explain(model, images(model), targets[:n], **context).flatten(1)


def close(maps: Tensor, expected: list[Tensor], tolerance: float = 1e-6) -> None:
    reference = torch.stack(expected).detach()
    np.testing.assert_allclose(maps, reference, rtol=1e-5, atol=tolerance * reference.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_cdam_is_token_times_gradient(kind: str) -> None:
    model = make(kind)
    close(explain("cdam", model), [naive(model, x, logit(t)) for x, t in zip(images(model), (1, 4), strict=True)])


def draws(image: Tensor, tokens: Tensor, count: int) -> list[Tensor]:
    """The noise of an image's copies, which are drawn ten at a time."""
    with seeded(image, 0):
        parts = [torch.randn(min(10, count - i), *tokens.shape, dtype=tokens.dtype) for i in range(0, count, 10)]
    return list(torch.cat(parts))


def repeated(
    model: VisionTransformer, image: Tensor, target: int, at: str, scales: list[float], level: float
) -> Tensor:
    tokens = run(model, image)[1][-1].tokens[0].detach()
    origin = tokens if at == "block_input" else model.blocks[-1].norm1(tokens).detach()
    deviation = level * (origin.max() - origin.min())
    total = torch.zeros(())
    for scale, noise in zip(scales, draws(image, tokens, len(scales)), strict=True):
        change = {"before" if at == "block_input" else "after": partial(_perturb, scale, deviation * noise)}
        total = total + naive(model, image, logit(target), **change)
    return total / len(scales)


def _perturb(scale: float, noise: Tensor, tokens: Tensor) -> Tensor:
    return scale * tokens + noise


COPIES = {
    "smooth_cdam[samples=13]": ("block_input", [1.0] * 13, 0.05),
    "smooth_cdam[samples=3,at=norm1,noise=0.2]": ("norm1", [1.0] * 3, 0.2),
    "integrated_cdam[steps=12]": ("block_input", [k / 12 for k in range(1, 12)], 0.0),
    "integrated_cdam[steps=4,noise=0.1]": ("block_input", [k / 4 for k in range(1, 4)], 0.1),
    "integrated_cdam[steps=4,at=norm1]": ("norm1", [k / 4 for k in range(5)], 0.05),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", COPIES)
def test_copies_of_the_last_block_are_copies_of_the_whole_model(kind: str, spec: str) -> None:
    model = make(kind)
    pairs = zip(images(model), (1, 4), strict=True)
    close(explain(spec, model), [repeated(model, *pair, *COPIES[spec]) for pair in pairs])


@pytest.mark.parametrize(
    ("spec", "copies", "stochastic"),
    [
        ("smooth_cdam", 50, True),
        ("smooth_cdam[at=norm1]", 50, True),
        ("integrated_cdam", 49, False),
        ("integrated_cdam[at=norm1]", 51, True),
        ("integrated_cdam[at=norm1,noise=0]", 51, False),
    ],
)
def test_defaults_are_the_released_ones(spec: str, copies: int, stochastic: bool) -> None:
    method = adapters.get(spec)
    assert len(method.scales()) == copies
    assert method.stochastic == stochastic
    assert method.level == (0.05 if stochastic else 0)


def test_without_noise_smooth_cdam_is_cdam() -> None:
    model = make("plain")
    for at in ("block_input", "norm1"):
        np.testing.assert_allclose(explain(f"smooth_cdam[noise=0,at={at}]", model), explain("cdam", model), rtol=1e-4)


def test_classes_of_an_image_see_the_same_noise() -> None:
    model = make("plain")
    weight, bias = model.head.weight.data, model.head.bias.data
    weight[2], bias[2] = weight[0] + weight[1], bias[0] + bias[1]
    first, second, both = (explain("smooth_cdam[samples=4]", model, targets=(c, c)) for c in range(3))
    np.testing.assert_allclose(both, first + second, rtol=1e-4, atol=1e-5 * both.abs().max().item())


def test_integrated_cdam_scales_the_skip_connection_and_little_else() -> None:
    """LN(a x) = LN(x): with the normalised tokens held fast, the map hardly changes."""
    model, steps = make("plain"), 5
    expected = []
    for image, target in zip(images(model), (1, 4), strict=True):
        fixed = model.blocks[-1].norm1(run(model, image)[1][-1].tokens).detach()
        maps = [
            naive(model, image, logit(target), partial(_perturb, k / steps, torch.zeros(())), lambda _, x=fixed: x)
            for k in range(1, steps)
        ]
        expected.append(torch.stack(maps).mean(0))
    close(explain(f"integrated_cdam[steps={steps}]", model), expected, tolerance=1e-4)


@pytest.mark.parametrize("spec", ["cdam", "smooth_cdam[samples=3]", "integrated_cdam[steps=3]"])
def test_tokens_that_the_class_token_does_not_attend_to_score_0(spec: str) -> None:
    model = make("plain")
    mask = torch.zeros(17, 17, dtype=torch.double)
    mask[0, [1, 6, 16]] = -torch.inf
    layer = model.blocks[-1].attn
    layer.forward = lambda normed, forward=layer.forward, **_: forward(normed, attn_mask=mask)
    layer.gate = nn.Linear(32, 32).double()  # so that the layer itself runs, and the mask with it
    maps = explain(spec, model)
    assert maps[:, [0, 5, 15]].eq(0).all()
    assert maps[:, [1, 2, 3, 4]].ne(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cdam_sums_to_the_derivative_along_the_tokens(kind: str) -> None:
    model = make(kind)

    def along(factor: float) -> Tensor:
        def stretch(*args: Tensor) -> Tensor:
            return torch.cat([args[2][:, : model.num_prefix_tokens], factor * args[2][:, model.num_prefix_tokens :]], 1)

        handle = model.blocks[-1].norm1.register_forward_hook(stretch)
        with torch.no_grad():
            logits = model(images(model))
        handle.remove()
        return logits.gather(1, torch.tensor([[1], [4]]))[:, 0]

    derivative = (along(1 + 1e-5) - along(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(explain("cdam", model).sum(1), derivative, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"scale_attn_norm": True}, {"init_values": 0.1}]
)
def test_the_last_block_equals_the_block_at_what_the_head_reads(kind: str, changes: dict[str, object]) -> None:
    if kind == "distilled" and changes:
        pytest.skip("one distilled model is enough")
    model = make(kind, **changes).requires_grad_(False)
    block, tokens = model.blocks[-1], torch.rand(2, 40, 32).double()
    normed = (block.norm1(tokens) + torch.rand_like(tokens)).requires_grad_()
    replaced = block.norm1.register_forward_hook(lambda *_: normed)
    full = block(tokens)
    replaced.remove()
    short, weight = vit.last_block(model, tokens, normed), torch.rand(40, 32).double()
    read = vit.read_tokens(model, tokens[..., 0])
    torch.testing.assert_close(short[:, read], full[:, read])
    slopes = [torch.autograd.grad((x[:, read] * weight[read]).sum(), normed)[0] for x in (short, full)]
    torch.testing.assert_close(*slopes)


def test_without_keys_and_values_of_all_tokens_where_the_head_reads_one() -> None:
    """Should every layer fall back to the whole block, nothing but the time would show it."""
    for kind, whole in (("plain", False), ("five_prefix", False), ("distilled", False), ("mean_pooled", True)):
        model, calls = make(kind), []
        model.blocks[-1].attn.qkv.register_forward_hook(lambda *_, to=calls: to.append(1))
        explain("smooth_cdam[samples=30]", model)
        assert len(calls) == (2 * (1 + 3) if whole else 2)  # two images, each seen once and in three chunks


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_resumes_from_its_last_blocks_output(kind: str) -> None:
    model = make(kind)
    inside = nn.Sequential(nn.ReLU(), model, nn.Linear(5, 5).double())
    tokens = torch.cat([run(model, image.relu())[1][-1].output for image in images(model)])
    torch.testing.assert_close(vit.resume(inside, images(model), tokens), inside(images(model)))
    assert "forward_features" not in vars(model)


@pytest.mark.parametrize("kind", KINDS)
def test_concept_cdam_is_cdam_of_the_dot_product(kind: str) -> None:
    model = make(kind)
    concept = images(model, 13)[2:]
    with torch.no_grad():
        mean = torch.stack([model.forward_head(model.forward_features(x[None]), pre_logits=True)[0] for x in concept])
        mean = mean.mean(0)
    torch.testing.assert_close(concept_latent(model.requires_grad_(False), concept), mean)

    expected = []
    for image in images(model):
        latent: list[Tensor] = []
        handle = model.norm.register_forward_hook(lambda *args, to=latent: to.append(args[2]))
        expected.append(naive(model, image, lambda _, x=latent: (model.forward_head(x[0], pre_logits=True) @ mean)[0]))
        handle.remove()
    close(explain("concept_cdam", model, concept=concept), expected)


def test_concept_images_come_from_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (4, 4), {"b.png": "red", "a.JPG": "blue"}[name]).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    method = adapters.get(f"concept_cdam[folder={tmp_path}]")
    assert [file.name for file in method.files()] == ["a.JPG", "b.png"]
    before = method.fingerprint()
    Image.new("RGB", (4, 4), "green").save(tmp_path / "b.png")
    assert method.fingerprint() != before
    assert adapters.get("concept_cdam").files() == []
    for folder in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(RequestError, match="finds no images in"):
            adapters.get("concept_cdam", folder=tmp_path / folder).files()
