"""Writes the sources of this Python's standard library as WebDataset shards of byte sequences, for language models.

    python launch/prepare_stdlib.py [--out data/stdlib] [--length 128] [--train-samples 16384] [--eval-samples 1024]

A tenth of the files, by a hash of their names, is held out to evaluate. The files of each part are joined with a byte 0
between them and cut so that every byte but the first is predicted once; that many of the sequences, drawn over all files,
are written. Does nothing when they are there. Other versions of Python have other sources, and other shards.
"""

from __future__ import annotations

import argparse
import platform
import sysconfig
from hashlib import sha256
from pathlib import Path

import numpy as np

from dst_train.data import write_sequences
from dst_train.data.sums import sums_match, write_sums

SEED = 0
SEPARATOR = b"\0"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
PER_SHARD = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/stdlib"), help="folder of the shards")
    parser.add_argument("--length", type=int, default=128, help="bytes that the model reads of a sequence")
    parser.add_argument("--train-samples", type=int, default=16384, help="sequences to train on")
    parser.add_argument("--eval-samples", type=int, default=1024, help="sequences to evaluate on")
    args = parser.parse_args()
    try:
        print(prepare(args.out, args.length, {"train": args.train_samples, "eval": args.eval_samples}))
    except ValueError as error:
        parser.error(str(error))


def prepare(folder: Path, length: int, samples: dict[str, int]) -> str:
    """Writes what is missing, damaged or other than asked for; returns what was done, in one line.

    samples: sequences of `train` and of `eval`. Raises ValueError if a number is below 1 or there are fewer sequences.
    """
    if min(length, *samples.values()) < 1:
        raise ValueError(f"length {length}, samples {samples}: all must be at least 1")
    names = [f"{part}-{i:06d}.tar" for part, count in samples.items() for i in range(-(-count // PER_SHARD))]
    origin = f"Python {platform.python_version()}, length {length}, samples {samples}"
    if sums_match(folder, names, origin):
        return f"{folder}: {len(names)} shards are complete, nothing to do"
    root = Path(sysconfig.get_path("stdlib"))
    found = {part: cut(root, files, length) for part, files in split(sources(root)).items()}
    for part, count in samples.items():
        if count > len(found[part]):
            raise ValueError(
                f"{root} makes {len(found[part])} {part} sequences of length {length}, {count} were asked for"
            )
    random = np.random.RandomState(SEED)  # its numbers are frozen by numpy, those of default_rng may change
    for part, count in samples.items():
        write_sequences(folder, part, found[part][random.permutation(len(found[part]))[:count]], PER_SHARD)
    write_sums(folder, names, origin)
    return f"{folder}: wrote {samples['train']} train and {samples['eval']} eval sequences in {len(names)} shards"


def sources(root: Path) -> list[str]:
    """Paths of Python files relative to `root`, sorted, without installed packages and tests."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if not LEFT_OUT.intersection(path.parts))


def split(files: list[str]) -> dict[str, list[str]]:
    """`train` and `eval`: each file is always in the same part, whatever the other files are."""
    held_out = {file for file in files if int(sha256(file.encode()).hexdigest(), 16) % 10 == 0}
    return {"train": [file for file in files if file not in held_out], "eval": sorted(held_out)}


def cut(root: Path, files: list[str], length: int) -> np.ndarray:
    """uint8 [n, length + 1], each sequence beginning with the last byte of the one before; an incomplete one is dropped."""
    stream = np.frombuffer(SEPARATOR.join((root / file).read_bytes() for file in files), np.uint8)
    if len(stream) <= length:
        return np.empty((0, length + 1), np.uint8)
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]


if __name__ == "__main__":
    main()
