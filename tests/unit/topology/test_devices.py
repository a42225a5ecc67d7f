"""Devices that are not the CPU, without one.

A default device: layers are made on it, and layers and topologies elsewhere do not notice it. "meta" stands for a GPU: its tensors have no
content, so that whatever is made there by mistake cannot be read. And a layer's device: updates of masks are computed there.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_train.sparse import DiagonalLinear, LowRank, MaskedLinear, sparsify
from dst_train.topology import Topology


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiagonalLinear(16, 24, sparsity=0.5, gate="straight_through", permute=True, rank=2),
        lambda: MaskedLinear(16, 24, pattern="block", sparsity=0.5, size=4),
        lambda: LowRank(16, 24, 2),
    ],
)
def test_a_layer_is_made_on_the_default_device(make: Any) -> None:
    with torch.device("meta"):
        layer = make()
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        ({}, "dynadiag"),
        ({"band": 4, "permute": "learned"}, "rigl"),
        ({"pattern": "unstructured"}, "set"),
        ({"pattern": "shuffled_block", "size": 4}, "mest"),
        ({"pattern": "tile_wise", "size": 4}, "rigl"),
        ({"pattern": "constant_fan_in"}, "srigl"),
        ({"pattern": "unstructured"}, "chase"),
        ({"pattern": "unstructured"}, "chts"),
        ({"pattern": "butterfly", "size": 2}, "static"),
    ],
)
def test_training_on_the_cpu_does_not_depend_on_the_default_device(rule: dict[str, Any], method: str) -> None:
    plain, other = (_trained(rule, method, default) for default in (nullcontext(), torch.device("meta")))
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_masks_are_updated_on_their_device_as_on_the_cpu() -> None:
    command = [sys.executable, "-m", "tests.unit.topology.second_device"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    verdicts = [line.rsplit("} ")[-1] for line in done.stdout.splitlines()]
    assert verdicts == ["the same"] * 9, done.stdout + done.stderr


def _trained(rule: dict[str, Any], method: str, default: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    x, target = torch.randn(6, 16), torch.randn(6, 16)
    gate = "straight_through" if method == "dynadiag" else None
    with default:
        sparsify(model, [{"match": "0", "sparsity": 0.4, **rule}], explore=1.5 if gate else 1.0, gate=gate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        topology = Topology(model, method=method, every=1, total_steps=12).bind(optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
            topology.step()
        topology.load_state_dict(topology.state_dict())
    assert method == "static" or topology.updates == 6
    return model.state_dict()
