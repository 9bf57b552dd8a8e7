"""One pass for many: the same maps, fewer passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import adapters
from adapters import conformance
from adapters.recording import Recording, SinglePass, explain_together, shareable
from explainer_bench import RequestError

METHODS = [adapters.quick(name) for name in adapters.registry.names()]


def sharing(model: nn.Module, half_precision: bool = True) -> list[SinglePass]:
    return [m for m in METHODS if shareable(m) and not m.supports(model) and m.half_precision == half_precision]  # type: ignore[misc]


def case(name: str) -> conformance.Case:
    return conformance.Case(METHODS[0], conformance.build(name).eval(), conformance.SIZES[name])


@pytest.mark.parametrize(("name", "half_precision"), [*((name, True) for name in conformance.MODELS), ("vit", False)])
def test_maps_explained_together_are_the_same_to_the_last_bit(name: str, half_precision: bool) -> None:
    problem = case(name)
    methods = sharing(problem.model, half_precision)
    assert methods
    together = explain_together(methods, problem.model, problem.inputs, problem.targets)
    for method, maps in zip(methods, together, strict=True):
        assert torch.equal(method.explain(problem.model, problem.inputs, problem.targets), maps), method.spec


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the forward passes, and the backward passes that reach the first and the last block."""
    counts = {"forward": 0, "first": 0, "last": 0}

    def count(what: str) -> object:
        def hook(*_: object) -> None:
            counts[what] += 1

        return hook

    handles = [
        model.register_forward_hook(count("forward")),
        model.blocks[0].mlp.fc1.register_full_backward_hook(count("first")),
        model.blocks[-1].mlp.fc1.register_full_backward_hook(count("last")),
    ]
    yield counts
    for handle in handles:
        handle.remove()


def test_all_of_them_share_one_forward_and_one_backward() -> None:
    problem = case("vit")
    own = {"legrad", "attention_guided_cam"}  # their gradients are others: they walk back through every block once more
    methods = [m for m in sharing(problem.model) if m.name not in own]
    assert len(methods) >= 7
    with counted(problem.model) as counts:
        explain_together(methods, problem.model, problem.inputs, problem.targets)
    assert counts == {"forward": 1, "first": 1, "last": 1}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("rollout", 0, 0), ("raw_attention", 0, 0), ("cdam", 0, 1), ("gradcam", 0, 1), ("gae", 1, 1)],
)
def test_the_graph_starts_no_earlier_than_it_must(name: str, first: int, last: int) -> None:
    problem = case("vit")
    with counted(problem.model) as counts:
        adapters.get(name).explain(problem.model, problem.inputs, problem.targets)
    assert counts == {"forward": 1, "first": first, "last": last}


class InPlace(nn.Module):
    """Overwrites what its convolution returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.conv(inputs)).mean((2, 3)))


@pytest.mark.parametrize("of_image", [False, True])
def test_what_is_recorded_survives_work_in_place(of_image: bool) -> None:
    model = InPlace().requires_grad_(False)
    inputs, targets = torch.rand(2, 3, 8, 8, requires_grad=True), torch.tensor([0, 4])
    seen = Recording(model, inputs, targets, [model.conv], [model.conv], of_image)
    before = model.conv(inputs)
    assert torch.equal(seen.output(model.conv), before)
    assert torch.equal(seen.input(model.conv), inputs)
    expected = model.head.weight[targets][:, :, None, None] / 36 * (before > 0)
    torch.testing.assert_close(seen.gradient(model.conv), expected)
    if of_image:
        (gradient,) = torch.autograd.grad(model(inputs).gather(1, targets[:, None]).sum(), inputs)
        torch.testing.assert_close(seen.image_gradient, gradient)


class TwoViews(nn.Module):
    """The mean of an image's logits and its mirror image's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.model(inputs) + self.model(inputs.flip(-1))) / 2


class Reordered(TwoViews):
    """Another order of the classes."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).flip(1)


class OwnPooling(TwoViews):
    """Reads the mean of the patch tokens, past the model's own head."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.head(self.model.forward_features(inputs)[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("wrapper", "name", "message"),
    [
        (TwoViews, "gae", "twice in a forward"),
        (TwoViews, "raw_attention", "twice in a forward"),
        (Reordered, "partial_lrp", "not its Vision Transformer's own"),
        (Reordered, "transformer_attribution", "not its Vision Transformer's own"),
        (OwnPooling, "rollout", "past its Vision Transformer's own forward"),
        (OwnPooling, "gae", "past its Vision Transformer's own forward"),
    ],
)
def test_a_model_that_would_be_misread_is_refused(wrapper: type[TwoViews], name: str, message: str) -> None:
    problem = case("vit")
    with pytest.raises(RequestError, match=message):
        adapters.get(name).explain(wrapper(problem.model), problem.inputs, problem.targets)


@pytest.mark.parametrize("name", ["saliency", "attn_lrp"])
def test_what_asks_no_module_serves_two_views(name: str) -> None:
    problem, method = case("vit"), adapters.get(name)
    both = method.explain(TwoViews(problem.model), problem.inputs, problem.targets)
    assert both.shape == method.explain(problem.model, problem.inputs, problem.targets).shape


def test_classes_follow_a_wrapper_that_reorders_them() -> None:
    problem, method = case("vit"), adapters.get("gae")
    maps = method.explain(Reordered(problem.model), problem.inputs, 4 - problem.targets)
    assert torch.equal(maps, method.explain(problem.model, problem.inputs, problem.targets))


def test_a_class_that_is_none_is_refused() -> None:
    problem = case("vit")
    for name in ("gae", "occlusion"):
        with pytest.raises(RequestError, match="target 9 is no class: there are 5"):
            adapters.get(name).explain(problem.model, problem.inputs, [0, 1, 9])


def test_images_that_are_no_grid_of_patches_are_refused() -> None:
    model = conformance.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3,
        dynamic_img_size=True, dynamic_img_pad=True,
    )  # fmt: skip
    with pytest.raises(RequestError, match="40 x 40 pixels are no multiple of the model's 16 x 16 patches"):
        adapters.get("cdam").explain(model, torch.rand(1, 3, 40, 40), [0])


@pytest.mark.parametrize("name", ["gae", "attn_lrp", "transformer_attribution"])
def test_gradient_checkpointing_is_switched_off_and_on_again(name: str) -> None:
    problem, method = case("vit"), adapters.get(name)
    expected = method.explain(problem.model, problem.inputs, problem.targets)
    problem.model.set_grad_checkpointing(True)
    assert torch.equal(method.explain(problem.model, problem.inputs, problem.targets), expected)
    assert problem.model.grad_checkpointing
