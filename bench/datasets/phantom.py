"""Synthetic chest radiographs whose evidence is known: findings to be read, and a burnt-in marker beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pydantic import Field

from bench.datasets.base import Item
from bench.datasets.drawn import DrawnDataset, shuffled

CANVAS = 96
FINE = 2  # shapes are drawn at this multiple of the canvas, then reduced
UNIT = 1000  # anatomy is laid out on a canvas of this side
VISIBLE = 4  # grey levels of 255: what changes a pixel by less is not part of the finding's mask
NORMAL, NODULE, INFILTRATE, EFFUSION = range(4)

Mask = np.ndarray
Point = tuple[int, int]
Side = Literal["right", "left"]  # the patient's: the right lung is at the left of the image

BODY: tuple[Point, ...] = (
    (405, -80), (398, 40), (330, 105), (190, 140), (75, 205), (25, 310), (45, 420), (80, 560), (90, 760), (95, 1080),
    (905, 1080), (910, 760), (920, 560), (955, 420), (975, 310), (925, 205), (810, 140), (670, 105), (602, 40),
    (595, -80),
)  # fmt: skip
LUNGS: dict[str, tuple[Point, ...]] = {
    "right": (
        (350, 125), (410, 190), (428, 320), (425, 470), (418, 620), (405, 715), (330, 690), (245, 705), (190, 755),
        (142, 850), (138, 700), (150, 550), (175, 400), (215, 270), (275, 165),
    ),
    "left": (
        (650, 125), (725, 165), (785, 270), (825, 400), (850, 550), (862, 700), (860, 860), (810, 780), (750, 735),
        (670, 730), (600, 745), (585, 620), (575, 470), (572, 320), (590, 190),
    ),
}  # fmt: skip
HEART: tuple[Point, ...] = (
    (440, 500), (510, 455), (585, 480), (650, 560), (705, 650), (722, 740), (640, 800), (500, 800), (420, 740),
    (408, 610),
)  # fmt: skip
MEDIASTINUM: tuple[Point, ...] = (
    (455, -60), (440, 150), (425, 260), (432, 400), (430, 600), (430, 1060), (570, 1060), (580, 600), (585, 400),
    (612, 320), (590, 240), (560, 150), (545, -60),
)  # fmt: skip
HILA: dict[str, Point] = {"right": (405, 450), "left": (597, 430)}

GLYPHS: tuple[str, ...] = (  # the lead letters L, R, A, S, in rows of five
    "10000 10000 10000 10000 10000 10000 11111",
    "11110 10001 10001 11110 10100 10010 10001",
    "00100 01010 10001 10001 11111 10001 10001",
    "01111 10000 10000 01110 00001 00001 11110",
)
GLYPH_SCALE = 2
GLYPH_HEIGHT, GLYPH_WIDTH = 7 * GLYPH_SCALE + 2, 5 * GLYPH_SCALE + 2
GRID = 4  # burnt-in glyphs stand at multiples of this many pixels
BORDER = 5  # at most so many pixels from the border of the image


class Phantom(DrawnDataset):
    """Chest-radiograph phantoms of 96 x 96 px: normal, nodule, infiltrate, effusion; a marker burnt in beside them.

    Every image is drawn from its own seed: body, lungs, heart, mediastinum, spine, ribs, clavicles, vessels,
    diaphragm, then a finding or two, exposure, noise, and burnt-in signs. Image ``i`` has the label ``i % 4``; one
    in four of the images with a finding has a second one in the other lung. A nodule stands anywhere in a lung, an
    infiltrate is a patchy cloud somewhere in a lung, an effusion fills a lung from its base up to a meniscus; side,
    size and density are drawn at random. All are fainter than bones, heart and diaphragm.

    One of four lead letters is burnt in near the border, between two scrambled ones; here it says nothing about the
    class. Regions: ``finding``, per class present the pixels that it changes by at least 4 of 255 grey levels;
    ``marker``, the letter's box, for every class. A normal image has no finding, and no ROI for it.

    Only integers are drawn; what is computed from them is the same on every machine.

    Parameters
    ----------
    contrast : float
        Factor on the density of the findings.
    remove : {"finding", "marker"}, optional
        Draw the very same images without their findings, or without their marker.
    move : {"finding", "marker"}, optional
        Draw the very same images with the same findings in the other lung, or the same marker at another place.
    swap : {"marker"}, optional
        Draw the very same images with the letter of the next class in the place of the marker.
    """

    name = "phantom"
    version = "1"
    class_names = ("normal", "nodule", "infiltrate", "effusion")
    regions: ClassVar[tuple[str, ...]] = ("finding", "marker")
    shipped_model: ClassVar[str] = "phantom_finding"
    licence: ClassVar[str] = "that of this package: drawn, not photographed"
    counts: ClassVar[str] = "As many as asked for with `size`, a quarter of each class."
    splitting: ClassVar[str] = "Every image is a patient of its own, drawn from its split, the seed and its index."
    labelling: ClassVar[str] = "The label decides what is drawn; of two findings, it is the one drawn first."
    roi_rule: ClassVar[str] = (
        "finding: per class present, the pixels that the finding changes by at least 4 of 255 grey levels. "
        "marker: for every class, the box of the burnt-in letter."
    )
    faults: ClassVar[str] = (
        "No radiograph: four kinds of look, one projection, no implants, no other diseases. What a method scores here "
        "says whether it finds known evidence, not how it does on patients."
    )

    contrast: Annotated[float, Field(ge=0, le=4)] = 1.0
    remove: Literal["finding", "marker"] | None = None
    move: Literal["finding", "marker"] | None = None
    swap: Literal["marker"] | None = None

    def draw(self, index: int) -> Item:
        """Draw image `index`; what `load` does, without a sample."""
        seed = [self.seed, self.splits.index(self.split), index]
        plan = self._plan(_stream(seed, "plan"), index % len(self.class_names))
        scene = _scene(_stream(seed, "anatomy"))
        grey, masks = self._with_findings(scene, plan, seed)
        marker, covered = self._burn_in(grey, plan, seed)
        visible = {finding: mask & ~covered for finding, mask in sorted(masks.items())}
        return self._item(grey, {finding: mask for finding, mask in visible.items() if mask.any()}, marker)

    def _plan(self, rng: np.random.Generator, label: int) -> Plan:
        """Decide which findings and which letter image `label` gets."""
        return Plan(findings(rng, label), int(rng.integers(len(GLYPHS))))

    def _with_findings(self, scene: Scene, plan: Plan, seed: list[int]) -> tuple[np.ndarray, dict[int, Mask]]:
        """Return the exposed image (H, W) uint8 and each finding's mask."""
        if self.remove == "finding":
            return scene.expose(scene.density), {}
        look, place = _stream(seed, "finding"), _stream(seed, "place", self.move == "finding")
        first = int(look.integers(2)) ^ (self.move == "finding")
        strength = round(self.contrast * 256)
        layers = {}
        for k, finding in enumerate(plan.findings):
            side: Side = "left" if first ^ k else "right"
            layers[finding] = _DRAW[finding](scene.lungs[side], side, look, place) * strength // 256
        total = sum(layers.values(), scene.density)
        grey = scene.expose(total)
        masks = {
            finding: np.abs(grey.astype(np.int16) - scene.expose(total - layer)) >= VISIBLE
            for finding, layer in layers.items()
        }
        return grey, masks

    def _burn_in(self, grey: np.ndarray, plan: Plan, seed: list[int]) -> tuple[Mask, Mask]:
        """Burn decoys and marker into an image; return the marker's box and all that is covered, (H, W) bool."""
        rng = _stream(seed, "marker")
        corners, free = [], _places()
        for _ in range(3):
            corners.append(_pick(rng, free))
            free = _apart(free, corners[-1])
        if self.move == "marker":
            corners[-1] = _pick(_stream(seed, "place", True), free)
        inks = rng.integers(170, 246, 3).tolist()
        signs = [_scrambled(rng), _scrambled(rng), _glyph((plan.glyph + (self.swap == "marker")) % len(GLYPHS))]
        covered, marker = np.zeros((2, *grey.shape), bool)
        for corner, ink, sign in list(zip(corners, inks, signs, strict=True))[: 2 if self.remove == "marker" else 3]:
            _stamp(grey, sign, corner, ink)
            covered[_inside(corner)] = True
        marker[_inside(corners[-1])] = self.remove != "marker"
        return marker, covered

    def _item(self, grey: np.ndarray, masks: dict[int, Mask], marker: Mask) -> Item:
        markers = dict.fromkeys(range(len(self.class_names)), marker) if marker.any() else {}
        return Item(np.repeat(grey[:, :, None], 3, axis=2), masks, {"finding": masks, "marker": markers})


class Plan(NamedTuple):
    """What is to be seen: the findings' classes, and the class whose letter is burnt in."""

    findings: tuple[int, ...]
    glyph: int


def findings(rng: np.random.Generator, label: int) -> tuple[int, ...]:
    """`label`, and in a quarter of the images with a finding another one."""
    second, both = int(rng.integers(1, EFFUSION)), int(rng.integers(4)) == 0
    if label == NORMAL:
        return ()
    other = 1 + (label - 1 + second % 2 + 1) % EFFUSION
    return (label, other) if both else (label,)


_PURPOSES = ("plan", "anatomy", "finding", "place", "marker")


def _stream(seed: list[int], purpose: str, again: bool = False) -> np.random.Generator:
    """An image's random numbers for one purpose: changing one thing leaves the others as they are."""
    return np.random.Generator(np.random.PCG64([*seed, _PURPOSES.index(purpose), again]))


# Anatomy ------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A patient without findings: densities (H, W) int32, the lungs' fields (H, W) int32 in 0..255, how to expose."""

    density: np.ndarray
    lungs: dict[Side, np.ndarray]
    gain: int
    offset: int
    noise: np.ndarray

    def expose(self, density: np.ndarray) -> np.ndarray:
        """Return the radiograph (H, W) uint8: a film's saturating curve, then noise."""
        level = np.clip(density * self.gain // 256 + self.offset, 0, 1023)
        return np.clip((_film()[level] + self.noise) >> 3, 0, 255).astype(np.uint8)


@cache
def _film() -> np.ndarray:
    """Grey level times 8 of a density 0..1023: steep in the middle, flat at both ends."""
    x = np.minimum(np.arange(1024, dtype=np.int64), 400)
    return (8 * 235 * (x * x * (1200 - 2 * x)) // 400**3 * 2 + 8 * 235 * x // 400) // 3


class _Pose:
    """Where a patient's anatomy comes to lie: size, shift and lean, drawn at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.scale = np.array([rng.integers(920, 1050), rng.integers(920, 1070)])
        self.shift = np.array([rng.integers(-35, 36), rng.integers(-30, 31)])
        self.lean = int(rng.integers(-50, 51))

    def __call__(self, points: object, jitter: int = 0) -> np.ndarray:
        """Bring points (..., 2) in `UNIT` to the image, each moved by up to `jitter`."""
        points = np.array(points) - UNIT // 2
        if jitter:
            points += self.rng.integers(-jitter, jitter + 1, points.shape)
        points[..., 0] += points[..., 1] * self.lean // UNIT
        return points * self.scale // 1000 + (UNIT // 2 + self.shift)


@cache
def _spline_weights(steps: int = 4) -> np.ndarray:
    """Catmull-Rom weights (steps, 4), to be divided by 2 * steps**3."""
    k, n = np.arange(steps)[:, None], steps
    terms = (-(k**3) + 2 * k * k * n - k * n * n, 3 * k**3 - 5 * k * k * n + 2 * n**3,
             -3 * k**3 + 4 * k * k * n + k * n * n, k**3 - k * k * n)  # fmt: skip
    return np.concatenate(terms, axis=1)


def _outline(points: np.ndarray) -> list[Point]:
    """The closed smooth curve through points (n, 2) in `UNIT`, in fine pixels."""
    weights = _spline_weights()
    around = points[(np.arange(len(points))[:, None] + (-1, 0, 1, 2)) % len(points)]
    curve = (weights[None, :, :, None] * around[:, None]).sum(2).reshape(-1, 2)
    return _to_pixels(curve // (2 * len(weights) ** 3))


def _bows(points: np.ndarray, steps: int = 8) -> list[list[Point]]:
    """The quadratic Bezier curves of points (n, 3, 2) in `UNIT`: start, bend, end; in fine pixels."""
    k = np.arange(steps + 1)[:, None]
    start, bend, end = points.swapaxes(0, 1)[:, :, None]
    curves = ((steps - k) ** 2 * start + 2 * k * (steps - k) * bend + k * k * end) // steps**2
    return [_to_pixels(curve) for curve in curves]


def _to_pixels(points: np.ndarray) -> list[Point]:
    return list(map(tuple, (points * (CANVAS * FINE) // UNIT).tolist()))


class _Layer:
    """A sheet to draw on, in fine pixels; grey level = density."""

    def __init__(self) -> None:
        self.sheet = Image.new("L", (CANVAS * FINE,) * 2)
        self.pen = ImageDraw.Draw(self.sheet)

    def density(self, blur: float = 0) -> np.ndarray:
        """Return (H, W) int32 in 0..255, blurred by a Gaussian of so many pixels."""
        image = self.sheet.reduce(FINE)
        return np.asarray(image.filter(ImageFilter.GaussianBlur(blur)) if blur else image).astype(np.int32)


def _scene(rng: np.random.Generator) -> Scene:
    """Draw a patient without findings."""
    pose = _Pose(rng)
    body = _shape(1, pose(BODY, 8))
    heart = _shape(1, pose(_grown(HEART, rng), 8))
    middle = _shape(1.5, pose(MEDIASTINUM, 6))
    lowered = int(rng.integers(-70, 120))
    air = _shape(0.8, *(pose(_lowered(lung, lowered), 7) for lung in LUNGS.values()))
    open_air = air * (255 - heart) // 255
    tissue = 150 + _depth(rng)
    density = body * (tissue - open_air * int(rng.integers(88, 104)) // 255) // 255
    density += middle * 36 // 255 + heart * 24 // 255
    density += _vessels(rng, pose) * open_air // 255
    density += _spine(rng, pose) + _bones(rng, pose) * body // 255
    noise = rng.integers(-40, 41, (4, CANVAS, CANVAS), np.int8).sum(0, np.int32) * int(rng.integers(60, 110)) // 100
    right = np.arange(CANVAS) < pose([(500, 500)])[0, 0] * CANVAS // UNIT
    lungs: dict[Side, np.ndarray] = {"right": open_air * right, "left": open_air * ~right}
    return Scene(density, lungs, int(rng.integers(300, 360)), int(rng.integers(-6, 22)), noise)


def _shape(blur: float, *outlines: np.ndarray) -> np.ndarray:
    layer = _Layer()
    for outline in outlines:
        layer.pen.polygon(_outline(outline), 255)
    return layer.density(blur)


def _grown(points: tuple[Point, ...], rng: np.random.Generator) -> np.ndarray:
    """A heart that is up to a tenth smaller or larger."""
    return (np.array(points) - (560, 640)) * int(rng.integers(90, 112)) // 100 + (560, 640)


def _lowered(points: tuple[Point, ...], percent: int) -> np.ndarray:
    """A lung that was breathed in more or less: its lower half is longer by a quarter of so many percent."""
    lung = np.array(points)
    lung[:, 1] += np.maximum(lung[:, 1] - 450, 0) * percent // 400
    return lung


def _depth(rng: np.random.Generator) -> np.ndarray:
    """Soft tissue (H, W): uneven, thicker below the diaphragm and at the flanks."""
    clouds = Image.fromarray(rng.integers(0, 256, (5, 5)).astype(np.uint8))
    soft = np.asarray(clouds.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)).astype(np.int32) * 26 // 256
    y = np.arange(CANVAS)[:, None] * UNIT // CANVAS
    return soft + np.maximum(y - 500, 0) * 50 // 500


_VERTEBRA = ((466, 0), (534, 0), (528, 29), (534, 50), (466, 50), (472, 29), (500, 15), (500, 54))
_WINDPIPE = ((497, -40), (496, 120), (490, 290))


def _spine(rng: np.random.Generator, pose: _Pose) -> np.ndarray:
    """Vertebrae with their discs and spinous processes, and the windpipe, darker than what is around it."""
    bone, air = _Layer(), _Layer()
    down = np.arange(-20, UNIT + 60, int(rng.integers(58, 70)))
    for vertebra in pose(np.array(_VERTEBRA) + np.stack([0 * down, down], axis=1)[:, None]):
        corners = _to_pixels(vertebra)
        bone.pen.polygon(corners[:6], 24)
        bone.pen.line(corners[6:], 34, 3)
    air.pen.line(_bows(pose(_WINDPIPE, 8)[None])[0], 34, 8)
    return bone.density(0.6) - air.density(1.0)


def _bones(rng: np.random.Generator, pose: _Pose) -> np.ndarray:
    """Ribs, clavicles and shoulder blades: shafts with denser edges."""
    layer = _Layer()
    start, step, slope = int(rng.integers(85, 125)), int(rng.integers(72, 84)), int(rng.integers(70, 130))
    bright = int(rng.integers(30, 42))
    y, out = start + np.arange(10) * step, np.minimum(250 + 45 * np.arange(10), 405)
    back = np.stack([[0 * y + 45, out * 5 // 8, out], [y, y - 45, y + slope]]).transpose(2, 1, 0)
    front = np.stack([[out, out * 7 // 8, 0 * y + 120], [y + slope - 50, y + slope + 70, y + slope + 130]])
    blade, collar = [[330, 170], [400, 300], [350, 440]], [[35, 190], [170, 175], [390, 120]]
    half = np.concatenate([[blade], front.transpose(2, 1, 0)[2:8], back, [collar]])
    for side in (-1, 1):
        lines = _bows(pose(half * (side, 1) + (500, 0), 7))
        layer.pen.line(lines[0], bright * 2 // 3, 2)
        for line in lines[1:7]:
            _shaft(layer.pen, line, 5, bright * 5 // 9)
        for line in lines[7:17]:
            _shaft(layer.pen, line, 5, bright)
        _shaft(layer.pen, lines[17], 6, bright + 12)
    return layer.density()


def _shaft(pen: ImageDraw.ImageDraw, line: list[Point], width: int, density: int) -> None:
    pen.line(line, density, width)
    pen.line(line, density * 2 // 3, width - 3)


def _vessels(rng: np.random.Generator, pose: _Pose, count: int = 11) -> np.ndarray:
    """Branching vessels that thin out from the hila, some seen end-on."""
    layer = _Layer()
    for hilum, out in zip(HILA.values(), ((-1, 1), (1, 1)), strict=True):
        reach = np.stack([rng.integers(40, 250, count), rng.integers(-270, 330, count)], axis=1) * out
        twig = reach * ((1, 2),) // ((2, 2),) + rng.integers(-60, 61, (count, 2))
        tree = np.stack([0 * reach, reach // (2, 3), reach, twig], axis=1) + hilum
        tree = pose(tree, 18)
        for line, end in zip(_bows(tree[:, :3]), _to_pixels(tree[:, 3]), strict=True):
            for part, width, density in ((line[5:], 1, 22), (line[2:6], 2, 26), (line[:3], 3, 32)):
                layer.pen.line(part, density, width)
            layer.pen.line([line[4], end], 20, 1)
        dots = np.stack([rng.integers(0, 110, 6), rng.integers(-60, 61, 6)], axis=1) * out
        dots[0] = 0
        for k, (x, y) in enumerate(_to_pixels(pose(hilum + dots, 8))):
            width, height, density = (6, 11, 34) if k == 0 else (1 + k % 2, 1 + k % 2, 30 + 4 * k)
            layer.pen.ellipse((x - width, y - height, x + width, y + height), density)
    return layer.density(0.5)


# Findings: densities (H, W) int32 ---------------------------------------------------------------------------------


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Rows (H, 1) and columns (1, W) in 1/16 px."""
    return np.arange(CANVAS)[:, None] * 16, np.arange(CANVAS)[None] * 16


def _pick(rng: np.random.Generator, places: np.ndarray) -> tuple[int, int]:
    row, column = places[rng.integers(len(places))].tolist()
    return row, column


def _deep(lung: np.ndarray, margin: int) -> np.ndarray:
    """The places (n, 2) in a lung with lung above, below, left and right of them at a distance of `margin` px."""
    m, rest = margin, slice(margin, -margin)
    least = np.minimum(np.minimum(lung[: -2 * m, rest], lung[2 * m :, rest]),
                       np.minimum(lung[rest, : -2 * m], lung[rest, 2 * m :]))  # fmt: skip
    return np.argwhere(least > 200) + m


def _nodule(lung: np.ndarray, side: Side, look: np.random.Generator, place: np.random.Generator) -> np.ndarray:
    """Return the chords of two or three overlapping balls of 3.5 to 7 px, somewhere in the lung."""
    row, column = _pick(place, _deep(lung, 3))
    radius, density = int(look.integers(56, 113)), int(look.integers(46, 64))
    y, x = _grid()
    chord = np.zeros(lung.shape)
    for k in range(3):
        r = radius * (100 - 22 * k) // 100
        dy, dx = (look.integers(-radius // 2, radius // 2 + 1, 2) * min(k, 1)).tolist()
        square = r * r - (y - 16 * row - dy) ** 2 - (x - 16 * column - dx) ** 2
        chord = np.maximum(chord, np.sqrt(np.maximum(square, 0) / (radius * radius)))
    return (density * chord).astype(np.int32)


def _infiltrate(lung: np.ndarray, side: Side, look: np.random.Generator, place: np.random.Generator) -> np.ndarray:
    """Return a patchy cloud with radii of 13 to 22 px, within the lung."""
    row, column = _pick(place, _deep(lung, 5))
    height, width, density = int(look.integers(13, 23)) * 16, int(look.integers(13, 23)) * 16, look.integers(62, 84)
    y, x = _grid()
    far = (y - 16 * row) ** 2 * 256 // height**2 + (x - 16 * column) ** 2 * 256 // width**2
    coarse = Image.fromarray(look.integers(0, 256, (14, 14)).astype(np.uint8))
    cloud = np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)).astype(np.int32)
    patches = np.clip((cloud - 70) * 2, 0, 255) * np.clip(2 * (256 - far), 0, 255) // 255
    return patches * lung // 255 * int(density) // 255


def _effusion(lung: np.ndarray, side: Side, look: np.random.Generator, place: np.random.Generator) -> np.ndarray:
    """Return fluid from the base of the lung up to a level that rises towards the flank."""
    inside = np.argwhere(lung > 128)
    low, (left, right) = int(inside[:, 0].max()), (int(inside[:, 1].min()), int(inside[:, 1].max()))
    level = low - int(look.integers(15, 29))
    x = np.arange(CANVAS)
    across = np.clip((x - left if side == "left" else right - x) * 256 // (right - left), 0, 256)
    meniscus = 16 * level + 10 * 16 - across * across * int(look.integers(12, 19)) * 16 // 256**2
    depth = np.clip((_grid()[0] - meniscus[None]) * 4, 0, 255)
    return depth * lung // 255 * int(look.integers(58, 80)) // 255


_DRAW = {NODULE: _nodule, INFILTRATE: _infiltrate, EFFUSION: _effusion}


# Burnt-in signs ---------------------------------------------------------------------------------------------------


@cache
def _places() -> np.ndarray:
    """Top and left (n, 2) of every place near the border where a glyph may stand."""
    tops, lefts = np.arange(1, CANVAS - GLYPH_HEIGHT, GRID), np.arange(1, CANVAS - GLYPH_WIDTH, GRID)
    grid = np.array([(top, left) for top in tops for left in lefts])
    gap = np.min([grid, (CANVAS - GLYPH_HEIGHT, CANVAS - GLYPH_WIDTH) - grid], axis=(0, 2))
    return grid[gap <= BORDER]


def _apart(places: np.ndarray, other: tuple[int, int]) -> np.ndarray:
    """The places whose glyph would not touch one at `other`."""
    distance = np.abs(places - other)
    return places[(distance[:, 0] > GLYPH_HEIGHT) | (distance[:, 1] > GLYPH_WIDTH)]


@cache
def _glyph(label: int) -> np.ndarray:
    """(7, 5) of 0 and 1."""
    return np.array([[int(dot) for dot in row] for row in GLYPHS[label].split()])


def _scrambled(rng: np.random.Generator) -> np.ndarray:
    """A letter whose dots are shuffled: the same ink, no letter."""
    dots = _glyph(int(rng.integers(len(GLYPHS))))
    return dots.reshape(-1)[shuffled(rng, dots.size)].reshape(dots.shape)


def _inside(corner: tuple[int, int]) -> tuple[slice, slice]:
    top, left = corner
    return slice(top, top + GLYPH_HEIGHT), slice(left, left + GLYPH_WIDTH)


def _stamp(grey: np.ndarray, glyph: np.ndarray, corner: tuple[int, int], ink: int) -> None:
    """Burn a glyph into an image: bright dots in a dark box."""
    dots = glyph.repeat(GLYPH_SCALE, 0).repeat(GLYPH_SCALE, 1)
    grey[_inside(corner)] = np.pad(dots, 1) * (ink - ink // 8) + ink // 8
