"""What the compiler makes of the kernels, and the CUDA library on a machine without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dst_ops
from dst_ops import build, cuda
from tests.gpu import sass
from tests.gpu.sass import Kernel
from tests.unit.ops.process import python


def _no_compiler() -> str | None:
    try:
        build._nvcc()
    except OSError as error:  # none, or of another major version; whatever else is wrong is an error
        return str(error)
    return None


NO_COMPILER = _no_compiler()
pytestmark = pytest.mark.cpu_only
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
on_every_chip = pytest.mark.parametrize("chip", re.findall(r"(\d+a?)(?!\d|-virtual)", build.ARCHITECTURES))

REGISTERS = 65536  # of a multiprocessor
DIAGONAL = 36  # instructions
BESIDE = {  # instructions, by width
    "band_stream": {8: 205, 16: 180, 32: 135, 64: 110},
    "band_gradient": {8: 245, 16: 225, 32: 190, 64: 125},
    "band_boxes_gradient": {32: 80, 64: 60},
}
BOXES = ("band_boxes", "band_boxes_gradient")


@pytest.fixture(scope="session")
def library() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DST_OPS_CUDA_ARCHS", raising=False)
        return build.build("cuda")


@pytest.fixture(scope="session")
def compiled(library: Path) -> dict[str, list[Kernel]]:
    return sass.kernels(library)


@pytest.fixture
def kernels(compiled: dict[str, list[Kernel]], chip: str) -> list[Kernel]:
    return compiled[chip]


def _named(kernels: list[Kernel], *names: str) -> list[Kernel]:
    found = [k for k in kernels if k.name in names]
    assert {k.name for k in found} == set(names)
    return found


def _block(k: Kernel) -> tuple[int, int]:
    """Threads of a block, and blocks that a multiprocessor is to hold: one loads while the other computes."""
    if k.name in ("band_resident", "band_stream", "band_gradient"):
        return 256, 2
    if k.name in BOXES and k.count("HMMA") == 0:  # a chip without the engine
        return 32, 1
    return {
        "band_boxes": (288, 1),
        "band_boxes_gradient": (384, 1),
        "sum_tokens": (256, 4),
        "sum_splits": (256, 4),
        "scalar_product": (256, 2),
        "scalar_few": (512, 2),
        "scalar_gradient": (256, 2),
        "band_pack": (256, 4),
        "add_parts": (256, 4),
        "dense_weight": (256, 4),
        "take_diagonals": (256, 4),
        "invert_offsets": (1024, 1),
    }[k.name]


def _with_boxes(kernels: list[Kernel], *names: str) -> list[Kernel]:
    """Those of names that are not empty: a chip without the engine has none of them."""
    return [k for k in _named(kernels, *names) if k.count("HMMA")]


def _width(k: Kernel) -> int:
    return int(k.arguments[1])


def _pack(k: Kernel) -> int:
    """Numbers in 16 bytes."""
    return 4 if k.arguments[0] == "float" else 8


@needs_compiler
@on_every_chip
def test_nothing_is_in_local_memory(kernels: list[Kernel]) -> None:
    """Neither what registers have no room for nor an array whose index is not known to the compiler."""
    stacks = {str(k): f"{k.stack} bytes, {k.count('STL')} stores, {k.count('LDL')} loads" for k in kernels if k.stack}
    assert stacks == {}
    assert [str(k) for k in kernels if k.count("LDL") + k.count("STL")] == []


@needs_compiler
@on_every_chip
def test_registers_leave_room_for_the_blocks(kernels: list[Kernel]) -> None:
    for k in kernels:
        threads, blocks = _block(k)
        assert k.threads == threads, str(k)
        assert k.registers * threads * blocks <= REGISTERS, str(k)


@needs_compiler
def test_kernels_that_are_launched_early_wait_for_the_launch_before_on_later_chips_too(library: Path) -> None:
    """They are made of assembly there: of a chip that has no such wait they would read what is not written yet."""
    text = "\n".join(sass.assembly(library))
    early = re.findall(r"\.entry (\w*(?:scalar_few|band_resident|band_stream)\w*)\((.*?)\n}", text, re.DOTALL)
    assert len(early) == 12 + 32 + 16
    assert [name for name, body in early if "griddepcontrol.wait" not in body] == []


@needs_compiler
def test_few_tokens_are_read_after_the_wait(compiled: dict[str, list[Kernel]]) -> None:
    """The compiler may move a read of what it takes for constant before it."""
    for k in _named(compiled["90a"], "scalar_few"):
        first = next(i for i, name in enumerate(k.instructions) if name.startswith("LDG"))
        assert k.instructions.index("ACQBULK") < first, str(k)


@needs_compiler
@on_every_chip
def test_band_products_multiply_no_more_than_they_must(kernels: list[Kernel]) -> None:
    """8 rows meet W / 8 + 1 blocks of 8 columns, two in an instruction or, without a partner, one. A tile is 8 times 8 rows."""
    for k in (*_named(kernels, "band_resident", "band_stream"), *_with_boxes(kernels, "band_boxes")):
        token_tiles = int(k.arguments[2]) if k.name == "band_resident" else 2
        pairs, single = k.count("HMMA.16816.F32"), k.count("HMMA.1688.F32")
        assert pairs + single == k.count("HMMA"), f"{k}: sums not in fp32"
        assert 2 * pairs + single == 8 * token_tiles * (_width(k) // 8 + 1), str(k)


@needs_compiler
@on_every_chip
def test_band_gradients_multiply_no_more_than_they_must(kernels: list[Kernel]) -> None:
    """A stage is 2 times 16 tokens; a warp has 2 times 16 positions, which meet W / 8 + 2 blocks of 8 columns of each band."""
    for k in (*_named(kernels, "band_gradient"), *_with_boxes(kernels, "band_boxes_gradient")):
        bands = (2 if _width(k) < 64 else 1) * (2 if k.name in BOXES else 1)
        assert k.count("HMMA.16816.F32") == k.count("HMMA") == 4 * bands * (_width(k) // 8 + 2), str(k)


@needs_compiler
@on_every_chip
def test_band_kernels_read_matrices_and_copy_in_the_background(kernels: list[Kernel]) -> None:
    for k in _named(kernels, "band_resident", "band_stream", "band_gradient"):
        # Matrices of the gradient are transposed as they are read: tokens are its summed dimension.
        assert k.count("LDSM.16.MT88" if k.name == "band_gradient" else "LDSM.16.M88") == k.count("LDSM") > 0, str(k)
        assert k.count("LDGSTS") > 0, f"{k}: copies go through registers"


@needs_compiler
@on_every_chip
def test_boxes_are_fetched_by_the_engine_of_chips_that_have_one(kernels: list[Kernel], chip: str) -> None:
    """Elsewhere the kernels are empty, which the launcher sees by the threads that they take (fetches_boxes in launch.h)."""
    found = _named(kernels, *BOXES)
    if chip != "90a":
        assert _with_boxes(kernels, *BOXES) == []
        assert {k.threads for k in found} == {32}
        return
    for k in found:
        product = k.name == "band_boxes"
        assert k.count("HMMA") > 0
        assert k.count("LDSM.16.M88" if product else "LDSM.16.MT88") == k.count("LDSM") > 0, str(k)
        assert k.count("UTMALDG.2D") > 0, str(k)
        assert (k.count("UBLKCP") > 0) == product, str(k)  # packed weights
        assert k.count("LDGSTS") == 0, str(k)


@needs_compiler
@on_every_chip
def test_bands_take_few_instructions_beside_those_that_work(kernels: list[Kernel]) -> None:
    """To find the next band, for addresses, to wait. A GPU was found to spend its time on them: see docs/op_cuda.md."""
    for k in (*_named(kernels, "band_stream", "band_gradient"), *_with_boxes(kernels, "band_boxes_gradient")):
        turn = k.shortest_turn("HMMA", "LDSM" if k.name in BOXES else "LDGSTS")
        working = sum(n for name, n in turn.items() if name.startswith(("HMMA", "LDSM", "LDS.", "LDG.E.128", "LDGSTS")))
        assert turn.total() - working <= BESIDE[k.name][_width(k)], f"{k}: {working} of {turn.total()} work"


@needs_compiler
@on_every_chip
def test_copies_of_whole_lines_go_past_the_first_level_cache_and_no_others(kernels: list[Kernel]) -> None:
    """What an H100 does best with; see copy_async."""
    for k in _named(kernels, "band_resident", "band_stream", "band_gradient", "scalar_few"):
        lines = k.name in ("band_stream", "band_gradient")
        assert k.count("LDGSTS.E.BYPASS.128") == (k.count("LDGSTS") if lines else 0), str(k)


@needs_compiler
@on_every_chip
def test_scalar_gradients_read_a_pack_at_once(kernels: list[Kernel]) -> None:
    for k in _named(kernels, "scalar_gradient"):
        assert k.count("FFMA") == _pack(k) * k.count("LDS.128") > 0, str(k)
        assert k.count("HMMA") == 0, str(k)


@needs_compiler
@on_every_chip
def test_scalar_products_spend_their_time_on_multiplications(kernels: list[Kernel]) -> None:
    """Instructions of the loop over diagonals. For a pack: one to read it and one for its address, a multiply-add for each
    number, and one to widen each that is of 16 bits. For a diagonal, shared by the packs: DIAGONAL instructions to read its
    offset, wrap the index, see whether the row is met, form the address of the weight, read it ahead, widen it and go on.
    """
    for k in _named(kernels, "scalar_product"):
        loop, pack, groups = k.hottest_loop("LDS.128"), _pack(k), int(k.arguments[1])
        packs = sum(n for name, n in loop.items() if name.startswith("FFMA")) // pack
        assert packs >= groups, str(k)
        assert loop["LDS.128"] >= packs, f"{k}: a pack is not read at once"
        of_a_pack = 2 + pack + (pack if pack == 8 else 0)
        assert sum(loop.values()) <= packs * of_a_pack + packs // groups * DIAGONAL, f"{k}: {loop}"
        assert k.count("HMMA") == 0, str(k)


LOAD = """
import sys, torch, dst_ops
def there():
    return [name for name in sys.argv[2:] if torch._C._dispatch_has_kernel_for_dispatch_key(f"dst_ops::{name}", "CUDA")]
assert there() == []
torch.ops.load_library(sys.argv[1])
assert there() == sys.argv[2:]
"""


@needs_compiler
def test_the_library_loads_without_a_gpu(library: Path) -> None:
    names = [schema.split("(")[0] for schema in cuda.SCHEMAS]
    assert len(names) == 7
    done = python(LOAD, str(library), *names)
    assert done.returncode == 0, done.stderr


def _step(sizes: dict[str, Any], x: Tensor, values: Tensor, offsets: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dvalues, dbias.

    The node of the graph is called and not torch.autograd.grad: the engine asks the driver for the device's context, also
    for tensors without numbers.
    """
    y = dst_ops.diagonal_linear(x, values, offsets, bias, **sizes)
    assert y.grad_fn is not None
    others = [torch.zeros_like(dy)] if sizes["activation"] else []  # the gradient of what the GELU was applied to
    dx, dvalues, _, _, _, dbias, *_ = y.grad_fn.apply(dy, *others)  # type: ignore[attr-defined]
    return [y, dx, dvalues, dbias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(64, 96), (96, 64)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_and_backward_are_traced_for_cuda(activation: str | None, m: int, n: int, dtype: torch.dtype) -> None:
    band, units = 8, 3
    sizes = {"out_features": m, "in_features": n, "band": band, "activation": activation}
    with FakeTensorMode():

        def fake(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)

        offsets = torch.empty(units, dtype=torch.int32, device="cuda")
        arguments = (fake(2, 5, n), fake(units * band, min(m, n)), offsets, fake(m), fake(2, 5, m).detach())
        graph = make_fx(lambda *tensors: _step(sizes, *tensors))(*arguments)
        results = graph(*arguments)
    called = [str(node.target) for node in graph.graph.nodes if "dst_ops" in str(node.target)]
    forward = "linear_gelu" if activation else "linear"
    assert called == [f"dst_ops.{name}.default" for name in (forward, "linear_transposed", "dvalues", "sum_of_rows")]
    assert [r.shape for r in results] == [(2, 5, m), *(arguments[i].shape for i in (0, 1, 3))]
    assert {(r.device.type, r.dtype) for r in results} == {("cuda", dtype)}


def test_compiles_whole_for_cuda() -> None:
    """Without a break in the graph. What dynamo hands to a backend is looked at: to compile it further takes a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        assert {tensor.device.type for tensor in inputs} == {"cuda"}
        graphs.append(graph)
        return graph.forward

    def layer(x: Tensor, values: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        return dst_ops.diagonal_linear(x, values, offsets, bias, out_features=64, in_features=96, band=8)

    with FakeTensorMode():
        x, values, bias = (torch.empty(*shape, device="cuda") for shape in ((2, 5, 96), (24, 64), (64,)))
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        y = torch.compile(layer, fullgraph=True, backend=backend)(x, values, offsets, bias)
    assert (y.shape, y.device.type) == ((2, 5, 64), "cuda")
    assert [str(node.target) for node in graphs[0].graph.nodes if "dst_ops" in str(node.target)] == ["dst_ops.linear"]
