"""The superpixels of an image, as the lime package cuts them."""

from __future__ import annotations

import numpy as np
from skimage.segmentation import quickshift


def superpixels(image: np.ndarray) -> np.ndarray:
    """Return the number, from 0, of each pixel's quickshift superpixel, with the settings of the lime package.

    The normalised image is first scaled to the [0, 1] that a colour space needs.

    Parameters
    ----------
    image : ndarray
        (H, W, C) in any range; of other than three channels, the mean counts.

    Returns
    -------
    ndarray
        (H, W) int.
    """
    image = image if image.shape[-1] == 3 else image.mean(-1, keepdims=True)
    low, high = image.min(), image.max()
    scaled = np.broadcast_to((image - low) / max(high - low, 1e-12), (*image.shape[:2], 3))
    return quickshift(scaled, kernel_size=4, max_dist=200, ratio=0.2, rng=0)
