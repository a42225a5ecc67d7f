from __future__ import annotations

import json
import os
import platform
from dataclasses import replace

import pytest

from dst_train.monitor import RunDirectory
from dst_train.monitor.run_directory import LISTED_UNITS


def test_it_is_made_with_its_parents_and_may_exist(tmp_path):
    for _ in range(2):
        run = RunDirectory(tmp_path / "a" / "b")
    assert run.path.is_dir()
    assert {run.checkpoints, run.tensorboard, run.log} == {
        run.path / n for n in ("checkpoints", "tensorboard", "log.txt")
    }


def test_one_training_at_a_time(run):
    lock = run.lock()
    with pytest.raises(BlockingIOError) as caught:
        run.lock()
    assert caught.value.strerror == f"process {os.getpid()} on {platform.node()}"
    lock.close()
    again = run.lock()
    assert (run.path / "lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"
    again.close()


def test_topology_has_a_line_for_each_update_and_layer(run, make_update):
    run.append_topology(make_update(4, layers=("a", "b")))
    run.append_topology(make_update(8, layers=("a", "b")))
    entries = [json.loads(line) for line in run.topology.read_text().splitlines()]
    assert [(entry["step"], entry["layer"]) for entry in entries] == [(4, "a"), (4, "b"), (8, "a"), (8, "b")]
    assert entries[0] == {
        "step": 4,
        "number": 1,
        "layer": "a",
        "dropped": [0],
        "grown": [3],
        "churn": 1 / 3,
        "active": [1, 2, 3],
        "mean_age": 2.5,
        "explored": 0.5,
        "uncovered": 1,
        "drop_margin": 0.25,
        "grow_margin": None,
        "gates": None,
        "effective_units": None,
        "temperature": None,
        "moved": None,
        "digest": "digest1",
    }
    assert run.active_units(9) == {"a": [(1, 2, 3), (2, 3, 4)], "b": [(1, 2, 3), (2, 3, 4)]}
    assert run.active_units(1) == {"a": [(2, 3, 4)], "b": [(2, 3, 4)]}


def test_units_of_a_large_layer_are_counted(run, make_update):
    small, large = make_update(4), make_update(4, layers=("mask",))
    large = replace(large, layers=tuple(replace(layer, num_units=LISTED_UNITS + 1) for layer in large.layers))
    for update in (small, large):
        run.append_topology(update)
    first, second = (json.loads(line) for line in run.topology.read_text().splitlines())
    assert (first["active"], second["active"], second["dropped"], second["grown"]) == ([1, 2, 3], 3, 1, 1)
    assert run.active_units(9) == {"fc": [(1, 2, 3)]}


@pytest.mark.parametrize(("after_step", "kept"), [(0, []), (7, [4]), (8, [4, 8]), (99, [4, 8, 12])])
def test_updates_after_a_step_are_forgotten(run, make_update, after_step, kept):
    for step in (4, 8, 12):
        run.append_topology(make_update(step, layers=("a", "b")))
    run.truncate_topology(after_step)
    steps = [json.loads(line)["step"] for line in run.topology.read_text().splitlines()]
    assert steps == sorted(2 * kept)
    run.append_topology(make_update(16))
    assert json.loads(run.topology.read_text().splitlines()[-1])["step"] == 16


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_cut_last_line_is_forgotten(run, make_update, cut):
    run.append_topology(make_update(4))
    whole = run.topology.read_text()
    run.topology.write_text(whole + whole[:cut])
    run.truncate_topology(4)
    assert run.topology.read_text() == whole


def test_a_line_that_was_damaged_in_its_middle_is_passed_over(run, make_update):
    for step in (4, 8):
        run.append_topology(make_update(step))
    raw = run.topology.read_bytes()
    run.topology.write_bytes(raw[:60] + bytes(20) + raw[80:])
    run.truncate_topology(8)
    assert run.active_units(9) == {"fc": [(2, 3, 4)]}


def test_a_run_without_updates_has_nothing_to_forget(run):
    run.truncate_topology(10)
    assert not run.topology.exists()
    assert run.active_units(9) == {}
