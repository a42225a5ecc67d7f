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
    registered.define("test_engine(Tensor x, int columns, int column, int token) -> Tensor")
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


# x [40, 72] of words of 16 bits, each other than all others. A box of 16 tokens: within x, and beyond its last column, its last token.
BOXES = [(columns, column, token) for columns in (32, 64) for column, token in ((8, 5), (48, 3), (0, 30), (72, 0))]


def _numbered() -> Tensor:
    return torch.arange(1, 40 * 72 + 1, dtype=torch.int16, device="cpu").view(torch.bfloat16).view(40, 72)


@pytest.mark.parametrize(("columns", "column", "token"), BOXES, ids=str)
def test_the_emulator_copies_boxes(columns: int, column: int, token: int, library: torch.library.Library) -> None:
    """Zeros outside; piece i of 16 bytes of a line of 128 lies where piece i ^ line % 8 would, in a box half as wide i ^ line % 4."""
    words = torch.ops.dst_ops.test_engine(_numbered(), columns, column, token) - 1  # it adds the turn
    padded = torch.zeros(40 + 16, 72 + 64, dtype=torch.int16, device="cpu")
    padded[:40, :72] = _numbered().view(torch.int16)
    pieces = padded[token : token + 16, column : column + columns].reshape(-1, 8, 8)  # lines, pieces, numbers
    expected = torch.empty_like(pieces)
    for line in range(len(pieces)):
        for piece in range(8):
            expected[line, piece ^ line % (columns // 8)] = pieces[line, piece]
    assert torch.equal(words[:-16].view(torch.int16), expected.flatten())
    assert torch.equal(words[-16:].view(torch.int16), _numbered().view(torch.int16).flatten()[:32])


@pytest.mark.parametrize(("columns", "column", "token"), BOXES, ids=str)
def test_a_gpu_copies_boxes_as_the_emulator_does(
    columns: int, column: int, token: int, library: torch.library.Library, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--backend") != "cuda":
        pytest.skip("needs a GPU")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a chip that copies boxes")
    x = _numbered()
    expected = torch.ops.dst_ops.test_engine(x, columns, column, token)
    assert torch.equal(torch.ops.dst_ops.test_engine(x.cuda(), columns, column, token).cpu(), expected)
