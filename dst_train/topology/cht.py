"""CHT: growth by the topology of the layer alone (Zhang et al. 2025, arXiv 2501.19107).

`cht` drops the smallest |value| and grows the highest score. `chts`, the soft rule, samples both, with the exponents of the
authors' code (1 to 3; see `methods`). Of the paper's other parts this has neither the removal of links of neurons that lost all
others nor its initial topologies and density decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Terms are whole multiples of this, so that their float64 sums are exact: in whatever order a machine adds them, links that
# score the same do so to the bit, on all ranks.
STEP = 2.0**-32


def scores(mask: Tensor) -> Tensor:
    """The CH3-L3 score of each absent link of a bipartite layer, in its node-based form; float64 [rows, columns].

    A path of length 3 that joins row r and column c passes column c' and row r'. The score is the sum of 1 / (1 + e) over all
    such r' and c', each counted once, where e is a node's number of links to others than r or c and the nodes on such paths:
    for r', degree(r') - common columns of r and r' - 1. This is the matrix form that the paper has for GPUs, as in the
    authors' code (`CH3_L3n`); their path-based form weighs each pair (r', c') by 1 / sqrt((1 + e) (1 + e')) instead.

    mask: bool [rows, columns], the present links. Scores of these mean nothing.
    """
    links = mask.double()
    return _over_rows(links) + _over_rows(links.t()).t()


def _over_rows(links: Tensor) -> Tensor:
    common = links @ links.t()
    external = links.sum(1) - common - 1  # [r, r']: of r'
    weight = torch.where(common > 0, 1.0 / (1.0 + external.clamp(min=0)), 0.0)
    return ((weight / STEP).round() @ links) * STEP
