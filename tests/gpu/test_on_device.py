"""What only a GPU can show: streams, graphs, memory that held something else. Needs --backend cuda."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import dst_ops
from tests.unit.ops.oracle import case

SHAPES = [(768, 768, 77, 1), (768, 3072, 10, 32), (3072, 768, 20, 16), (3072, 768, 40, 8)]
pytestmark = pytest.mark.usefixtures("gpu", "kernel")


@pytest.fixture
def gpu(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--backend") != "cuda":
        pytest.skip("needs --backend cuda")


def _poison() -> None:
    """NaN in the memory that the next tensors get."""
    for bytes_ in (2**10, 2**14, 2**18, 2**22, 2**26):
        held = [torch.full((bytes_ // 4,), torch.nan) for _ in range(8)]
        del held
    torch.cuda.synchronize()


def _step(c: dict[str, Any]) -> list[Tensor]:
    x, values, bias = (c[k].detach().requires_grad_() for k in ("x", "values", "bias"))
    y = dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"], activation="gelu")
    return [y.detach(), *torch.autograd.grad(y, (x, values, bias), c["dy"])]


@pytest.mark.parametrize("rows", [1, 8, 197, 5000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_is_written_and_the_same_twice(shape: tuple[int, int, int, int], rows: int) -> None:
    c = case(*shape, torch.bfloat16, (rows,))
    expected = _step(c)
    for _ in range(2):
        _poison()
        for got, want in zip(_step(c), expected, strict=True):
            assert torch.isfinite(got).all()
            assert torch.equal(got, want)


def test_offsets_of_another_device_are_refused() -> None:
    c = case(64, 64, 2, 8, torch.bfloat16)
    with pytest.raises(RuntimeError, match="offsets must be on the device of"):
        torch.ops.dst_ops.dvalues(c["dy"], c["x"], c["offsets"].cpu(), 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_another_stream(shape: tuple[int, int, int, int]) -> None:
    """Work is queued behind what the stream holds already, and on no other stream."""
    c = case(*shape, torch.bfloat16, (300,))
    expected = _step(c)
    late = {**c, "x": torch.full_like(c["x"], torch.nan)}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: x is filled long after the calls are queued
        late["x"].copy_(c["x"])
        results = _step(late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_graph_is_captured_without_waiting_for_the_device(shape: tuple[int, int, int, int], rows: int) -> None:
    """Capture fails on any call that synchronises; replays compute with the numbers that the tensors hold then."""
    first, second = (case(*shape, torch.bfloat16, (rows,), seed=s) for s in (0, 1))
    x = first["x"].clone()

    def infer() -> Tensor:
        with torch.no_grad():
            return dst_ops.diagonal_linear(x, first["values"], first["offsets"], first["bias"], **first["sizes"])

    infer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = infer()
    for c in (second, first):
        x.copy_(c["x"])
        graph.replay()
        assert torch.equal(y, infer())


def test_a_training_step_is_captured() -> None:
    c = case(768, 768, 3, 32, torch.bfloat16, (300,))
    expected = _step(c)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # autograd wants its warm-up on another stream than the default
        _step(c)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _step(c)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# Our kernels alone: racecheck does not get through a product of cuBLAS on an H200.
SANITIZED = """
import torch
import dst_ops
from dst_ops import cuda, routes
from tests.unit.ops.oracle import case
torch.set_default_device("cuda")
for shape in ((96, 64, 2, 16), (64, 96, 2, 8), (128, 128, 2, 32), (1024, 904, 1, 64)):
    for rows in (1, 3, 70):
        c = case(*shape, torch.bfloat16, (rows,))
        for kernel in ("scalar", "band"):
            cuda.choose = lambda call, *rest: routes.Choice(kernel, "the test's")
            cuda._choice.cache_clear()
            x, values = c["x"].requires_grad_(), c["values"].requires_grad_()
            y = dst_ops.diagonal_linear(x, values, c["offsets"], c["bias"], **c["sizes"])
            torch.autograd.grad(y, (x, values), c["dy"])
    m, n, _, band = shape
    weight = torch.ops.dst_ops.cuda_weight(values.detach(), c["offsets"], m, n, band)
    torch.ops.dst_ops.cuda_diagonals(weight.float(), c["offsets"], band)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("kernel", ["scalar"], indirect=True)  # the script goes through all of them
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, kernel: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has its bounds
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=dst_ops"]
    done = subprocess.run([*command, sys.executable, "-c", SANITIZED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
