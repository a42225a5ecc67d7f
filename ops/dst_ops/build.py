"""Builds the CPU library just in time, once per machine, source, torch and compiler, and loads it.

Nothing happens at import. Processes that start together share one build under `flock`, which the kernel releases when its
holder dies, so that a killed build cannot block the next one; the library appears under its name only when it is whole.

Environment: CXX (compiler, default c++), DST_OPS_CACHE (folder of built libraries, default $TORCH_EXTENSIONS_DIR/dst_ops
or ~/.cache/dst_ops), DST_OPS_REQUIRE_FUSED=1 (a failed build is an error), DST_OPS_ISA (portable, avx2 or avx512: at most
this instruction set).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
COMMON_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
# One file per instruction set; the choice among them is made when the library runs.
INSTRUCTION_SETS = ("", "portable", "avx2", "avx512")
X86_FLAGS = {"kernels_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"), "kernels_avx512.cpp": ("-mavx512f", "-mfma")}

_lock = threading.Lock()
_error: str | None = None
_loaded: Path | None = None


def load() -> bool:
    """Build if needed and load the library; True if the compiled kernels serve the CPU, False if the reference does.

    The first call of an op on the CPU does this (see registration.py); calling it earlier only chooses the moment.

    Raises:
        RuntimeError: the build fails and DST_OPS_REQUIRE_FUSED=1. Otherwise a failed build warns, once.
        ValueError: DST_OPS_ISA names no instruction set.
    """
    if _loaded is None and _error is None:
        with _lock:
            if _loaded is None and _error is None:
                _load()
    return _loaded is not None


def status() -> tuple[Path | None, str | None]:
    """(the loaded library, why there is none); both None before the first use."""
    return _loaded, _error


def instruction_set() -> str:
    """The instruction set that the loaded library chose: portable, avx2 or avx512."""
    function = ctypes.CDLL(str(_loaded)).dst_ops_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def generates_code() -> bool:
    """Whether products of many tokens run code that is generated for their offsets: not if the system forbids it."""
    function = ctypes.CDLL(str(_loaded)).dst_ops_generates
    function.restype = ctypes.c_bool
    return bool(function())


def library_path() -> Path:
    """Where the library for these sources, this torch and this compiler is or will be."""
    key = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            key.update(path.name.encode() + path.read_bytes())
    key.update(repr((COMMON_FLAGS, X86_FLAGS, torch.__version__, platform.machine(), _compiler())).encode())
    return _cache() / f"dst_ops_cpu-{key.hexdigest()[:16]}.so"


def build() -> Path:
    """The library, built if it is not in the cache.

    Raises:
        OSError, subprocess.CalledProcessError: no compiler, no ninja, or sources that do not compile.
    """
    library = library_path()
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():  # another process may have built it while this one waited
            print(f"dst_ops: building {library} (some 10 s, once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                _run_ninja(Path(folder))
                os.replace(Path(folder) / "library.so", library)
    return library


def _load() -> None:
    global _loaded, _error
    isa = os.environ.get("DST_OPS_ISA", "")
    if isa not in INSTRUCTION_SETS:
        raise ValueError(f"DST_OPS_ISA is {isa!r}, expected portable, avx2 or avx512")
    try:
        library = build()
        torch.ops.load_library(str(library))
        _loaded = library
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stdout", None) or ""
        reason = f"{error}\n{output.strip()[-2000:]}".strip()
        if os.environ.get("DST_OPS_REQUIRE_FUSED") == "1":
            raise RuntimeError(f"dst_ops: the CPU kernels could not be built or loaded: {reason}") from error
        _error = reason
        warnings.warn(
            "dst_ops: the CPU kernels could not be built or loaded; the reference in plain PyTorch serves instead, slower "
            f"than a dense layer. Install a C++ compiler, or set DST_OPS_REQUIRE_FUSED=1 to make this an error. {reason}",
            stacklevel=3,
        )


def _run_ninja(folder: Path) -> None:
    torch_root = Path(torch.__file__).parent
    x86 = platform.machine() in ("x86_64", "AMD64")
    rules = [
        "rule cxx",
        f"  command = {_compiler()} {' '.join(COMMON_FLAGS)} -isystem {_quoted(torch_root / 'include')} $flags -c $in -o $out",
        "rule link",
        f"  command = {_compiler()} -shared $in -o $out -L{_quoted(torch_root / 'lib')} -ltorch_cpu",
    ]
    objects = []
    for source in sorted((SOURCES / "cpu").glob("*.cpp")):
        if source.name in X86_FLAGS and not x86:
            continue
        objects.append(f"{source.stem}.o")
        rules += [
            f"build {objects[-1]}: cxx {_escaped(source)}",
            f"  flags = {' '.join(X86_FLAGS.get(source.name, ()))}",
        ]
    rules.append(f"build library.so: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    subprocess.run(
        [_ninja(), "-C", str(folder)], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _quoted(path: Path) -> str:
    """For a command in build.ninja, where $ is special besides what the shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escaped(path: Path) -> str:
    """For the name of a file in build.ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _ninja() -> str:
    """ninja of the Python package, which need not be on PATH when the environment is not activated, or of the system."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    if found is None:
        raise FileNotFoundError("ninja is neither beside the Python executable nor on PATH; pip install ninja")
    return found


def _cache() -> Path:
    if "DST_OPS_CACHE" in os.environ:
        return Path(os.environ["DST_OPS_CACHE"])
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "dst_ops"
    return Path.home() / ".cache" / "dst_ops"
