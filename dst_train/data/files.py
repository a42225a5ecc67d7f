"""Files that appear whole or not at all, also when several ranks write them together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

SUMS = "SHA256SUMS"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends, and is removed when it fails.

    The temporary name is unique, so that writers of one path on any number of hosts do not meet; the last one wins.
    Raises OSError where the folder cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner reads; shards and their indexes are shared between users
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_sums(folder: Path, names: Sequence[str], origin: str = "") -> None:
    """Writes SHA256SUMS, as `sha256sum` reads it, of files of a folder; `origin`: what they were made of, in one line."""
    with atomic_file(folder / SUMS) as file:
        file.write(_sums(folder, names, origin).encode())


def sums_match(folder: Path, names: Sequence[str], origin: str = "") -> bool:
    """Whether these files are there, whole and of that origin, by the folder's SHA256SUMS."""
    if not all((folder / name).is_file() for name in (SUMS, *names)):
        return False
    return (folder / SUMS).read_text() == _sums(folder, names, origin)


def _sums(folder: Path, names: Sequence[str], origin: str) -> str:
    lines = [f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    return "".join([f"# {origin}\n" if origin else "", *lines])
