"""Writes shards of images or byte sequences that every machine writes byte for byte alike."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from dst_train.files import atomic_file

# stored, not compressed: the output of deflate differs between zlib versions
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "png": ("png", {"compress_level": 0}),
    "jpeg": ("jpg", {"quality": 90}),
}


def write_shards(
    folder: str | Path,
    prefix: str,
    arrays: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    per_shard: int,
    image_format: Literal["png", "jpeg"] = "png",
) -> list[Path]:
    """Writes `<prefix>-000000.tar`, `<prefix>-000001.tar`, ... and returns their paths.

    arrays: uint8 [n, height, width] or [n, height, width, 3]; labels: n class numbers. Each shard appears whole.
    Existing shards of these names are replaced. PNG files are not compressed. Raises ValueError.
    """
    if arrays.dtype != np.uint8 or not (arrays.ndim == 3 or (arrays.ndim == 4 and arrays.shape[3] == 3)):
        raise ValueError(f"arrays are {arrays.dtype} {list(arrays.shape)}, must be uint8 [n, h, w] or [n, h, w, 3]")
    if len(labels) != len(arrays):
        raise ValueError(f"{len(labels)} labels for {len(arrays)} arrays")
    classes = np.asarray(labels)
    if len(classes) and (classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0):
        raise ValueError(f"labels are {classes.dtype} {list(classes.shape)}, must be n whole numbers, 0 or more")
    if image_format not in ENCODINGS:
        raise ValueError(f"image_format is {image_format!r}, must be one of {sorted(ENCODINGS)}")
    extension, options = ENCODINGS[image_format]

    def encoded(index: int) -> dict[str, bytes]:
        image = io.BytesIO()
        Image.fromarray(arrays[index]).save(image, format=image_format, **options)
        return {extension: image.getvalue(), "cls": b"%d" % int(classes[index])}

    return _write(Path(folder), prefix, len(arrays), per_shard, encoded)


def write_sequences(folder: str | Path, prefix: str, sequences: np.ndarray, per_shard: int) -> list[Path]:
    """As `write_shards`, for the transform `next_byte`: sequences uint8 [n, length + 1]. Raises ValueError."""
    if sequences.dtype != np.uint8 or sequences.ndim != 2:
        raise ValueError(f"sequences are {sequences.dtype} {list(sequences.shape)}, must be uint8 [n, length + 1]")
    return _write(Path(folder), prefix, len(sequences), per_shard, lambda index: {"bin": sequences[index].tobytes()})


def _write(
    folder: Path, prefix: str, count: int, per_shard: int, encoded: Callable[[int], dict[str, bytes]]
) -> list[Path]:
    if per_shard < 1:
        raise ValueError(f"per_shard is {per_shard}, must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, count, per_shard)):
        paths.append(folder / f"{prefix}-{number:06d}.tar")
        with atomic_file(paths[-1]) as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for index in range(start, min(start + per_shard, count)):
                tar.write({"__key__": f"{index:08d}", **encoded(index)})
    return paths
