"""From the shard pattern of a job to tar files on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from dst_train.data.errors import DataError
from dst_train.files import atomic_file

MADE_BY = {"data/digits": "launch/prepare_digits.py", "data/stdlib": "launch/prepare_stdlib.py"}
"""The shards of this project's own jobs, and the programs that write them."""


def local_shards(pattern: str, cache_dir: str | None) -> list[Path]:
    """Expands braces, copies remote shards whole into `cache_dir`, and returns the local files in order.

    Raises DataError if the pattern does not expand, a shard is missing, or a remote shard has nowhere to go.
    """
    if "${" in pattern:
        raise DataError(f"shards {pattern!r}: a variable is left in the pattern; set it in the environment")
    try:
        urls = expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: cannot expand the braces: {error}") from error
    return [_local_shard(url, cache_dir) for url in urls]


def _local_shard(url: str, cache_dir: str | None) -> Path:
    parsed = urlparse(url)
    if parsed.scheme not in ("", "file"):
        return _cached(url, cache_dir)
    path = Path(url2pathname(parsed.path)) if parsed.scheme else Path(url)
    if not path.is_file():
        start = "" if path.is_absolute() else f" (relative paths start at the working directory: {path.absolute()})"
        if path.is_dir():
            raise DataError(f"shard {path} is a folder; name the files in it: {path}/train-{{000000..000003}}.tar")
        if any(c in path.name for c in "*?["):
            raise DataError(f"shard {path} does not exist; there are no globs here, write a range: {{000000..000003}}")
        program = MADE_BY.get(str(path.parent)) if not path.parent.exists() else None
        hint = f", or run {program}, which writes it" if program else ""
        raise DataError(f"shard {path} does not exist{start}; check data.*.shards{hint}")
    return path


def _cached(url: str, cache_dir: str | None) -> Path:
    if cache_dir is None:
        raise DataError(f"shard {url} is remote: set data.cache_dir to a folder that can hold all shards")
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir {cache_dir}: cannot be made: {error}") from error
    # webdataset names cached files by the last part of the url, so that train/000.tar and val/000.tar would collide
    name = Path(urlparse(url).path).name or "shard.tar"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    # one process copies, the others wait; the kernel drops the lock of a killed process
    with open(path.with_name(path.name + ".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _copy(url, path)
    return path


def _copy(url: str, path: Path) -> None:
    try:
        with atomic_file(path) as file, gopen(url) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    except (OSError, ValueError) as error:
        raise DataError(f"shard {url}: cannot copy it to {path}: {error}") from error
