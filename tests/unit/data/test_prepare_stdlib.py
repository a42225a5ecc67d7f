import hashlib
import runpy
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dst_train.data import check
from dst_train.data.store import SampleStore
from dst_train.job.schema import Split

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "launch" / "prepare_stdlib.py"))


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A standard library of 60 files; file i has i + 40 times the byte 100 + i."""
    root = tmp_path / "lib"
    for folder in ("package", "test", "package/tests", "site-packages/other", "__pycache__"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "left_out.py").write_bytes(b"x" * 50)
    (root / "package/left_out.py").unlink()
    (root / "data.txt").write_bytes(b"x" * 50)
    for i in range(60):
        (root / f"{'package/' if i % 2 else ''}m{i}.py").write_bytes(bytes([100 + i]) * (i + 40))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(root)}[name])
    return root


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


def sequences(folder, part, count, length):
    pattern = f"{folder}/{part}-000000.tar"
    check(Split(shards=pattern, samples=count, transform="next_byte", length=length))
    store = SampleStore(pattern, sequence_bytes=length + 1)
    return [store.read(i).content for i in range(count)]


def test_sources_are_those_of_the_library(stdlib):
    found = SCRIPT["sources"](stdlib)
    assert found == sorted(f"{'package/' if i % 2 else ''}m{i}.py" for i in range(60))


def test_a_file_is_always_in_the_same_part():
    files = [f"package/m{i:04d}.py" for i in range(1000)]
    parts = SCRIPT["split"](files)
    assert sorted(parts["train"] + parts["eval"]) == files
    # binomial: 100 with a deviation of 9.5
    assert 70 < len(parts["eval"]) < 130
    fewer = SCRIPT["split"](files[::3])
    assert all(set(fewer[part]) <= set(parts[part]) for part in parts)


def test_every_byte_is_predicted_once(stdlib):
    files = ["m0.py", "package/m1.py", "m2.py"]
    stream = bytes([100]) * 40 + b"\0" + bytes([101]) * 41 + b"\0" + bytes([102]) * 42
    cut = SCRIPT["cut"](stdlib, files, 6)
    assert cut.shape == ((len(stream) - 1) // 6, 7)
    predicted = cut[:, 1:].tobytes()
    assert predicted == stream[1 : 1 + len(predicted)]
    assert len(stream) - 1 - len(predicted) < 6
    assert (cut[1:, 0] == cut[:-1, -1]).all()
    assert SCRIPT["cut"](stdlib, files, len(stream) - 1).shape == (1, len(stream))
    assert SCRIPT["cut"](stdlib, files, len(stream)).shape == (0, len(stream) + 1)
    assert SCRIPT["cut"](stdlib, [], 4).shape == (0, 5)


def test_exact_numbers_of_distinct_sequences_and_no_file_in_both_parts(stdlib, tmp_path):
    folder = tmp_path / "out"
    said = SCRIPT["prepare"](folder, 10, {"train": 150, "eval": 12})
    assert said == f"{folder}: wrote 150 train and 12 eval sequences in 2 shards"
    train, held_out = sequences(folder, "train", 150, 10), sequences(folder, "eval", 12, 10)
    parts = SCRIPT["split"](SCRIPT["sources"](stdlib))
    for part, found in (("train", train), ("eval", held_out)):
        possible = [row.tobytes() for row in SCRIPT["cut"](stdlib, parts[part], 10)]
        assert all(found.count(one) <= possible.count(one) for one in found)
        assert found != possible[: len(found)]
    # the byte of a file tells the file
    assert (set(b"".join(train)) & set(b"".join(held_out))) <= {0}
    # drawn over all files, not the first ones
    assert len(set(b"".join(train))) > len(parts["train"]) / 2


def test_same_bytes_again_and_damage_is_repaired(stdlib, tmp_path):
    folder, samples = tmp_path / "out", {"train": 150, "eval": 12}
    SCRIPT["prepare"](folder, 10, samples)
    expected = sums(folder)
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    assert SCRIPT["prepare"](folder, 10, samples) == f"{folder}: 2 shards are complete, nothing to do"
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.tar")} == stamps
    (folder / "train-000000.tar").write_bytes(b"half")
    (folder / "eval-000000.tar").unlink()
    assert "wrote" in SCRIPT["prepare"](folder, 10, samples)
    assert sums(folder) == expected
    assert "wrote 149 train" in SCRIPT["prepare"](folder, 10, {**samples, "train": 149})
    assert len(sequences(folder, "train", 149, 10)) == 149


def test_what_cannot_be_written(stdlib, tmp_path, monkeypatch, capsys):
    parts = SCRIPT["split"](SCRIPT["sources"](stdlib))
    there = len(SCRIPT["cut"](stdlib, parts["eval"], 10))
    with pytest.raises(ValueError, match=rf"makes {there} eval sequences of length 10, {there + 1} were asked for"):
        SCRIPT["prepare"](tmp_path / "out", 10, {"train": 1, "eval": there + 1})
    for length, samples in ((0, {"train": 1, "eval": 1}), (10, {"train": 0, "eval": 1})):
        with pytest.raises(ValueError, match="must be at least 1"):
            SCRIPT["prepare"](tmp_path / "out", length, samples)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", ["prepare_stdlib.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        SCRIPT["main"]()
    assert caught.value.code == 2
    assert "16384 were asked for" in capsys.readouterr().err


def test_main_writes_what_the_arguments_say(stdlib, tmp_path, monkeypatch, capsys):
    arguments = f"--out {tmp_path / 'out'} --length 10 --train-samples 20 --eval-samples 3"
    monkeypatch.setattr("sys.argv", ["prepare_stdlib.py", *arguments.split()])
    SCRIPT["main"]()
    assert "wrote 20 train and 3 eval sequences" in capsys.readouterr().out
    assert np.shape([list(s) for s in sequences(tmp_path / "out", "train", 20, 10)]) == (20, 11)
