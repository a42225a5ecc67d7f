"""A study through the command line, with real training: interrupted, continued, and equal to runs of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dst_train.job import dump, load
from tests.e2e.test_resume import STEP_20, _assert_equal

STUDY = """\
name: small
run_root: ROOT/studies
job: job.yaml
seeds: [3]
metric: accuracy
axes:
  method:
    set: [topology.method=set]
    mest: [topology.method=mest]
    rigl: [topology.method=rigl]
    long: [topology.method=static, train.steps=1000]
columns: method
parallel: 2
"""


def _start(study: Path, *arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from dst_train.cli import main; sys.exit(main())"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "study", str(study), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_study_is_interrupted_continued_and_not_run_again(write_job: Any, run_job: Any, tmp_path: Path) -> None:
    write_job(evaluate__every_epochs=100, monitor__every_steps=10, checkpoint__every_steps=2000)
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.replace("ROOT", str(tmp_path)))
    folder = tmp_path / "studies/small"
    finished = [folder / f"{name}-seed3/result.json" for name in ("set", "mest", "rigl")]
    last = folder / "long-seed3/log.txt"

    process = _start(study)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if all(path.is_file() for path in finished) and last.is_file() and "step " in last.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (130, "stopped; the same command continues\n"), out
    assert "3 of 4 runs" in (folder / "table.md").read_text()
    assert "stopped by a signal at step " in (folder / "long-seed3/output-0.txt").read_text()
    before = [path.stat().st_mtime_ns for path in finished]

    process = _start(study, "--out", str(tmp_path / "out"))
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("[4/4] long-seed3  accuracy ")
    assert "resumed step-" in last.read_text()
    assert "step 1000/1000" in last.read_text()
    assert "4 of 4 runs" in (tmp_path / "out/table.md").read_text()
    assert [path.stat().st_mtime_ns for path in finished] == before

    # The third run of two workers is at least the second of its own, and, to the bit, that of a process of its own.
    job = load(folder / "rigl-seed3/job.yaml")
    alone = tmp_path / "alone.yaml"
    alone.write_text(dump(job.model_copy(update={"run_root": str(tmp_path / "alone")})))
    assert run_job(alone, ranks=1).returncode == 0
    _assert_equal(folder / f"rigl-seed3/checkpoints/{STEP_20}", tmp_path / f"alone/rigl-seed3/checkpoints/{STEP_20}")
