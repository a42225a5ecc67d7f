"""Random transforms, and worker processes. The samples are eight 48 x 64 colour JPEGs in two shards."""

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dst_train.data import DataError, train_loader, write_shards
from dst_train.data.store import SampleStore
from dst_train.data.transforms import transform
from dst_train.job import BatchPlan
from dst_train.processes import STOPS


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)
    noise[7] = noise[6]
    write_shards(tmp_path, "rgb", noise, range(8), 4, "jpeg")
    return tmp_path


@pytest.fixture
def colour_job(make_job, folder):
    def make(seed=0, **data):
        split = {"shards": f"{folder}/rgb-{{000000..000001}}.tar", "samples": 8, "transform": "imagenet_train"}
        return make_job(seed, {"batch_size": 4, "micro_batch_size": 2}, {"train": split, "eval": None, **data})

    return make


def steps(job, world_size=1, start_step=0):
    """Inputs and labels of each global batch from start_step on."""
    plan = BatchPlan.of(job, world_size)
    ranks = [train_loader(job, plan, rank=rank, start_step=start_step) for rank in range(world_size)]
    taken = [[next(rank) for _ in range(plan.accumulation) for rank in ranks] for _ in range(start_step, 4)]
    return [(torch.cat([b.inputs for b in step]), torch.cat([b.targets for b in step])) for step in taken]


def equal(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and torch.equal(label, other) for (x, label), (y, other) in pairs)


def test_augmentation_is_a_function_of_seed_epoch_and_index(colour_job):
    whole = steps(colour_job())
    torch.manual_seed(99)
    assert equal(steps(colour_job()), whole)
    assert equal(steps(colour_job(), world_size=2, start_step=1), whole[1:])
    by_label = [
        dict(zip(torch.cat([y for _, y in half]).tolist(), torch.cat([x for x, _ in half]), strict=True))
        for half in (whole[:2], whole[2:], steps(colour_job(seed=1))[:2])
    ]
    assert not torch.equal(by_label[0][6], by_label[0][7])
    for label in range(8):
        first, second_epoch, other_seed = (images[label] for images in by_label)
        assert not torch.equal(first, second_epoch)
        assert not torch.equal(first, other_seed)


def test_workers_change_nothing_and_ignore_signals(colour_job):
    alone = steps(colour_job())
    job = colour_job(num_workers=2)
    plan = BatchPlan.of(job, 1)
    batches = train_loader(job, plan, rank=0)
    taken = [next(batches), next(batches)]  # one of each worker, so that both are running
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
    taken += batches
    together = [
        tuple(torch.cat(part) for part in zip(*[b[:2] for b in taken[i : i + 2]], strict=True)) for i in (0, 2, 4, 6)
    ]
    assert equal(together, alone)
    assert not any(worker.is_alive() for worker in workers)


def test_workers_that_have_yet_to_start_do_not_die_of_signals_either(colour_job):
    job = colour_job(num_workers=1)
    received = []

    def ask():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        (worker,) = multiprocessing.active_children()
        for number in STOPS:
            os.kill(worker.pid, number)
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        asks = threading.Thread(target=ask)
        asks.start()
        together = list(train_loader(job, BatchPlan.of(job, 1), rank=0))
        asks.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(together) == BatchPlan.of(job, 1).total_steps * BatchPlan.of(job, 1).accumulation
    assert received == [1]  # who trains is asked all the same
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_an_error_in_a_worker_reads_as_without_workers(colour_job, tmp_path):
    write_shards(tmp_path, "grey", np.zeros((8, 28, 28), np.uint8), [0] * 8, 4, "jpeg")
    shard = tmp_path / "grey-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff\xe0", b"\x00\x00\x00\x00"))
    grey = {"shards": f"{tmp_path}/grey-{{000000..000001}}.tar", "samples": 8, "transform": "digits"}
    messages = []
    for num_workers in (0, 1):
        job = colour_job(train=grey, num_workers=num_workers)
        with pytest.raises(DataError, match=r"grey-000001\.tar, sample 0000000\d: \.jpg: not an image") as caught:
            list(train_loader(job, BatchPlan.of(job, 1), rank=0))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_digits_are_normalised():
    image = Image.fromarray(np.arange(784, dtype=np.uint16).reshape(28, 28).astype(np.uint8))
    got = transform("digits").apply(image)
    expected = (np.arange(784) % 256 / 255 - 0.1307) / 0.3081
    assert got.shape == (1, 28, 28)
    # float32: three roundings of numbers below 3
    np.testing.assert_allclose(got.numpy().ravel(), expected, atol=1e-6)


def test_imagenet_eval_is_not_random():
    image = Image.fromarray(np.full((300, 400, 3), 255, np.uint8))
    apply = transform("imagenet_eval").apply
    got = apply(image)
    assert got.shape == (3, 224, 224)
    assert torch.equal(got, apply(image))
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    # white stays white when resized; float32 rounding
    torch.testing.assert_close(got[:, 0, 0], white, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["imagenet_train", "imagenet_eval"])
def test_in_memory_gives_the_same_and_reads_once(colour_job, monkeypatch, name):
    reads = []
    read = SampleStore.read
    monkeypatch.setattr(SampleStore, "read", lambda self, index: reads.append(index) or read(self, index))
    split = {**colour_job().data.train.model_dump(), "transform": name}
    expected = steps(colour_job(train=split))
    assert len(reads) == 2 * 8
    reads.clear()
    assert equal(steps(colour_job(train=split, in_memory=True)), expected)
    assert sorted(reads) == list(range(8))


def test_unknown_transform():
    with pytest.raises(ValueError, match="unknown transform 'cifar'"):
        transform("cifar")
