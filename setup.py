"""Compiles the op's libraries ahead of time into the wheel, where torch is at hand: `pip wheel . --no-build-isolation`.

An isolated build has no torch, and an editable install reads the sources where they are: both go without, and the
libraries are built at first use. The libraries use LibTorch's stable ABI and nothing of Python, so one wheel serves every
Python and every torch from 2.11 on.

Environment: DST_OPS_CUDA=0 leaves the CUDA library out, 1 makes it an error if it cannot be built; by default it is
built if torch has CUDA and there is an nvcc for it. What dst_ops/build.py reads applies too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibraries(build_ext):
    def run(self) -> None:
        folder = Path(self.build_lib) / "dst_ops" / "lib"
        shutil.rmtree(folder, ignore_errors=True)  # a library of an earlier build that this one may leave out
        folder.mkdir(parents=True)
        build = build_module()
        for device in devices():
            try:
                shutil.copy(build.build(device), folder / f"dst_ops_{device}.so")
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"dst_ops: no {device} library: {error}\n{getattr(error, 'stdout', '')}", file=sys.stderr)
                if device == "cpu" or os.environ.get("DST_OPS_CUDA") == "1":
                    raise

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "dst_ops" / "lib").iterdir()]


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def devices() -> list[str]:
    choice = os.environ.get("DST_OPS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise ValueError(f"DST_OPS_CUDA is {choice!r}, expected 0 or 1")
    return ["cpu"] if choice == "0" else ["cpu", "cuda"]


def build_module() -> ModuleType:
    """dst_ops/build.py by itself: importing the package would register its ops."""
    spec = spec_from_file_location("dst_ops_build", Path(__file__).parent / "ops" / "dst_ops" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ahead_of_time = "bdist_wheel" in sys.argv and find_spec("torch") is not None
if "bdist_wheel" in sys.argv and not ahead_of_time and os.environ.get("DST_OPS_CUDA") == "1":
    raise ModuleNotFoundError("DST_OPS_CUDA=1 needs torch where the wheel is built: pip wheel . --no-build-isolation")
setup(
    # The extension says that there is something to compile and a platform to name; BuildLibraries does the rest.
    ext_modules=[Extension("dst_ops.lib", [])] if ahead_of_time else [],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
