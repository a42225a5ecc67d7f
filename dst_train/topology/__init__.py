"""Topology: who is dropped, who grows, when, and the proof that all ranks agree."""

from dst_train.topology.editor import ParameterEditor, editor_for
from dst_train.topology.manager import Topology
from dst_train.topology.methods import METHODS
from dst_train.topology.ranks import Ranks, TopologyMismatchError
from dst_train.topology.settings import Settings
from dst_train.topology.update import LayerUpdate, TopologyUpdate

__all__ = [
    "METHODS",
    "LayerUpdate",
    "ParameterEditor",
    "Ranks",
    "Settings",
    "Topology",
    "TopologyMismatchError",
    "TopologyUpdate",
    "editor_for",
]
