"""SHA256SUMS: whether the files of a folder are those that were made, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from dst_train.files import write_text

SUMS = "SHA256SUMS"


def write_sums(folder: Path, names: Sequence[str], origin: str = "") -> None:
    """Writes SHA256SUMS, as `sha256sum` reads it, of files of a folder; `origin`: what they were made of, in one line."""
    write_text(folder / SUMS, _sums(folder, names, origin))


def sums_match(folder: Path, names: Sequence[str], origin: str = "") -> bool:
    """Whether these files are there, whole and of that origin, by the folder's SHA256SUMS."""
    if not all((folder / name).is_file() for name in (SUMS, *names)):
        return False
    return (folder / SUMS).read_text() == _sums(folder, names, origin)


def _sums(folder: Path, names: Sequence[str], origin: str) -> str:
    lines = [f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    return "".join([f"# {origin}\n" if origin else "", *lines])
