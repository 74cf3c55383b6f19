"""The search finds what fits, tries nothing twice and nothing too large."""

import pytest

from lightning_hpo.functional.batching.micro_batch import largest_fitting


def search(limit: int, **arguments: int) -> tuple[int, list[int]]:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    return largest_fitting(fits, **arguments), tried


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 63, 64, 65, 99, 100, 101, 1000])
@pytest.mark.parametrize("start", [1, 2, 5, 64])
@pytest.mark.parametrize("factor", [2, 3])
def test_bisection_finds_the_limit(limit: int, start: int, factor: int) -> None:
    found, tried = search(limit, start=start, maximum=100, factor=factor, refine=True)
    assert found == min(limit, 100)
    assert len(set(tried)) == len(tried)
    assert max(tried) <= 100
    assert len(tried) <= 16


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 63, 64, 65, 99, 100, 101, 1000])
def test_doubling_stops_within_a_factor_of_the_limit(limit: int) -> None:
    found, tried = search(limit, start=1, maximum=100)
    assert found == (100 if limit >= 100 else max(2**i for i in range(7) if 2**i <= limit))
    assert tried == sorted(set(tried))


def test_a_start_that_is_too_large_is_halved() -> None:
    assert search(10, start=48, maximum=64) == (6, [48, 24, 12, 6])
    assert search(1, start=5, maximum=64) == (1, [5, 2, 1])


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="not even 1 fits"):
        search(0, start=4, maximum=8)


def test_wrong_arguments_are_listed() -> None:
    with pytest.raises(ValueError, match="start must be .* got 0; maximum must be .* got -1; factor must be .* got 1"):
        search(1, start=0, maximum=-1, factor=1)
