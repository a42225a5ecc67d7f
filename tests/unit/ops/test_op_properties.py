"""The op on whatever shapes, strides and offsets hypothesis draws. Not without it: a machine with a GPU may lack it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.ops.oracle import case
from tests.unit.ops.test_op import DTYPES, assert_as_good_as_dense


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides: what slices, transpositions and odd addresses give."""
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.t().contiguous().t()
    rows, columns = tensor.shape
    if layout == "shifted":  # an address that no vector width divides
        flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
        return flat[1:].view(rows, columns)
    wide = tensor.new_full((rows, 2 * columns + 1), torch.nan)
    wide[:, 1::2] = tensor
    return wide[:, 1::2]


LAYOUTS = st.sampled_from(["contiguous", "transposed", "shifted", "strided"])


# The kernel is the same for all examples of a test.
@pytest.mark.usefixtures("kernel")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 150),
    n=st.integers(1, 150),
    band=st.sampled_from([1, 1, 2, 3, 4, 8, 16, 32]),
    share=st.floats(0, 1),
    rows=st.one_of(st.integers(0, 20), st.integers(30, 100)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=st.integers(0, 2**31),
)
# Few tokens, and weights that could be copied 16 bytes at a time if they did not begin at an odd address.
@example(64, 96, 1, 0.5, 3, torch.bfloat16, ("contiguous", "contiguous", "shifted"), 0)
@example(96, 64, 1, 0.5, 1, torch.float32, ("contiguous", "contiguous", "shifted"), 0)
def test_any_shape(
    m: int, n: int, band: int, share: float, rows: int, dtype: torch.dtype, layouts: tuple[str, str, str], seed: int
) -> None:
    if m >= n:
        m = -(-m // band) * band
    else:
        n = -(-n // band) * band
    units = max(m, n) // band
    c = case(m, n, max(1, round(share * min(units, 400 // band))), band, dtype, (rows,), seed)
    for name, layout in zip(("x", "dy", "values"), layouts, strict=True):
        c[name] = _laid_out(c[name], layout)
    assert_as_good_as_dense(c)
