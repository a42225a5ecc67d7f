"""Numbers of the op and its gradients against the dense weight written out with loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import dst_ops
from tests.conftest import OLDER
from tests.unit.ops.oracle import CASES, case, dense
from tests.unit.ops.process import python

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _expected(c: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, dx, dvalues, dbias through the dense weight, computed in `dtype`."""
    m, n, band = c["sizes"]["out_features"], c["sizes"]["in_features"], c["sizes"]["band"]
    weight = dense(c["values"], c["offsets"].tolist(), m, n, band).to(dtype)
    x, dy = c["x"].reshape(-1, n).to(dtype), c["dy"].reshape(-1, m).to(dtype)
    dweight = (dy.t() @ x).cpu()
    rows = []
    for unit in c["offsets"].tolist():
        for o in range(unit * band, unit * band + band):
            at = [((j + o) % m, j) if m >= n else (j, (j + o) % n) for j in range(min(m, n))]
            rows.append(torch.stack([dweight[a] for a in at]))
    return {
        "y": (x @ weight.t() + c["bias"].to(dtype)).reshape(*c["dy"].shape),
        "dx": (dy @ weight).reshape(c["x"].shape),
        "dvalues": torch.stack(rows).to(x.device),
        "dbias": dy.sum(0),
    }


def _actual(c: dict[str, Any]) -> dict[str, Tensor]:
    x, values, bias = (c[k].detach().requires_grad_() for k in ("x", "values", "bias"))
    y = dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"])
    dx, dvalues, dbias = torch.autograd.grad(y, (x, values, bias), c["dy"])
    return {"y": y.detach(), "dx": dx, "dvalues": dvalues, "dbias": dbias}


def assert_as_good_as_dense(c: dict[str, Any]) -> None:
    """Error against fp64 at most twice that of the dense computation in the same dtype, plus one rounding of the result.

    The dense product may be exact by luck, so n roundings of our sums (fp32, or fp64) of n terms come on top.
    """
    truth, plain, actual = _expected(c, torch.float64), _expected(c, c["x"].dtype), _actual(c)
    for name, value in actual.items():
        assert value.dtype == c["x"].dtype, name
        assert value.shape == truth[name].shape, name
        if value.numel() == 0:
            continue
        scale = truth[name].abs().max() + 1
        terms = max(*c["sizes"].values(), c["x"].numel() // c["x"].shape[-1])
        rounding = (
            terms * torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps + 2 * torch.finfo(value.dtype).eps
        )
        bound = 2 * (plain[name].double() - truth[name]).abs().max() + rounding * scale
        assert (value.double() - truth[name]).abs().max() <= bound, name


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_as_good_as_dense(case(*shape, dtype))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3, 0), (2, 3, 4), (17,), (33,)], ids=str)
@pytest.mark.parametrize("shape", [(24, 60, 9, 1), (60, 24, 9, 1), (32, 32, 2, 4)], ids=str)
def test_batches(shape: tuple[int, int, int, int], batch: tuple[int, ...]) -> None:
    assert_as_good_as_dense(case(*shape, torch.float32, batch))


def _with_gelu(c: dict[str, Any], fused: bool) -> list[Tensor]:
    """y, dx, dvalues, dbias with a GELU behind the layer."""
    x, values, bias = (c[k].detach().requires_grad_() for k in ("x", "values", "bias"))
    if fused:
        y = dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"], activation="gelu")
    else:
        y = F.gelu(dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"]))
    return [y.detach(), *torch.autograd.grad(y, (x, values, bias), c["dy"])]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 41, 6, 1), (97, 33, 1, 1), (48, 32, 2, 8), (128, 128, 3, 32)], ids=str)
def test_gelu_behind_the_product(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """As good as one behind a layer in the same dtype, which rounds once more on the way."""
    c = case(*shape, dtype, (35,))
    truth = _with_gelu({k: v.double() if k in ("x", "values", "bias", "dy") else v for k, v in c.items()}, fused=False)
    for got, plain, exact in zip(_with_gelu(c, True), _with_gelu(c, False), truth, strict=True):
        bound = 2 * (plain.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * (exact.abs().max() + 1)
        assert (got.double() - exact).abs().max() <= bound
    with torch.no_grad():
        y = dst_ops.diagonal_linear(c["x"], c["values"], c["offsets"], c["bias"], **c["sizes"], activation="gelu")
    assert torch.equal(y, _with_gelu(c, True)[0])  # whether or not the product is kept for the backward pass


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("used", [(False, True), (True, True)], ids=["before", "both"])
def test_gradients_through_what_the_gelu_was_applied_to(used: tuple[bool, bool]) -> None:
    c = case(48, 32, 2, 8, torch.float32)
    x, values, bias = (c[k].requires_grad_() for k in ("x", "values", "bias"))
    outputs = torch.ops.dst_ops.linear_gelu(x, values, c["offsets"], 48, 8, bias, True)
    before = dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"])
    expected = [F.gelu(before), before]
    chosen = [(a, b) for a, b, taken in zip(outputs, expected, used, strict=True) if taken]
    got = torch.autograd.grad([a for a, _ in chosen], (x, values, bias), [c["dy"]] * len(chosen))
    wanted = torch.autograd.grad([b for _, b in chosen], (x, values, bias), [c["dy"]] * len(chosen))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:  # type: ignore[override]
        return None


def test_a_gelu_whose_result_gets_no_gradient_gives_none() -> None:
    c = case(24, 16, 3, 1, torch.float32)
    x, values = c["x"].requires_grad_(), c["values"].requires_grad_()
    y = dst_ops.diagonal_linear(x, values, c["offsets"], **c["sizes"], activation="gelu")
    _WithoutGradient.apply(y).sum().backward()
    assert x.grad is None
    assert values.grad is None


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [0, 7, 32, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 4, 1), (130, 97, 11, 1), (97, 130, 11, 1), (128, 128, 3, 32)], ids=str)
def test_gradients_at_once_are_those_of_the_single_ops(
    shape: tuple[int, int, int, int], dtype: torch.dtype, rows: int
) -> None:
    c, ops = case(*shape, dtype, (rows,)), torch.ops.dst_ops
    x, dy, values, offsets, band = (*(c[k] for k in ("x", "dy", "values", "offsets")), c["sizes"]["band"])
    dx, dvalues, dbias = ops.linear_backward(dy, x, values, offsets, band)
    assert torch.equal(dx, ops.linear_transposed(dy, values, offsets, x.shape[-1], band))
    assert torch.equal(dvalues, ops.dvalues(dy, x, offsets, band))
    assert dbias.dtype == torch.promote_types(dtype, torch.float32)
    bound = max(rows - 1, 0) * torch.finfo(dbias.dtype).eps / 2 * dy.double().abs().sum(0)  # any order of additions
    assert bool(((dbias.double() - dy.double().sum(0)).abs() <= bound).all())


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("needed", ["x", "values", "bias"])
def test_a_gradient_that_is_asked_for_alone(needed: str) -> None:
    c = case(24, 60, 9, 1, torch.float32, (40,))
    expected = _actual(c)[f"d{needed}"]
    y = dst_ops.diagonal_linear(
        *(c[k].requires_grad_(k == needed) for k in ("x", "values")),
        c["offsets"],
        c["bias"].requires_grad_(needed == "bias"),
        **c["sizes"],
    )
    (got,) = torch.autograd.grad(y, c[needed], c["dy"])
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("kernel")
def test_non_contiguous_inputs() -> None:
    c = case(24, 60, 9, 1, torch.float32, (6, 8))
    whole = _actual(c)
    c["x"], c["dy"] = (
        c["x"].transpose(0, 1).contiguous().transpose(0, 1),
        c["dy"][:, ::1].clone().as_strided((6, 8, 24), (192, 24, 1)),
    )
    c["values"] = c["values"].t().contiguous().t()
    strided = _actual(c)
    assert not c["x"].is_contiguous()
    assert not c["values"].is_contiguous()
    assert all(torch.equal(whole[k], strided[k]) for k in whole)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(64,), (2, 3, 65), (3, 100), (2, 512)], ids=str)
@pytest.mark.parametrize("shape", [(24, 60, 9, 1), (97, 33, 6, 1), (48, 32, 2, 8), (64, 96, 2, 16)], ids=str)
def test_a_transposed_tensor_is_taken_and_given_as_it_is(
    shape: tuple[int, int, int, int], batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    c = case(*shape, dtype, batch)
    whole = _actual(c)
    for transposed in (("x",), ("dy",), ("x", "dy")):
        given = {**c, **{k: c[k].mT.contiguous().mT for k in transposed}}
        got = _actual(given)
        assert got["y"].mT.is_contiguous() == ("x" in transposed)
        assert got["dx"].mT.is_contiguous() == ("dy" in transposed)
        # A number of the product is one sum in one order, wherever it stands; the gradients of values and bias are sums over tokens.
        assert torch.equal(got["y"], whole["y"])
        assert torch.equal(got["dx"], whole["dx"])
        assert_as_good_as_dense(given)


@pytest.mark.cpu_only
@pytest.mark.parametrize("tokens", [3, 100, 1000])
def test_a_weight_without_diagonals_gives_the_bias_and_no_gradients(tokens: int) -> None:
    ops, x, dy, bias = torch.ops.dst_ops, torch.randn(tokens, 9), torch.randn(tokens, 5), torch.randn(5)
    values, offsets = torch.empty(0, 5), torch.empty(0, dtype=torch.int32)
    assert torch.equal(ops.linear(x, values, offsets, 5, 1, bias), bias.expand(tokens, 5))
    dx, dvalues, _ = ops.linear_backward(dy, x, values, offsets, 1)
    assert torch.equal(dx, torch.zeros(tokens, 9))
    assert dvalues.shape == ops.dvalues(dy, x, offsets, 1).shape == (0, 5)


@pytest.mark.cpu_only
def test_few_tokens_side_by_side_are_copied() -> None:
    c = case(24, 60, 9, 1, torch.float32, (5, 63))
    c["x"] = c["x"].mT.contiguous().mT
    assert _actual(c)["y"].is_contiguous()


# Products and gradients that take several chunks of rows, blocks of outputs, or segments of packed weights.
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1300, 50, 40, 1), 70),
        ((50, 1300, 40, 1), 70),
        ((1088, 1056, 1, 32), 33),
        ((1300, 1290, 5, 1), 40),
        ((1296, 1290, 2, 16), 40),
        ((130, 120, 130, 1), 600),
    ],
)
@pytest.mark.usefixtures("kernel")
def test_more_than_one_block(shape: tuple[int, int, int, int], rows: int) -> None:
    assert_as_good_as_dense(case(*shape, torch.float32, (rows,)))


# The tensor cores' kernels keep few features whole and stream windows of many; many tokens of a gradient are split.
@pytest.mark.cuda_only
@pytest.mark.parametrize("kernel", ["band", OLDER], indirect=True)
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1024, 904, 2, 8), 40),
        ((904, 1024, 3, 16), 130),
        ((1024, 1024, 3, 32), 150),
        ((1024, 512, 2, 64), 130),
        ((1088, 1152, 4, 64), 150),
        ((320, 288, 3, 32), 600),
        ((256, 320, 2, 64), 600),
    ],
    ids=str,
)
def test_bands_of_wide_layers(shape: tuple[int, int, int, int], rows: int) -> None:
    assert_as_good_as_dense(case(*shape, torch.bfloat16, (rows,)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(100, 300, 20, 1), (500, 260, 500, 1), (96, 96, 2, 16), (460, 730, 60, 1), (1310, 460, 100, 1), (512, 512, 9, 16)],
    ids=str,
)
def test_bits_of_a_token_do_not_depend_on_how_many_there_are(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    c = case(*shape, dtype, (101,))

    def first(rows: int) -> Tensor:
        return dst_ops.diagonal_linear(c["x"][:rows], c["values"], c["offsets"], c["bias"], **c["sizes"])

    for rows in (1, 2, 7, 32, 33, 64):
        assert torch.equal(first(rows), first(101)[:rows])


@pytest.mark.cpu_only
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, rows: int) -> None:
    c = case(128, 96, 5, 1, dtype, (rows,))
    x = c["x"]
    x[0, 7], x[1, 20], x[2, 90] = torch.nan, torch.inf, -torch.inf
    if dtype.itemsize == 2:
        x.view(torch.int16)[0, 50] = 0x7FFF  # a NaN of ones only: rounding must not carry it into the sign
    y = dst_ops.diagonal_linear(x, c["values"], c["offsets"], c["bias"], **c["sizes"])
    weight = dst_ops.to_dense(c["values"], c["offsets"], **c["sizes"]).double()
    meets = weight[:, [7, 50]] != 0 if dtype.itemsize == 2 else weight[:, [7]] != 0
    assert torch.equal(y[0].isnan(), meets.any(1))
    assert torch.equal(y[1].isinf(), weight[:, 20] != 0)
    assert torch.equal(y[2] == torch.inf, weight[:, 90] < 0)
    assert y[3:].isfinite().all()


@pytest.mark.parametrize("shape", [(7, 5, 3, 1), (5, 7, 3, 1), (6, 6, 1, 2)], ids=str)
def test_first_and_second_derivatives(shape: tuple[int, int, int, int]) -> None:
    c = case(*shape, torch.float64, (3,))
    inputs = [c[k].requires_grad_() for k in ("x", "values", "bias")]

    def op(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"])

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.cpu_only
@pytest.mark.parametrize("tokens", [37, 1000])
@pytest.mark.parametrize("shape", [(100, 300, 20, 1), (300, 100, 20, 1), (96, 96, 2, 16)], ids=str)
def test_bits_do_not_depend_on_threads_or_slots(shape: tuple[int, int, int, int], tokens: int) -> None:
    c = case(*shape, torch.float32, (tokens,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_actual(c))
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(c["offsets"].numel(), generator=torch.Generator().manual_seed(1))
    rows = (order[:, None] * c["sizes"]["band"] + torch.arange(c["sizes"]["band"])).flatten()
    moved = _actual({**c, "offsets": c["offsets"][order], "values": c["values"][rows]})
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)
    assert torch.equal(moved["y"], results[0]["y"])
    assert torch.equal(moved["dx"], results[0]["dx"])
    assert torch.equal(moved["dvalues"], results[0]["dvalues"][rows])


@pytest.mark.cpu_only
def test_threads_take_over_from_slower_ones() -> None:
    """More threads than cores: some have hardly begun when others are done."""
    c, ops = case(200, 300, 20, 1, torch.float32, (700,)), torch.ops.dst_ops
    arguments = (c["values"], c["offsets"], 200, 1)

    def results(sign: int) -> tuple[Tensor, ...]:
        backward = ops.linear_backward(sign * c["dy"], c["x"], c["values"], c["offsets"], 1)
        return (ops.linear(sign * c["x"], *arguments), *backward)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(1)
        for turn in range(60):
            torch.set_num_threads(2 + turn % 7)
            sign = (-1) ** turn  # or what was never written could be the last turn's result, in the same memory
            assert all(torch.equal(got, sign * e) for got, e in zip(results(sign), expected, strict=True))
    finally:
        torch.set_num_threads(before)


FEWER_THREADS = """
import torch, dst_ops
x, dy, values, offsets = torch.randn(700, 200), torch.randn(700, 300), torch.randn(20, 200), torch.arange(20).int()
ops, calls = torch.ops.dst_ops, []
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    for sign in (1, -1):  # or what was never written could be an earlier result, in the same memory
        results = [ops.linear(sign * x, values, offsets, 300, 1), *ops.linear_backward(sign * dy, x, values, offsets, 1)]
    calls.append(results)
assert all(torch.equal(a, b) for results in calls for a, b in zip(results, calls[0], strict=True))
"""


@pytest.mark.cpu_only
def test_fewer_threads_than_asked_for_do_all_the_work() -> None:
    done = python(FEWER_THREADS, OMP_THREAD_LIMIT="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_dense_round_trip(shape: tuple[int, int, int, int]) -> None:
    c = case(*shape, torch.float64)
    weight = dst_ops.to_dense(c["values"], c["offsets"], **c["sizes"])
    assert torch.equal(weight, dense(c["values"], c["offsets"].tolist(), *shape[:2], shape[3]))
    assert torch.equal(dst_ops.from_dense(weight, c["offsets"], band=shape[3]), c["values"])


def _call(**changes: Any) -> Tensor:
    c = case(12, 8, 3, 2, torch.float32)
    arguments = {**{k: c[k] for k in ("x", "values", "offsets", "bias")}, **c["sizes"], **changes}
    return dst_ops.diagonal_linear(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, "x: type list, expected a torch.Tensor"),
        ({"values": 3}, "values: type int, expected a torch.Tensor"),
        ({"offsets": [0, 1, 2]}, "offsets: type list, expected a torch.Tensor"),
        ({"x": torch.zeros(5, 9)}, r"x: shape \(5, 9\), expected \[..., in_features=8\]"),
        ({"x": torch.tensor(1.0)}, r"x: shape \(\)"),
        ({"x": torch.zeros(5, 8, dtype=torch.int64)}, "x: dtype torch.int64, expected float32"),
        ({"x": torch.zeros(5, 8, device="meta")}, "values: device .*, expected the device of x, meta"),
        ({"values": torch.zeros(6, 9)}, r"values: shape \(6, 9\), expected \(6, 8\)"),
        ({"values": torch.zeros(6, 8, dtype=torch.bfloat16)}, "values: dtype torch.bfloat16, expected the dtype of x"),
        ({"offsets": torch.tensor([0, 1, 2])}, "offsets: dtype torch.int64, expected int32"),
        ({"offsets": torch.tensor([[0, 1, 2]], dtype=torch.int32)}, r"offsets: shape \(1, 3\), expected \[1 to 6\]"),
        ({"offsets": torch.zeros(3, dtype=torch.int32, device="meta")}, "offsets: device meta"),
        ({"bias": torch.zeros(8)}, r"bias: shape \(8,\), expected \(12,\)"),
        ({"bias": torch.zeros(12, dtype=torch.float64)}, "bias: dtype torch.float64"),
        ({"bias": torch.zeros(12, device="meta")}, "bias: device meta"),
        ({"activation": "relu"}, "activation: 'relu', expected None or 'gelu'"),
        ({"band": 5}, r"band: 5, expected a divisor of max\(out_features, in_features\) = 12"),
        ({"out_features": 0}, "out_features: 0, expected at least 1"),
        ({"in_features": 0}, "in_features: 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("name", ["x", "values", "bias"])
def test_forward_mode_derivatives_are_refused(name: str, activation: str | None) -> None:
    c = case(12, 8, 3, 2, torch.float32)
    message = f"{name}: has a tangent, and there are no forward-mode derivatives"
    with forward_ad.dual_level():
        assert _call(activation=activation).shape == (5, 12)
        with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
            _call(**{name: forward_ad.make_dual(c[name], torch.ones_like(c[name]))}, activation=activation)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda t: _call(**{name: t}, activation=activation), (c[name],), (c[name],))


# On another device reading the numbers would wait for it: there the kernels stop.
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 1, 6], "offsets: range 0 to 6, expected 0 to 5"),
        ([0, -1, 2], "offsets: range -1 to 2"),
        ([4, 1, 4], r"offsets: repeated units \[4\], expected distinct"),
    ],
)
def test_bad_numbers_in_offsets_are_named(numbers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(offsets=torch.tensor(numbers, dtype=torch.int32))


def test_the_other_functions_check_too() -> None:
    offsets = torch.tensor([0, 3], dtype=torch.int32, device="cpu")
    with pytest.raises(ValueError, match=r"values: shape \(3, 4\), expected \(2, 4\)"):
        dst_ops.to_dense(torch.zeros(3, 4), offsets, out_features=4, in_features=4)
    with pytest.raises(ValueError, match=r"weight: shape \(4,\)"):
        dst_ops.from_dense(torch.zeros(4), offsets)
    with pytest.raises(ValueError, match="offsets: range 0 to 3, expected 0 to 2"):
        dst_ops.from_dense(torch.zeros(3, 3), offsets)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 9], dtype=torch.int32), 4, 1),
            "is 9, expected 0 to 3",
        ),
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([2, 2], dtype=torch.int32), 4, 1),
            "repeats unit 2",
        ),
        ("linear", (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 1]), 4, 1), "must be int32"),
        ("linear", (torch.zeros(2, 4), torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32), 4, 1), "values is"),
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0], dtype=torch.int32), 4, 3),
            "band 3 must divide 4",
        ),
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(2, 4).double(), torch.tensor([0, 1], dtype=torch.int32), 4, 1),
            "one dtype",
        ),
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 1], dtype=torch.int32), 4, 1, torch.zeros(3)),
            "bias must be",
        ),
        ("linear", (torch.tensor(1.0), torch.zeros(2, 4), torch.tensor([0, 1], dtype=torch.int32), 4, 1), "dst_ops: x"),
        (
            "linear",
            (torch.zeros(2, 4).int(), torch.zeros(2, 4).int(), torch.tensor([0, 1], dtype=torch.int32), 4, 1),
            "dtype must be",
        ),
        (
            "dvalues",
            (torch.zeros(2, 4), torch.zeros(2, 4).double(), torch.tensor([0], dtype=torch.int32), 1),
            "one dtype",
        ),
        (
            "linear",
            (torch.zeros(2, 0), torch.zeros(1, 0), torch.zeros(1, dtype=torch.int32), 4, 1),
            "at least one feature",
        ),
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(1, 0), torch.zeros(1, dtype=torch.int32), 0, 1),
            "out_features must be at least 1",
        ),
        ("linear", (torch.zeros(2, 4), torch.zeros(4), torch.zeros(1, dtype=torch.int32), 4, 1), r"values \[K, L\]"),
        (
            "linear",
            (torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int32), 2**31, 1),
            "is 2147483648, expected",
        ),
        (
            "linear_transposed",
            (torch.tensor(1.0), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int32), 4, 1),
            "at least one feature",
        ),
        (
            "dvalues",
            (torch.zeros(2, 4), torch.zeros(2, 0), torch.zeros(1, dtype=torch.int32), 1),
            "at least one feature",
        ),
        (
            "dvalues",
            (torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor([0], dtype=torch.int32), 1),
            "one shape but for the last",
        ),
        (
            "linear_backward",
            (torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(1, 4), torch.tensor([0], dtype=torch.int32), 1),
            "one shape but for the last",
        ),
        (
            "linear_backward",
            (torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(1, 3), torch.tensor([0], dtype=torch.int32), 1),
            r"values is \[1, 3\], expected \[1, 4\]",
        ),
    ],
)
def test_the_kernels_guard_memory_themselves(op: str, arguments: tuple, message: str) -> None:
    """A traced program calls the raw ops without the checks of the public functions."""
    assert dst_ops.load()
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.dst_ops, op)(*arguments)
