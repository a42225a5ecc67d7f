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


@pytest.mark.parametrize("block", [1, 64, 2**21], ids=["columns", "small", "whole"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_scores(shape: tuple[int, int, int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SCORE_BLOCK", block)
    m, n, _, band = shape
    torch.manual_seed(0)
    x, dy = torch.randn(6, n), torch.randn(6, m)
    seen: list[int] = []

    def reduce(part: Tensor, first_column: int) -> Tensor:
        assert part.is_contiguous()
        assert part.numel() <= max(block, m)
        seen.extend(range(first_column, first_column + part.shape[1]))
        return part

    scores = dst_ops.diagonal_scores(
        x.view(2, 3, n), dy.view(2, 3, m), out_features=m, in_features=n, band=band, reduce=reduce
    )
    assert seen == list(range(n))
    # A mean of |sum of 6 products| in fp32.
    torch.testing.assert_close(scores.double(), _expected(x, dy, band), rtol=1e-5, atol=1e-6)


def test_reduce_acts_before_the_absolute_value() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(8, 20), torch.randn(8, 12)
    held: dict[int, Tensor] = {}

    def hold(part: Tensor, first_column: int) -> Tensor:
        held[first_column] = part.clone()
        return part

    sizes: dict[str, Any] = {"out_features": 12, "in_features": 20}
    dst_ops.diagonal_scores(x[:4], dy[:4], **sizes, reduce=hold)
    both = dst_ops.diagonal_scores(x[4:], dy[4:], **sizes, reduce=lambda part, first_column: part + held[first_column])
    torch.testing.assert_close(both, dst_ops.diagonal_scores(x, dy, **sizes), rtol=1e-5, atol=1e-6)


def test_no_rows_still_reduces() -> None:
    calls = []

    def reduce(part: Tensor, first_column: int) -> Tensor:
        calls.append(first_column)
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


@pytest.mark.parametrize("first_column", [0, 3])
@pytest.mark.parametrize(
    ("columns", "m", "n"), [(5, 6, 8), (4, 700, 7), (2, 7, 700), (1, 9, 9), (2, 5, 6), (300, 40, 310)]
)
def test_sums_along_diagonals(columns: int, m: int, n: int, first_column: int) -> None:
    torch.manual_seed(0)
    block = torch.randn(m, columns)
    expected = torch.zeros(max(m, n), dtype=torch.float64)
    for row in range(m):
        for j in range(columns):
            column = first_column + j
            expected[(row - column) % m if m >= n else (column - row) % n] += block[row, j].abs()
    assert dst_ops.load()
    for sums in (torch.ops.dst_ops.diagonal_sums, reference.diagonal_sums):
        # At most min(columns, m) terms, each rounded once when it is added.
        torch.testing.assert_close(
            sums(block, first_column, n).double(), expected, rtol=min(columns, m) * 2**-24, atol=0
        )
    torch.library.opcheck(torch.ops.dst_ops.diagonal_sums.default, (block, first_column, n))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("block", "first_column", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.float64), 0, "block must be float32"),
        (torch.zeros(4), 0, "block must be float32"),
        (torch.zeros(4, 2), 5, "columns 5 to 6 are not among 6"),
        (torch.zeros(4, 2), -1, "columns -1 to 0 are not among 6"),
    ],
)
def test_the_kernel_names_what_it_refuses(block: Tensor, first_column: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dst_ops.diagonal_sums(block, first_column, 6)
