"""Micro-batches of decoded, transformed samples; runs in the loader's worker processes."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from webdataset.autodecode import Decoder, DecodingError, imagehandler

from dst_train.data.errors import BadSampleError, DataError
from dst_train.data.order import Ref, stable_seed
from dst_train.data.store import LABEL, SampleStore
from dst_train.data.transforms import transform
from dst_train.job.schema import Split

MAX_SUCCESSORS = 8


class Batch(NamedTuple):
    """A micro-batch of training."""

    inputs: Tensor
    """float32 images [micro_batch_size, channels, height, width] or int64 bytes [micro_batch_size, length]."""
    targets: Tensor
    """int64 [micro_batch_size] class labels, or [micro_batch_size, length] next bytes."""
    replaced: int
    """Undecodable samples that were replaced by their successor."""


class EvalBatch(NamedTuple):
    """A micro-batch of evaluation, of the same size on every rank."""

    inputs: Tensor
    """As in Batch."""
    targets: Tensor
    """As in Batch."""
    valid: Tensor
    """bool [micro_batch_size]; padding is not valid and must not be counted."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the CPU generators of torch, `random` and numpy, so that loading in the process of the training
    (`num_workers: 0`) does not change its dropout."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def seed_rng(seed: int) -> None:
    # not torch.manual_seed: that would also seed the training's CUDA generators
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class Images:
    """Decoded images and labels of a split by number.

    keep: hold what was read once, decoded and, where nothing of it is random, transformed.
    """

    def __init__(self, store: SampleStore, transform_name: str, seed: int, *, keep: bool = False) -> None:
        self.store, self.seed = store, seed
        self._transform = transform(transform_name)
        self._decoder = Decoder([imagehandler(self._transform.mode)])
        self._kept: dict[int, tuple[Any, Tensor]] | None = {} if keep else None

    def load(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """The input and the label, int64 []; augmentation depends on (seed, epoch, index) only.

        Raises BadSampleError, DataError.
        """
        if self._kept is None:
            image, label = self._decode(index)
        else:
            if index not in self._kept:
                self._kept[index] = self._decode(index)
            image, label = self._kept[index]
        if not self._transform.random:
            return image, label
        seed_rng(stable_seed(self.seed, "augment", epoch, index))
        return self._apply(image, index), label

    def _decode(self, index: int) -> tuple[Any, Tensor]:
        """The image, as a tensor where the transform is the same in each epoch, and the label."""
        stored = self.store.read(index)
        try:
            image = self._decoder({stored.extension: stored.content})[stored.extension]
        except DecodingError as error:
            raise BadSampleError(f"{self.store.name(index)}: .{error.k}: {_reason(error.__cause__)}") from error
        label = self._label(stored.label, index)
        return image if self._transform.random else self._apply(image, index), label

    def _label(self, text: bytes, index: int) -> Tensor:
        try:
            label = int(text)
        except ValueError:
            label = -1
        if not 0 <= label < 2**63:  # -100 would be left out of the loss, as cross_entropy's ignore_index
            raise BadSampleError(
                f"{self.store.name(index)}: .{LABEL}: {reprlib.repr(text)}, expected the number of a class, 0 or more"
            )
        return torch.tensor(label)

    def _apply(self, image: Image.Image, index: int) -> Tensor:
        try:
            return self._transform.apply(image)
        except ValueError as error:
            raise BadSampleError(f"{self.store.name(index)}: .{self.store.extension(index)}: {error}") from error


def _reason(error: BaseException | None) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"  # PIL's text is the address of a buffer
    return f"{type(error).__name__}: {error}"


class Sequences:
    """Bytes of a split by number; the target of each is the byte after it."""

    def __init__(self, store: SampleStore) -> None:
        self.store = store

    def load(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [length] each, from length + 1 bytes. Raises BadSampleError, DataError."""
        content = np.frombuffer(self.store.read(index).content, np.uint8).astype(np.int64)
        return torch.from_numpy(content[:-1]), torch.from_numpy(content[1:])


Samples = Images | Sequences


def samples(split: Split, store: SampleStore, seed: int, *, keep: bool) -> Samples:
    """What the split's transform makes of the stored samples. keep: see Images; sequences need no decoding."""
    return Sequences(store) if split.transform == "next_byte" else Images(store, split.transform, seed, keep=keep)


class TrainSet(Dataset):
    """Micro-batches for lists of Ref. A DataError is returned, not raised: torch would wrap the text of an exception
    that crosses from a worker in a traceback."""

    def __init__(self, samples: Samples, max_bad_samples: int) -> None:
        self._samples, self._may_replace = samples, max_bad_samples > 0

    def __getitems__(self, refs: Sequence[Ref]) -> Batch | DataError:
        try:
            with preserved_rng():
                loaded = [self._load(ref) for ref in refs]
        except DataError as error:
            return error
        inputs, targets, replaced = zip(*loaded, strict=True)
        return Batch(torch.stack(inputs), torch.stack(targets), sum(replaced))

    def _load(self, ref: Ref) -> tuple[Tensor, Tensor, bool]:
        try:
            return *self._samples.load(ref.epoch, ref.sample), False
        except BadSampleError as error:
            if not self._may_replace:
                raise BadSampleError(f"{error} (data.max_bad_samples is 0: none may be replaced)") from error
            return *self._successor(ref, error), True

    def _successor(self, ref: Ref, first: BadSampleError) -> tuple[Tensor, Tensor]:
        """The next readable sample of the split: the same one on any rank."""
        for step in range(1, MAX_SUCCESSORS + 1):
            try:
                return self._samples.load(ref.epoch, (ref.sample + step) % len(self._samples.store))
            except BadSampleError:
                continue
        raise DataError(f"{first}; so are its {MAX_SUCCESSORS} successors: check the shard") from first


class EvalSet(Dataset):
    """As TrainSet, without replacement: an evaluation counts every sample or fails."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitems__(self, refs: Sequence[Ref]) -> EvalBatch | DataError:
        try:
            with preserved_rng():
                inputs, targets = zip(*(self._samples.load(ref.epoch, ref.sample) for ref in refs), strict=True)
        except DataError as error:
            return error
        valid = torch.tensor([ref.valid for ref in refs])
        return EvalBatch(torch.stack(inputs), torch.stack(targets), valid)
