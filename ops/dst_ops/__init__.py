"""Diagonally sparse linear operators: one fused op for CPU and CUDA, with autograd, torch.compile and export."""

from dst_ops.api import diagonal_linear, diagonal_scores, from_dense, to_dense
from dst_ops.build import load
from dst_ops.report import backend_report
from dst_ops.routes import Call

__all__ = ["Call", "backend_report", "diagonal_linear", "diagonal_scores", "from_dense", "load", "to_dense"]
