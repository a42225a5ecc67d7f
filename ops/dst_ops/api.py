"""The public functions: validation, autocast, and the dense gradient's score per candidate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dst_ops import build, reference, registration  # noqa: F401  (registers torch.ops.dst_ops)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCORE_BLOCK = 3 * 2**19  # elements of dW held at once: 6 MiB in fp32


def diagonal_linear(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    in_features: int,
    band: int = 1,
    activation: str | None = None,
) -> Tensor:
    """`y = x W^T + bias` for a diagonally sparse W of shape [out_features, in_features] that is never stored.

    With P = max(out_features, in_features) and L = min(...), entry l of candidate diagonal o in [0, P) is at row
    (l + o) mod out_features, column l if out_features >= in_features, else at row l, column (l + o) mod in_features
    (DynaDiag, arXiv 2506.11449, in the indexing of its released code). Sums are taken in fp32 (fp64 for fp64).

    Args:
        x: [..., in_features]; float32, bfloat16, float16 or float64. Inside autocast all floating inputs are cast to its
            dtype, except float64.
        values: [U * band, L], dtype and device of x; row u * band + i belongs to candidate offsets[u] * band + i.
        offsets: int32 [U]; distinct units in [0, P / band), in any order.
        bias: [out_features] or None, dtype of x.
        band: adjacent diagonals per unit; divides P.
        activation: None or "gelu" (exact), which the CUDA kernels apply before they write y.

    Returns:
        y: [..., out_features] in the dtype of x, contiguous. On the CPU, if x is the transpose of a contiguous tensor and has
            at least 64 tokens in its last dimension but one, so is y, and neither is copied.

    Raises:
        ValueError: naming the argument, its value and what was expected. Values of offsets are checked in eager mode
            on the CPU; a traced program relies on the kernel's own bounds check (RuntimeError).
        NotImplementedError: for forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad).
    """
    if not (isinstance(x, Tensor) and isinstance(values, Tensor) and isinstance(offsets, Tensor)):
        for name, given in (("x", x), ("values", values), ("offsets", offsets)):
            _check(isinstance(given, Tensor), name, "type", type(given).__name__, "a torch.Tensor")
    # Here and not as an autocast kernel of the op: torch.library.register_autocast casts to one dtype named when it is
    # registered, whatever dtype the autocast region asks for. Like torch's own, this leaves float64 alone.
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, values = _cast(x, dtype), _cast(values, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    tracing = torch.compiler.is_compiling()
    # Once for each kind of call: one token has no time for it. Sizes of fake tensors may be symbols, which no cache takes.
    check = _check_call if type(x) is Tensor and not tracing else _check_call.__wrapped__
    check(
        (x.dtype, x.device, x.shape),
        (values.dtype, values.device, values.shape),
        (offsets.dtype, offsets.device, offsets.shape),
        None if bias is None else (bias.dtype, bias.device, bias.shape),
        out_features,
        in_features,
        band,
    )
    if activation not in (None, "gelu"):
        raise ValueError(f"activation: {activation!r}, expected None or 'gelu'")
    if forward_ad._current_level >= 0:
        _check_no_tangents(x=x, values=values, bias=bias)
    if device == "cpu" and not tracing and not build.load():
        _check_numbers(offsets, out_features, in_features, band)  # the compiled kernels check them themselves
    x = reference.as_taken(x)  # here, so that the gradient of values finds the copy that the forward pass made
    arguments = (x, values, offsets, out_features, band, bias)
    try:
        if tracing or torch.is_grad_enabled():
            return _call(arguments, activation)
        # The ops' autograd is in Python, where it takes as long as a product of one token, also if it has nothing to do.
        with torch._C._AutoDispatchBelowAutograd():
            return _call(arguments, activation)
    except RuntimeError:
        _check_numbers(offsets, out_features, in_features, band)
        raise


def _call(arguments: tuple[Any, ...], activation: str | None) -> Tensor:
    ops = torch.ops.dst_ops
    if activation is None:
        return ops.linear(*arguments)
    x, values, _, _, _, bias = arguments
    # Inside vmap, requires_grad of whatever is mapped over is False.
    needed = torch._C._are_functorch_transforms_active() or any(
        t is not None and t.requires_grad for t in (x, values, bias)
    )
    return ops.linear_gelu(*arguments, torch.is_grad_enabled() and needed)[0]


def to_dense(values: Tensor, offsets: Tensor, *, out_features: int, in_features: int, band: int = 1) -> Tensor:
    """The weight as [out_features, in_features], in the dtype of values; differentiable. Errors as `diagonal_linear`."""
    _check_offsets(offsets.dtype, offsets.shape, out_features, in_features, band)
    _check_numbers(offsets, out_features, in_features, band)
    expected = (offsets.shape[0] * band, min(out_features, in_features))
    _check(tuple(values.shape) == expected, "values", "shape", values.shape, expected)
    return reference.to_dense(values, offsets, out_features, in_features, band)


def from_dense(weight: Tensor, offsets: Tensor, *, band: int = 1) -> Tensor:
    """The values [U * band, L] of the given diagonals of a dense weight [out_features, in_features]; differentiable."""
    _check(weight.dim() == 2, "weight", "shape", weight.shape, "[out_features, in_features]")
    _check_offsets(offsets.dtype, offsets.shape, weight.shape[0], weight.shape[1], band)
    _check_numbers(offsets, weight.shape[0], weight.shape[1], band)
    rows, columns = reference.positions(offsets, weight.shape[0], weight.shape[1], band)
    return weight[rows, columns]


@torch.no_grad()
def diagonal_scores(
    x: Tensor,
    dy: Tensor,
    *,
    out_features: int,
    in_features: int,
    band: int = 1,
    reduce: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Mean |dW| over the entries of each unit, where dW = dy^T x is the dense weight's gradient.

    dW is computed in fp32 in blocks of columns of at most 6 MiB (or one column, or half of dW) and never held as a whole.

    Args:
        x: [..., in_features]. dy: [..., out_features], same leading shape and device.
        reduce: called with each block dW[:, first : first + columns] (fp32, contiguous, may be changed in place) and
            first, before the absolute value; returns the block to use, for example summed over ranks. The cut into
            blocks depends on out_features and in_features only, so that it is the same on all ranks.

    Returns:
        float32 [P / band].

    Raises:
        ValueError: as `diagonal_linear`.
    """
    _check_band(out_features, in_features, band)
    _check(x.shape[-1:] == (in_features,), "x", "shape", x.shape, "[..., in_features={}]", in_features)
    expected = (*x.shape[:-1], out_features)
    _check(tuple(dy.shape) == expected, "dy", "shape", dy.shape, expected)
    _check(dy.device == x.device, "dy", "device", dy.device, "the device of x, {}", x.device)
    x32, dy32 = x.reshape(-1, in_features).float(), dy.reshape(-1, out_features).float()
    # Columns, not rows: MKL's product is then a tenth quicker where dW is large.
    columns = max(1, min(SCORE_BLOCK // out_features, -(-in_features // 2)))
    sums = x32.new_zeros(max(out_features, in_features))
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, in_features, columns):
            block = dy32.t() @ x32[:, first : first + columns]
            if reduce is not None:
                block = reduce(block, first)
            sums += torch.ops.dst_ops.diagonal_sums(block, first, in_features)
            del block  # before the next one is there
    return sums.view(-1, band).sum(1) / (band * min(out_features, in_features))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


_Metadata = tuple[torch.dtype, torch.device, torch.Size]  # what is checked of a tensor


@functools.lru_cache(maxsize=1024)
def _check_call(
    x: _Metadata,
    values: _Metadata,
    offsets: _Metadata,
    bias: _Metadata | None,
    out_features: int,
    in_features: int,
    band: int,
) -> None:
    dtype, device, shape = x
    _check_offsets(offsets[0], offsets[2], out_features, in_features, band)
    _check(dtype in DTYPES, "x", "dtype", dtype, "float32, bfloat16, float16 or float64")
    _check(len(shape) >= 1 and shape[-1] == in_features, "x", "shape", shape, "[..., in_features={}]", in_features)
    expected = (offsets[2][0] * band, min(out_features, in_features))
    _check(tuple(values[2]) == expected, "values", "shape", values[2], expected)
    _check(values[0] == dtype, "values", "dtype", values[0], "the dtype of x, {} (or autocast)", dtype)
    _check(values[1] == device, "values", "device", values[1], "the device of x, {}", device)
    _check(offsets[1] == device, "offsets", "device", offsets[1], "the device of x, {}", device)
    if bias is not None:
        _check(tuple(bias[2]) == (out_features,), "bias", "shape", bias[2], (out_features,))
        _check(bias[0] == dtype, "bias", "dtype", bias[0], "the dtype of x, {}", dtype)
        _check(bias[1] == device, "bias", "device", bias[1], "the device of x, {}", device)


def _check_no_tangents(**tensors: Tensor | None) -> None:
    """torch gives the results of an operator that is defined in Python no tangent, and says nothing."""
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: has a tangent, and there are no forward-mode derivatives; use backward")


def _check(ok: bool, argument: str, what: str, got: object, expected: object, *parts: object) -> None:
    """`parts` fill the braces of `expected`, here and only on failure: dynamo cannot put a dynamic size into a string."""
    if not ok:
        got = tuple(got) if isinstance(got, torch.Size) else got
        expected = expected.format(*parts) if isinstance(expected, str) else expected
        raise ValueError(f"{argument}: {f'{what} {got}'.strip()}, expected {expected}")


def _check_band(out_features: int, in_features: int, band: int) -> None:
    _check(out_features >= 1, "out_features", "", out_features, "at least 1")
    _check(in_features >= 1, "in_features", "", in_features, "at least 1")
    candidates = max(out_features, in_features)
    _check(
        band >= 1 and candidates % band == 0,
        "band",
        "",
        band,
        "a divisor of max(out_features, in_features) = {}",
        candidates,
    )


def _check_offsets(dtype: torch.dtype, shape: torch.Size, out_features: int, in_features: int, band: int) -> None:
    _check_band(out_features, in_features, band)
    units = max(out_features, in_features) // band
    _check(dtype == torch.int32, "offsets", "dtype", dtype, "int32")
    _check(len(shape) == 1 and 1 <= shape[0] <= units, "offsets", "shape", shape, "[1 to {}]", units)


def _check_numbers(offsets: Tensor, out_features: int, in_features: int, band: int) -> None:
    if torch.compiler.is_compiling() or type(offsets) is not Tensor or offsets.device.type != "cpu":
        return  # the numbers are not there yet, or reading them would wait for the device
    units, numbers = max(out_features, in_features) // band, offsets.tolist()
    low, high = min(numbers), max(numbers)
    _check(low >= 0 and high < units, "offsets", f"range {low} to", high, f"0 to {units - 1}")
    if len(set(numbers)) != len(numbers):
        _check(False, "offsets", "repeated units", _repeated(numbers), "distinct units")


def _repeated(numbers: list[int]) -> list[int]:
    return sorted({n for n in numbers if numbers.count(n) > 1})
