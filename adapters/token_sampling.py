"""Explainers that ask a Vision Transformer about fewer of its tokens, or about masks made of its own activations."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from sklearn.cluster import AgglomerativeClustering, KMeans
from torch import Tensor, nn

from adapters import vit
from adapters.base import min_max, predict
from adapters.masking import ROWS, QueryExplainer, ask, probabilities
from adapters.recording import Recording


class _ViTQueries(QueryExplainer):
    """Base of the explainers that ask a timm Vision Transformer, about one image at a time."""

    def supports(self, model: nn.Module) -> str | None:
        """Return why `model` has no Vision Transformer that can be looked into, or None."""
        return vit.unsupported(model)


class TokenAblation(_ViTQueries):
    """What the target logit loses when one patch token is removed, for every patch token.

    ``logit(all tokens) - logit(all tokens but this one)``. The token is taken out of the sequence after the positional
    embedding, so that the blocks see one token less and nothing stands in its place; class, distillation and register
    tokens stay. The image is embedded once. Brocki, Binda and Chung call it token ablation map (TAM).

    A metric that hides single patches, such as `faithfulness_estimate`, asks nearly the same question: there a good
    score is little evidence.
    """

    name = "token_ablation"
    asks = "single_patches"
    passes = 197
    reference = "Brocki, Binda and Chung, Class-discriminative attention maps for Vision Transformers, TMLR 2024"

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w) losses, in units of logit."""
        seen = Recording(model, inputs[:1], targets[:1], vit.find(model).blocks[:1])
        height, width = vit.token_grid(model, inputs)
        others = ~torch.eye(height * width, dtype=torch.bool, device=inputs.device)
        drops = seen.logits.double().cpu() - logits_keeping(seen, others)
        return drops[:, targets.cpu()].T.unflatten(1, (height, width))


class TIS(_ViTQueries):
    """Transformer input sampling: how probable the target is from the subsets of tokens that hold a given token.

    The outputs of all blocks give a map over the patch tokens per block and channel. k-means (Euclidean, Lloyd, started
    at random maps) groups these maps into `n_masks` clusters, or as many as there are maps. Each cluster centre keeps
    the `ratio` of patch tokens where it is largest; the others are taken out after the positional embedding, as in
    `token_ablation`. A token's value is the mean softmax probability of the target over the subsets that hold it, 0
    where none does. The authors' code scales the map to [0, 1] last; here it stays in units of probability. They leave
    out one prefix token, here all that the model has are no part of the map and always kept.
    """

    name = "tis"
    signed = False
    stochastic = True
    reference = "Englebert et al., Explaining through Transformer input sampling, ICCV Workshops 2023"
    quick = "n_masks=6"
    n_masks: Annotated[int, Field(ge=1)] = 1024
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def cost(self) -> float:
        """One forward pass per subset, as much cheaper as it has fewer tokens."""
        return 1 + self.n_masks * self.ratio

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, h, w), at least 0, in units of probability."""
        blocks = vit.find(model).blocks
        seen = Recording(model, inputs[:1], targets[:1], blocks)
        kept = self._subsets(torch.cat([_channels(seen, block) for block in blocks]).float().cpu())
        probability = probabilities(logits_keeping(seen, kept.to(inputs.device)))[:, targets.cpu()]
        means = probability.T @ kept.double() / kept.sum(0).clamp(min=1)
        return means.unflatten(1, vit.token_grid(model, inputs))

    def _subsets(self, maps: Tensor) -> Tensor:
        """Return (subsets, patch tokens) bool, the tokens that each centre of the (maps, patch tokens) keeps."""
        n_clusters = min(self.n_masks, len(maps))
        seed = np.random.randint(2**31 - 1)
        centres = (
            KMeans(n_clusters, init="random", n_init=1, max_iter=100, random_state=seed).fit(maps).cluster_centers_
        )
        largest = torch.from_numpy(centres).topk(max(int(self.ratio * maps.shape[1]), 1)).indices
        return torch.zeros(n_clusters, maps.shape[1], dtype=torch.bool).scatter_(1, largest, True)


class ViTCX(_ViTQueries):
    """ViT-CX: masks made of the last block's channels, weighted by how much of the target they cause.

    The masks are the channels of the patch tokens that enter the last block's attention (after its `norm1`), enlarged
    bilinearly to the image and scaled to [0, 1]; those whose cosine distance is within `distance` are merged by
    agglomerative clustering (complete linkage), summed and scaled again. With noise ``n`` of standard deviation 0.1,
    drawn per mask, its score is ``p(x * mask + n * (1 - mask)) - p(x + n * (1 - mask)) + p(x)`` in softmax
    probabilities of the target. A pixel's value is the mean of the scores, weighted by the masks there, divided by
    their number, as in the authors' code. Values below 0 are possible and rare: such a mask costs the target more
    than nothing being seen. A channel that is the same everywhere is a mask of zeros here, where their code gets NaN.
    """

    name = "vit_cx"
    stochastic = True
    licence = "the authors' code is under the 3-clause BSD licence; nothing of it is used here"
    reference = "Xie et al., ViT-CX: Causal explanation of Vision Transformers, IJCAI 2023"
    quick = "distance=0.6"
    distance: Annotated[float, Field(gt=0, le=1)] = 0.1

    @property
    def cost(self) -> float:
        """Two forward passes per mask, of which 25 are typical of a ViT-Tiny; wider models have more."""
        return 53

    def attribute(self, model: nn.Module, inputs: Tensor, targets: Tensor, **context: Tensor) -> Tensor:
        """Return (N, H, W), in units of probability per mask."""
        image, norm = inputs[0].detach(), vit.find(model).blocks[-1].norm1
        seen = Recording(model, inputs[:1], targets[:1], [norm])
        maps = _channels(seen, norm).float().unflatten(1, vit.token_grid(model, inputs))
        masks = self._merged(min_max(F.interpolate(maps[:, None], image.shape[1:], mode="bilinear")[:, 0]))
        scores = torch.cat([_causal_scores(model, image, rows, targets) for rows in masks.split(ROWS)])
        scores += ask(model, [image[None]], targets, probability=True)
        weighted = torch.tensordot(scores.to(masks), masks, ([0], [0]))
        return weighted / masks.sum(0).clamp(min=1e-12) / len(masks)

    def _merged(self, masks: Tensor) -> Tensor:
        """Return (clusters, H, W) of (masks, H, W), each in [0, 1]."""
        products = masks.flatten(1) @ masks.flatten(1).T
        norms = products.diagonal().sqrt().clamp(min=1e-12)
        distances = (1 - products / norms.outer(norms)).cpu().numpy()
        clustering = AgglomerativeClustering(
            n_clusters=None, distance_threshold=self.distance, metric="precomputed", linkage="complete"
        )
        labels = torch.from_numpy(clustering.fit(distances).labels_).to(masks.device)
        return min_max(masks.new_zeros(int(labels.max()) + 1, *masks.shape[1:]).index_add_(0, labels, masks))


def logits_keeping(seen: Recording, kept: Tensor) -> Tensor:
    """Return the logits of a recorded image of which some patch tokens are taken out after the positional embedding.

    Parameters
    ----------
    seen : Recording
        Of one image, with the Vision Transformer's first block.
    kept : Tensor
        (rows, patch tokens) bool, as many true in every row; all prefix tokens are kept as well.

    Returns
    -------
    Tensor
        (rows, K) float64 on the CPU.
    """
    transformer = vit.find(seen.model)
    tokens = seen.input(transformer.blocks[0])

    def resumed(sequences: Tensor) -> Tensor:
        images = seen.inputs.expand(len(sequences), -1, -1, -1)
        return vit.resume(seen.model, images, transformer.blocks(sequences))

    logits = []
    for rows in F.pad(kept, (transformer.num_prefix_tokens, 0), value=True).split(ROWS):
        sequences = tokens.expand(len(rows), -1, -1)[rows].view(len(rows), -1, tokens.shape[-1])
        logits.append(predict(resumed, sequences))
    return torch.cat(logits).cpu().double()


def _channels(seen: Recording, module: nn.Module) -> Tensor:
    """Return what a module returned for the patch tokens of one image, (channels, patch tokens)."""
    return seen.output(module)[0, vit.find(seen.model).num_prefix_tokens :].T


def _causal_scores(model: nn.Module, image: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
    """Return (rows, T), how much more probable a target is if the rest of the noisy image is taken away."""
    noise = torch.randn(len(masks), *image.shape, device=image.device) * 0.1 * (1 - masks[:, None])
    masked = ask(model, [(image * masks[:, None] + noise).to(image)], targets, probability=True)
    return masked - ask(model, [(image + noise).to(image)], targets, probability=True)
