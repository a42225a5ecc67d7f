"""CHT: growth by the topology of the layer alone (Zhang et al. 2025, arXiv 2501.19107).

`cht` drops the smallest |value| and grows the highest score. `chts`, the soft rule, samples both, with the exponents of the
authors' code (1 to 3; see `methods`), and scores by CH2-L3, as the paper does throughout for it. Of the paper's other parts this has neither the
removal of links of neurons that lost all others nor its initial topologies and density decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Terms are whole multiples of this, so that their float64 sums are exact: in whatever order a machine adds them, links that
# score the same do so to the bit, on all ranks.
STEP = 2.0**-32


def scores(mask: Tensor, *, internal: bool = False) -> Tensor:
    """The CH3-L3 score of each absent link of a bipartite layer, or the CH2-L3 score, in node-based form; float64 [rows, columns].

    A path of length 3 that joins row r and column c passes column c' and row r'. The score is the sum of (1 + i) / (1 + e) over
    all such r' and c', each counted once. e is a node's number of links to others than r or c and the nodes on such paths: for r',
    degree(r') - common columns of r and r' - 1. i is its number of links to those nodes: for r', the common columns; 0 without `internal`.
    As in the authors' code (`CH3_L3n`, `CH2_L3n`). The CHT of before this paper is path-based: it weighs each pair (r', c') by
    1 / sqrt((1 + e) (1 + e')) instead.

    Args:
        mask: bool [rows, columns], the present links. Scores of these mean nothing.
        internal: whether links inside of the community count in favour: CH2-L3.
    """
    links = mask.double()
    return _over_rows(links, internal) + _over_rows(links.t(), internal).t()


def _over_rows(links: Tensor, internal: bool) -> Tensor:
    common = links @ links.t()
    external = links.sum(1) - common - 1  # [r, r']: of r'
    favour = 1.0 + common if internal else torch.ones_like(common)
    weight = torch.where(common > 0, favour / (1.0 + external.clamp(min=0)), 0.0)
    return ((weight / STEP).round() @ links) * STEP
