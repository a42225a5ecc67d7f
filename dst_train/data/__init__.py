"""Samples of WebDataset shards, in an order that the number of ranks does not change."""

from dst_train.data.dataset import Batch, EvalBatch
from dst_train.data.errors import BadSampleError, DataError
from dst_train.data.loader import check, eval_loader, train_loader
from dst_train.data.transforms import example_input
from dst_train.data.writer import write_sequences, write_shards

__all__ = [
    "BadSampleError",
    "Batch",
    "DataError",
    "EvalBatch",
    "check",
    "eval_loader",
    "example_input",
    "train_loader",
    "write_sequences",
    "write_shards",
]
