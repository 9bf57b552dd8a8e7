"""Class-discriminative attention maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adapters import vit
from adapters.base import Explainer
from adapters.recording import Recording, record
from explainer_bench import RequestError

_REFERENCE = "Brocki, Binda and Chung, Class-discriminative attention maps for vision transformers, TMLR 2024"
_LICENCE = "the authors' first code has no licence, their later code Apache-2.0 or GPL-3.0; written from the paper"
_CHUNK = 10  # perturbed copies of an image at a time
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class CDAM(vit.ViTExplainer):
    """Class-discriminative attention map: token times gradient of the target logit, summed over the channels.

    The tokens are the input of the last attention, that is the output of ``blocks[-1].norm1``. The map is signed and
    neither clipped nor normalised.
    """

    name = "cdam"
    family = "cdam"
    signed = True
    passes = 1
    reference = _REFERENCE
    licence = _LICENCE

    def differentiates(self, model: nn.Module) -> list[nn.Module]:
        """Return the last attention's input."""
        return [vit.find(model).blocks[-1].norm1]

    def read(self, seen: Recording) -> Tensor:
        """Return (N, h, w) signed scores in units of the logit."""
        (norm,) = self.differentiates(seen.model)
        return vit.to_grid(seen, (seen.output(norm) * seen.gradient(norm)).sum(-1))


class _RepeatedCDAM(Explainer):
    """Base of the means of CDAM over copies of an image whose tokens are scaled and noisy before the last attention.

    The model runs once, up to its last block. Of that block, each copy computes only what the head reads.
    """

    family = "cdam"
    signed = True
    reference = _REFERENCE
    licence = _LICENCE
    at: Literal["block_input", "norm1"] = "block_input"

    @property
    def cost(self) -> float:
        """One pass, and a hundredth of one (measured on ViT-B/16) for each copy where the head reads the class token.

        Where it reads the mean of all, a copy costs a forward and a backward pass through the last block.
        """
        return 1 + 0.01 * len(self.scales())

    @property
    def level(self) -> float:
        """Standard deviation of the noise, as a share of the range of the tokens."""
        raise NotImplementedError

    def scales(self) -> Tensor:
        """Return the factor of each copy."""
        raise NotImplementedError

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no last block that can be repeated, or None."""
        return vit.unsupported(model)

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) signed scores in units of the logit."""
        norm = vit.find(model).blocks[-1].norm1
        seen = Recording(model, inputs, targets, [norm])
        rows = zip(seen.inputs, seen.input(norm), targets, strict=True)
        return vit.to_grid(seen, torch.stack([self._mean(model, *row) for row in rows]))

    def _mean(self, model: nn.Module, image: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
        """Return the scores (tokens,) of one image, given as its (tokens, width) before the last block."""
        chunks = self.scales().to(tokens).split(_CHUNK)
        return torch.cat([self._maps(model, image, tokens, target, scales) for scales in chunks]).mean(0)

    def _maps(self, model: nn.Module, image: Tensor, tokens: Tensor, target: Tensor, scales: Tensor) -> Tensor:
        """Return the scores (copies, tokens) of one copy per scale."""
        norm = vit.find(model).blocks[-1].norm1
        if self.at == "block_input":
            before = self._perturbed(tokens, scales)
            normed = norm(before)
        else:
            normed = self._perturbed(norm(tokens), scales)
            before = tokens.expand_as(normed)
        after = vit.last_block(model, before, normed.requires_grad_())
        logits = vit.resume(model, image.expand(len(scales), -1, -1, -1), after)[:, target]
        return (normed * torch.autograd.grad(logits.sum(), normed)[0]).sum(-1).detach()

    def _perturbed(self, tokens: Tensor, scales: Tensor) -> Tensor:
        copies = scales[:, None, None] * tokens
        if not self.level:
            return copies
        noise = torch.randn(copies.shape, dtype=copies.dtype, device=copies.device)
        return copies + self.level * (tokens.max() - tokens.min()) * noise


class SmoothCDAM(_RepeatedCDAM):
    """CDAM averaged over noisy copies of the last block's tokens, as in SmoothGrad.

    The mean over `samples` draws of noisy token times its gradient. The noise is Gaussian; its standard deviation is
    `noise` times the range of the image's tokens. With ``at="block_input"`` it is added before the last block's first
    normalisation, as in the authors' code of 2024; with ``at="norm1"`` to what that puts out, as in their library of
    2025, only that the range there is the whole batch's. All classes of an image see the same noise.
    """

    name = "smooth_cdam"
    stochastic = True
    quick = "samples=3"
    samples: Annotated[int, Field(ge=1)] = 50
    noise: Annotated[float, Field(ge=0)] = 0.05

    @property
    def level(self) -> float:
        """Standard deviation of the noise, as a share of the range of the tokens."""
        return self.noise

    def scales(self) -> Tensor:
        """Return the factor of each copy."""
        return torch.ones(self.samples)


class IntegratedCDAM(_RepeatedCDAM):
    """CDAM averaged over copies of the last block's tokens that are scaled down towards zero.

    With ``at="block_input"``, the authors' code of 2024, the copies are ``k / steps`` times the block's input, for k
    from 1 to ``steps - 1``, and `noise` is 0 unless given. As the normalisation that follows undoes the scale, what
    changes is mostly the weight of the skip connection: the attention's tokens follow no path. With ``at="norm1"``,
    their library of 2025, the copies are ``k / steps`` times the normalised tokens, for k from 0 to `steps`, and
    `noise` is 0.05 unless given: Gaussian, in shares of the range of the tokens (there, of those of the whole batch).
    Which of the two the paper's tables used is not known.
    """

    name = "integrated_cdam"
    quick = "steps=3"
    steps: Annotated[int, Field(ge=2)] = 50
    noise: Annotated[float, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        self.stochastic = self.level > 0  # type: ignore[misc]

    @property
    def level(self) -> float:
        """Standard deviation of the noise, as a share of the range of the tokens."""
        return {"block_input": 0.0, "norm1": 0.05}[self.at] if self.noise is None else self.noise

    def scales(self) -> Tensor:
        """Return the factor of each copy."""
        steps = torch.arange(self.steps + 1) / self.steps
        return steps[1:-1] if self.at == "block_input" else steps


class ConceptCDAM(CDAM):
    """CDAM of a concept, given by a few images of it, in place of a class.

    Token times gradient of the dot product (not the cosine) of two latents: the image's, and the mean of the concept
    images'. A latent is what the head's last layer receives. The context `concept` holds the concept images, (M, C, H,
    W), normalised as the model wants them; on the command line, `folder` names the folder they are in. The paper's
    figures use 30 images, its notebook 2.
    """

    name = "concept_cdam"
    class_discriminative = False
    needs = ("concept",)
    folder: Path | None = None

    def files(self) -> list[Path]:
        """Return the images in `folder`, sorted by name; none, where no folder is given."""
        if self.folder is None:
            return []
        found = sorted(path for path in self.folder.glob("*") if path.suffix.lower() in _IMAGES)
        if not found:
            raise RequestError(
                f"{self.name} finds no images in {self.folder}: give the folder of the concept's images."
            )
        return found

    def watches(self, model: nn.Module) -> list[nn.Module]:
        """Return the last normalisation."""
        return [vit.find(model).norm]

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) signed scores in units of the dot product."""
        seen = record([self], model, inputs, targets)
        (norm,) = self.differentiates(model)
        similarity = vit.latents(seen) @ concept_latent(model, context["concept"])
        return vit.to_grid(seen, (seen.output(norm) * seen.gradient_of(similarity, norm)).sum(-1))


def concept_latent(model: nn.Module, images: Tensor) -> Tensor:
    """Return the mean latent (width,) of concept images (M, C, H, W)."""
    none = torch.zeros(len(images), dtype=torch.long, device=images.device)
    parts = zip(images.split(_CHUNK), none.split(_CHUNK), strict=True)
    recordings = (Recording(model, *part, [vit.find(model).norm]) for part in parts)
    return torch.cat([vit.latents(seen) for seen in recordings]).mean(0)
