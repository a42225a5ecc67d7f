"""What an installation contains, what an import costs, and what the make targets run."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import setuptools
import torch

import dst_train
from tests.unit.ops.compilers import fake_compiler, fake_nvcc

ROOT = Path(__file__).parents[2]


# What pip runs in the process that builds a wheel.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])('out'), file=sys.stderr)"


def _source(folder: Path) -> Path:
    """A copy of the tree, so that a build leaves nothing in the tree and nothing left in the tree gets in."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("dst_train", "ops", "tests/unit/monitor", "launch", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def _build(source: Path, hook: str, **env: str) -> subprocess.CompletedProcess[str]:
    command, changed = [sys.executable, "-c", BUILD, hook], {**os.environ, **env}
    return subprocess.run(command, cwd=source, env=changed, capture_output=True, text=True)


def _wheel(source: Path) -> zipfile.ZipFile:
    (built,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built where torch and (stand-ins for) both compilers are at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    release = torch.version.cuda or "13.0"
    fake_nvcc(folder / "toolkit", release)
    env = {"CXX": str(fake_compiler(folder, seconds=0)), "CUDA_HOME": str(folder / "toolkit"), "DST_OPS_CUDA": ""}
    done = _build(_source(folder / "source"), "build_wheel", DST_OPS_CACHE=str(folder / "cache"), **env)
    assert done.returncode == 0, done.stderr
    return _wheel(folder / "source")


def _files(root: Path, parent: Path) -> set[str]:
    """Python and kernel sources below `root`, relative to `parent`."""
    return {
        str(path.relative_to(parent))
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix == ".py" or "csrc" in path.parts)
    }


def test_a_wheel_holds_both_packages_and_every_kernel_source(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    libraries = {name for name in packed if name.startswith("dst_ops/lib/")}
    assert packed - libraries == _files(ROOT / "dst_train", ROOT) | _files(ROOT / "ops/dst_ops", ROOT / "ops")
    for device, suffix in (("cpu", ".cpp"), ("cuda", ".cu")):
        assert any(name.startswith(f"dst_ops/csrc/{device}/") and name.endswith(suffix) for name in packed)


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


def test_a_wheel_built_beside_torch_brings_the_libraries_for_any_python_of_the_platform(wheel):
    libraries = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("dst_ops/lib/")}
    devices = ("cpu", "cuda") if torch.version.cuda else ("cpu",)
    assert libraries == {f"dst_ops/lib/dst_ops_{device}.so": b"built\n" for device in devices}
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.filename.endswith(f"-py3-none-{platform}.whl")


# Stands in the way of `import torch`, as an isolated build does.
NO_TORCH = "import sys; sys.modules['torch'] = None"


@pytest.mark.parametrize("hook", ["build_editable", "build_wheel"])
def test_an_editable_or_isolated_build_goes_without_libraries(tmp_path, hook):
    source = _source(tmp_path / "source")
    (source / "sitecustomize.py").write_text(NO_TORCH)
    path = {"PYTHONPATH": str(source)} if hook == "build_wheel" else {}
    done = _build(source, hook, CXX="/bin/false", DST_OPS_CUDA="", **path)
    assert done.returncode == 0, done.stderr
    wheel = _wheel(source)
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in wheel.namelist())
    assert ("dst_ops/csrc/cpu/ops.cpp" in wheel.namelist()) == (hook == "build_wheel")


def test_an_isolated_build_cannot_be_told_to_bring_the_cuda_library(tmp_path):
    source = _source(tmp_path / "source")
    (source / "sitecustomize.py").write_text(NO_TORCH)
    done = _build(source, "build_wheel", PYTHONPATH=str(source), DST_OPS_CUDA="1")
    assert done.returncode == 1
    assert "DST_OPS_CUDA=1 needs torch where the wheel is built: pip wheel . --no-build-isolation" in done.stderr


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Builds the libraries as setup.py does, with an nvcc that is too old; returns their names."""
    fake_nvcc(tmp_path / "toolkit", "1.0")
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, seconds=0)))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("DST_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    command = runpy.run_path(str(ROOT / "setup.py"))["BuildLibraries"](setuptools.Distribution())
    command.build_lib = str(tmp_path / "lib")

    def build() -> list[str]:
        command.run()
        return sorted(Path(name).name for name in command.get_outputs())

    return build


def test_without_a_fitting_nvcc_the_wheel_goes_without_cuda_and_says_so(libraries, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DST_OPS_CUDA", raising=False)
    stale = tmp_path / "lib" / "dst_ops" / "lib" / "dst_ops_cuda.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert libraries() == ["dst_ops_cpu.so"]
    assert "dst_ops: no cuda library: " in capsys.readouterr().err
    monkeypatch.setenv("DST_OPS_CUDA", "0")
    assert libraries() == ["dst_ops_cpu.so"]
    assert "dst_ops: no cuda library" not in capsys.readouterr().err


def test_a_cuda_library_that_was_asked_for_must_be_built(libraries, monkeypatch):
    monkeypatch.setenv("DST_OPS_CUDA", "1")
    with pytest.raises(OSError, match=r"is of CUDA 1\.0|is built without CUDA"):
        libraries()


def test_a_cpu_library_must_be_built(libraries, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(subprocess.CalledProcessError):
        libraries()
    assert "/bin/false" in capsys.readouterr().err


def test_an_unclear_word_on_cuda_is_refused(libraries, monkeypatch):
    monkeypatch.setenv("DST_OPS_CUDA", "yes")
    with pytest.raises(ValueError, match="DST_OPS_CUDA is 'yes', expected 0 or 1"):
        libraries()


def test_the_names_of_the_package_are_those_of_its_parts():
    from dst_train.sparse import sparsify
    from dst_train.topology import Topology

    assert dst_train.sparsify is sparsify
    assert dst_train.Topology is Topology


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(
        AttributeError, match="'sparsfy'; it has Topology, __version__, densify, load_exported, sparse_layers, sparsify"
    ):
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
