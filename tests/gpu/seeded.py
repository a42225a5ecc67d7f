"""Parity of emulated kernels on a few small cases: python -m tests.gpu.seeded

Answers each line of its input, a JSON list of what `check` takes and the file to print to, with a line: the exit status. By hand:

    echo '["LIBRARY", ["CHECK"], 0, null, "/dev/stdout"]' | python -m tests.gpu.seeded
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dst_ops import reference, registration  # noqa: F401  (registers torch.ops.dst_ops)

FLOAT, BF16 = torch.float32, torch.bfloat16


def _integers(g: torch.Generator, *shape: int) -> Tensor:
    """-2 ... 2: every sum is exact in fp32, whatever the order. So results must be equal to the last bit."""
    return torch.randint(-2, 3, shape, generator=g).double()


def _draw(m: int, n: int, units: int, band: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, values, offsets, bias, dy."""
    g = torch.Generator().manual_seed(m + 3 * n + 5 * units)
    offsets = torch.randperm(max(m, n) // band, generator=g)[:units].int()
    numbers = [_integers(g, *shape) for shape in ((tokens, n), (units * band, min(m, n)), (m,), (tokens, m))]
    return numbers[0], numbers[1], offsets, numbers[2], numbers[3]


def _product(kernel: str, m: int, n: int, units: int, band: int, tokens: int, dtype: torch.dtype) -> bool:
    x, values, offsets, bias, _ = _draw(m, n, units, band, tokens)
    op = getattr(torch.ops.dst_ops, f"cuda_{kernel}")
    y = op(x.to(dtype), values.to(dtype), offsets, m, band, m >= n, bias.to(dtype), False, None)
    return torch.equal(y, reference.linear(x, values, offsets, m, band, bias).to(dtype))


def _gradient(kernel: str, m: int, n: int, units: int, band: int, tokens: int, dtype: torch.dtype) -> bool:
    x, _, offsets, _, dy = _draw(m, n, units, band, tokens)
    op = getattr(torch.ops.dst_ops, f"cuda_{kernel}_dvalues")
    return torch.equal(op(dy.to(dtype), x.to(dtype), offsets, band), reference.dvalues(dy, x, offsets, band).float())


def _dense(m: int, n: int, units: int, band: int, dtype: torch.dtype) -> bool:
    _, values, offsets, _, _ = _draw(m, n, units, band, 1)
    weight = torch.ops.dst_ops.cuda_weight(values.to(dtype), offsets, m, n, band)
    back = torch.ops.dst_ops.cuda_diagonals(weight.float(), offsets, band)
    return torch.equal(weight, reference.to_dense(values, offsets, m, n, band).to(dtype)) and torch.equal(
        back, values.float()
    )


def _sums(tokens: int, features: int, dtype: torch.dtype) -> bool:
    dy = _integers(torch.Generator().manual_seed(tokens), tokens, features)
    return torch.equal(torch.ops.dst_ops.cuda_sum_of_rows(dy.to(dtype)), dy.sum(0).float())


# Without fp16, whose kernels are bf16's, and which test_seeded_bugs.py does not compile. More than 96 diagonals: a warp's list is
# still written to in its last round.
CHECKS: dict[str, list[Callable[[], bool]]] = {
    "scalar_product": [
        partial(_product, "scalar", *case)
        for case in (
            (120, 90, 110, 1, 40, FLOAT),
            (90, 120, 110, 1, 40, BF16),
        )
    ],
    # Warps of a block share the diagonals of 32, 64 or 128 rows. Weights that can be copied 16 bytes at a time, and others.
    "scalar_few": [
        partial(_product, "scalar", *case)
        for case in (
            (70, 40, 24, 1, 3, BF16),
            (40, 72, 6, 4, 3, FLOAT),
            (64, 48, 40, 1, 1, BF16),
            (48, 64, 40, 1, 9, BF16),
            (2048, 24, 6, 1, 30, BF16),
            (4096, 24, 8, 8, 25, BF16),
        )
    ],
    # So many diagonals that a warp fetches weights into places it has read, and lists diagonals more than once.
    "scalar_few_long": [partial(_product, "scalar", 1032, 1032, 1030, 1, 1, BF16)],
    "scalar_gradient": [
        partial(_gradient, "scalar", *case) for case in ((70, 40, 30, 1, 20, FLOAT), (40, 70, 30, 1, 21, BF16))
    ],
    "scalar_splits": [partial(_gradient, "scalar", 40, 70, 3, 1, 260, BF16)],
    "band_resident": [
        partial(_product, "band", *case, tokens, dtype)
        for tokens, dtype in ((3, BF16), (40, BF16))
        for case in ((96, 64, 3, 8), (64, 96, 3, 16), (192, 128, 2, 32), (64, 192, 2, 64))
    ],
    # So many features that a tile of tokens does not fit: the other kernel. Several bands, so that windows follow each other;
    # more than 32, of which a warp's lanes know one each at a time. 130 tokens: also windows that are there as a whole.
    "band_stream": [
        partial(_product, "band", *case, BF16)
        for case in (
            (128, 1024, 4, 8, 40),
            (1024, 1032, 5, 24, 40),
            (1088, 1024, 4, 64, 40),
            (64, 1024, 40, 8, 40),
            (128, 1024, 3, 8, 130),
            (128, 1024, 3, 16, 130),
            (192, 1024, 4, 32, 130),
            (128, 1024, 2, 64, 130),
        )
    ],
    # More bands than there are stages, and more tiles than processors; windows that go round the end, a tile without a partner.
    "band_boxes": [
        partial(_product, "band", *case, BF16)
        for case in ((1088, 1024, 4, 64, 40), (192, 1152, 8, 32, 300), (320, 1152, 5, 64, 40))
    ],
    "band_boxes_gradient": [
        partial(_gradient, "band", *case, BF16)
        for case in ((192, 128, 2, 64, 140), (512, 256, 3, 32, 100), (320, 288, 10, 32, 520))
    ],
    # From 256 positions on, also parts that are there as a whole.
    "band_gradient": [
        partial(_gradient, "band", *case, 100, BF16)
        for case in (
            (96, 64, 3, 8),
            (64, 96, 3, 16),
            (192, 128, 2, 64),
            (512, 320, 3, 8),
            (320, 512, 2, 16),
            (512, 256, 3, 32),
            (256, 512, 2, 64),
        )
    ],
    "band_splits": [partial(_gradient, "band", 64, 96, 3, 8, 520, BF16)],
    "sums_tokens": [partial(_sums, *case) for case in ((3, 50, FLOAT), (150, 72, BF16), (700, 520, BF16))],
    "dense": [partial(_dense, *case) for case in ((70, 40, 30, 1, BF16), (40, 72, 5, 8, FLOAT))],
}


def check(path: str, names: list[str], bug: int, symptom: str | None) -> bool:
    """Prints what fails in which order of threads; whether nothing does. Ends once it prints what contains `symptom`.

    bug: the number of the one that is to show, 0 for none.
    """
    torch.ops.load_library(path)
    library, good = ctypes.CDLL(path), True
    ctypes.c_int.in_dll(library, "dst_ops_seeded").value = bug
    for order in (0, 1, 2):
        for name in names:
            older = name in ("band_stream", "band_gradient", "band_splits")  # kernels of chips that copy no boxes
            library.dst_ops_emulator_set(order, 0, 8 if older else 9)
            for case in CHECKS[name]:
                try:
                    wrong = "" if case() else "numbers differ"
                except RuntimeError as error:
                    wrong = str(error).splitlines()[0]
                if wrong:
                    good = False
                    print(f"order {order}, {name}{case.args}: {wrong}", flush=True)
                    if symptom is not None and symptom in wrong:
                        return False
    return good


def serve() -> None:
    """In forks of this process, which has imported torch already and in which no library is loaded."""
    for line in sys.stdin:
        *arguments, printed = json.loads(line)
        child = os.fork()
        if child == 0:
            to = os.open(printed, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(to, 1)
            os.dup2(to, 2)
            signal.alarm(300)
            os._exit(0 if check(*arguments) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
