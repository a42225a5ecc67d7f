"""The ops inside PyTorch's machinery: opcheck, compile, export, autocast, vmap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import dst_ops
from tests.unit.ops.oracle import case
from tests.unit.ops.process import python

SHAPES = [(24, 60, 9, 1), (60, 24, 9, 1), (32, 32, 2, 4)]


def _linear(c: dict[str, Any], x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck reads it of tensors that are not leaves
@pytest.mark.parametrize(
    "op", ["linear", "linear_gelu", "linear_transposed", "dvalues", "sum_of_rows", "linear_backward"]
)
@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPES[0], torch.float32), (SHAPES[1], torch.float32), (SHAPES[2], torch.bfloat16)], ids=str
)
def test_opcheck(shape: tuple[int, int, int, int], dtype: torch.dtype, op: str) -> None:
    m, n, _, band = shape
    c = case(*shape, dtype, (2, 5))
    x, dy, values, bias = (c[k].requires_grad_() for k in ("x", "dy", "values", "bias"))
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (x, values, c["offsets"], m, band, bias),
        "linear_gelu": (x, values, c["offsets"], m, band, bias, True),
        "linear_transposed": (dy, values, c["offsets"], n, band),
        "dvalues": (dy, x, c["offsets"], band),
        "sum_of_rows": (dy,),
        "linear_backward": (*(t.detach() for t in (dy, x, values)), c["offsets"], band),  # has no derivative
    }
    torch.library.opcheck(getattr(torch.ops.dst_ops, op).default, arguments[op])


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("op", ["linear", "linear_gelu", "linear_transposed", "linear_backward"])
@pytest.mark.parametrize("transposed", [("x",), ("dy",), ("x", "dy")], ids=str)
def test_opcheck_of_transposed_tensors(transposed: tuple[str, ...], op: str) -> None:
    c = case(24, 60, 9, 1, torch.float32, (2, 70))
    for name in transposed:
        c[name] = c[name].mT.contiguous().mT
    x, dy, values, offsets = c["x"], c["dy"], c["values"], c["offsets"]
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (x, values, offsets, 24, 1, c["bias"]),
        "linear_gelu": (x, values, offsets, 24, 1, c["bias"], True),
        "linear_transposed": (dy, values, offsets, 60, 1),
        "linear_backward": (dy, x, values, offsets, 1),
    }
    torch.library.opcheck(getattr(torch.ops.dst_ops, op).default, arguments[op])


@pytest.mark.parametrize("op", ["linear", "linear_gelu", "linear_transposed", "dvalues", "sum_of_rows"])
def test_second_derivatives_of_every_op(op: str) -> None:
    c = case(5, 7, 3, 1, torch.float64, (3,))
    ops, offsets = torch.ops.dst_ops, c["offsets"]
    x, dy, values = (c[k].requires_grad_() for k in ("x", "dy", "values"))
    functions: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        "linear": (lambda x, v: ops.linear(x, v, offsets, 5, 1), (x, values)),
        "linear_gelu": (lambda x, v: ops.linear_gelu(x, v, offsets, 5, 1, None, True), (x, values)),
        "linear_transposed": (lambda dy, v: ops.linear_transposed(dy, v, offsets, 7, 1), (dy, values)),
        "dvalues": (lambda dy, x: ops.dvalues(dy, x, offsets, 1), (dy, x)),
        "sum_of_rows": (ops.sum_of_rows, (dy,)),
    }
    assert torch.autograd.gradcheck(*functions[op])
    assert torch.autograd.gradgradcheck(*functions[op])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_whole(shape: tuple[int, int, int, int]) -> None:
    c = case(*shape, torch.float32, (2, 5))
    results = []
    for function in (_linear, torch.compile(_linear, fullgraph=True, backend="aot_eager")):
        x, values, bias = (c[k].clone().requires_grad_() for k in ("x", "values", "bias"))
        y = function(c, x, values, bias)
        results.append((y, *torch.autograd.grad(y, (x, values, bias), c["dy"])))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_compiles_for_any_batch() -> None:
    c = case(24, 60, 9, 1, torch.float32)
    compiled = torch.compile(_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 4, 9):
        x = torch.randn(rows, 60)  # on the tests' device, as all of these
        assert torch.equal(compiled(c, x, c["values"], None), _linear(c, x, c["values"], None))


@pytest.mark.cpu_only
def test_compiles_between_transpositions() -> None:
    c = case(60, 60, 9, 1, torch.float32, (2, 80))

    def mixed(x: Tensor, values: Tensor) -> Tensor:
        y = torch.relu(_linear(c, x.mT, values, c["bias"]))
        return _linear(c, y, values, None).mT + x

    results = []
    for function in (mixed, torch.compile(mixed, fullgraph=True, backend="aot_eager")):
        x, values = c["x"].mT.contiguous().requires_grad_(), c["values"].clone().requires_grad_()
        y = function(x, values)
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y, (x, values), c["dy"].mT)))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


# Nothing beside the op: inductor would spend half a minute in the C++ compiler on one addition.
FRESH_COMPILE = """
import sys, torch, dst_ops
x, values, offsets, dy = torch.load(sys.argv[1])
def function(x, values):
    return dst_ops.diagonal_linear(x, values, offsets, out_features=24, in_features=60)
y = torch.compile(function, fullgraph=True)(x, values)
torch.save((y.detach(), *torch.autograd.grad(y, (x, values), dy)), sys.argv[1])
print(next(e.kernel for e in dst_ops.backend_report().entries if e.device == x.device.type))
"""


@pytest.mark.not_emulated
def test_inductor_compiles_it_as_the_first_use_in_a_process(tmp_path: Path) -> None:
    c = case(24, 60, 9, 1, torch.float32)
    x, values = c["x"].requires_grad_(), c["values"].requires_grad_()
    torch.save((x, values, c["offsets"], c["dy"]), tmp_path / "data.pt")
    done = python(FRESH_COMPILE, str(tmp_path / "data.pt"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fused"
    y = _linear(c, x, values, None)
    expected = (y, *torch.autograd.grad(y, (x, values), c["dy"]))
    assert all(torch.equal(a, b) for a, b in zip(torch.load(tmp_path / "data.pt"), expected, strict=True))


class _Module(torch.nn.Module):
    offsets: Tensor

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(c["values"])
        self.register_buffer("offsets", c["offsets"])
        self.sizes = c["sizes"]

    def forward(self, x: Tensor) -> Tensor:
        return dst_ops.diagonal_linear(x, self.values, self.offsets, **self.sizes)


RUN_EXPORTED = """
import sys, torch, dst_ops
x, y = torch.load(sys.argv[2])
program = torch.export.load(sys.argv[1]).module()
assert torch.equal(program(x), y)
assert torch.equal(program(x[:3]), y[:3])
print(next(e.kernel for e in dst_ops.backend_report().entries if e.device == x.device.type))
"""


@pytest.mark.not_emulated
def test_an_exported_program_runs_fused_in_another_process(tmp_path: Path) -> None:
    c = case(24, 60, 9, 1, torch.float32, (7,))
    module = _Module(c)
    program = torch.export.export(module, (c["x"],), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((c["x"], module(c["x"]).detach()), tmp_path / "data.pt")
    done = python(RUN_EXPORTED, str(tmp_path / "program.pt2"), str(tmp_path / "data.pt"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fused"


def test_traced_with_sizes_that_are_symbols() -> None:
    c = case(24, 60, 9, 1, torch.float32, (7,))

    def op(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return _linear(c, x, values, bias)

    arguments = (c["x"], c["values"], c["bias"])
    program = make_fx(op, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    assert torch.equal(program(*arguments), op(*arguments))
    assert torch.equal(program(c["x"][:3], *arguments[1:]), op(c["x"][:3], *arguments[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_all_inputs_and_keeps_parameter_gradients(dtype: torch.dtype) -> None:
    c = case(24, 60, 9, 1, torch.float32)
    x, values, bias = (c[k].requires_grad_() for k in ("x", "values", "bias"))
    with torch.autocast(c["x"].device.type, dtype=dtype):
        y = _linear(c, x, values, bias)
    assert y.dtype == dtype
    assert torch.equal(y, _linear(c, x.to(dtype), values.to(dtype), bias.to(dtype)))
    gradients = torch.autograd.grad(y, (x, values, bias), c["dy"].to(dtype))
    assert [g.dtype for g in gradients] == [torch.float32] * 3


def test_autocast_leaves_float64_alone() -> None:
    c = case(24, 60, 9, 1, torch.float64)
    with torch.autocast(c["x"].device.type, dtype=torch.bfloat16):
        y = _linear(c, c["x"], c["values"], c["bias"])
    assert torch.equal(y, _linear(c, c["x"], c["values"], c["bias"]))


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("values", torch.float64, "values: dtype torch.float64, expected the dtype of x, torch.bfloat16"),
        ("bias", torch.float64, "bias: dtype torch.float64, expected the dtype of x, torch.bfloat16"),
        ("x", torch.float64, "values: dtype torch.float32, expected the dtype of x, torch.float64"),
        ("x", torch.int64, "x: dtype torch.int64, expected float32"),
        ("values", torch.int64, "values: dtype torch.int64, expected the dtype of x, torch.bfloat16"),
    ],
    ids=str,
)
def test_autocast_casts_no_integers_and_no_float64(name: str, dtype: torch.dtype, expected: str) -> None:
    c = case(24, 60, 9, 1, torch.float32)
    c[name] = c[name].to(dtype)
    with torch.autocast(c["x"].device.type, dtype=torch.bfloat16), pytest.raises(ValueError, match=expected):
        _linear(c, c["x"], c["values"], c["bias"])


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 1, None), (1, 0, 0), (None, None, 0)], ids=str
)
def test_vmap_is_a_loop(in_dims: tuple[int | None, ...]) -> None:
    c = case(24, 60, 9, 1, torch.float32)
    drawn = [torch.stack([c[k] * (i + 1) for i in range(3)]) for k in ("x", "values", "bias")]
    arguments = [a[0] if d is None else a.movedim(0, d) for a, d in zip(drawn, in_dims, strict=True)]
    mapped = torch.vmap(lambda *a: _linear(c, *a), in_dims=in_dims)(*arguments)
    for i in range(3):
        one = [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)]
        assert torch.equal(mapped[i], _linear(c, *one))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 1)], ids=str)
def test_vmap_of_the_backward_ops(in_dims: tuple[int | None, int | None]) -> None:
    c = case(24, 60, 9, 1, torch.float32, (3, 5))
    ops, offsets = torch.ops.dst_ops, c["offsets"]
    values = torch.stack([c["values"]] * 3)
    for op, second, rest in ((ops.linear_transposed, values, (60, 1)), (ops.dvalues, c["x"], (1,))):
        pair = [a[0] if d is None else a.movedim(0, d) for a, d in zip((c["dy"], second), in_dims, strict=True)]
        mapped = torch.vmap(lambda a, b, op=op, rest=rest: op(a, b, offsets, *rest), in_dims=in_dims)(*pair)
        for i in range(3):
            one = [a if d is None else a.select(d, i) for a, d in zip(pair, in_dims, strict=True)]
            assert torch.equal(mapped[i], op(*one, offsets, *rest))


@pytest.mark.parametrize("batched", ["dy", "x", "values"])
def test_gradients_of_a_batch_of_gradients(batched: str) -> None:
    c = case(24, 60, 9, 1, torch.float32)
    given = {
        k: torch.stack([c[k] * (i + 1) for i in range(3)]) if k == batched else c[k] for k in ("dy", "x", "values")
    }

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.dst_ops.linear_backward(*tensors, c["offsets"], 1)

    mapped = torch.vmap(op, in_dims=tuple(0 if k == batched else None for k in given))(*given.values())
    for i in range(3):
        one = op(*(t[i] if k == batched else t for k, t in given.items()))
        assert all(torch.equal(m[i], o) for m, o in zip(mapped, one, strict=True))


def test_the_product_must_be_kept_where_a_gradient_is_taken() -> None:
    c = case(24, 60, 9, 1, torch.float32)
    y, before = torch.ops.dst_ops.linear_gelu(c["x"].requires_grad_(), c["values"], c["offsets"], 24, 1, None, False)
    assert before.numel() == 0
    with pytest.raises(RuntimeError, match="linear_gelu: keep is False, expected True"):
        y.sum().backward()


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)], ids=str)
def test_vmap_of_two_results(in_dims: tuple[int | None, int | None]) -> None:
    c = case(24, 60, 9, 1, torch.float32)
    drawn = [torch.stack([c[k] * (i + 1) for i in range(3)]) for k in ("x", "values")]
    x, values = (a[0] if d is None else a for a, d in zip(drawn, in_dims, strict=True))

    def op(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.dst_ops.linear_gelu(x, values, c["offsets"], 24, 1, None, True)

    mapped = torch.vmap(op, in_dims=in_dims)(x, values)
    for i in range(3):
        one = op(*(a if d is None else a[i] for a, d in zip((x, values), in_dims, strict=True)))
        assert all(torch.equal(m[i], o) for m, o in zip(mapped, one, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_what_vmap_maps_over_a_gelu(compiled: bool) -> None:
    c = case(24, 60, 9, 1, torch.float32, (3, 5))
    x = c["x"].requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return dst_ops.diagonal_linear(x, c["values"], c["offsets"], **c["sizes"], activation="gelu")

    mapped = torch.vmap(layer)
    if compiled:
        mapped = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(mapped(x), x, c["dy"])
    (expected,) = torch.autograd.grad(layer(x), x, c["dy"])
    torch.testing.assert_close(got, expected)


def test_a_meta_tensor_gives_the_shape() -> None:
    c = case(24, 60, 9, 1, torch.bfloat16, (2, 5))
    meta = {k: c[k].to("meta") for k in ("x", "values", "offsets", "bias")}
    y = dst_ops.diagonal_linear(meta["x"], meta["values"], meta["offsets"], meta["bias"], **c["sizes"])
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 24), torch.bfloat16, "meta")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_without_gradients_the_result_is_the_same_and_asks_for_none(activation: str | None) -> None:
    """Calls then pass the ops' autograd by."""
    c = case(24, 60, 9, 1, torch.float32, (2, 5))
    x, values, bias = (c[k].requires_grad_() for k in ("x", "values", "bias"))
    arguments = (x, values, c["offsets"], bias)
    expected = dst_ops.diagonal_linear(*arguments, **c["sizes"], activation=activation)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = dst_ops.diagonal_linear(*arguments, **c["sizes"], activation=activation)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    with torch.no_grad():
        mapped = torch.vmap(
            lambda row: dst_ops.diagonal_linear(row, *arguments[1:], **c["sizes"], activation=activation)
        )(x)
    assert torch.equal(mapped, expected)
