"""Byte sequences through the loaders."""

import numpy as np
import pytest
import torch

from dst_train.data import DataError, check, eval_loader, example_input, train_loader, write_sequences
from dst_train.job import BatchPlan
from dst_train.job.schema import Split

LENGTH, COUNT = 5, 21
CONTENT = np.random.RandomState(0).randint(0, 256, (COUNT, LENGTH + 1)).astype(np.uint8)


@pytest.fixture
def sequences(tmp_path):
    write_sequences(tmp_path, "s", CONTENT, 8)
    return {
        "shards": f"{tmp_path}/s-{{000000..000002}}.tar",
        "samples": COUNT,
        "transform": "next_byte",
        "length": LENGTH,
    }


def whole(inputs, targets):
    """The sequences that a batch was made of."""
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], 1).tolist()


def test_an_epoch_has_every_sequence_as_it_was_written(make_job, sequences):
    job = make_job(train={"epochs": 1, "batch_size": 7, "micro_batch_size": 7}, data={"train": sequences, "eval": None})
    found = [row for b in train_loader(job, BatchPlan.of(job, 1), rank=0) for row in whole(b.inputs, b.targets)]
    assert sorted(found) == sorted(CONTENT.tolist())
    assert found != CONTENT.tolist()


def test_evaluation_pads_whole_sequences(make_job, sequences):
    job = make_job(data={"train": sequences, "eval": sequences})
    plan = BatchPlan.of(job, 2)
    batches = [batch for rank in range(2) for batch in eval_loader(job, plan, rank=rank)]
    assert all(b.inputs.shape == b.targets.shape == (4, LENGTH) and b.valid.shape == (4,) for b in batches)
    rows = [row for b in batches for row in whole(b.inputs[b.valid], b.targets[b.valid])]
    assert sorted(rows) == sorted(CONTENT.tolist())
    assert sum(int((~b.valid).sum()) for b in batches) == 24 - COUNT


def test_samples_must_be_what_the_transform_reads(sequences, shards):
    with pytest.raises(
        DataError, match=r"s-000000\.tar, sample 00000000: has {'bin': 6} bytes, needs \.bin of 8 bytes"
    ):
        check(Split(**{**sequences, "length": 7}))
    with pytest.raises(DataError, match=r"has {'cls': 1, 'png': \d+} bytes, needs \.bin of 6 bytes"):
        check(Split(**{**sequences, "shards": str(shards[0])}))
    with pytest.raises(DataError, match=r"has {'bin': 6} bytes, needs one image and \.cls"):
        check(Split(shards=sequences["shards"], samples=COUNT, transform="digits"))


def test_example_inputs():
    text = example_input(Split(shards="x", samples=1, transform="next_byte", length=9))
    assert (text.dtype, text.shape, int(text.min())) == (torch.int64, (1, 9), 255)
    for transform, shape in (("digits_train", (1, 1, 28, 28)), ("imagenet_eval", (1, 3, 224, 224))):
        image = example_input(Split(shards="x", samples=1, transform=transform))
        assert (image.dtype, image.shape) == (torch.float32, shape)


@pytest.mark.parametrize(
    ("array", "per_shard", "message"),
    [
        (np.zeros((2, 4)), 2, r"float64 \[2, 4\]"),
        (np.zeros(4, np.uint8), 2, r"uint8 \[4\]"),
        (CONTENT, 0, "per_shard is 0"),
    ],
)
def test_writer_refuses(tmp_path, array, per_shard, message):
    with pytest.raises(ValueError, match=message):
        write_sequences(tmp_path, "s", array, per_shard)
