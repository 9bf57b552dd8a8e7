"""Handwritten digits among clutter: a small, real localization task that needs no download."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from bench.datasets.base import Item
from bench.datasets.drawn import DrawnDataset, shuffled

CANVAS = 64
CELL = 16  # four by four cells of one digit or one decoy each at most
INK = 64  # of 255: fainter ink does not widen the ROI
BACKGROUND = (20, 90)

_SPLIT_OF_TENTH = ("train",) * 7 + ("val",) + ("test",) * 2


@cache
def originals() -> dict[str, list[np.ndarray]]:
    """Return for each split and digit the original digits, (n, 8, 8) uint8.

    A digit's split follows from the hash of its pixels, so the splits are disjoint, equal digits stay
    together, and nothing depends on the order of the file. About 70, 10 and 20 % go to train, val and test.
    """
    bunch = load_digits()
    pixels = (bunch.images * 255 // 16).astype(np.uint8)
    tenths = np.array([int(hashlib.sha256(digit.tobytes()).hexdigest(), 16) % 10 for digit in pixels])
    split = np.array(_SPLIT_OF_TENTH)[tenths]
    return {s: [pixels[(split == s) & (bunch.target == d)] for d in range(10)] for s in set(_SPLIT_OF_TENTH)}


class Digits(DrawnDataset):
    """Two to four handwritten digits of distinct classes per 64 x 64 RGB image, one ROI for each.

    The digits are scikit-learn's `load_digits` (8 x 8), enlarged twofold, in random colours in random cells of
    a 4 x 4 grid. Decoys stand in some of the other cells: digits whose 2 x 2 blocks are shuffled, of the same
    size, colours and contrast. Strokes and noise fill the background, so neither intensity nor edges nor the
    image's centre tells where the digits are.

    A ROI is the filled bounding box of a digit's ink. A sample's label is one of the classes present:
    image ``i`` certainly shows ``i % 10``, its label; the other classes are drawn at random. Only integers
    are drawn and computed, each image from its own seed, so that the same image comes out everywhere.

    Parameters
    ----------
    split : {"train", "val", "test"}
        The three show different originals.
    seed : int
        Another seed, another set of images of the same originals.
    """

    name = "digits"
    version = "1"
    class_names = tuple("0123456789")
    licence: ClassVar[str] = "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998)"
    counts: ClassVar[str] = "as many as asked for (`size`), from 1,797 originals"
    splitting: ClassVar[str] = "by original: about 70, 10 and 20 % of them, by the hash of their pixels"
    labelling: ClassVar[str] = "one of the two to four digits in the image"
    roi_rule: ClassVar[str] = "the filled bounding box of each digit's ink"
    faults: ClassVar[str] = "digits of 8 x 8 pixels enlarged twofold: coarse"
    reference = "https://doi.org/10.24432/C50P49"

    def draw(self, index: int) -> Item:
        """Draw image `index`; what `load` does, without a sample."""
        seed = [self.seed, self.splits.index(self.split), index]
        return _draw(np.random.Generator(np.random.PCG64(seed)), index % 10, originals()[self.split])


def _draw(rng: np.random.Generator, label: int, pool: list[np.ndarray]) -> Item:
    """Draw one image that shows `label`, from the original digits in `pool`."""
    others = [int(d) for d in shuffled(rng, 10) if d != label]
    classes = [label, *others[: rng.integers(1, 4)]]
    decoys = others[: rng.integers(1, 4)]
    cells = shuffled(rng, (CANVAS // CELL) ** 2).tolist()
    canvas = _background(rng)
    for digit in decoys:
        _paste(rng, canvas, _scrambled(rng, _pick(rng, pool[digit])), cells.pop())
    roi = {d: _paste(rng, canvas, _pick(rng, pool[d]), cells.pop()) for d in classes}
    noise = rng.integers(-10, 11, (CANVAS, CANVAS, 3))
    image = np.clip(np.asarray(canvas).astype(np.int64) + noise, 0, 255).astype(np.uint8)
    return Item(image, dict(sorted(roi.items())))


def _pick(rng: np.random.Generator, digits: np.ndarray) -> np.ndarray:
    return digits[rng.integers(len(digits))]


def _scrambled(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Shuffle the sixteen 2 x 2 blocks of a digit (8, 8): the same ink, no digit."""
    blocks = digit.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 2, 2)[shuffled(rng, 16)]
    return blocks.reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)


def _background(rng: np.random.Generator) -> Image.Image:
    """Smooth colour clouds with a few straight and curved strokes."""
    clouds = rng.integers(*BACKGROUND, (5, 5, 3)).astype(np.uint8)
    canvas = Image.fromarray(clouds).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 7)):
        x0, x1 = sorted(rng.integers(-8, CANVAS + 8, 2).tolist())
        y0, y1 = rng.integers(0, CANVAS, 2).tolist()
        colour, width = _colour(rng), int(rng.integers(1, 3))
        if rng.integers(2):
            pen.line((x0, y0, x1, y1), colour, width)
        else:
            start = int(rng.integers(360))
            pen.arc((x0, min(y0, y1), x1, max(y0, y1)), start, start + 150, colour, width)
    return canvas


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """One RGB colour for a digit, a decoy or a stroke: all come from the same range."""
    red, green, blue = rng.integers(120, 256, 3).tolist()
    return red, green, blue


def _paste(rng: np.random.Generator, canvas: Image.Image, digit: np.ndarray, cell: int) -> np.ndarray:
    """Ink a digit (8, 8) into a cell of the canvas; return the filled bounding box of its ink (H, W) bool."""
    row, column = divmod(cell, CANVAS // CELL)
    left, top = column * CELL, row * CELL
    ink = Image.fromarray(digit).resize((CELL, CELL), Image.Resampling.BICUBIC)
    canvas.paste(_colour(rng), (left, top), ink)
    rows, columns = np.nonzero(np.asarray(ink) >= INK)
    mask = np.zeros((CANVAS, CANVAS), bool)
    mask[top + rows.min() : top + rows.max() + 1, left + columns.min() : left + columns.max() + 1] = True
    return mask
