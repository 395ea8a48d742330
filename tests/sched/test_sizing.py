"""The grid of step sizes."""

from __future__ import annotations

import pytest

from semipd.sched.sizing import on_grid


@pytest.mark.parametrize("num_bits", [1, 3, 4])
def test_a_size_on_the_grid_is_the_largest_of_few_bits_that_is_not_above(num_bits: int) -> None:
    sizes = [size for size in range(1, 2000) if len(f"{size:b}".rstrip("0")) <= num_bits]
    for num_tokens in range(1, 2000):
        assert on_grid(num_tokens, num_bits) == max(size for size in sizes if size <= num_tokens)
    assert on_grid(0, num_bits) == 1
