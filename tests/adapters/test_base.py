"""What the base class owes to authors who get things wrong."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters import Explainer
from adapters.base import ExplanationError, predict
from adapters.state import ModelChangedError
from explainer_bench import RequestError


class Careless(Explainer):
    """Leaves everything behind that can be left behind."""

    name = "careless"
    family = "test"
    fail: bool = False

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(inputs).sum().backward()
        model.register_forward_hook(lambda *_: None)
        model.blocks[0].attn.fused_attn = False
        model.blocks[0].forward = lambda x, **_: x
        model.kept = inputs
        if self.fail:
            raise ValueError("as asked")
        assert inputs.grad is not None
        return inputs.grad.sum(1)


def facts(model: nn.Module) -> list[object]:
    modules = [
        (m.training, sorted(vars(m)), len(m._forward_hooks), getattr(m, "fused_attn", 0)) for m in model.modules()
    ]
    return [modules, [(p.requires_grad, p.grad) for p in model.parameters()]]


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was_even_after_an_error(plain: VisionTransformer, fail: bool) -> None:
    next(plain.parameters()).requires_grad_(False)
    plain.eval()
    before, inputs = facts(plain), torch.rand(2, 3, 32, 32)
    logits = plain(inputs)
    if fail:
        with pytest.raises(ValueError, match="as asked"):
            Careless(fail=True)(plain, inputs, [0, 1])
    else:
        Careless()(plain, inputs, [0, 1])
    assert facts(plain) == before
    assert torch.equal(plain(inputs), logits)


class Returns(Explainer):
    """Returns what it is told."""

    name = "returns"
    family = "test"
    what: str = ""

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        good = inputs.mean(1)
        bad = {
            "nan": torch.where(torch.arange(len(good))[:, None, None] == 0, torch.nan, good),
            "channels": inputs,
            "flat": good.flatten(),
            "fewer": good[:-1],
            "larger": good.repeat(1, 2, 1),
            "empty": good[:, :0],
            "array": good.detach().numpy(),
        }
        return bad[self.what]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "NaN or infinite values in 1 of 2"),
        ("channels", r"\(2, 3, 32, 32\), not a torch tensor \(2, height"),
        ("flat", "not"),
        ("fewer", "not"),
        ("larger", "larger than the image"),
        ("empty", "empty"),
        ("array", "ndarray"),
    ],
)
def test_what_is_no_map_is_refused(plain: VisionTransformer, what: str, message: str) -> None:
    with pytest.raises(ExplanationError, match=message):
        Returns(what=what)(plain, torch.rand(2, 3, 32, 32), [0, 1])


class Vandal(Explainer):
    """Changes a weight."""

    name = "vandal"
    family = "test"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        with torch.no_grad():
            model.head.weight.mul_(2)
        return inputs.mean(1)


def test_changed_weights_are_noticed(plain: VisionTransformer) -> None:
    with pytest.raises(ModelChangedError, match="changed the model's weights"):
        Vandal()(plain, torch.rand(1, 3, 32, 32), [0])


class Hungry(nn.Module):
    """Runs out of memory above two images."""

    def __init__(self, error: type[RuntimeError], message: str) -> None:
        super().__init__()
        self.head, self.error, self.message = nn.Linear(3, 5), error, message

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > 2:
            raise self.error(self.message)
        return self.head(inputs.mean((2, 3)))


class Gradient(Explainer):
    """The input's gradient."""

    name = "gradient"
    family = "test"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(model(inputs).gather(1, targets[:, None]).sum(), inputs)
        return gradient.sum(1)


@pytest.mark.parametrize(
    ("error", "message"),
    [(torch.OutOfMemoryError, "CUDA out of memory"), (RuntimeError, "DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_batch(error: type[RuntimeError], message: str) -> None:
    model, inputs = Hungry(error, message), torch.rand(7, 3, 8, 8)
    targets = torch.arange(7) % 5
    maps = Gradient()(model, inputs, targets)
    expected = model.head.weight[targets].sum(1).detach().numpy() / 64
    np.testing.assert_allclose(maps[:, 0], np.broadcast_to(expected[:, None, None], (7, 8, 8)), rtol=1e-5)


def test_other_errors_come_through_at_once() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        Gradient()(Hungry(RuntimeError, "something else"), torch.rand(4, 3, 8, 8), [0, 1, 2, 3])


class Grid(Explainer):
    """A fixed 2 x 2 grid."""

    name = "grid"
    family = "test"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        return torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]).expand(len(inputs), -1, -1)


class SmoothGrid(Grid):
    """The same, interpolated."""

    name = "smooth_grid"
    upsampling = "bilinear"


def test_maps_are_upsampled_as_the_method_says_and_kept_on_their_own_grid(plain: VisionTransformer) -> None:
    inputs = torch.rand(1, 3, 32, 32)
    assert Grid().explain(plain, inputs, [0]).shape == (1, 2, 2)
    nearest = Grid()(plain, inputs, [0])[0, 0]
    assert np.array_equal(nearest, np.kron([[0, 1], [2, 3]], np.ones((16, 16))))
    smooth = SmoothGrid()(plain, inputs, [0])[0, 0]
    assert smooth[0, 0] == 0 and smooth[-1, -1] == 3
    assert len(np.unique(smooth)) > 4


def test_context_comes_through_the_contract_only(plain: VisionTransformer) -> None:
    import adapters

    prior, inputs = np.random.default_rng(0).random((2, 32, 32)).astype(np.float32), torch.rand(2, 3, 32, 32)
    method = adapters.get("roi_prior")
    np.testing.assert_array_equal(method(plain, inputs, [0, 1], roi_prior=prior)[:, 0], prior)
    with pytest.raises(RequestError, match="needs 'roi_prior'"):
        method(plain, inputs, [0, 1])
    with pytest.raises(TypeError, match="roi_priors"):
        method(plain, inputs, [0, 1], roi_priors=prior)


def test_predict_falls_back_to_gradients_only_where_the_model_needs_them() -> None:
    class Hooking(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            out = super().forward(inputs)
            out.register_hook(lambda g: g)
            return out

    model = Hooking(3, 2).requires_grad_(False)
    assert predict(model, torch.rand(5, 3), batch_size=2).shape == (5, 2)
    assert not predict(model, torch.rand(5, 3)).requires_grad
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predict(model, torch.rand(5, 4))


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        ((3, 3, 8, 8), [1], r"targets \(1,\)"),
        ((3, 3, 8, 8), [0, 1, 2, 3], r"targets \(4,\)"),
        ((2, 3, 8, 8), [0, -1], "a class from 0"),
        ((0, 3, 8, 8), [], "at least one"),
        ((3, 8, 8), [0, 1, 2], r"give images \(N, C, H, W\)"),
    ],
)
def test_images_without_a_class_each_are_refused(shape: tuple[int, ...], targets: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Gradient()(Hungry(RuntimeError, ""), torch.rand(shape), targets)


class BehindTheBack(Explainer):
    """Changes a weight where autograd does not look."""

    name = "behind_the_back"
    family = "test"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        model.head.weight.data.mul_(1.1)
        return inputs.mean(1)


def test_weights_changed_through_data_are_noticed_and_the_culprit_named(plain: VisionTransformer) -> None:
    with pytest.raises(ModelChangedError, match="behind_the_back changed the model's weights"):
        BehindTheBack()(plain, torch.rand(1, 3, 32, 32), [0])


def test_predicting_halves_the_batch_that_does_not_fit() -> None:
    model, inputs = Hungry(torch.OutOfMemoryError, "CUDA out of memory"), torch.rand(7, 3, 8, 8)
    torch.testing.assert_close(predict(model, inputs), model.head(inputs.mean((2, 3))))


class Nothing(Explainer):
    """Defines nothing."""

    name = "nothing"
    family = "test"


def test_a_missing_attribute_is_named(plain: VisionTransformer) -> None:
    with pytest.raises(NotImplementedError, match="Nothing defines no `attribute`"):
        Nothing()(plain, torch.rand(1, 3, 32, 32), [0])
