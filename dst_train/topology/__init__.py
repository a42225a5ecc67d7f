"""Topology: who is dropped, who grows, when, and the proof that all ranks agree."""

from dst_train.topology.editor import ParameterEditor, editor_for
from dst_train.topology.manager import METHODS, LayerUpdate, Topology, TopologyUpdate
from dst_train.topology.ranks import Ranks, TopologyMismatchError

__all__ = [
    "METHODS",
    "LayerUpdate",
    "ParameterEditor",
    "Ranks",
    "Topology",
    "TopologyMismatchError",
    "TopologyUpdate",
    "editor_for",
]
