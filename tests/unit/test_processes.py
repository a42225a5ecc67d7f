"""Ranks that `dst-train run` starts, as small scripts in the place of a training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dst_train import processes
from dst_train.cli import main

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")


def _script(folder: Path, text: str) -> list[str]:
    path = folder / "rank.py"
    path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\nfolder = {str(folder)!r}\n{text}")
    return [sys.executable, "-S", str(path)]


def test_each_rank_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "cores", lambda: 7)
    command = _script(
        tmp_path, f"open(f'{{folder}}/{{rank}}', 'w').write(' '.join(os.environ[v] for v in {VARIABLES}))"
    )
    assert processes.run_ranks(command, 3) == 0
    for rank in "012":
        assert (tmp_path / rank).read_text() == f"{rank} {rank} 3 3 127.0.0.1 2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert processes.run_ranks(command, 1) == 0
    assert (tmp_path / "0").read_text().endswith(" 5")


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)]
)
def test_a_rank_that_fails_ends_those_that_wait_for_it(
    end: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "EXIT_SECONDS", 0.2)
    waits = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f'{folder}/deaf', 'w').close(); time.sleep(600)"
    fails = f"while not os.path.exists(f'{{folder}}/deaf'): time.sleep(0.01)\n    {end}"
    assert processes.run_ranks(_script(tmp_path, f"if rank: {waits}\nelse:\n    {fails}"), 2) == code


def test_a_signal_is_handed_to_all_ranks_which_end_in_their_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "EXIT_SECONDS", 0.0)
    command = _script(
        tmp_path,
        "signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), open(f'{folder}/stopped{rank}', 'w').close(), sys.exit(0)))\n"
        "open(f'{folder}/ready{rank}', 'w').close()\ntime.sleep(600)",
    )

    def ask() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    asks = threading.Thread(target=ask)
    asks.start()
    assert processes.run_ranks(command, 2) == 0
    asks.join()
    assert len(list(tmp_path.glob("stopped*"))) == 2
    assert signal.getsignal(signal.SIGUSR1) == before


def test_run_starts_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr(processes, "run_ranks", lambda *arguments: started.append(arguments) or 7)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    command = [sys.executable, "-m", "dst_train.train", "--job", "a.yaml"]
    assert main(["run", "a.yaml"]) == 7
    assert main(["run", "a.yaml", "--ranks", "2", "--set", "name=b", "--set", "seed=1"]) == 7
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["run", "a.yaml"]) == 7
    assert main(["run", "a.yaml", "--ranks", "8"]) == 7
    overrides = ["--set", "name=b", "--set", "seed=1"]
    assert started == [(command, 4), ([*command, *overrides], 2), (command, 1), (command, 8)]


@pytest.mark.parametrize(
    ("environment", "ranks", "message"),
    [
        ({"RANK": "0"}, "1", "RANK is set: this process is a rank already"),
        ({"PMI_SIZE": "2"}, "1", "PMI_SIZE is 2 and RANK is not set: each process would train alone"),
        ({}, "5", "--ranks 5: this machine has 4 GPUs, and each rank takes one"),
    ],
)
def test_run_refuses(
    environment: dict[str, str],
    ranks: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "a.yaml", "--ranks", ranks]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_run_wants_at_least_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "a.yaml", "--ranks", "0"])
    assert "--ranks 0: must be at least 1" in capsys.readouterr().err


def test_cores_are_those_that_the_process_may_use() -> None:
    one = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from dst_train.processes import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", one], check=True, capture_output=True, text=True).stdout == "1\n"


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert processes.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,none")
    assert processes.visible_gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert processes.visible_gpus() == []
    command = _script(tmp_path, "open(f'{folder}/{rank}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])")
    for process in processes.start_ranks(command, 1, threads="1", gpus=["GPU-b"]):
        process.wait()
    assert (tmp_path / "0").read_text() == "GPU-b"


def test_a_rank_that_cannot_be_started_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, started = subprocess.Popen, []

    def refuse_the_second(*arguments: object, **options: object) -> object:
        if started:
            raise BlockingIOError("no more processes")
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", refuse_the_second)
    with pytest.raises(BlockingIOError):
        processes.start_ranks(_script(tmp_path, "time.sleep(600)"), 2, threads="1")
    assert started[0].returncode is not None
