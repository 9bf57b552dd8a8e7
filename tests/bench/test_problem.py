"""Samples, shards and the leave-one-out prior."""

from functools import cached_property

import numpy as np
import pytest
import torch
from torch import nn

from bench import datasets
from bench.datasets import Dataset, Item, Sample
from bench.models import Model
from bench.models.preprocessing import Preprocessing
from bench.problem import SHARD, Problem, portable
from explainer_bench import RequestError


class Squares(Dataset):
    """One square per image, the first two images of one group."""

    name = "squares"
    class_names = ("a", "b")
    where = "embedded"
    n: int = 40

    @cached_property
    def samples(self) -> list[Sample]:
        return [Sample(f"{i:03d}", i % 2, f"g{max(i, 1)}", f"digest {i}", i) for i in range(self.n)]

    def load(self, sample: Sample) -> Item:
        mask = np.zeros((8, 8), dtype=bool)
        mask[sample.source % 8, 0] = True
        return Item(np.full((8, 8, 3), sample.source, dtype=np.uint8), {sample.label: mask})


def model() -> Model:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    how = Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3, "nearest")
    return Model(name="m", module=module, preprocessing=how, class_names=("a", "b"), architecture="none")


def problem(samples: int = 40, seed: int = 0, n: int = 40) -> Problem:
    return Problem(Squares(n=n), model(), samples, seed)


def test_more_samples_continue_the_same_order() -> None:
    ids = [sample.id for sample in problem(40).samples]
    assert [sample.id for sample in problem(7).samples] == ids[:7]
    assert sorted(ids) == [sample.id for sample in Squares().samples]
    assert ids != sorted(ids)
    assert [sample.id for sample in problem(40, seed=1).samples] != ids


def test_shards_hold_every_sample_once() -> None:
    whole = problem(40)
    shards = list(whole.shards(range(whole.n_shards)))
    assert [len(shard.samples) for shard in shards] == [SHARD, SHARD, 40 - 2 * SHARD]
    assert [s for shard in shards for s in shard.samples] == whole.samples
    for shard in shards:
        expected = torch.tensor([sample.source / 255 for sample in shard.samples])
        torch.testing.assert_close(shard.inputs[:, 0, 0, 0], expected)


def test_a_roi_is_that_of_the_class_or_empty() -> None:
    shard = problem().shard(0)
    labels = np.array([sample.label for sample in shard.samples])
    assert (shard.roi(labels).sum((1, 2)) == 1).all()
    assert not shard.roi(1 - labels).any()


def test_seeds_follow_the_sample_and_not_its_place() -> None:
    def seeds(samples: int, seed: int) -> dict[str, int]:
        part = problem(samples)
        shards = part.shards(range(part.n_shards))
        return {s.id: v for shard in shards for s, v in zip(shard.samples, shard.seeds(seed), strict=True)}

    few, many = seeds(5, 0), seeds(40, 0)
    assert few.items() <= many.items()
    assert len(set(many.values())) == 40
    assert not set(many.values()) & set(seeds(40, 1).values())


def test_the_prior_leaves_the_whole_group_out() -> None:
    whole = problem(3)
    masks = {sample.id: whole.dataset.load(sample).roi[sample.label] for sample in whole.dataset.samples}
    for index in range(whole.n_shards):
        shard = whole.shard(index)
        for sample, prior in zip(shard.samples, whole.roi_prior(shard), strict=True):
            others = [masks[other.id] for other in whole.dataset.samples if other.group != sample.group]
            np.testing.assert_allclose(prior, np.mean(others, axis=0), atol=1e-6)


@pytest.mark.parametrize(("masks", "left"), [("{}/masks", "masks"), ("drawn/by ann", "drawn/by ann")])
def test_a_name_says_nothing_of_the_machine(tmp_path, masks: str, left: str) -> None:
    names = set()
    for home in (tmp_path / "ann", tmp_path / "bob"):
        dataset = datasets.get("folder", root=home, masks=masks.format(home), groups=f"{home}/patients.csv")
        assert portable(dataset).params | {"root": None} == portable(dataset).params
        assert (portable(dataset).masks, portable(dataset).groups) == (left, "patients.csv")
        names.add(portable(dataset).spec)
    assert len(names) == 1


def test_too_little_data_is_said() -> None:
    with pytest.raises(RequestError, match="no samples"):
        problem(n=0)
    alone = problem(n=1)
    with pytest.raises(RequestError, match="too few ROIs"):
        alone.roi_prior(alone.shard(0))
