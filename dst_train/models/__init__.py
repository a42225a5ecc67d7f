"""Builders of the models that a job may name."""

from dst_train.models.build import build, untrained
from dst_train.models.mlp import MLP

__all__ = ["MLP", "build", "untrained"]
