"""Processes that start with torch, DeepSpeed and the engine imported, which takes seconds: forks of one that has done it.

Their hashes of strings are the same, unlike those of processes that a launcher starts: what must not depend on them is tested
through the launcher as well.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

# The last one DeepSpeed imports for each engine, to look at the optimiser's type, and that imports most of torch's compiler.
PRELOADED = ["dst_train.engine", "dst_train.monitor", "dst_train.plan", "deepspeed.runtime.zero.muon.muon_optimizer"]


def context() -> ForkServerContext:
    result = multiprocessing.get_context("forkserver")
    result.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # read when these are imported
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        forkserver.ensure_running()
    return result


def run_script(script: Path, arguments: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """What such a process is to do: `python script arguments`."""
    os.environ.update(environment)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
