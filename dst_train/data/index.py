"""Where the samples of a tar shard are: an index of member offsets, kept as JSON beside the shard.

webdataset reads tars in sequence only; a random order and a resume at any sample need offsets.
"""

from __future__ import annotations

import json
import logging
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from dst_train.data.errors import DataError
from dst_train.files import atomic_file

log = logging.getLogger(__name__)
VERSION = 1
BLOCK = 512

Sample = tuple[str, dict[str, tuple[int, int]]]
"""Key of a sample, and for each extension the offset and size of its bytes in the shard."""


def load_index(shard: Path, cache_dir: str | None = None) -> list[Sample]:
    """The samples of a shard in the order of the file. Builds and writes the index where it is missing or stale.

    The index goes beside the shard as `<shard>.index.json`, or into `cache_dir` where that folder is read-only.
    Processes may do this together: each builds the same file and puts it in place atomically.

    Raises DataError (shard named) if the tar is damaged, truncated or sparse, or if there is nowhere to write the index.
    """
    stamp = _stamp(shard)
    places = _places(shard, cache_dir)
    for place in places:
        samples = _read(place, stamp)
        if samples is not None:
            return samples
    samples = _scan(shard)
    _write(places, shard, {"version": VERSION, **stamp, "samples": samples})
    return samples


def _stamp(shard: Path) -> dict[str, int]:
    status = shard.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _places(shard: Path, cache_dir: str | None) -> list[Path]:
    places = [shard.with_name(shard.name + ".index.json")]
    if cache_dir is not None:
        digest = sha256(str(shard.resolve()).encode()).hexdigest()[:16]
        places.append(Path(cache_dir) / f"{digest}-{shard.name}.index.json")
    return places


def _read(place: Path, stamp: dict[str, int]) -> list[Sample] | None:
    """None where the index has to be built; says why unless it was never there."""
    try:
        text = place.read_bytes()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        samples = [(key, {ext: (int(a), int(b)) for ext, (a, b) in files.items()}) for key, files in content["samples"]]
        recorded = {name: content[name] for name in stamp}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("index %s is unreadable (%s: %s): building it again", place, type(error).__name__, error)
        return None
    if recorded != stamp:
        log.warning("index %s is older than its shard (%s, now %s): building it again", place, recorded, stamp)
        return None
    return samples


def _write(places: list[Path], shard: Path, content: dict[str, Any]) -> None:
    failures = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as file:
                file.write(json.dumps(content, separators=(",", ":")).encode())
            return
        except OSError as error:
            failures.append(f"{place}: {error.strerror or error}")
    hint = "" if len(places) > 1 else "; make the folder writable once or set data.cache_dir"
    raise DataError(f"shard {shard}: cannot write its index ({'; '.join(failures)}){hint}")


def _scan(shard: Path) -> list[Sample]:
    """Groups neighbouring members with one key, as webdataset does."""
    samples: list[Sample] = []
    for member in _members(shard):
        key, extension = base_plus_ext(member.name)
        if not member.isfile() or key is None or key.startswith("__"):
            continue
        extension = extension.lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise DataError(f"shard {shard}: member {member.name} is there twice in a row; write the shard again")
        samples[-1][1][extension] = (member.offset_data, member.size)
    return samples


def _members(shard: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"shard {shard} ({shard.stat().st_size} bytes) is not a whole, uncompressed tar file: {error}; "
            "copy or decompress it again"
        ) from error
    for member in members:
        if member.issparse():  # the file lacks its holes: neither its bytes nor its end are where its size says
            raise DataError(f"shard {shard}: member {member.name} is sparse; write the tar without -S (--sparse)")
    _refuse_hidden_tail(shard, members)
    return members


def _refuse_hidden_tail(shard: Path, members: list[tarfile.TarInfo]) -> None:
    """tarfile takes a damaged header after the first for the end of the archive: samples would silently be missing."""
    end = max((m.offset_data + -(-m.size // BLOCK) * BLOCK for m in members), default=0)
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(BLOCK)
    if any(block):
        last = members[-1].name if members else "the start"
        raise DataError(f"shard {shard}: damaged header at byte {end}, after {last}; copy the shard again")
