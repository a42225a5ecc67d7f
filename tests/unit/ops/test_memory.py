"""Peak memory of a call, seen by the system, in a process of its own."""

from __future__ import annotations

import pytest

from tests.unit.ops.process import python

# Resident memory above what was there before the call, at most. VmHWM is the peak since the last write to clear_refs.
PEAK = """
import sys, torch, dst_ops
tokens, n, m, active, band = map(int, sys.argv[1:])
torch.set_num_threads(2)
ops, longest = torch.ops.dst_ops, max(n, m)

def resident(name):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))

def arguments(tokens, n, m, active, band):
    offsets = torch.randperm(max(n, m) // band)[:active].int()
    return torch.randn(tokens, n), torch.randn(tokens, m), torch.randn(active * band, min(n, m)), offsets

def call(name, x, dy, values, offsets):
    if name == "linear":
        return ops.linear(x, values, offsets, dy.shape[1], band)
    if name == "linear_transposed":
        return ops.linear_transposed(dy, values, offsets, x.shape[1], band)
    if name == "dvalues":
        return ops.dvalues(dy, x, offsets, band)
    return dst_ops.diagonal_scores(x, dy, out_features=dy.shape[1], in_features=x.shape[1], band=band)

given = arguments(tokens, n, m, active, band)
for name in ("linear", "linear_transposed", "dvalues", "scores"):
    call(name, *arguments(40, 2 * band, 2 * band, 1, band))  # the library, threads, torch's own buffers
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident("VmRSS")
    result = call(name, *given)
    print(name, resident("VmHWM") - before - result.numel() * result.element_size())
    del result
"""


@pytest.mark.parametrize(
    ("tokens", "n", "m", "active", "band"),
    [
        (2048, 768, 3072, 307, 1),
        (2048, 3072, 768, 19, 16),
        (512, 4096, 4096, 410, 1),
        (512, 4096, 4096, 26, 16),
        (512, 4096, 4096, 1638, 1),
    ],
)
def test_temporaries_take_at_most_twice_the_larger_of_x_and_y(
    tokens: int, n: int, m: int, active: int, band: int
) -> None:
    done = python(PEAK, *map(str, (tokens, n, m, active, band)))
    assert done.returncode == 0, done.stderr
    larger = 4 * tokens * max(n, m)
    # 1 MiB more for what does not grow with the tokens: generated code, lists of offsets, the allocator's own.
    for line in done.stdout.splitlines():
        name, peak = line.split()
        assert int(peak) <= 2 * larger + 2**20, f"{name}: {int(peak) / 2**20:.1f} MiB, x or y: {larger / 2**20:.1f} MiB"
