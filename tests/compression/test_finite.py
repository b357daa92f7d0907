"""All kinds of numbers, at all places, in all types and layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qprune.compression.finite import all_finite

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(st.lists(st.floats(width=16), max_size=40), st.sampled_from(TYPES))
def test_as_torch_says_element_by_element(numbers: list[float], kind: torch.dtype) -> None:
    x = torch.tensor(numbers, dtype=kind)
    found = all_finite(x)
    assert found.dtype == torch.bool
    assert found.shape == ()
    assert bool(found) == bool(torch.isfinite(x).all())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", TYPES)
def test_one_number_among_many_at_every_place(kind: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 7).to(kind).to(memory_format=layout)
    x[0, 0, 0, 0] = torch.finfo(kind).max
    assert all_finite(x)
    for place in range(x.numel()):
        for number in (float("nan"), float("inf"), -float("inf")):
            y = x.clone()
            y.as_strided((y.numel(),), (1,))[place] = number
            assert not all_finite(y)


def test_what_has_no_numbers_is_finite() -> None:
    assert all_finite(torch.empty(0, 3, 2, 2))
