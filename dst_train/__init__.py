"""dst-train: distributed dynamic sparse training with diagonally sparse layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst_train.export import load_exported
    from dst_train.sparse import densify, sparse_layers, sparsify
    from dst_train.topology import Topology

__version__ = "0.1.0"

__all__ = ["Topology", "__version__", "densify", "load_exported", "sparse_layers", "sparsify"]

_HOMES = {
    "Topology": "dst_train.topology",
    "densify": "dst_train.sparse",
    "load_exported": "dst_train.export",
    "sparse_layers": "dst_train.sparse",
    "sparsify": "dst_train.sparse",
}


def __getattr__(name: str) -> Any:
    """Imported at first use: `import dst_train.job` and `dst-train schema` need no torch, which takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dst_train' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
