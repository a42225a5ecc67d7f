"""dst-train: distributed dynamic sparse training with diagonally sparse layers."""

from dst_train.sparse import sparsify
from dst_train.topology import Topology

__version__ = "0.1.0"

__all__ = ["Topology", "__version__", "sparsify"]
