"""The emulator's instructions against matrix products, and a GPU's against the emulator's, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dst_ops import build
from tests.gpu import emulated

SOURCE = Path(__file__).with_name("intrinsics.cu")


@pytest.fixture(scope="session")  # torch cannot list its ops any more once one has gone
def library(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> torch.library.Library:
    """torch.ops.dst_ops.test_intrinsics for the CPU (emulated) and, with --backend cuda, for the GPU."""
    if not emulated.available:
        pytest.skip("the emulator is for x86_64")
    folder = tmp_path_factory.mktemp("intrinsics")
    registered = torch.library.Library("dst_ops", "FRAGMENT")
    registered.define("test_intrinsics(Tensor a, Tensor b) -> Tensor")
    objects = emulated.compile_objects([emulated.RUNTIME, SOURCE], folder, f"-I{emulated.SOURCES}")
    emulated.link(objects, folder / "emulated.so")
    torch.ops.load_library(str(folder / "emulated.so"))
    if pytestconfig.getoption("--backend") == "cuda":
        _compile_for_cuda(folder / "cuda.so")
        torch.ops.load_library(str(folder / "cuda.so"))
    return registered


def _compile_for_cuda(to: Path) -> None:
    recipe, root = build._recipe("cuda"), Path(torch.__file__).parent
    options = f"-I {emulated.SOURCES} -isystem {root / 'include'} -L {root / 'lib'}"
    command = f"{recipe.compiler} {' '.join(recipe.flags)} {options} -shared {SOURCE} -o {to} {' '.join(recipe.link)}"
    subprocess.run(command, shell=True, check=True)


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Small integers: sums of their products are exact in any order."""
    g = torch.Generator("cpu").manual_seed(0)
    draw = [torch.randint(-8, 9, size, generator=g, device="cpu") for size in ((16, 16), (16, 8))]
    return draw[0].to(dtype), draw[1].to(dtype)


def _matrix(words: Tensor) -> Tensor:
    """Fragment D [16, 8] of a lane's four floats: rows lane / 4 and 8 more, columns lane % 4 * 2 and one more."""
    lanes = words.contiguous().view(torch.float32)
    matrix = torch.empty(16, 8, device="cpu")
    for lane in range(32):
        for i in range(4):
            matrix[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = lanes[lane, i]
    return matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_emulator_multiplies_matrices(dtype: torch.dtype, library: torch.library.Library) -> None:
    a, b = _operands(dtype)
    words = torch.ops.dst_ops.test_intrinsics(a, b)
    assert torch.equal(_matrix(words[:, 8:12]), a.float() @ b.float())
    assert torch.equal(_matrix(words[:, 12:16]), a[:, 8:].float() @ b[8:].float())
    assert words[:, 17].tolist() == [sum(1 << i for i in range(0, 32, 3))] * 32
    assert torch.equal(words[:, 6:8], torch.zeros(32, 2, dtype=torch.int32, device="cpu"))  # copied as absent
    halves = words[:, 19].contiguous().view(torch.int16).view(32, 2).view(dtype)
    flat = a.flatten()
    assert torch.equal(halves, torch.stack([flat[:32], flat[1:33]], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_does_what_the_emulator_does(
    dtype: torch.dtype, library: torch.library.Library, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--backend") != "cuda":
        pytest.skip("needs a GPU")
    a, b = _operands(dtype)
    expected = torch.ops.dst_ops.test_intrinsics(a, b)
    assert torch.equal(torch.ops.dst_ops.test_intrinsics(a.cuda(), b.cuda()).cpu(), expected)
