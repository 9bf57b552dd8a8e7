"""One forward and one backward pass of a model, and all the maps that can be read off it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adapters.base import Explainer, check_targets, explain_all
from explainer_bench import RequestError


class Recording:
    """What the modules of a model received, returned and got as gradient while it computed the target logits.

    The graph starts at the first output whose gradient is asked for, so what lies before costs no backward pass.

    Parameters
    ----------
    model : nn.Module
        Classifier with frozen parameters.
    inputs : Tensor
        (N, C, H, W).
    targets : Tensor
        (N,) long.
    watched : iterable of nn.Module
        Whose inputs and outputs to keep.
    differentiated : iterable of nn.Module
        Those of them whose `gradient` may be asked for.
    of_image : bool
        Whether `image_gradient` may be asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        watched: Iterable[nn.Module],
        differentiated: Iterable[nn.Module] = (),
        of_image: bool = False,
    ) -> None:
        self.model, self.targets, self.of_image = model, targets, of_image
        self.inputs = inputs if of_image else inputs.detach()
        self.differentiated = list(dict.fromkeys(differentiated))
        self._watched = {*watched, *self.differentiated}
        if self._watched:
            self._watched |= {module for module in model.modules() if isinstance(module, VisionTransformer)}
        self._inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        self._versions: dict[nn.Module, int] = {}
        self._in_place = False
        self.logits = self._forward()
        if any(self._outputs[module]._version != version for module, version in self._versions.items()):
            self._in_place = True  # something overwrote what it had received: run again, and let it have a copy
            self._outputs.clear()
            self.logits = self._forward()
        check_targets(targets, self.logits)

    def _forward(self) -> Tensor:
        graph = nullcontext() if self.of_image or self.differentiated else torch.no_grad()
        handles = [module.register_forward_hook(self._keep) for module in self._watched]
        try:
            with unfused(self.model), graph:
                return self.model(self.inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if module in self._outputs:
            raise RequestError(
                f"the model uses its {type(module).__name__} twice in a forward: explain one use at a time."
            )
        starts = module in self.differentiated and not output.requires_grad
        if starts:
            output = output.detach().requires_grad_()
        self._inputs[module], self._outputs[module], self._versions[module] = inputs[0], output, output._version
        return output.clone() if starts or self._in_place else output

    def ran(self, module: nn.Module) -> bool:
        """Tell whether the forward pass went through a watched `module`."""
        return module in self._outputs

    def input(self, module: nn.Module) -> Tensor:
        """Return the first argument of `module`, as the module left it."""
        return self._inputs[module].detach()

    def output(self, module: nn.Module) -> Tensor:
        """Return what `module` returned."""
        return self._outputs[module].detach()

    def gradient(self, module: nn.Module) -> Tensor:
        """Return the gradient of each row's target logit with respect to what `module` returned."""
        return self._gradients[self.differentiated.index(module)]

    @property
    def image_gradient(self) -> Tensor:
        """The gradient (N, C, H, W) of each row's target logit with respect to the image."""
        return self._gradients[-1]

    def gradient_of(self, scalars: Tensor, module: nn.Module) -> Tensor:
        """Return the gradient of the sum of `scalars`, made of `differentiable` outputs, at the output of `module`."""
        return torch.autograd.grad(scalars.sum(), self._outputs[module], retain_graph=True)[0]

    def differentiable(self, module: nn.Module) -> Tensor:
        """Return what `module` returned, still in the graph."""
        return self._outputs[module]

    @cached_property
    def _gradients(self) -> tuple[Tensor, ...]:
        chosen = self.logits.gather(1, self.targets[:, None]).sum()
        tensors = [self._outputs[module] for module in self.differentiated] + [self.inputs] * self.of_image
        return torch.autograd.grad(chosen, tensors, retain_graph=True)


class SinglePass(Explainer):
    """Base of the explainers that read their map off one forward and at most one backward pass.

    Asked for together, they share these passes, see `explain_together`.
    """

    of_image: ClassVar[bool] = False  # it reads the gradient with respect to the image

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules whose inputs or outputs the map is read off."""
        return []

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules at whose outputs it needs the gradient of the target logit."""
        return []

    def read(self, seen: Recording) -> Tensor:
        """Return the (N, h, w) or (N, H, W) maps."""
        raise NotImplementedError

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return what `read` makes of a pass of its own."""
        return self.read(record([self], model, inputs, targets))


def record(explainers: Sequence[SinglePass], model: nn.Module, inputs: Tensor, targets: Tensor) -> Recording:
    """Run the model once, keeping what each of the explainers reads."""
    return Recording(
        model,
        inputs,
        targets,
        [module for explainer in explainers for module in explainer.watches(model)],
        [module for explainer in explainers for module in explainer.differentiates(model)],
        any(explainer.of_image for explainer in explainers),
    )


def shareable(explainer: Explainer) -> bool:
    """Tell whether `explain_together` takes this explainer."""
    return isinstance(explainer, SinglePass) and not explainer.needs


def explain_together(
    explainers: Sequence[SinglePass], model: nn.Module, inputs: Any, targets: Any, *, seed: int = 0
) -> list[Tensor]:
    """Return the maps of each explainer, the same to the last bit as its own `explain`, from shared passes.

    Parameters
    ----------
    explainers : sequence of SinglePass
        Each of them `shareable`, all of the same `half_precision` and `batch_size`.
    model, inputs, targets, seed
        As for `Explainer.explain`.
    """

    def attribute(model: nn.Module, images: Tensor, classes: Tensor, context: dict[str, Tensor]) -> list[Tensor]:
        seen = record(explainers, model, images, classes)
        return [explainer.read(seen) for explainer in explainers]

    return explain_all(explainers, attribute, model, inputs, targets, seed=seed)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Let timm's attention layers compute their attention step by step, so that it can be seen.

    Done for every recording, whatever it reads: fused kernels round otherwise, and maps would depend on their company.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    fused = [layer.fused_attn for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        yield
    finally:
        for layer, was in zip(layers, fused, strict=True):
            layer.fused_attn = was
