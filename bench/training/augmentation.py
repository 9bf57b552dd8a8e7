"""Varying training images: each by draws of its own, so that no image depends on its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.recipes import Augment

# What each of an image's draws decides; a new one goes to the end, so that the others keep theirs.
_DRAWS = (
    "flip",
    "zoom",
    "right",
    "down",
    "rotate",
    "quarter",
    "contrast",
    "brightness",
    "channels",
    "area",
    "aspect",
    "left",
    "top",
)
_ORDERS = np.array(list(permutations(range(3))))


def draws(ids: Sequence[str], seed: int, epoch: int) -> np.ndarray:
    """Return (B, 13) uniform numbers in [0, 1), a function of seed, epoch and each sample's id only."""
    return np.stack([_generator(name, seed, epoch).random(len(_DRAWS)) for name in ids])


def _generator(name: str, seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")])


def vary(images: Tensor, augment: Augment, uniform: np.ndarray) -> Tensor:
    """Vary a batch.

    Parameters
    ----------
    images : Tensor
        (B, 3, H, W) uint8, on any device.
    augment : Augment
        How far to go.
    uniform : ndarray
        (B, 13) from `draws`.

    Returns
    -------
    Tensor
        (B, 3, H, W), uint8 or float32 in [0, 255].
    """
    draw = dict(zip(_DRAWS, uniform.T, strict=True))
    if augment.channels:
        orders = torch.from_numpy(_ORDERS[(len(_ORDERS) * draw["channels"]).astype(int)]).to(images.device)
        images = images.gather(1, orders[:, :, None, None].expand_as(images))
    if augment.moves:
        images = _move(images, augment, draw)
    if augment.contrast or augment.brightness:
        gain = _column(1 + augment.contrast * _signed(draw["contrast"]), images)
        offset = _column(augment.brightness * _signed(draw["brightness"]), images)
        images = (images * gain + offset).clamp(0, 255)
    return images


def _signed(uniform: np.ndarray) -> np.ndarray:
    return 2 * uniform - 1


def _column(values: np.ndarray, images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1, 1)


def _move(images: Tensor, augment: Augment, draw: dict[str, np.ndarray]) -> Tensor:
    matrix = torch.tensor(_matrices(augment, draw, images.shape[2] / images.shape[3]), dtype=torch.float32)
    grid = F.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    outside = "reflection" if augment.outside == "reflect" else "zeros"
    return F.grid_sample(images.float(), grid, padding_mode=outside, align_corners=False)


def _matrices(augment: Augment, draw: dict[str, np.ndarray], height: float) -> np.ndarray:
    """(B, 2, 3): from places in the new image to places in the old one, both in [-1, 1] from edge to edge.

    `height` is the image's in units of its width.
    """
    wide, high = _crop(augment, draw)
    scale = 1 / (1 + augment.zoom * _signed(draw["zoom"]))
    mirror = np.where(augment.flip & (draw["flip"] < 0.5), -1.0, 1.0)
    turn = np.deg2rad(augment.rotate) * _signed(draw["rotate"])
    turn = turn + augment.quarter_turns * np.pi / 2 * np.floor(4 * draw["quarter"])
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    right, down = np.broadcast_to(augment.shift, 2)
    x = (1 - wide) * _signed(draw["left"]) + 2 * right * _signed(draw["right"])
    y = (1 - high) * _signed(draw["top"]) + 2 * down * _signed(draw["down"])
    rows = [[cos * mirror * wide, -sin * high * height, x], [sin * mirror * wide / height, cos * high, y]]
    return np.array(rows).transpose(2, 0, 1)


def _crop(augment: Augment, draw: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of the part to take, as shares of the image's."""
    if augment.crop is None:
        return np.ones_like(draw["area"]), np.ones_like(draw["area"])
    low, high = augment.crop
    area = low + (high - low) * draw["area"]
    aspect = np.exp(np.log(4 / 3) * _signed(draw["aspect"]))
    return np.minimum(1, np.sqrt(area * aspect)), np.minimum(1, np.sqrt(area / aspect))
