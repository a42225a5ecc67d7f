"""dst-train: distributed dynamic sparse training with diagonally sparse layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst_train.sparse import sparsify
    from dst_train.topology import Topology

__version__ = "0.1.0"

__all__ = ["Topology", "__version__", "sparsify"]

_HOMES = {"sparsify": "dst_train.sparse", "Topology": "dst_train.topology"}


def __getattr__(name: str) -> Any:
    """Imported at first use: `import dst_train.job` and `dst-train schema` need no torch, which takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dst_train' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
