"""Peak memory of a call, seen by the system, in a process of its own."""

from __future__ import annotations

import pytest
import torch

import dst_ops
from tests.unit.ops.process import python

# Resident memory above what was there before the call, at most. VmHWM is the peak since the last write to clear_refs. Each
# call has a process of its own, forked before there are threads: the op keeps its temporaries for the next call.
PEAK = """
import os, sys, torch, dst_ops
torch.set_num_threads(2)
dst_ops.load()
ops = torch.ops.dst_ops

def resident(name):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))

def arguments(tokens, n, m, active, band):
    offsets = torch.randperm(max(n, m) // band)[:active].int()
    return torch.randn(tokens, n), torch.randn(tokens, m), torch.randn(active * band, min(n, m)), offsets

def call(name, band, x, dy, values, offsets):
    if name == "linear":
        return ops.linear(x, values, offsets, dy.shape[1], band)
    if name == "linear_transposed":
        return ops.linear_transposed(dy, values, offsets, x.shape[1], band)
    if name == "dvalues":
        return ops.dvalues(dy, x, offsets, band)
    if name == "linear_backward":
        return ops.linear_backward(dy, x, values, offsets, band)
    return dst_ops.diagonal_scores(x, dy, out_features=dy.shape[1], in_features=x.shape[1], band=band)

for case in sys.argv[1:]:
    *sizes, band = map(int, case.split(","))
    for name in ("linear", "linear_transposed", "dvalues", "linear_backward", "scores"):
        if os.fork() == 0:
            given = arguments(*sizes, band)
            call(name, band, *arguments(40, 2 * band, 2 * band, 1, band))  # threads, torch's own buffers
            with open("/proc/self/clear_refs", "w") as clear:
                clear.write("5")
            before = resident("VmRSS")
            result = call(name, band, *given)
            results = result if isinstance(result, tuple) else (result,)
            taken = resident("VmHWM") - before - sum(r.numel() * r.element_size() for r in results)
            print(case, name, taken, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""
# tokens, inputs, outputs, active, band
CASES = (
    "2048,768,3072,307,1",
    "2048,3072,768,19,16",
    "512,4096,4096,410,1",
    "512,4096,4096,26,16",
    "512,4096,4096,1638,1",
)


def test_temporaries_take_at_most_twice_the_larger_of_x_and_y() -> None:
    # Blocks are given back when they are freed, or what was freed before the call would hide what the call takes.
    done = python(PEAK, *CASES, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5 * len(CASES)
    for line in done.stdout.splitlines():
        case, name, taken = line.split()
        tokens, inputs, outputs, *_ = map(int, case.split(","))
        larger = 4 * tokens * max(inputs, outputs)
        assert int(taken) <= 2 * larger, (
            f"{case} {name}: {int(taken) / 2**20:.1f} MiB, at most {2 * larger / 2**20:.1f}"
        )


@pytest.mark.cpu_only
def test_a_result_that_no_memory_can_hold_is_refused() -> None:
    assert dst_ops.load()
    x, values, offsets = torch.zeros(2**23, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"no memory for a result of {2**46} numbers; use fewer tokens at a time"):
        torch.ops.dst_ops.linear(x, values, offsets, 2**23, 1)
