"""What people see of a run: lines, and event files read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dst_train.monitor import Monitor, RunDirectory, monitor
from dst_train.monitor.monitor import PICTURE_ROWS, picture
from dst_train.monitor.run_directory import LISTED_UNITS
from dst_train.sparse import SparsityReport

Open = Callable[..., Monitor]


@pytest.fixture(autouse=True)
def _draws_at_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "DRAWING_SHARE", math.inf)


@pytest.fixture
def open_monitor(run: RunDirectory) -> Iterator[Open]:
    """Monitors of 100 steps that are closed only after the test, as if their processes had been killed before."""
    opened: list[Monitor] = []

    def open_(start_step: int = 0, *, rank: int = 0, tensorboard: bool = True, write=lambda text: None) -> Monitor:
        one = Monitor(run, rank=rank, tensorboard=tensorboard, total_steps=100, start_step=start_step, write=write)
        opened.append(one)
        return one

    yield open_
    for one in opened:
        one.close()


def _train(monitor: Monitor, steps: range, make_update, report: SparsityReport) -> None:
    """Scalars at every step, an update at every fourth, an evaluation at every fifth; the loss tells the runs apart."""
    for step in steps:
        if step % 4 == 0:
            monitor.topology(make_update(step), report)
        monitor.step(step, scalars=_scalars(loss=steps.start + step / 1000))
        if step % 5 == 0:
            monitor.evaluation(step, scalars={"eval/accuracy": step / 100})


def _scalars(loss: float = 1.0, seconds: float = 0.5) -> dict[str, float]:
    return {
        "train/loss": loss,
        "train/accuracy": 0.25,
        "train/samples_per_second": 64.0,
        "train/step_seconds": seconds,
    }


def _read(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return reader


def _steps(reader: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in reader.Scalars(tag)]


def _image(event) -> np.ndarray:
    """uint8 [height, width] of an image event."""
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))


def test_every_scalar_reaches_tensorboard_at_its_step(open_monitor, run, make_update, report):
    _train(open_monitor(), range(1, 11), make_update, report)
    reader = _read(run.tensorboard)
    assert _steps(reader, "train/loss") == list(range(1, 11))
    assert _steps(reader, "eval/accuracy") == [5, 10]
    assert reader.Scalars("eval/accuracy")[1].value == pytest.approx(0.10)
    assert _steps(reader, "topology/churn") == [4, 8]


def test_an_update_is_told_for_each_layer(open_monitor, run, make_update, report):
    open_monitor().topology(make_update(4), report)
    reader = _read(run.tensorboard)
    expected = {
        "churn": 1 / 3,
        "churn/fc": 1 / 3,
        "dropped/fc": 1.0,
        "grown/fc": 1.0,
        "sparsity_target/fc": 0.6,
        "sparsity_actual/fc": 0.625,
        "sparsity": 0.625,
        "drop_fraction": 0.3,
        "update_seconds": 0.25,
        "mean_age/fc": 2.5,
        "explored/fc": 0.5,
        "uncovered/fc": 1.0,
        "drop_margin/fc": 0.25,
    }
    # Event files hold float32.
    told = {tag.removeprefix("topology/"): reader.Scalars(tag)[0].value for tag in reader.Tags()["scalars"]}
    assert told == pytest.approx(expected, rel=1e-6)


def test_gates_are_shown_and_large_layers_have_no_picture(open_monitor, run, make_update, report):
    update = make_update(4)
    gated = {"gates": (0.5, 1.0, 1.5), "effective_units": 2.57, "temperature": 0.5, "num_units": LISTED_UNITS + 1}
    update = replace(update, layers=tuple(replace(layer, **gated) for layer in update.layers))
    open_monitor().topology(update, report)
    reader = _read(run.tensorboard)
    assert reader.Scalars("topology/effective_units/fc")[0].value == pytest.approx(2.57, rel=1e-6)
    assert reader.Scalars("topology/temperature/fc")[0].value == 0.5
    assert reader.Histograms("gates/fc")[0].histogram_value.num == 3
    present = len(update.layers[0].active) / (LISTED_UNITS + 1)
    assert reader.Scalars("topology/sparsity")[0].value == pytest.approx(1 - present, rel=1e-6)
    assert reader.Tags()["images"] == []


def test_resuming_after_a_crash_shows_each_step_once(open_monitor, run, make_update, report):
    _train(open_monitor(), range(1, 21), make_update, report)  # killed at 20, the newest checkpoint is of 15
    _train(open_monitor(start_step=15), range(16, 31), make_update, report)
    reader = _read(run.tensorboard)
    losses = reader.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 31))
    assert [round(event.value) for event in losses] == [1] * 15 + [16] * 15
    assert _steps(reader, "eval/accuracy") == [5, 10, 15, 20, 25, 30]
    assert _steps(reader, "topology/churn") == [4, 8, 12, 16, 20, 24, 28]
    assert [event.step for event in reader.Images("units/fc")] == [4, 8, 12, 16, 20, 24, 28]
    assert len(run.active_units(9)["fc"]) == 7


def test_starting_again_after_a_crash_before_the_first_checkpoint(open_monitor, run, make_update, report):
    _train(open_monitor(), range(1, 8), make_update, report)
    _train(open_monitor(), range(1, 11), make_update, report)
    reader = _read(run.tensorboard)
    assert _steps(reader, "train/loss") == list(range(1, 11))
    assert _image(reader.Images("units/fc")[-1]).shape == (2, 8)


def test_what_was_said_survives_a_kill(open_monitor, run):
    monitor = open_monitor()
    monitor.step(1, scalars=_scalars())
    monitor.message("checkpoint step-1")
    assert _steps(_read(run.tensorboard), "train/loss") == [1]  # not closed: the writer's own delay is 2 minutes
    assert run.log.read_text().splitlines()[-1] == "checkpoint step-1"


def test_the_picture_has_a_row_for_each_update_also_over_a_resume(open_monitor, run, make_update, report):
    _train(open_monitor(), range(1, 11), make_update, report)  # updates 1 (step 4) and 2 (step 8)
    _train(open_monitor(start_step=7), range(8, 13), make_update, report)  # 2 again, and 3
    active = [(1, 2, 3), (2, 3, 4), (3, 4, 5)]
    expected = [[255 * (unit in row) for unit in range(8)] for row in active]
    assert _image(_read(run.tensorboard).Images("units/fc")[-1]).tolist() == expected


def test_the_picture_keeps_the_newest_updates(open_monitor, run, make_update, report):
    steps = range(4, 4 * (PICTURE_ROWS + 3), 4)
    for step in steps:
        run.append_topology(make_update(step))
    last = 4 * (PICTURE_ROWS + 3)
    open_monitor(start_step=last - 1).topology(make_update(last), report)
    image = _image(_read(run.tensorboard).Images("units/fc")[-1])
    assert image.shape == (PICTURE_ROWS, 8)
    assert tuple(np.flatnonzero(image[-1])) == make_update(last).layers[0].active
    assert tuple(np.flatnonzero(image[0])) == make_update(last - 4 * (PICTURE_ROWS - 1)).layers[0].active


def test_picture_marks_active_units():
    assert picture([(0, 2), (1, 2)], 4).tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]


def test_a_last_line_cut_by_a_crash_does_not_stop_the_resume(open_monitor, run, make_update, report):
    run.append_topology(make_update(4))
    with run.topology.open("a") as file:
        file.write('{"step": 8, "num')
    open_monitor(start_step=6).topology(make_update(8), report)
    assert run.active_units(9) == {"fc": [(1, 2, 3), (2, 3, 4)]}


def test_the_progress_line(open_monitor, run):
    lines: list[str] = []
    open_monitor(write=lines.append).step(10, scalars=_scalars(loss=2.3456, seconds=41.0))
    # 90 steps of 41 s are left: 3690 s.
    assert lines == ["step 10/100  loss 2.3456  accuracy 25.00%  64.0 samples/s  1:01:30 left"]
    assert run.log.read_text().splitlines() == lines


def test_a_step_without_a_loss_has_a_line_too(open_monitor, run):
    lines: list[str] = []
    scalars = _scalars(loss=math.nan)
    del scalars["train/loss"]
    open_monitor(write=lines.append).step(10, scalars=scalars)
    assert "step 10/100  loss nan  accuracy" in lines[0]
    assert "train/loss" not in _read(run.tensorboard).Tags()["scalars"]


def test_evaluations_and_messages_are_lines_on_the_terminal_and_in_the_log(run, capsys):
    monitor = Monitor(run, rank=0, tensorboard=False, total_steps=100, start_step=0)
    monitor.evaluation(20, scalars={"eval/loss": 0.5, "eval/accuracy": 0.75})
    monitor.message("checkpoint step-20")
    monitor.close()
    lines = ["step 20/100  eval/loss 0.5000  eval/accuracy 0.7500", "checkpoint step-20"]
    assert capsys.readouterr().out.splitlines() == lines
    assert run.log.read_text().splitlines() == lines


def test_the_log_of_a_resumed_run_continues(open_monitor, run):
    open_monitor().message("first")
    open_monitor(start_step=5).message("second")
    assert run.log.read_text().splitlines() == ["first", "second"]


def test_without_tensorboard_the_files_for_people_stay(open_monitor, run, make_update, report):
    _train(open_monitor(tensorboard=False), range(1, 6), make_update, report)
    assert not run.tensorboard.exists()
    assert len(run.log.read_text().splitlines()) == 6
    assert list(run.active_units(9)) == ["fc"]


def test_other_ranks_write_nothing(open_monitor, run, make_update, report, capsys):
    lines: list[str] = []
    run.append_topology(make_update(4))
    before = run.topology.read_text()
    monitor = open_monitor(rank=1, write=lines.append)
    _train(monitor, range(1, 11), make_update, report)
    monitor.message("hello")
    assert lines == []
    assert capsys.readouterr().out == ""
    assert [path.name for path in run.path.iterdir()] == ["topology.jsonl"]
    assert run.topology.read_text() == before


def test_pictures_take_their_share_of_the_time_and_the_last_one_comes(
    open_monitor, run, make_update, report, monkeypatch
):
    clock = iter([0.0, 10.0, 10.0, 10.2, 14.0, 25.0, 25.0, 25.1, 26.0, 27.0, 27.5])
    monkeypatch.setattr(monitor, "DRAWING_SHARE", 0.01)
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    writes = open_monitor()
    for step in (4, 8, 12, 16):  # drawn in 0.2 s after 10, not after 14, in 0.1 s after 25, not after 26
        writes.topology(make_update(step), report)
    assert [event.step for event in _read(run.tensorboard).Images("units/fc")] == [4, 12]
    writes.close()
    images = _read(run.tensorboard).Images("units/fc")
    assert [event.step for event in images] == [4, 12, 16]
    assert _image(images[-1]).shape == (4, 8)
