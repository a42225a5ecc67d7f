"""Sparse layers, and the swap of a model's dense layers for them."""

from dst_train.sparse.budget import BUDGETS, densities
from dst_train.sparse.butterfly import ButterflyLinear
from dst_train.sparse.densify import densify
from dst_train.sparse.layer import SparseLayer
from dst_train.sparse.linear import GATES, DiagonalLinear
from dst_train.sparse.low_rank import LowRank
from dst_train.sparse.masked import PATTERNS, MaskedLinear
from dst_train.sparse.report import LayerReport, SparsityReport
from dst_train.sparse.sdgp import SdgpLinear
from dst_train.sparse.sparsify import RuleError, SparsityRule, sparse_layers, sparsify
from dst_train.sparse.sr_ste import SrSteLinear

__all__ = [
    "BUDGETS",
    "GATES",
    "PATTERNS",
    "ButterflyLinear",
    "DiagonalLinear",
    "LayerReport",
    "LowRank",
    "MaskedLinear",
    "RuleError",
    "SdgpLinear",
    "SparseLayer",
    "SparsityReport",
    "SparsityRule",
    "SrSteLinear",
    "densify",
    "densities",
    "sparse_layers",
    "sparsify",
]
