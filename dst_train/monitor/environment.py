"""Where and with what a run was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dst-train", "torch", "deepspeed", "webdataset", "timm", "torchvision", "numpy", "pydantic")


def environment() -> dict[str, Any]:
    """Versions, devices, git revision of the code, command line, host and time (UTC); plain JSON values."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "cpu": cpu_name(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
        "git": git_revision(Path(__file__).resolve()),
    }


def cpu_name() -> str:
    """As the system calls it, for example `AMD EPYC 9654`; where it has no name for it, the architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def git_revision(file: Path) -> dict[str, Any] | None:
    """Revision of the checkout that tracks `file` and whether it has changes; None without one, or without git."""
    folder = file.parent
    try:
        # An installation may lie inside somebody else's checkout (a .venv): that revision is not ours.
        _run_git(folder, "ls-files", "--error-unmatch", file.name)
        revision = _run_git(folder, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_run_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _run_git(folder: Path, *args: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *args], check=True, capture_output=True, text=True)
    return result.stdout.strip()
