"""What an installation contains, what an import costs, and what the make targets run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dst_train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that nothing is left in the tree and nothing left in the tree gets in."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("dst_train", "ops", "tests/unit/monitor", "launch", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder / "out"), str(folder)], check=True)
    (built,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def _files(root: Path, parent: Path) -> set[str]:
    """Python and kernel sources below `root`, relative to `parent`."""
    return {
        str(path.relative_to(parent))
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix == ".py" or "csrc" in path.parts)
    }


def test_a_wheel_holds_both_packages_and_every_kernel_source(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == _files(ROOT / "dst_train", ROOT) | _files(ROOT / "ops/dst_ops", ROOT / "ops")
    assert any(name.startswith("dst_ops/csrc/") and name.endswith(".cpp") for name in packed)


def test_a_wheel_says_version_licence_python_and_command(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "dst-train"
    assert metadata["Version"] == dst_train.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(requirement.startswith("torch>=2.11") for requirement in metadata.get_all("Requires-Dist", []))
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "dst-train = dst_train.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_names_of_the_package_are_those_of_its_parts():
    from dst_train.sparse import sparsify
    from dst_train.topology import Topology

    assert dst_train.sparsify is sparsify
    assert dst_train.Topology is Topology


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(AttributeError, match="'sparsfy'; it has Topology, __version__, sparsify"):
        dst_train.sparsfy  # noqa: B018


def test_jobs_are_read_without_torch():
    code = "import sys, dst_train.job, dst_train.cli; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def _make(*arguments: str) -> str:
    """What `make` prints, started as from a shell also when these tests run under `make test`."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    }
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def _dry_run(*arguments: str) -> str:
    """What `make` would run; nothing is run."""
    return _make("--dry-run", "--always-make", *arguments)


def test_make_demo_hands_each_override_to_the_training():
    shown = _dry_run(
        "demo", "RANKS=3", "JOB=jobs/mlp_digits.yaml", "SET=train.epochs=2 name=a optimizer.betas=[0.9,0.95]"
    )
    training = next(line for line in shown.splitlines() if line.startswith("deepspeed"))
    assert training.startswith("deepspeed -q --num_gpus 3 --master_port ")
    assert training.endswith(
        " launch/train.py --job jobs/mlp_digits.yaml "
        "--set 'train.epochs=2' --set 'name=a' --set 'optimizer.betas=[0.9,0.95]'"
    )


@pytest.mark.parametrize("target", ["demo", "test", "unit", "lint", "format"])
def test_make_targets_install_first(target):
    lines = _dry_run(target).splitlines()
    install = next(i for i, line in enumerate(lines) if "pip install" in line and "[dev]" in line)
    assert "-m venv .venv" in lines[0]
    assert 0 < install < len(lines) - 1


def test_make_alone_says_what_there_is():
    shown = _make()
    for target in ("demo", "test", "unit", "lint", "format", "clean"):
        assert f"make {target}" in shown
