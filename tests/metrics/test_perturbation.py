"""The perturbation engine."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from explainer_bench import RequestError
from metrics import Samples
from metrics.perturbation import IMPUTERS, in_batches, patch_grid, patch_ranks, patch_sums

Make = Callable[..., Samples]


def test_imputers_are_of_each_image_alone() -> None:
    inputs = torch.tensor([[[[0.0, 1], [2, 3]], [[4, 5], [6, 7]]], [[[-9, 0], [0, 1]], [[8, 8], [8, 8]]]])
    assert IMPUTERS["mean"](inputs).squeeze().tolist() == [[1.5, 5.5], [-2, 8]]
    assert IMPUTERS["black"](inputs).squeeze().tolist() == [0, -9]


def test_patch_sums_run_in_raster_order(make_samples: Make) -> None:
    maps = np.arange(5 * 256, dtype=float).reshape(5, 16, 16)
    sums = patch_sums(make_samples(maps=maps, patch=(8, 4)))
    assert sums.shape == (5, 8)
    assert sums[1, 5] == maps[1, 8:16, 4:8].sum()


def test_upsampled_tokens_tie_exactly(make_samples: Make) -> None:
    maps = np.full((5, 16, 16), 0.1)
    assert (np.ptp(patch_sums(make_samples(maps=maps)), axis=1) == 0).all()


def test_ranks_follow_the_map_and_ties_favour_no_place(make_samples: Make) -> None:
    n = 2000
    maps = np.zeros((n, 16, 16))
    maps[:, 4:8, 8:12] = 1
    ranks = patch_ranks(make_samples(n, maps=maps))
    assert (np.sort(ranks, axis=1) == np.arange(16)).all()
    assert (ranks[:, 6] == 0).all()
    mean_rank = np.delete(ranks, 6, axis=1).mean(axis=0)
    assert np.abs(mean_rank - 8).max() < 4 * np.sqrt((15**2 - 1) / 12 / n)


def test_ranks_do_not_depend_on_the_other_samples(make_samples: Make) -> None:
    samples = make_samples(maps=np.zeros((5, 16, 16)))
    rows = np.array([4, 2])
    np.testing.assert_array_equal(patch_ranks(samples.take(rows)), patch_ranks(samples)[rows])


def test_image_that_is_no_whole_number_of_patches_is_refused(make_samples: Make) -> None:
    with pytest.raises(RequestError, match="16 x 16 pixels are not a whole number of patches of 5 x 4"):
        patch_grid(make_samples(patch=(5, 4)))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batches_halve_when_memory_runs_out(error: RuntimeError) -> None:
    sizes = []

    def run(index: torch.Tensor) -> torch.Tensor:
        sizes.append(len(index))
        if len(index) > 3:
            raise error
        return index * 2

    assert in_batches(run, torch.arange(10), 16).tolist() == list(range(0, 20, 2))
    assert sizes == [10, 8, 4, 2, 2, 2, 2, 2]


def test_other_errors_and_a_single_image_too_large_are_raised() -> None:
    def fail(message: str) -> torch.Tensor:
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shape"):
        in_batches(lambda index: fail("wrong shape"), torch.arange(4), 2)
    with pytest.raises(RuntimeError, match="can't allocate"):
        in_batches(lambda index: fail("can't allocate memory"), torch.arange(4), 2)
