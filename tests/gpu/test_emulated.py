"""The CUDA kernels on the host: any order of threads, what they issue, and what they refuse. Needs --backend emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dst_ops import cuda, routes
from tests.conftest import OLDER
from tests.gpu.emulated import Emulator
from tests.unit.ops.oracle import case

SHAPES = [
    (96, 64, 9, 1),
    (64, 96, 20, 1),
    (128, 128, 40, 1),
    (96, 64, 3, 8),
    (64, 96, 2, 16),
    (128, 128, 2, 32),
    (256, 128, 2, 64),
]
OPS = torch.ops.dst_ops
BANDS = ["band", OLDER]


def _run(c: dict[str, Any]) -> list[Tensor]:
    m, n, band = c["sizes"]["out_features"], c["sizes"]["in_features"], c["sizes"]["band"]
    return [
        OPS.linear(c["x"], c["values"], c["offsets"], m, band, c["bias"]),
        OPS.linear_transposed(c["dy"], c["values"], c["offsets"], n, band),
        OPS.dvalues(c["dy"], c["x"], c["offsets"], band),
    ]


@pytest.mark.every_chip
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [3, 40, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_threads_does_not_matter(
    shape: tuple[int, int, int, int], dtype: torch.dtype, rows: int, emulator: Emulator
) -> None:
    c = case(*shape, dtype, (rows,))
    results = []
    for order in (0, 1, 2):
        emulator.set(order=order)
        results.append(_run(c))
    emulator.set()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.every_chip
@pytest.mark.usefixtures("kernel", "emulator")
@pytest.mark.parametrize(
    ("m", "n", "band", "units", "rows"),
    [
        (1280, 1024, 8, [8], 40),
        (1280, 1024, 8, [24, 40, 3], 40),
        (1280, 1024, 40, [1], 40),
        (1024, 1280, 8, [8], 40),
        (1280, 1024, 16, [4, 5], 40),
        (1280, 1024, 32, [2, 37], 40),
        (1280, 1024, 64, [1, 18], 40),
        (96, 64, 8, [8], 3),
    ],
    ids=str,
)
def test_nothing_is_read_that_was_not_written(m: int, n: int, band: int, units: list[int], rows: int) -> None:
    """New memory holds NaN; windows of these bands begin or end next to blocks that are not there."""
    c = case(m, n, len(units), band, torch.bfloat16, (rows,))
    c["offsets"] = torch.tensor(units, dtype=torch.int32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new tensors
    try:
        results = _run(c)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(bool(result.isfinite().all()) for result in results)


def _useful_share(counts: dict[str, int], tokens: int, c: dict[str, Any]) -> float:
    """Of the multiplications in matrix instructions: 16 x 8 x 16 or 16 x 8 x 8."""
    return tokens * c["values"].numel() / (counts["mma_k16"] * 2048 + counts["mma_k8"] * 1024)


def _product(c: dict[str, Any]) -> None:
    OPS.linear(c["x"], c["values"], c["offsets"], c["sizes"]["out_features"], c["sizes"]["band"], c["bias"])


def _gradient(c: dict[str, Any]) -> None:
    OPS.dvalues(c["dy"], c["x"], c["offsets"], c["sizes"]["band"])


def _counts(emulator: Emulator, call: Any, c: dict[str, Any]) -> dict[str, int]:
    emulator.counts()
    emulator.set(count_banks=True)
    call(c)
    emulator.set()
    return emulator.counts()


@pytest.mark.parametrize("kernel", BANDS, indirect=True)
@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize(("m", "n"), [(256, 256), (256, 512), (512, 256)])
def test_share_of_useful_multiplications(m: int, n: int, width: int, kernel: str, emulator: Emulator) -> None:
    tokens = 64
    c = case(m, n, 2, width, torch.bfloat16, (tokens,))
    shorter = min(m, n)
    # 8 rows meet width + 8 columns in whole blocks; where the result is longer, a diagonal's ends lie in blocks of their own.
    ends = shorter / (shorter + width + 8) if m > n else 1.0
    share = _useful_share(_counts(emulator, _product, c), tokens, c)
    assert share >= width / (width + 8) * ends
    # 16 positions meet width + 16 columns; the two blocks of 8 tokens of an instruction are full at 64 tokens.
    assert _useful_share(_counts(emulator, _gradient, c), tokens, c) >= width / (width + 16)


@pytest.mark.parametrize("kernel", ["scalar", "band"], indirect=True)
@pytest.mark.parametrize("call", [_product, _gradient])
@pytest.mark.parametrize(("m", "n"), [(256, 256), (128, 512), (512, 128)])
def test_shared_memory_is_read_without_bank_conflicts(
    m: int, n: int, call: Any, kernel: str, emulator: Emulator
) -> None:
    counts = _counts(emulator, call, case(m, n, 2, 16, torch.bfloat16, (64,)))
    assert counts["shared_loads"] > 0
    # At the ends of a diagonal some lanes read the zeros instead, which may lie in another lane's banks.
    ends = 1.1 if kernel == "scalar" and call is _product and m > n else 1.0
    assert counts["shared_waves"] <= ends * counts["shared_loads"]


@pytest.mark.parametrize("kernel", BANDS, indirect=True)
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_windows_are_read_without_bank_conflicts(width: int, kernel: str, emulator: Emulator) -> None:
    """So many features that blocks stream windows; several bands, which begin in different places of a line."""
    c = case(256, 1024, 3, width, torch.bfloat16, (64,))
    for call in (_product, _gradient):
        counts = _counts(emulator, call, c)
        assert counts["shared_waves"] == counts["shared_loads"] > 0


@pytest.mark.usefixtures("emulator", "kernel")
@pytest.mark.parametrize("numbers", [[0, 8], [0, -1]], ids=str)
def test_a_wrong_number_in_offsets_stops_the_kernels(numbers: list[int]) -> None:
    c = case(64, 64, 2, 8, torch.bfloat16)
    c["offsets"] = torch.tensor(numbers, dtype=torch.int32)
    for op in (_product, _gradient):
        with pytest.raises(RuntimeError, match=r"a number in offsets is not in \[0, P / band\)"):
            op(c)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("kernel", ["dense"], indirect=True)
def test_the_dense_route_refuses_a_repeated_unit(kernel: str) -> None:
    c = case(64, 64, 2, 8, torch.bfloat16)
    c["offsets"][1] = c["offsets"][0]
    with pytest.raises(RuntimeError, match="offsets repeats a unit"):
        _product(c)


X, V, U = torch.zeros(2, 16), torch.zeros(8, 16), torch.zeros(1, dtype=torch.int32)
H, HV = X.bfloat16(), V.bfloat16()
PRODUCT = {"out_features": 16, "band": 8, "scatter": True, "bias": None, "gelu": False, "before": None}


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("op", "arguments", "changes", "message"),
    [
        ("cuda_scalar", (torch.tensor(1.0), V, U), {}, "at least one feature"),
        ("cuda_scalar", (X, V, U.long()), {}, "offsets must be int32"),
        ("cuda_scalar", (X, V, U), {"out_features": 0}, "expected 1 to 2"),
        ("cuda_scalar", (X, V, U), {"out_features": 2**30}, "is 1073741824, expected 1 to 2"),
        ("cuda_scalar", (X, V, U), {"band": 5}, "band 5 must divide 16"),
        ("cuda_scalar", (X, V, torch.zeros(0, dtype=torch.int32)), {}, "names 0 units, expected 1 to 2"),
        ("cuda_scalar", (X, V[:7], U), {}, r"values must be \[8, 16\]"),
        ("cuda_scalar", (X, HV, U), {}, "values and x must have one dtype"),
        ("cuda_scalar", (X, V, U), {"bias": torch.zeros(15)}, r"bias must be \[16\]"),
        ("cuda_scalar", (X, V, U), {"before": torch.zeros(15)}, "before must be like y"),
        ("cuda_scalar", (X, V, U), {"before": torch.zeros(2, 16)}, "gelu is false"),
        ("cuda_scalar", (X.int(), V.int(), U), {}, "dtype must be"),
        ("cuda_scalar", (torch.zeros(2, 2**15), torch.zeros(8, 16), U), {}, "in_features 32768 do not fit"),
        ("cuda_scalar", (torch.zeros(40, 2**15), torch.zeros(8, 16), U), {}, "in_features 32768 do not fit"),
        ("cuda_band", (X, V, U), {}, "take bfloat16 or float16"),
        ("cuda_band", (H[:, :12].contiguous(), HV[:, :12].contiguous(), U), {}, "multiples of 8"),
    ],
)
def test_launchers_name_what_they_refuse(
    op: str, arguments: tuple[Tensor, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*arguments, **{**PRODUCT, **changes})


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.cuda_scalar_dvalues(X, X[:1], U, 8), "as many rows"),
        (lambda: OPS.cuda_scalar_dvalues(X, H, U, 8), "one dtype"),
        (lambda: OPS.cuda_scalar_dvalues(torch.zeros(2, 2**15), X, U, 8), "do not fit"),
        (lambda: OPS.cuda_band_dvalues(X, X, U, 8), "take bfloat16 or float16"),
        (lambda: OPS.cuda_diagonals(H, U, 8), "must be float32"),
        (lambda: OPS.cuda_weight(V[:7], U, 16, 16, 8), "values must be"),
        (lambda: OPS.cuda_sum_of_rows(X.int()), "dtype must be"),
        (lambda: OPS.cuda_sum_of_rows(torch.zeros(1, 2**23 + 1)), "has 8388609 features, expected 1 to 2"),
    ],
)
def test_other_launchers_name_what_they_refuse(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("op", "tokens"), [("product", 1), ("product", 2), ("product", 40), ("gradient", 1)])
@pytest.mark.parametrize(
    ("kernel", "dtype", "band"), [("scalar", "float32", 1), ("scalar", "bfloat16", 1), ("band", "bfloat16", 16)]
)
def test_routes_and_launchers_agree_on_what_fits(op: str, tokens: int, kernel: str, dtype: str, band: int) -> None:
    """The largest number of features that a route accepts is one that the launcher takes."""

    def fits(features: int) -> bool:
        return kernel in routes.possible(routes.Call(op, tokens, features, 64, band, band, dtype), 227 * 1024)

    most = max((n for n in range(64, 2**17, 64) if fits(n)), default=0)
    x, dy = (torch.zeros(tokens, n, dtype=getattr(torch, dtype)) for n in (most, 64))
    values, offsets = torch.zeros(band, 64, dtype=x.dtype), torch.zeros(1, dtype=torch.int32)
    if op == "product":
        getattr(OPS, f"cuda_{kernel}")(x, values, offsets, 64, band, False, None, False, None)
    else:
        getattr(OPS, f"cuda_{kernel}_dvalues")(dy, x, offsets, band)


def test_a_choice_is_made_once_for_a_shape(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    asked = []
    monkeypatch.setattr(cuda, "choose", lambda *a: asked.append(a) or routes.Choice("scalar", ""))
    cuda._choice.cache_clear()
    c = case(64, 64, 2, 8, torch.bfloat16)
    for _ in range(3):
        _product(c)
    cuda._choice.cache_clear()
    assert len(asked) == 1
