"""Where and with what a run was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
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
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """Revision of the checkout that the code runs from; None when it runs from an installation or without git."""
    folder = Path(__file__).resolve().parent
    try:
        revision = _run_git(folder, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_run_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _run_git(folder: Path, *args: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *args], check=True, capture_output=True, text=True)
    return result.stdout.strip()
