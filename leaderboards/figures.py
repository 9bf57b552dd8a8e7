"""Thumbnails for the page: images, regions of interest and heat maps as small data URIs."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

SIZE = 128  # pixels, the longer side of a thumbnail
SIGNED, UNSIGNED = "RdBu_r", "inferno"
_OUTLINE = (57, 255, 120)
_PERCENTILE = 99.5  # of the magnitude, shown at full strength: one outlier must not darken the rest


def _resize(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, 3) -> `shape`, averaging when it shrinks and repeating pixels when it grows."""
    mode = "F" if array.ndim == 2 else "RGB"
    data = array.astype(np.float32 if mode == "F" else np.uint8)
    return np.asarray(Image.fromarray(data, mode).resize(shape[::-1], Image.Resampling.BOX))


def _thumbnail_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    scale = SIZE / max(shape[:2])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def image(pixels: np.ndarray) -> np.ndarray:
    """Shrink an image (H, W, 3) uint8 to a thumbnail (h, w, 3) uint8."""
    return _resize(pixels, _thumbnail_shape(pixels.shape))


def outline(thumbnail: np.ndarray, roi: np.ndarray | None) -> np.ndarray:
    """Draw the border of a region (H, W) bool onto a thumbnail (h, w, 3) uint8."""
    if roi is None or not roi.any():
        return thumbnail
    inside = _resize(roi, thumbnail.shape[:2]) >= 0.5
    border = inside & ~ndimage.binary_erosion(inside)
    halo = ndimage.binary_dilation(border) & ~border
    drawn = np.where(halo[..., None], thumbnail // 3, thumbnail)
    drawn[border] = _OUTLINE
    return drawn


def strengths(values: np.ndarray) -> np.ndarray:
    """Scale an array to [-1, 1]: a few of the largest magnitudes are cut off."""
    top = np.percentile(np.abs(values), _PERCENTILE) or np.abs(values).max() or 1.0
    return np.clip(values / top, -1, 1)


def heat_map(pixels: np.ndarray, values: np.ndarray, signed: bool) -> np.ndarray | None:
    """Overlay an attribution map on the grey image.

    Parameters
    ----------
    pixels : ndarray
        (H, W, 3) uint8.
    values : ndarray
        (H', W') float, the map.
    signed : bool
        A diverging colour map centred at 0 whose strength is the magnitude; else a sequential one from the least value.

    Returns
    -------
    ndarray or None
        (h, w, 3) uint8; None if the map is not finite.
    """
    if not np.isfinite(values).all():
        return None
    base = image(pixels)
    grey = np.repeat(base.mean(axis=2, keepdims=True), 3, axis=2) / 255
    values = _resize(values if signed else values - values.min(), base.shape[:2])
    strength = strengths(values)
    if signed:
        colour, alpha = matplotlib.colormaps[SIGNED](0.5 + strength / 2), np.abs(strength)[..., None] ** 0.5
    else:
        colour, alpha = matplotlib.colormaps[UNSIGNED](strength), np.float32(0.7)
    blend = alpha * colour[..., :3] + (1 - alpha) * grey
    return (255 * blend).round().astype(np.uint8)


def data_uri(thumbnail: np.ndarray) -> str:
    """Encode a thumbnail (h, w, 3) uint8 as a WebP data URI."""
    buffer = io.BytesIO()
    Image.fromarray(thumbnail).save(buffer, "WEBP", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def gradient(signed: bool) -> str:
    """Return the colour map as a CSS gradient, for the key."""
    stops = matplotlib.colormaps[SIGNED if signed else UNSIGNED](np.linspace(0, 1, 9))
    return f"linear-gradient(90deg, {', '.join(matplotlib.colors.to_hex(stop) for stop in stops)})"
