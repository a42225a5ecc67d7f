"""All samples of a split, read by number."""

from __future__ import annotations

import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from webdataset.autodecode import IMAGE_EXTENSIONS

from dst_train.data.errors import BadSampleError, DataError
from dst_train.data.index import Sample, load_index
from dst_train.data.shards import local_shards

LABEL = "cls"
SEQUENCE = "bin"
MAX_OPEN_FILES = 64


class Encoded(NamedTuple):
    """One sample as it is stored."""

    content: bytes
    extension: str
    label: bytes
    """Empty for a sequence, whose targets are in its content."""


class SampleStore:
    """Samples 0 to n - 1 of tar shards, in the order of the pattern and of each file.

    Reads by offset; files are opened at first use in each process, so that an instance may be sent to workers.
    Each sample has one image and one `.cls` label or, with `sequence_bytes`, one `.bin` of that many bytes. Other
    members are ignored.
    """

    def __init__(self, pattern: str, cache_dir: str | None = None, *, sequence_bytes: int | None = None) -> None:
        """Raises DataError if a shard is missing or damaged, or a sample does not have what it should."""
        self._sequence_bytes = sequence_bytes
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        self._shards = local_shards(pattern, cache_dir)
        self._extensions: list[str] = []
        # arrays, shard by shard: Python objects for a million samples are slow to build and copied into every worker
        tables = [self._rows(number, load_index(shard, cache_dir)) for number, shard in enumerate(self._shards)]
        self._sizes = [len(keys) for _, keys in tables]
        self._table = np.concatenate([rows for rows, _ in tables])
        self._keys = np.concatenate([keys for _, keys in tables])
        self._shared: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        """The tables of a million samples are more than the pipe to a worker holds: it would have to import everything and read them
        before the next one is started. So workers get shared memory, all of them the same."""
        if self._shared is None or not self._shared[0].is_shared():  # not: of a copy
            keys = self._keys.view(np.uint8).reshape(len(self._keys), -1)
            self._shared = torch.from_numpy(self._table).share_memory_(), torch.from_numpy(keys).share_memory_()
            self._use_shared()
        return {**self.__dict__, "_open": OrderedDict(), "_table": None, "_keys": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._use_shared()

    def _use_shared(self) -> None:
        assert self._shared is not None
        table, keys = self._shared
        self._table, self._keys = table.numpy(), keys.numpy().view(f"S{keys.shape[1]}").reshape(-1)

    def counts(self) -> list[tuple[Path, int]]:
        """Every shard and its number of samples."""
        return list(zip(self._shards, self._sizes, strict=True))

    def read(self, index: int) -> Encoded:
        """Raises BadSampleError if the shard ends before the sample does, DataError if it cannot be read at all."""
        shard, extension, *places = self._table[index].tolist()
        content = self._bytes(index, shard, *places[:2])
        label = self._bytes(index, shard, *places[2:])
        return Encoded(content, self._extensions[extension], label)

    def extension(self, index: int) -> str:
        """Of the sample's content, without the dot."""
        return self._extensions[self._table[index, 1]]

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        key = self._keys[index].decode(errors="backslashreplace")
        return f"shard {self._shards[self._table[index, 0]]}, sample {key}"

    def _rows(self, number: int, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Places, int64 [samples, 6], and keys of one shard."""
        rows = np.array([self._row(number, sample) for sample in samples], np.int64).reshape(-1, 6)
        # tarfile's own way to hold names that are not UTF-8
        return rows, np.array([key.encode(errors="surrogateescape") for key, _ in samples], np.bytes_)

    def _row(self, number: int, sample: Sample) -> tuple[int, ...]:
        key, members = sample
        if self._sequence_bytes is None:
            found = [extension for extension in members if extension in IMAGE_EXTENSIONS and LABEL in members]
            needs = f"one image and .{LABEL}"
        else:
            found = [SEQUENCE] if members.get(SEQUENCE, (0, 0))[1] == self._sequence_bytes else []
            needs = f".{SEQUENCE} of {self._sequence_bytes} bytes"
        if len(found) != 1:
            sizes = {extension: size for extension, (_, size) in sorted(members.items())}
            raise DataError(f"shard {self._shards[number]}, sample {key}: has {sizes} bytes, needs {needs}")
        if found[0] not in self._extensions:
            self._extensions.append(found[0])
        label = members[LABEL] if self._sequence_bytes is None else (0, 0)
        return (number, self._extensions.index(found[0]), *members[found[0]], *label)

    def _bytes(self, index: int, shard: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file(shard).fileno(), size, offset)
        except OSError as error:
            raise DataError(f"shard {self._shards[shard]}: cannot read it: {error}") from error
        if len(data) != size:
            raise BadSampleError(
                f"{self.name(index)}: {len(data)} of {size} bytes at {offset}; the file changed after it was indexed"
            )
        return data

    def _file(self, shard: int) -> FileIO:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        file = self._open[shard] = FileIO(self._shards[shard])
        return file
