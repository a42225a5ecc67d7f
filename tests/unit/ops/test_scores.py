"""diagonal_scores against the dense gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dst_ops
from dst_ops import api, reference
from tests.unit.ops.oracle import CASES


def _expected(x: Tensor, dy: Tensor, band: int) -> Tensor:
    gradient = dy.double().t() @ x.double()
    m, n = gradient.shape
    scores = torch.zeros(max(m, n), dtype=torch.float64)
    for row in range(m):
        for column in range(n):
            scores[(row - column) % m if m >= n else (column - row) % n] += gradient[row, column].abs()
    return scores.view(-1, band).sum(1) / (band * min(m, n))


@pytest.mark.parametrize("block", [1, 64, 2**21], ids=["rows", "small", "whole"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_scores(shape: tuple[int, int, int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SCORE_BLOCK", block)
    m, n, _, band = shape
    torch.manual_seed(0)
    x, dy = torch.randn(6, n), torch.randn(6, m)
    seen: list[int] = []

    def reduce(part: Tensor, first_row: int) -> Tensor:
        assert part.is_contiguous()
        assert part.numel() <= max(block, n)
        seen.extend(range(first_row, first_row + part.shape[0]))
        return part

    scores = dst_ops.diagonal_scores(
        x.view(2, 3, n), dy.view(2, 3, m), out_features=m, in_features=n, band=band, reduce=reduce
    )
    assert seen == list(range(m))
    # A mean of |sum of 6 products| in fp32.
    torch.testing.assert_close(scores.double(), _expected(x, dy, band), rtol=1e-5, atol=1e-6)


def test_reduce_acts_before_the_absolute_value() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(8, 20), torch.randn(8, 12)
    held: dict[int, Tensor] = {}

    def hold(part: Tensor, first_row: int) -> Tensor:
        held[first_row] = part.clone()
        return part

    sizes: dict[str, Any] = {"out_features": 12, "in_features": 20}
    dst_ops.diagonal_scores(x[:4], dy[:4], **sizes, reduce=hold)
    both = dst_ops.diagonal_scores(x[4:], dy[4:], **sizes, reduce=lambda part, first_row: part + held[first_row])
    torch.testing.assert_close(both, dst_ops.diagonal_scores(x, dy, **sizes), rtol=1e-5, atol=1e-6)


def test_no_rows_still_reduces() -> None:
    calls = []

    def reduce(part: Tensor, first_row: int) -> Tensor:
        calls.append(first_row)
        return part + 1

    scores = dst_ops.diagonal_scores(torch.zeros(0, 4), torch.zeros(0, 6), out_features=6, in_features=4, reduce=reduce)
    assert calls
    assert torch.equal(scores, torch.ones(6))


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(500, 8).bfloat16(), torch.randn(500, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = dst_ops.diagonal_scores(x, dy, out_features=8, in_features=8)
    assert scores.dtype == torch.float32
    # Products of two bf16 numbers are exact in fp32.
    torch.testing.assert_close(scores.double(), _expected(x, dy, 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("x", "dy", "band", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 6), 1, r"x: shape \(2, 5\)"),
        (torch.zeros(2, 4), torch.zeros(3, 6), 1, r"dy: shape \(3, 6\), expected \(2, 6\)"),
        (torch.zeros(2, 4), torch.zeros(2, 6, device="meta"), 1, "dy: device meta"),
        (torch.zeros(2, 4), torch.zeros(2, 6), 4, "band: 4"),
    ],
)
def test_bad_arguments_are_named(x: Tensor, dy: Tensor, band: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dst_ops.diagonal_scores(x, dy, out_features=6, in_features=4, band=band)


@pytest.mark.parametrize("first_row", [0, 3])
@pytest.mark.parametrize(("rows", "m", "n"), [(5, 8, 6), (4, 7, 700), (2, 700, 7), (1, 9, 9), (2, 6, 5)])
def test_sums_along_diagonals(rows: int, m: int, n: int, first_row: int) -> None:
    torch.manual_seed(0)
    block = torch.randn(rows, n)
    expected = torch.zeros(max(m, n), dtype=torch.float64)
    for row in range(rows):
        for column in range(n):
            r = first_row + row
            expected[(r - column) % m if m >= n else (column - r) % n] += block[row, column].abs()
    assert dst_ops.load()
    for sums in (torch.ops.dst_ops.diagonal_sums, reference.diagonal_sums):
        # At most 5 terms, each rounded once when it is added.
        torch.testing.assert_close(sums(block, first_row, m).double(), expected, rtol=5 * 2**-24, atol=0)
    torch.library.opcheck(torch.ops.dst_ops.diagonal_sums.default, (block, first_row, m))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("block", "first_row", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), 0, "block must be float32"),
        (torch.zeros(4), 0, "block must be float32"),
        (torch.zeros(2, 4), 5, "rows 5 to 6 are not among 6"),
        (torch.zeros(2, 4), -1, "rows -1 to 0 are not among 6"),
    ],
)
def test_the_kernel_names_what_it_refuses(block: Tensor, first_row: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dst_ops.diagonal_sums(block, first_row, 6)
