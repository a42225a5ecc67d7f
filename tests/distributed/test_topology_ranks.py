"""The topology on 1, 2 and 4 ranks: the same for the same global batch, and proven equal after every update."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dst_train.sparse import sparse_layers, sparsify
from dst_train.topology import Topology, TopologyMismatchError
from tests.distributed.ranks import run_ranks

GLOBAL_BATCH, MICRO_BATCH, UPDATES = 16, 4, 20


History = list[list[list[int]]]


def _train(
    method: str, grow_signal: str = "exact", pattern: str = "diagonal", tamper_rank: int | None = None
) -> History:
    """[update][layer] -> units by slot, of a data-parallel MLP in plain PyTorch; gradients are averaged by hand."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32), nn.GELU(), nn.Linear(32, 8))
    more = {"explore": 2.0, "gate": "straight_through"} if method == "dynadiag" else {}
    kwargs = {"gamma_sal": 1.0} if method == "srigl" else {}  # so that there is something to ablate
    kind = {"permute": "learned"} if pattern == "permuted" else {"pattern": pattern}
    sparsify(model, [{"match": "[02]", "sparsity": 0.8, **kind}], **more)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * world_size)
    topology = Topology(
        model, method=method, every=2, total_steps=100, grow_signal=grow_signal, accumulation=accumulation, **kwargs
    ).bind(optimizer)
    data = torch.Generator().manual_seed(7)
    history: list[list[list[int]]] = []
    while len(history) < UPDATES:
        x = torch.randn(GLOBAL_BATCH, 32, generator=data)
        target = torch.randint(8, (GLOBAL_BATCH,), generator=data)
        optimizer.zero_grad()
        for a in range(accumulation):
            part = slice((a * world_size + rank) * MICRO_BATCH, (a * world_size + rank + 1) * MICRO_BATCH)
            (nn.functional.cross_entropy(model(x[part]), target[part]) / accumulation).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        dist.all_reduce(gradients)
        nn.utils.vector_to_parameters(gradients / world_size, [p.grad for p in model.parameters()])
        optimizer.step()
        if tamper_rank == rank and len(history) == 3:
            model[2].offsets[0] = next(u for u in range(96) if u not in model[2].offsets.tolist())
        if topology.step() is not None:
            history.append([layer.units().tolist() for layer in sparse_layers(model).values()])
            if pattern == "permuted":
                history[-1] += [layer.order.tolist() for layer in sparse_layers(model).values()]
    return history


CASES = [
    ("set", "exact", "diagonal"),
    ("rigl", "exact", "diagonal"),
    ("rigl", "local", "diagonal"),
    ("mest", "exact", "diagonal"),
    ("dynadiag", "exact", "diagonal"),
    ("rigl", "exact", "unstructured"),
    ("rigl", "exact", "constant_fan_in"),
    ("srigl", "exact", "constant_fan_in"),
    ("chase", "exact", "unstructured"),
    ("rigl", "exact", "permuted"),
    ("rigl", "local", "permuted"),
]
Case = tuple[str, str, str]


def _histories() -> dict[Case, History]:
    dist.init_process_group("gloo")
    return {case: _train(*case) for case in CASES}


def _tampered(tamper_ranks: list[int]) -> list[str]:
    dist.init_process_group("gloo")
    messages = []
    for rank in tamper_ranks:
        with pytest.raises(TopologyMismatchError) as caught:
            _train("rigl", tamper_rank=rank)
        messages.append(str(caught.value))
    return messages


@functools.cache
def _on(world_size: int) -> list[dict[Case, History]]:
    return run_ranks(world_size, _histories)


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "exact"], ids="-".join)
def test_same_units_after_20_updates_on_1_2_and_4_ranks(case: Case) -> None:
    single = _on(1)[0][case]
    assert len(single) == UPDATES
    assert single[0] != single[-1]
    for world_size in (2, 4):
        for rank, histories in enumerate(_on(world_size)):
            assert histories[case] == single, f"rank {rank} of {world_size}"


def test_local_signal_is_equal_on_all_ranks() -> None:
    for pattern in ("diagonal", "permuted"):
        first, *others = (histories["rigl", "local", pattern] for histories in _on(4))
        assert all(history == first for history in others)
        assert first != _on(1)[0]["rigl", "exact", pattern]


def test_a_tampered_rank_is_caught_and_named() -> None:
    for messages in run_ranks(4, _tampered, [0, 2]):
        for rank, message in zip([0, 2], messages, strict=True):
            assert f"2 on rank {rank} (of 4 ranks)" in message
            assert "before the topology update at step 8" in message
