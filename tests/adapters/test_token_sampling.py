"""Token removal against sequences rebuilt by hand; TIS and ViT-CX against their formulas, one mask at a time."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adapters
from tests.adapters.conftest import build

TARGETS = [1, 3]


def image_for(vit: VisionTransformer) -> Tensor:
    return torch.randn(1, 3, *vit.patch_embed.img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def logits_by_hand(vit: VisionTransformer, image: Tensor, kept: list[int]) -> Tensor:
    """The logits from the prefix tokens and some patch tokens, (K,)."""
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    tokens = tokens[:, [*range(vit.num_prefix_tokens), *(vit.num_prefix_tokens + place for place in kept)]]
    for block in vit.blocks:
        tokens = block(tokens)
    return vit.forward_head(vit.norm(tokens))[0].detach()


def distilled() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def removed_by_hand(vit: VisionTransformer, image: Tensor) -> list[list[float]]:
    """Per target, what its logit loses without each patch token."""
    places = list(range(vit.patch_embed.num_patches))
    full = logits_by_hand(vit, image, places)
    without = [logits_by_hand(vit, image, [other for other in places if other != place]) for place in places]
    return [[float(full[target] - logits[target]) for logits in without] for target in TARGETS]


def test_token_ablation_is_brute_force(vit: VisionTransformer) -> None:
    vit = vit.double().eval()
    image = image_for(vit)
    found = adapters.get("token_ablation").explain(vit, image.expand(2, -1, -1, -1), TARGETS)
    assert found.shape == (2, *vit.patch_embed.grid_size)
    np.testing.assert_allclose(found.flatten(1), removed_by_hand(vit, image), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vit", [distilled(), build(pre_norm=True, qkv_bias=False)], ids=["distilled", "pre_norm"])
def test_token_ablation_of_other_transformers(vit: VisionTransformer) -> None:
    vit = vit.double().eval()
    image = image_for(vit)
    found = adapters.get("token_ablation").explain(vit, image.expand(2, -1, -1, -1), TARGETS)
    np.testing.assert_allclose(found.flatten(1), removed_by_hand(vit, image), rtol=1e-5, atol=1e-7)


def test_what_stands_around_the_transformer_is_kept(plain: VisionTransformer) -> None:
    vit = plain.double().eval()
    wrapped = nn.Sequential(nn.Hardtanh(-0.5, 0.5), vit, nn.Softplus()).eval()
    image = image_for(vit)
    found = adapters.get("token_ablation").explain(wrapped, image, [1])
    clipped = image.clamp(-0.5, 0.5)
    full = nn.functional.softplus(logits_by_hand(vit, clipped, list(range(16))))
    without = nn.functional.softplus(logits_by_hand(vit, clipped, list(range(1, 16))))
    assert float(found[0, 0, 0]) == pytest.approx(float(full[1] - without[1]), rel=1e-5)


def block_outputs(vit: VisionTransformer, image: Tensor) -> list[Tensor]:
    """Per block, (patch tokens, width)."""
    tokens, outputs = vit.norm_pre(vit._pos_embed(vit.patch_embed(image))), []
    for block in vit.blocks:
        tokens = block(tokens)
        outputs.append(tokens[0, vit.num_prefix_tokens :].detach())
    return outputs


def tis_by_hand(vit: VisionTransformer, image: Tensor, maps: Tensor, ratio: float) -> np.ndarray:
    """The mean probability over the subsets that hold a token, for one map per subset."""
    number = maps.shape[1]
    total, times = np.zeros((len(TARGETS), number)), np.zeros(number)
    for each in maps:
        kept = sorted(sorted(range(number), key=lambda place: -float(each[place]))[: int(ratio * number)])
        probabilities = logits_by_hand(vit, image, kept).softmax(0)
        for place in kept:
            times[place] += 1
            total[:, place] += [float(probabilities[target]) for target in TARGETS]
    return total / np.maximum(times, 1)


@pytest.mark.parametrize("ratio", [0.5, 0.3])
@pytest.mark.parametrize("shape", ["plain", "non_square", "five_prefix", "mean_pooled"])
def test_tis_of_more_masks_than_channels_takes_every_channel(shape: str, ratio: float) -> None:
    vit = build(shape).double().eval()
    image = image_for(vit)
    found = adapters.get("tis", ratio=ratio).explain(vit, image.expand(2, -1, -1, -1), TARGETS)
    maps = torch.cat([output.T for output in block_outputs(vit, image)])
    assert len(maps) == 64
    np.testing.assert_allclose(found.flatten(1), tis_by_hand(vit, image, maps, ratio), rtol=1e-5)


def test_tis_of_one_mask_takes_the_mean_of_all_channels(plain: VisionTransformer) -> None:
    vit = plain.double().eval()
    image = image_for(vit)
    found = adapters.get("tis", n_masks=1).explain(vit, image.expand(2, -1, -1, -1), TARGETS)
    mean = torch.cat([output.T for output in block_outputs(vit, image)]).mean(0, keepdim=True)
    assert (found > 0).flatten(1).sum(1).tolist() == [8, 8]
    np.testing.assert_allclose(found.flatten(1), tis_by_hand(vit, image, mean, 0.5), rtol=1e-5)


def test_tis_clusters_find_groups_of_like_maps() -> None:
    groups = torch.zeros(2, 8)
    groups[0, :4] = groups[1, 2:6] = 10
    maps = groups.repeat_interleave(10, 0) + torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    np.random.seed(1)
    subsets = adapters.get("tis", n_masks=2)._subsets(maps)
    assert sorted(subsets.int().tolist()) == sorted((groups > 0).int().tolist())


def scaled(array: np.ndarray) -> np.ndarray:
    return (array - array.min()) / (array.max() - array.min())


def vit_cx_by_hand(vit: VisionTransformer, image: Tensor, noise: Tensor, distance: float) -> tuple[np.ndarray, int]:
    """ViT-CX with another package's clustering, one mask at a time and with the same noise; and the number of masks."""
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    channels = vit.blocks[-1].norm1(tokens)[0, vit.num_prefix_tokens :].T.detach()
    grids = channels.unflatten(1, vit.patch_embed.grid_size)[:, None]
    large = nn.functional.interpolate(grids, image.shape[2:], mode="bilinear", align_corners=False)[:, 0].numpy()
    masks = np.stack([scaled(each) for each in large])
    labels = fcluster(linkage(pdist(masks.reshape(len(masks), -1), "cosine"), "complete"), distance, "distance")
    merged = [scaled(masks[labels == label].sum(0)) for label in np.unique(labels)]
    total = 0.0
    for mask in merged:
        shown = torch.from_numpy(mask)
        versions = torch.cat([image * shown + noise * (1 - shown), image + noise * (1 - shown), image])
        masked, noisy, full = vit(versions).softmax(1)[:, TARGETS].detach().numpy()
        total = total + (masked - noisy + full)[:, None, None] * mask / sum(merged)
    return total / len(merged), len(merged)


@pytest.mark.parametrize(
    ("shape", "distance"), [("plain", 0.1), ("plain", 0.3), ("five_prefix", 0.3), ("non_square", 0.2)]
)
def test_vit_cx_is_the_papers_formula(shape: str, distance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build(shape).double().eval()
    image = image_for(vit)
    noise = torch.randn(3, *image.shape[2:], generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "randn", lambda rows, *size, device: noise.expand(rows, *size))
    found = adapters.get("vit_cx", distance=distance).explain(vit, image.expand(2, -1, -1, -1), TARGETS)
    expected, masks = vit_cx_by_hand(vit, image, 0.1 * noise, distance)
    assert 1 < masks < 32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_vit_cx_survives_channels_that_are_the_same_everywhere(plain: VisionTransformer) -> None:
    vit = plain.double().eval()
    with torch.no_grad():
        vit.blocks[-1].norm1.weight[:3] = 0
    assert adapters.get("vit_cx").explain(vit, image_for(vit), [1]).isfinite().all()
