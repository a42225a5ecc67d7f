"""Stand-ins for compilers: quick, and they tell what they were asked to do."""

from __future__ import annotations

from pathlib import Path

COMPILER = """#!/bin/sh
for argument; do
  case $previous in -o) output=$argument ;; -c) [ -f "$argument" ] || exit 1 ;; esac
  previous=$argument
done
echo "$output" >> {log}
sleep {seconds}
echo built > "$output"
"""
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V{release}.88"; exit; fi
echo "$@" >> {log}
exec {compiler} "$@"
"""


def fake_compiler(folder: Path, name: str = "compiler", seconds: float = 0.2) -> Path:
    """Notes the call, takes a moment and writes whatever it was asked to write."""
    return _script(folder / name, COMPILER.format(log=folder / f"{name}.log", seconds=seconds))


def calls(compiler: Path) -> list[str]:
    log = compiler.with_name(f"{compiler.name}.log")
    return log.read_text().split() if log.exists() else []


def fake_nvcc(toolkit: Path, release: str) -> Path:
    """toolkit/bin/nvcc of a CUDA release; `commands` and `calls(toolkit / "compiler")` tell what it did."""
    (toolkit / "bin").mkdir(parents=True)
    compiler = fake_compiler(toolkit, seconds=0)
    return _script(toolkit / "bin" / "nvcc", NVCC.format(release=release, log=toolkit / "commands", compiler=compiler))


def commands(toolkit: Path) -> list[str]:
    return (toolkit / "commands").read_text().splitlines()


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path
