"""Sparse layers, and the swap of a model's dense layers for them."""

from dst_train.sparse.budget import BUDGETS, densities
from dst_train.sparse.layer import SparseLayer
from dst_train.sparse.linear import GATES, DiagonalLinear
from dst_train.sparse.low_rank import LowRank
from dst_train.sparse.masked import PATTERNS, MaskedLinear
from dst_train.sparse.report import LayerReport, SparsityReport
from dst_train.sparse.sparsify import SparsityRule, sparse_layers, sparsify

__all__ = [
    "BUDGETS",
    "GATES",
    "PATTERNS",
    "DiagonalLinear",
    "LayerReport",
    "LowRank",
    "MaskedLinear",
    "SparseLayer",
    "SparsityReport",
    "SparsityRule",
    "densities",
    "sparse_layers",
    "sparsify",
]
