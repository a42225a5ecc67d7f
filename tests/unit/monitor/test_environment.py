from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dst_train import __version__
from dst_train.monitor import environment
from dst_train.monitor.environment import cpu_name, git_revision


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one committed file, code.py."""
    (tmp_path / "code.py").write_text("a = 1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", "code.py")
    _git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "--message", "m")
    return tmp_path


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_it_is_written_as_json(run):
    run.write_environment()
    written = json.loads((run.path / "env.json").read_text())
    assert written["python"] == platform.python_version()
    assert written["command"] == sys.argv
    assert written["packages"]["dst-train"] == __version__
    assert written["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert written["packages"]["deepspeed"]
    assert written["cpu"]
    assert len(written["devices"]) == torch.cuda.device_count()
    assert written["time"].endswith("+00:00")


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    module = importlib.import_module("dst_train.monitor.environment")  # the package hands on a function of this name
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-distribution"))
    packages = environment()["packages"]
    assert packages["no-such-distribution"] is None
    assert packages["numpy"]


def test_revision_and_changes_of_a_checkout(repository):
    revision = _git(repository, "rev-parse", "HEAD")
    assert git_revision(repository / "code.py") == {"revision": revision, "dirty": False}
    (repository / "code.py").write_text("a = 2\n")
    assert git_revision(repository / "code.py") == {"revision": revision, "dirty": True}


def test_an_installation_inside_another_checkout_has_no_revision(repository):
    installed = repository / ".venv" / "code.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert git_revision(installed) is None


def test_outside_a_checkout_or_without_git_there_is_no_revision(tmp_path, repository, monkeypatch):
    (tmp_path.parent / "loose.py").write_text("")
    assert git_revision(tmp_path.parent / "loose.py") is None
    monkeypatch.setenv("PATH", "")
    assert git_revision(repository / "code.py") is None
    assert environment()["git"] is None


def test_a_cpu_without_a_name_is_told_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert cpu_name() == platform.machine()
