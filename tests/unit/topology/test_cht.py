"""The Cannistraci-Hebb score against paths counted by hand, and growth by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst_train.sparse import sparsify
from dst_train.topology import Topology, cht, policy


def test_two_paths_by_hand() -> None:
    # Rows a, b, c and columns 0 ... 3: a-0, b-0, b-1, b-2, c-1, c-3.
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    scores = cht.scores(mask)
    # a to 1: only a-0-b-1. b has 3 links, one of them to 1 and one to 0: 1 outside. 0 has the links a and b: none outside.
    # So 1 / (1 + 1) for b; for column 0: links a, b; common with column 1 is b, and a is the end: 1 / (1 + 0).
    assert scores[0, 1] == 0.5 + 1.0
    # a to 3: no path of length 3.
    assert scores[0, 3] == 0.0
    # c to 0: c-1-b-0. b: links 0, 1 and 2: 1 outside. Column 1: links b, c: none.
    assert scores[2, 0] == 1.5
    # b to 3: b-1-c-3. c: links 1, 3: none outside. Column 1: links b, c: none.
    assert scores[1, 3] == 2.0
    # Each node on such a path has one link to another of them, besides those to the ends: twice the score.
    assert torch.equal(cht.scores(mask, internal=True)[~mask], 2 * scores[~mask])


@pytest.mark.parametrize("internal", [False, True])
def test_equals_an_enumeration_of_paths(internal: bool) -> None:
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    scores = cht.scores(mask, internal=internal)
    rows, columns = mask.shape
    neighbours = {("r", r): {("c", c) for c in range(columns) if mask[r, c]} for r in range(rows)}
    neighbours |= {("c", c): {("r", r) for r in range(rows) if mask[r, c]} for c in range(columns)}
    for r in range(rows):
        for c in range(columns):
            if mask[r, c]:
                continue
            start, end = ("r", r), ("c", c)
            paths = [(y, z) for y in neighbours[start] for z in neighbours[y] if end in neighbours[z]]
            inside = {start, end} | {node for path in paths for node in path}
            expected = 0.0
            for node in inside - {start, end}:
                links = len(neighbours[node] & (inside - {start, end})) if internal else 0
                expected += (1 + links) / (1 + len(neighbours[node] - inside))
            # Each term is rounded to a multiple of 2^-32.
            assert float(scores[r, c]) == pytest.approx(expected, abs=21 * 2**-33)


@pytest.mark.parametrize("method", ["cht", "chts"])
def test_drops_by_value_and_grows_by_the_scores_of_what_is_left(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9))
    sparsify(model, [{"match": "0", "sparsity": 0.7, "pattern": "unstructured"}])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = Topology(model, method=method, every=1, total_steps=10, until=1.0, seed=5).bind(optimizer)
    optimizer.step()  # without a gradient
    before = model[0].mask.clone().flatten()
    value = model[0].weight.detach().abs().double().flatten()
    (change,) = topology.step().layers
    if method == "chts":
        # Step 1 of 10: |value|^(1 + 2 / 10).
        value = policy.sampled(value**1.2, (5, 0, 0, 0))
    order = value.masked_fill(~before, torch.inf).argsort()
    assert change.dropped == tuple(sorted(order[: len(change.dropped)].tolist()))
    left = before.clone()
    left[list(change.dropped)] = False
    wish = cht.scores(left.view(9, 12), internal=method == "chts").flatten()
    if method == "chts":
        wish = policy.sampled(wish, (5, 0, 0, 1))
    order = wish.masked_fill(before, -1.0).sort(descending=True, stable=True).indices
    assert change.grown == tuple(sorted(order[: len(change.grown)].tolist()))
    assert len(change.grown) == len(change.dropped) > 0
