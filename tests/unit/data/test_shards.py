"""Shards that are missing, damaged, remote or changed, and their indexes."""

import copy
import io
import json
import logging
import multiprocessing
import os
import reprlib
import stat
import subprocess
import sys
import tarfile
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from dst_train.data import BadSampleError, DataError, check, eval_loader, index, loader, train_loader, write_shards
from dst_train.data.dataset import Images
from dst_train.data.index import load_index
from dst_train.data.store import SampleStore
from dst_train.files import atomic_file
from dst_train.job import BatchPlan, JobError, dump
from dst_train.job.schema import Split


def index_of(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index.json")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_reads_what_webdataset_reads(tmp_path):
    long_name = "folder/" + "n" * 120
    members = {
        "__meta__": b"x",
        "b.jpg": b"jpeg",
        "b.cls": b"1",
        "b.json": b"{}",
        f"{long_name}.PNG": b"png",
        f"{long_name}.cls": b"22",
        "noextension": b"y",
    }
    shard = write_tar(tmp_path / "s.tar", members)
    store = SampleStore(str(shard))
    with open(shard, "rb") as stream:
        expected = list(group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])))
    assert len(store) == len(expected) == 2
    assert [tuple(store.read(i)) for i in range(2)] == [
        (expected[0]["jpg"], "jpg", expected[0]["cls"]),
        (expected[1]["png"], "png", expected[1]["cls"]),
    ]
    assert store.name(1) == f"shard {shard}, sample {long_name}"


def test_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    shard = write_tar(tmp_path / "s.tar", {f"{name}.png": b"png", f"{name}.cls": b"1"})
    for _ in range(2):  # the second time with the index of the first
        store = SampleStore(str(shard))
        assert tuple(store.read(0)) == (b"png", "png", b"1")
        assert store.name(0) == rf"shard {shard}, sample caf\xe9"


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dst_train.data.store.MAX_OPEN_FILES", 2)
    write_shards(tmp_path, "a", np.zeros((9, 4, 4), np.uint8), range(9), 1)
    before = len(os.listdir("/proc/self/fd"))
    store = SampleStore(f"{tmp_path}/a-{{000000..000008}}.tar")
    for turn in ([*range(9)], [0, 8, 0, 7]):
        assert [int(store.read(i).label) for i in turn] == turn
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_check_counts_samples(split):
    check(Split(**split))
    with pytest.raises(JobError, match=r"50 samples in 5 shards, but the job says samples: 49, 10 in each"):
        check(Split(**{**split, "samples": 49}))


def test_check_names_the_odd_shard(split, shards, tmp_path):
    write_shards(tmp_path, "short", np.zeros((8, 28, 28), np.uint8), [0] * 8, 8)[0].rename(shards[3])
    with pytest.raises(DataError, match=r"48 samples.*says samples: 50; shards with other than 10.*a-000003\.tar: 8"):
        check(Split(**split))


def test_missing_shard(split, shards):
    shards[2].unlink()
    with pytest.raises(JobError, match=r"shard \S+a-000002\.tar does not exist"):
        check(Split(**split))


def test_a_missing_shard_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as relative:
        SampleStore("shards/a.tar")
    assert str(relative.value) == (
        f"shard shards/a.tar does not exist (relative paths start at the working directory: {tmp_path}/shards/a.tar); "
        "check data.*.shards"
    )
    with pytest.raises(DataError) as absolute:
        SampleStore(f"{tmp_path}/a.tar")
    assert str(absolute.value) == f"shard {tmp_path}/a.tar does not exist; check data.*.shards"


def test_what_is_no_name_of_a_shard_is_told_how_to_write_it(shards, tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name the files in it: .*/train-\{000000\.\.000003\}\.tar"):
        SampleStore(str(shards[0].parent))
    with pytest.raises(DataError, match=r"a-\*\.tar does not exist; there are no globs here, write a range: \{000000"):
        SampleStore(f"{shards[0].parent}/a-*.tar")


@pytest.mark.parametrize("name", ["digits", "stdlib"])
def test_a_missing_shard_of_our_own_jobs_says_what_writes_it(tmp_path, monkeypatch, name):
    program = f"launch/prepare_{name}.py"
    assert f'default=Path("data/{name}")' in Path(program).read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"check data\.\*\.shards, or run {program}, which writes it"):
        SampleStore(f"data/{name}/eval-000000.tar")


@pytest.mark.parametrize(("pattern", "message"), [("${UNSET}/a.tar", "variable"), ("a-{0..1.tar", "braces")])
def test_bad_patterns(pattern, message):
    with pytest.raises(DataError, match=message):
        SampleStore(pattern)


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2 + 600]


def break_header(data: bytes) -> bytes:
    return data[:2560] + b"\xaa" * 512 + data[2560 + 512 :]


def cut_header(data: bytes) -> bytes:
    return data[: 2560 + 100]


@pytest.mark.parametrize(
    "damage", [truncate, break_header, cut_header, lambda data: b"", lambda data: b"\x1f\x8b" + data]
)
def test_damaged_shards_are_refused(split, shards, damage):
    shards[1].write_bytes(damage(shards[1].read_bytes()))
    with pytest.raises(DataError, match=r"shard \S+a-000001\.tar.*(not a whole, uncompressed tar|damaged header)"):
        check(Split(**split))
    assert not index_of(shards[1]).exists()


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_refused(tmp_path, format):
    (tmp_path / "a.cls").write_text("1")
    with open(tmp_path / "a.png", "wb") as file:
        file.seek(1 << 20)
        file.write(b"behind a hole")
    shard = tmp_path / "s.tar"
    subprocess.run(["tar", "-cSf", shard, f"--format={format}", "-C", tmp_path, "a.png", "a.cls"], check=True)
    with pytest.raises(DataError, match=r"shard \S+s\.tar: member a\.png is sparse; write the tar without -S"):
        SampleStore(str(shard))


def test_samples_need_an_image_and_a_label(tmp_path):
    for members in ({"a.png": b""}, {"a.cls": b"1"}, {"a.png": b"", "a.jpg": b"", "a.cls": b"1"}):
        shard = write_tar(tmp_path / "s.tar", members)
        with pytest.raises(DataError, match=r"s\.tar, sample a: has .* needs one image and \.cls"):
            SampleStore(str(shard))
    shard = write_tar(tmp_path / "s.tar", {"a.png": b"", "a.PNG": b"", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"s\.tar: member a\.PNG is there twice"):
        SampleStore(str(shard))


def test_index_is_written_once(shards, monkeypatch):
    first = load_index(shards[0])
    assert json.loads(index_of(shards[0]).read_text())["size"] == shards[0].stat().st_size
    assert stat.S_IMODE(index_of(shards[0]).stat().st_mode) == 0o644
    monkeypatch.setattr(index, "_scan", lambda shard: pytest.fail("scanned again"))
    assert load_index(shards[0]) == first


def test_index_follows_its_shard(shards, caplog):
    load_index(shards[0])
    write_shards(shards[0].parent, "a", np.zeros((3, 28, 28), np.uint8), [0] * 3, 10)
    assert len(load_index(shards[0])) == 3
    assert "older than its shard" in caplog.text
    # same size, other time
    os.utime(shards[0], ns=(0, 12345))
    caplog.clear()
    load_index(shards[0])
    assert "older than its shard" in caplog.text
    assert json.loads(index_of(shards[0]).read_text())["mtime_ns"] == 12345


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"version": 0}', '{"version":1,"samples":[["a",3]]}', "\udcff"]
)
def test_unreadable_index_is_built_again(shards, caplog, content):
    expected = load_index(shards[0])
    index_of(shards[0]).write_bytes(content.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert load_index(shards[0]) == expected
    assert "unreadable" in caplog.text
    caplog.clear()
    assert load_index(shards[0]) == expected
    assert not caplog.text


def test_index_of_a_read_only_folder(shards, tmp_path, monkeypatch):
    # root may write anywhere, so that permissions cannot make a folder read-only here
    def refuse(path):
        if path.parent == shards[0].parent:
            raise PermissionError(13, "Permission denied")
        return atomic_file(path)

    monkeypatch.setattr(index, "atomic_file", refuse)
    with pytest.raises(
        DataError, match=r"a-000000\.tar: cannot write its index .*Permission denied.*set data\.cache_dir"
    ):
        load_index(shards[0])
    cache = tmp_path / "cache"
    expected = load_index(shards[0], str(cache))
    assert len(expected) == 10
    monkeypatch.setattr(index, "_scan", lambda shard: pytest.fail("scanned again"))
    assert load_index(shards[0], str(cache)) == expected


def test_processes_may_build_an_index_together(tmp_path):
    shard = write_shards(tmp_path, "a", np.zeros((400, 8, 8), np.uint8), [0] * 400, 400)[0]
    context = multiprocessing.get_context("fork")
    with context.Pool(4, initializer=_set_barrier, initargs=(context.Barrier(4),)) as pool:
        found = pool.map(_build_together, [shard] * 4, chunksize=1)
    assert all(samples == found[0] for samples in found)
    assert len(found[0]) == 400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-000000.tar", "a-000000.tar.index.json"]


_start: list[Barrier] = []


def _set_barrier(barrier):
    _start.append(barrier)


def _build_together(shard):
    _start[0].wait(timeout=30)
    return load_index(shard)


def test_remote_shards_are_copied_whole_and_once(shards, tmp_path):
    count = tmp_path / "count"
    pattern = f"pipe:echo x >> {count}; cat {shards[0].parent}/a-{{000000..000001}}.tar"
    with pytest.raises(DataError, match=r"is remote: set data\.cache_dir"):
        SampleStore(pattern)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"data\.cache_dir {tmp_path}/file: cannot be made: "):
        SampleStore(pattern, str(tmp_path / "file"))
    cache = tmp_path / "cache"
    for _ in range(2):
        store = SampleStore(pattern, str(cache))
        assert [store.read(i) for i in range(20)] == [SampleStore(str(shards[i // 10])).read(i % 10) for i in range(20)]
    assert count.read_text() == "x\n" * 2


def test_remote_failure_leaves_no_shard(tmp_path):
    with pytest.raises(DataError, match=r"shard pipe:head -c 700 /dev/zero; false: cannot copy it"):
        SampleStore("pipe:head -c 700 /dev/zero; false", str(tmp_path))
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


def test_file_urls_are_local(shards):
    assert len(SampleStore(f"file://{shards[0]}")) == 10


def corrupt(shard: Path, number: int) -> None:
    """Damages the image of one sample without changing size or time, as a bad disk does."""
    offset, _ = load_index(shard)[number][1]["png"]
    times = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_corrupt_sample_fails_by_name(make_job, shards):
    corrupt(shards[1], 4)
    job = make_job()
    with pytest.raises(BadSampleError, match=r"a-000001\.tar, sample 00000014: \.png: not an image.*max_bad"):
        list(train_loader(job, BatchPlan.of(job, 1), rank=0))


def test_corrupt_sample_is_replaced_by_its_successor(make_job, shards, numbers):
    clean = make_job()
    expected = [numbers(b.inputs) for b in train_loader(clean, BatchPlan.of(clean, 1), rank=0)]
    for shard, number in ((shards[1], 4), (shards[1], 5), (shards[4], 9)):
        corrupt(shard, number)
    successor = {14: 16, 15: 16, 49: 0}
    job = make_job(data={"max_bad_samples": 1})
    for world_size in (1, 2):
        plan = BatchPlan.of(job, world_size)
        ranks = [train_loader(job, plan, rank=rank) for rank in range(world_size)]
        got = [next(ranks[i % world_size]) for i in range(len(expected))]
        assert [numbers(b.inputs) for b in got] == [[successor.get(n, n) for n in batch] for batch in expected]
        assert [b.targets.tolist() for b in got] == [[successor.get(n, n) % 7 for n in batch] for batch in expected]
        assert [b.replaced for b in got] == [sum(n in successor for n in batch) for batch in expected]


def test_a_run_of_corrupt_samples_is_not_replaced(make_job, shards):
    for number in range(10):
        corrupt(shards[2], number)
    job = make_job(data={"max_bad_samples": 100})
    with pytest.raises(DataError, match=r"a-000002\.tar, sample 0000002\d.*so are its 8 successors"):
        list(train_loader(job, BatchPlan.of(job, 1), rank=0))


def test_wrong_size_and_wrong_label_are_bad_samples(make_job, tmp_path):
    big = write_shards(tmp_path, "big", np.zeros((4, 29, 28), np.uint8), range(4), 4)[0]
    with tarfile.open(big) as tar:
        stored = tar.extractfile("00000000.png")
        assert stored is not None
        image = stored.read()
    named = write_tar(tmp_path / "named.tar", {"a.png": image, "a.cls": b"cat"})
    for shard, count, message in (
        (big, 4, r"the image is 28 x 29, digits are 28 x 28"),
        (named, 1, r"sample a: \.cls: .*'cat'"),
    ):
        split = {"shards": str(shard), "samples": count, "transform": "digits"}
        job = make_job(0, {"batch_size": 1, "micro_batch_size": 1}, {"train": split})
        with pytest.raises(BadSampleError, match=message):
            list(train_loader(job, BatchPlan.of(job, 1), rank=0))


@pytest.mark.parametrize("label", [b"-1", b"-100", b"%d" % 2**63, b"%d" % 10**30, b"1.5", b"", b"\xff", b"9" * 5000])
def test_a_label_is_the_number_of_a_class(shards, label):
    with tarfile.open(shards[0]) as tar:
        stored = tar.extractfile("00000000.png")
        assert stored is not None
        image = stored.read()
    shard = write_tar(shards[0].with_name("s.tar"), {"a.png": image, "a.cls": label})
    images = Images(SampleStore(str(shard)), "digits", 0)
    expected = f"shard {shard}, sample a: .cls: {reprlib.repr(label)}, expected the number of a class, 0 or more"
    with pytest.raises(BadSampleError) as caught:
        images.load(0, 0)
    assert str(caught.value) == expected


def test_evaluation_never_replaces(make_job, shards):
    corrupt(shards[1], 4)
    job = make_job(data={"max_bad_samples": 5})
    with pytest.raises(BadSampleError, match=r"sample 00000014"):
        list(eval_loader(job, BatchPlan.of(job, 1), rank=0))
    job = make_job(data={"eval": None})
    with pytest.raises(DataError, match=r"data\.eval"):
        eval_loader(job, BatchPlan.of(job, 1), rank=0)


def test_shard_that_shrinks_or_goes_while_training(shards):
    store = SampleStore(str(shards[0]))
    os.truncate(shards[0], 3000)
    with pytest.raises(BadSampleError, match=r"a-000000\.tar, sample 00000009: 0 of 880 bytes at \d+"):
        store.read(9)
    store = SampleStore(str(shards[1]))
    shards[1].unlink()
    with pytest.raises(DataError, match=r"a-000001\.tar: cannot read it"):
        store.read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrays": np.zeros((2, 4, 4))}, "float64"),
        ({"arrays": np.zeros((2, 4, 4, 1), np.uint8)}, r"\[2, 4, 4, 1\]"),
        ({"labels": [1]}, "1 labels for 2"),
        ({"labels": [0.5, 1.7]}, r"labels are float64 \[2\], must be n whole numbers, 0 or more"),
        ({"labels": [0, -1]}, "labels are int64"),
        ({"labels": ["cat", "dog"]}, "labels are <U3"),
        ({"per_shard": 0}, "per_shard is 0"),
        ({"image_format": "bmp"}, "'bmp'"),
    ],
)
def test_writer_refuses(tmp_path, change, message):
    right = {"arrays": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1], "per_shard": 2, "image_format": "png"}
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, "a", **{**right, **change})


def test_an_open_loader_does_not_keep_the_interpreter(make_job, tmp_path):
    """Workers ignore SIGTERM, which is all that multiprocessing sends them at exit."""
    (tmp_path / "job.yaml").write_text(dump(make_job(data={"num_workers": 1})))
    (tmp_path / "main.py").write_text(
        """
import sys
from dst_train.data import train_loader
from dst_train.job import BatchPlan, load
if __name__ == "__main__":
    job = load(sys.argv[1])
    batches = train_loader(job, BatchPlan.of(job, 1), rank=0)
    next(batches)
    raise RuntimeError("training failed")
"""
    )
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "training failed" in done.stderr


def test_a_worker_is_sent_no_tables(shards):
    """Those of a million samples fill the pipe to it, so that workers would start one after the other."""
    store = SampleStore(str(shards[0]))
    read = [store.read(i) for i in range(10)], [store.name(i) for i in range(10)]
    store._table, store._keys = np.tile(store._table, (20000, 1)), np.tile(store._keys, 20000)
    for _ in range(2):  # two workers
        sent = ForkingPickler.dumps(store)
        assert len(sent) < 2**16
    again = ForkingPickler.loads(sent)
    assert len(again) == len(store) == 200_000
    copied = copy.deepcopy(store)
    assert len(ForkingPickler.dumps(copied)) < 2**16
    assert copied._table.base.data_ptr() == copied._shared[0].data_ptr()  # not what was freed when it became shared
    for one in (store, again, copied):
        assert ([one.read(i) for i in range(10)], [one.name(i) for i in range(10)]) == read


def test_indexes_are_read_once_as_long_as_shards_stay(split, shards, monkeypatch):
    made = []
    monkeypatch.setattr(loader, "SampleStore", lambda *args, **kw: made.append(args) or SampleStore(*args, **kw))
    loader._store.cache_clear()
    for _ in range(2):
        check(Split(**split))
    assert len(made) == 1
    os.utime(shards[0], (1, 1))
    check(Split(**split))
    assert len(made) == 2
