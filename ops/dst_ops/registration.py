"""The raw ops `torch.ops.dst_ops.{linear, linear_gelu, linear_transposed, dvalues, sum_of_rows, linear_backward, diagonal_sums}`.

Here are their schemas, fake kernels, autograd and vmap. linear, linear_transposed and dvalues are closed under
differentiation: the backward of each uses only the other two and sum_of_rows, so that any order of derivative works.
linear_backward is the gradients of all three at once, for the CPU, where that is a tenth quicker. The schemas are defined here and not in
C++, so that `import dst_ops` builds nothing and torch.compile can trace the ops before a library is loaded. What runs at
first is the kernel below, registered for every device, however the op was reached: eagerly, from a compiled program or from
an exported one. On the CPU it loads the library (csrc/cpu), whose kernels for the CPU key take its place from then on; on
CUDA it chooses among the kernels of another library (cuda.py, csrc/cuda) at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dst_ops import build, cuda, reference

SCHEMAS = (
    "linear(Tensor x, Tensor values, Tensor offsets, SymInt out_features, int band, Tensor? bias=None) -> Tensor",
    "linear_gelu(Tensor x, Tensor values, Tensor offsets, SymInt out_features, int band, Tensor? bias, bool keep)"
    " -> (Tensor, Tensor)",  # GELU of linear, and what it was applied to (no numbers unless `keep`)
    "linear_transposed(Tensor dy, Tensor values, Tensor offsets, SymInt in_features, int band) -> Tensor",
    "dvalues(Tensor dy, Tensor x, Tensor offsets, int band) -> Tensor",
    "sum_of_rows(Tensor dy) -> Tensor",  # the gradient of a bias
    "linear_backward(Tensor dy, Tensor x, Tensor values, Tensor offsets, int band) -> (Tensor, Tensor, Tensor)",
    "diagonal_sums(Tensor block, int first_column, int in_features) -> Tensor",  # of |entries|; has no derivative
)

library = torch.library.Library("dst_ops", "DEF")
for _schema in (*SCHEMAS, *cuda.SCHEMAS):
    library.define(_schema)


def _first_kernel(name: str) -> Callable[..., Any]:
    """The compiled kernels, or the definition where there are none."""
    definition = getattr(reference, name)
    on_cuda = getattr(cuda, name, definition)

    def kernel(tensor: Tensor, *args: Any) -> Any:
        device = tensor.device.type
        if device == "cpu" and name in IN_CPU_LIBRARY and build.load():
            return getattr(torch.ops.dst_ops, name).default(tensor, *args)
        with torch.autocast(device, enabled=False):  # sums in fp32, as in the compiled kernels
            if device == "cuda" and cuda.serves(tensor.device) and build.load("cuda"):
                return on_cuda(tensor, *args)
            return definition(tensor, *args)

    return kernel


IN_CPU_LIBRARY = ("linear", "linear_transposed", "dvalues", "linear_backward", "diagonal_sums")
for _name in (*IN_CPU_LIBRARY, "linear_gelu", "sum_of_rows"):
    library.impl(_name, _first_kernel(_name), "CompositeExplicitAutograd")


@torch.library.register_fake("dst_ops::linear")
def _(x: Tensor, values: Tensor, offsets: Tensor, out_features: int, band: int, bias: Tensor | None = None) -> Tensor:
    return reference.empty(x, out_features)


@torch.library.register_fake("dst_ops::linear_gelu")
def _(
    x: Tensor, values: Tensor, offsets: Tensor, out_features: int, band: int, bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    y = reference.empty(x, out_features)
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.register_fake("dst_ops::linear_transposed")
def _(dy: Tensor, values: Tensor, offsets: Tensor, in_features: int, band: int) -> Tensor:
    return reference.empty(dy, in_features)


@torch.library.register_fake("dst_ops::dvalues")
def _(dy: Tensor, x: Tensor, offsets: Tensor, band: int) -> Tensor:
    return x.new_empty((offsets.shape[0] * band, min(dy.shape[-1], x.shape[-1])), dtype=reference.sum_dtype(x))


@torch.library.register_fake("dst_ops::sum_of_rows")
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[-1], dtype=reference.sum_dtype(dy))


@torch.library.register_fake("dst_ops::linear_backward")
def _(dy: Tensor, x: Tensor, values: Tensor, offsets: Tensor, band: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.sum_dtype(x)
    dvalues = x.new_empty(values.shape, dtype=wide)
    return reference.empty(dy, x.shape[-1]), dvalues, x.new_empty(dy.shape[-1], dtype=wide)


@torch.library.register_fake("dst_ops::diagonal_sums")
def _(block: Tensor, first_column: int, in_features: int) -> Tensor:
    return block.new_empty(max(block.shape[0], in_features))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, offsets, _, ctx.band, bias = inputs
    ctx.save_for_backward(x, values, offsets)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, *ctx.saved_tensors)


def _gradients(ctx: Any, dy: Tensor, x: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor | None, ...]:
    need, ops = ctx.needs_input_grad, torch.ops.dst_ops
    need_bias = ctx.bias_dtype is not None and need[5]
    dx = dvalues = dbias = None
    # linear_backward has no derivative: where a graph of the gradients is asked for, the ops that have one give them.
    if dy.device.type == "cpu" and need[0] and need[1] and not torch.is_grad_enabled():
        dx, dvalues, dbias = ops.linear_backward(dy, x, values, offsets, ctx.band)
    else:
        dy = reference.as_taken(dy)  # once, not in each of the two ops
        if need[0]:
            dx = ops.linear_transposed(dy, values, offsets, x.shape[-1], ctx.band)
        if need[1]:
            dvalues = ops.dvalues(dy, x, offsets, ctx.band)
        if need_bias:
            dbias = ops.sum_of_rows(dy)
    dvalues = None if dvalues is None else dvalues.to(values.dtype)
    dbias = dbias.to(ctx.bias_dtype) if need_bias and dbias is not None else None
    return dx, dvalues, None, None, None, dbias


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, offsets, _, ctx.band, bias, ctx.keep = inputs
    ctx.save_for_backward(x, values, offsets, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # nobody uses `before`: zeros for it would be written, read and added


def _gelu_backward(ctx: Any, dy: Tensor | None, dbefore: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("dst_ops.linear_gelu: keep is False, expected True where a gradient is taken")
    x, values, offsets, before = ctx.saved_tensors
    parts = [dbefore, None if dy is None else torch.ops.aten.gelu_backward(dy, before)]
    there = [part for part in parts if part is not None]
    if not there:
        return (None,) * 7
    return (*_gradients(ctx, there[0] if len(there) == 1 else there[0] + there[1], x, values, offsets), None)


def _transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, offsets, _, ctx.band = inputs
    ctx.save_for_backward(dy, values, offsets)


def _transposed_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, values, offsets = ctx.saved_tensors
    ops = torch.ops.dst_ops
    ddy = ops.linear(g, values, offsets, dy.shape[-1], ctx.band) if ctx.needs_input_grad[0] else None
    dvalues = ops.dvalues(dy, g, offsets, ctx.band).to(values.dtype) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, None, None, None


def _dvalues_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, offsets, ctx.band = inputs
    ctx.save_for_backward(dy, x, offsets)


def _dvalues_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, offsets = ctx.saved_tensors
    ops, values = torch.ops.dst_ops, g.to(x.dtype)
    ddy = ops.linear(x, values, offsets, dy.shape[-1], ctx.band) if ctx.needs_input_grad[0] else None
    dx = ops.linear_transposed(dy, values, offsets, x.shape[-1], ctx.band) if ctx.needs_input_grad[1] else None
    return ddy, dx, None, None


def _sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (dy,) = inputs
    ctx.shape, ctx.dtype = dy.shape, dy.dtype


def _sums_backward(ctx: Any, g: Tensor) -> Tensor:
    return g.to(ctx.dtype).expand(ctx.shape)


torch.library.register_autograd("dst_ops::linear", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("dst_ops::linear_gelu", _gelu_backward, setup_context=_gelu_setup)
torch.library.register_autograd("dst_ops::linear_transposed", _transposed_backward, setup_context=_transposed_setup)
torch.library.register_autograd("dst_ops::dvalues", _dvalues_backward, setup_context=_dvalues_setup)
torch.library.register_autograd("dst_ops::sum_of_rows", _sums_backward, setup_context=_sums_setup)


def _vmap(op: Any, free_first: bool) -> Any:
    """A vmap rule: leading dimensions of the first tensor are free if nothing else is batched; otherwise a loop."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        dims = (*in_dims, *(None for _ in range(len(args) - len(in_dims))))
        if free_first and dims[0] is not None and all(d is None for d in dims[1:]):
            result = op(args[0].movedim(dims[0], 0), *args[1:])
            return result, 0 if isinstance(result, Tensor) else (0,) * len(result)
        results = []
        for i in range(info.batch_size):
            one = [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]
            results.append(op(*one))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


torch.library.register_vmap("dst_ops::linear", _vmap(torch.ops.dst_ops.linear, True))
torch.library.register_vmap("dst_ops::linear_gelu", _vmap(torch.ops.dst_ops.linear_gelu, True))
torch.library.register_vmap("dst_ops::linear_transposed", _vmap(torch.ops.dst_ops.linear_transposed, True))
torch.library.register_vmap("dst_ops::dvalues", _vmap(torch.ops.dst_ops.dvalues, False))
torch.library.register_vmap("dst_ops::sum_of_rows", _vmap(torch.ops.dst_ops.sum_of_rows, False))
torch.library.register_vmap("dst_ops::linear_backward", _vmap(torch.ops.dst_ops.linear_backward, False))
