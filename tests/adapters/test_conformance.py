"""What every explainer must keep, found by the registry: a new file is covered with no edit here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters import Explainer, conformance
from adapters.conformance import Finding

NAMES = adapters.registry.names()


@pytest.mark.parametrize("model", conformance.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_explainer_keeps_the_contract(name: str, model: str) -> None:
    findings = list(conformance.check(adapters.quick(name), (model,)))
    assert [finding for finding in findings if finding.verdict == "broken"] == []
    assert len(findings) in (1, len(conformance.CHECKS))


@pytest.mark.parametrize("name", NAMES)
def test_every_explainer_serves_one_of_the_models(name: str) -> None:
    reasons = [adapters.quick(name).supports(conformance.build(model)) for model in conformance.MODELS]
    assert None in reasons


class Well(Explainer):
    """Input times gradient."""

    name = "well"
    family = "test"
    signed = True
    reference = "none"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(model(inputs).gather(1, targets[:, None]).sum(), inputs)
        return (inputs * gradient).sum(1)


class Undocumented(Well):
    family = ""


class Blind(Well):
    class_discriminative = False


class Positive(Well):
    signed = False


class Noisy(Well):
    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        return super().attribute(model, inputs, targets) + torch.rand(())


class Mixing(Well):
    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        maps = super().attribute(model, inputs, targets)
        return maps / maps.abs().max()


class Stateful(Well):
    calls: int = 0

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        self.calls += 1
        return super().attribute(model, inputs, targets) * self.calls


class Lying(Well):
    def supports(self, model: nn.Module) -> str | None:
        return "it must not"

    def explain(self, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(3, 64, 64)


class Half(Well):
    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        return torch.from_numpy(super().attribute(model, inputs, targets).detach().cpu().numpy())


class Leaking(Well):
    def __call__(self, model: nn.Module, *args: object, **kwargs: object) -> object:
        model.register_forward_hook(lambda *_: None)
        return super().__call__(model, *args, **kwargs)


class Vandal(Well):
    def __call__(self, model: nn.Module, *args: object, **kwargs: object) -> object:
        maps = super().__call__(model, *args, **kwargs)
        next(model.parameters()).data.add_(1e-3)
        return maps


class Grafted(Well):
    def __call__(self, model: nn.Module, inputs: Tensor, *args: object, **kwargs: object) -> object:
        scale = 2 if getattr(inputs, "grad_fn", None) else 1
        return super().__call__(model, inputs, *args, **kwargs) * scale


def broken(cls: type[Explainer]) -> dict[str, str]:
    return {f.check: f.line for f in conformance.check(cls(), ("vit",)) if f.verdict == "broken"}


def test_a_good_explainer_passes() -> None:
    findings = list(conformance.check(Well()))
    assert {finding.model for finding in findings} == set(conformance.MODELS)
    assert {finding.verdict for finding in findings} == {"passed"}


@pytest.mark.parametrize(
    ("cls", "check", "line"),
    [
        (Undocumented, "states_facts", "it states no family"),
        (Blind, "knows_its_target", "class_discriminative=False"),
        (Positive, "keeps_its_sign", "signed=False"),
        (Noisy, "is_seeded", "stochastic=False"),
        (Mixing, "ignores_company", "one image at a time"),
        (Stateful, "is_seeded", "two different maps"),
        (Lying, "refuses_clearly", "but it is explained"),
        (Half, "runs_in_half_precision", "BFloat16"),
        (Leaking, "leaves_no_trace", "hooks"),
        (Vandal, "leaves_no_trace", "changes the model's"),
        (Grafted, "runs_anywhere", "part of a graph"),
    ],
)
def test_what_authors_get_wrong_is_found(cls: type[Explainer], check: str, line: str) -> None:
    assert line in broken(cls)[check]


def test_an_error_in_supports_is_a_finding() -> None:
    class Raising(Well):
        def supports(self, model: nn.Module) -> str | None:
            raise KeyError("oops")

    assert list(conformance.check(Raising(), ("vit",))) == [
        Finding("vit", "supports", "broken", "`supports` raises KeyError: 'oops'")
    ]


@pytest.mark.parametrize("name", conformance.MODELS)
def test_the_models_are_always_the_same_and_the_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second = conformance.build(name).state_dict(), conformance.build(name).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("function", conformance.CHECKS)
def test_every_check_says_what_it_checks(function: Callable[..., str]) -> None:
    assert function.__doc__
