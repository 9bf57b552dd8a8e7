"""Mosaics: which images, where, and that nothing but the sample, its target, the seed and the split decides."""

from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import adapters
from bench import datasets, models
from bench.datasets import Dataset, Item, Sample
from bench.models import Model
from bench.models.preprocessing import Preprocessing
from bench.mosaics import Mosaics
from bench.problem import Problem
from metrics.mosaic import positive_share

SIDE = 8


class Grey(Dataset):
    """Image i is of grey value i and class i % `classes`, and in pairs of a group; some show class 0 as well."""

    name = "grey"
    where = "embedded"
    class_names = ("a", "b", "c")
    n: int = 30
    classes: int = 3
    both: bool = False

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(f"{i:03d}", i % self.classes, f"g{i // 6}{i % 3}", f"digest {i}", i) for i in range(self.n)]

    def load(self, sample: Sample) -> Item:
        mask = np.ones((SIDE, SIDE), dtype=bool)
        roi = {sample.label: mask, **({0: mask} if self.both and sample.source % 2 else {})}
        return Item(np.full((SIDE, SIDE, 3), sample.source, dtype=np.uint8), roi)


def model(size: tuple[int, int] = (SIDE, SIDE)) -> Model:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    how = Preprocessing(size, (0.0,) * 3, (1 / 255,) * 3, "nearest")
    return Model(name="m", module=module, preprocessing=how, class_names=("a", "b", "c"), architecture="none")


def quarters(image: torch.Tensor, own: np.ndarray) -> list[tuple[int, bool]]:
    """Return for each quarter of one mosaic the image it shows, and whether it is the target's."""
    found = []
    for rows in (slice(4), slice(4, 8)):
        for columns in (slice(4), slice(4, 8)):
            values, mine = image[:, rows, columns].numpy(), own[rows, columns]
            assert np.ptp(values) < 1e-3 and mine.all() == mine.any()
            found.append((round(float(values.mean())), bool(mine.all())))
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_two_of_the_target_and_two_that_do_not_show_it(target: int, both: bool, seed: int) -> None:
    data = Grey(both=both)
    mosaics, of = Mosaics(data, model(), seed), {sample.source: sample for sample in data.samples}
    for sample in data.samples:
        image, own = mosaics.mosaic(sample, target)
        found = quarters(image, own)
        assert sorted(mine for _, mine in found) == [False, False, True, True]
        assert len({of[source].group for source, _ in found}) == 4
        for source, mine in found:
            assert (of[source].label == target) == mine
            assert mine or target not in data.load(of[source]).roi
        assert ((sample.source, True) in found) == (sample.label == target)


def test_partners_and_places_vary_with_sample_target_and_seed() -> None:
    data = Grey()
    found = [
        tuple(quarters(*Mosaics(data, model(), seed).mosaic(sample, target)))
        for seed in (0, 1)
        for sample in data.samples
        for target in range(3)
    ]
    assert len(set(found)) > 0.95 * len(found)
    places = np.array([[mine for _, mine in quarters_] for quarters_ in found])
    partners = {source for quarters_ in found for source, _ in quarters_}
    assert (abs(places.mean(axis=0) - 0.5) < 0.15).all() and partners == set(range(30))


def test_neither_shard_nor_order_nor_number_of_samples_matters() -> None:
    data, net = Grey(), model()
    whole, few = Problem(data, net, 30, 0), Problem(data, net, 5, 0)
    targets = np.arange(16) % 3
    images, own = Mosaics(data, net, 7)(whole.shard(0), targets)
    fewer, own_fewer = Mosaics(data, net, 7)(few.shard(0), targets[:5])
    assert images.shape == (16, 3, SIDE, SIDE) and own.shape == (16, SIDE, SIDE) and own.dtype == bool
    torch.testing.assert_close(fewer, images[:5], rtol=0, atol=0)
    np.testing.assert_array_equal(own_fewer, own[:5])
    for row in (15, 3):
        image, mine = Mosaics(data, net, 7).mosaic(whole.shard(0).samples[row], targets[row])
        torch.testing.assert_close(image, images[row], rtol=0, atol=0)
        np.testing.assert_array_equal(mine, own[row])


@pytest.mark.parametrize(
    ("data", "target"),
    [
        (Grey(classes=1), 0),  # no other class
        (Grey(classes=2), 2),  # no image of the target's class
        (Grey(n=5), 0),  # two of the target's class, but of one group
        (Grey(n=3), 1),
        (Grey(both=True, n=6), 0),
    ],
)
def test_where_the_split_lacks_images_there_is_no_mosaic(data: Grey, target: int) -> None:
    image, own = Mosaics(data, model(), 0).mosaic(data.samples[0], target)
    assert not own.any() and not image.any()


def test_images_are_antialiased_after_the_models_own_preprocessing() -> None:
    class Lines(Grey):
        name = "lines"

        def load(self, sample: Sample) -> Item:
            image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
            image[:, 3] = 8 * sample.source
            return Item(image, {})

    image, _ = Mosaics(Lines(), model(), 0).mosaic(Lines().samples[9], 0)
    corners = [image[0, row, column : column + 4].tolist() for row in (0, 4) for column in (0, 4)]
    # triangles of four pixels, 1 3 3 1, not pairs of pixels
    assert min(np.abs(np.array(corner) - [0, 27, 9, 0]).max() for corner in corners) < 1e-2


def test_any_input_size_is_filled() -> None:
    image, own = Mosaics(Grey(), model((7, 10)), 0).mosaic(Grey().samples[9], 0)
    assert image.shape == (3, 7, 10) and own.shape == (7, 10) and own.any() and not own.all()


def test_nothing_is_read_before_it_is_asked_for_nor_twice() -> None:
    class Counting(Grey):
        name = "counting"

        def load(self, sample: Sample) -> Item:
            loads.append(sample.id)
            return super().load(sample)

    loads: list[str] = []
    data = Counting()
    problem = Problem(data, model(), 30, 0)
    mosaics, shard, targets = Mosaics(data, problem.model, 0), problem.shard(0), np.zeros(16, dtype=int)
    assert not loads
    first = mosaics(shard, targets)
    read = len(loads)
    assert 0 < read <= 16 * 4 + len(data.samples)
    assert mosaics(problem.shard(0), targets.copy())[0] is first[0] and len(loads) == read
    assert not torch.equal(mosaics(shard, targets + 1)[0], first[0])


def test_of_digits_no_other_image_contains_the_target() -> None:
    data = datasets.get("digits[size=60]")
    mosaics = Mosaics(data, model((64, 64)), 0)
    for sample in data.samples[:20]:
        chosen = mosaics.choose(sample, 3, np.random.default_rng(0))
        assert [3 in data.load(s).roi for s in chosen] == [True, True, False, False]


ZEBRAS = "el1.png", "el2.png", "el3.png", "el4.png", "el5.png", "elephant-zebra.jpg"
HORNS = "horn.jpg", "horn1.jpg", "horn2.jpg"


class Photographs(Dataset):
    """Natural images of two classes, zebra and horn."""

    name = "photographs"
    class_names = ("zebra", "horn")

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(n, int(n in HORNS), n, n, n) for n in (*ZEBRAS, *HORNS)]

    def load(self, sample: Sample) -> Item:
        assert self.root
        return Item(np.asarray(Image.open(self.root / sample.source).convert("RGB")), {})


def test_a_class_aware_explainer_finds_its_class_among_photographs_and_a_blind_one_does_not(shared: Path) -> None:
    weights = shared / "data/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    net = models.get("vit_tiny_patch16_224", weights=weights)
    data = Photographs(root=shared / "data/imagenet_samples")
    problem = Problem(data, net, 9, 0)
    shard = problem.shard(0)
    labels = np.array([sample.label for sample in shard.samples])
    images, own = Mosaics(data, net, 0)(shard, labels)
    assert own.mean(axis=(1, 2)).tolist() == [0.5] * 9

    def focus(explainer: str) -> np.ndarray:
        maps = adapters.get(explainer)(net.module, images, np.array([340, 566])[labels])[:, 0].astype(float)
        return np.array([positive_share(*pair) for pair in zip(maps, own, strict=True)])

    assert focus("cdam").mean() > 0.6
    assert abs(focus("rollout").mean() - 0.5) < 0.05
