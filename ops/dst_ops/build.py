"""The compiled libraries, one for the CPU and one for CUDA: built just in time, once per machine, source, torch, compiler.

Nothing happens at import. Each library is built and loaded at the first call on its device; a wheel that brings it in
lib/ (see setup.py) spares the build. Processes that start together share one build under `flock`, which the kernel
releases when its holder dies, so that a killed build cannot block the next one; a library appears under its name only
when it is whole.

Environment: CXX (C++ compiler, default c++; nvcc's host compiler, default nvcc's own choice), CXXFLAGS (of the CPU library,
after ours), CUDA_HOME or CUDA_PATH (where bin/nvcc is; otherwise nvcc on PATH, then /usr/local/cuda), DST_OPS_CUDA_ARCHS
(chips to compile for, such as "80" or "80;90-virtual;90a", the default; fewer build faster), MAX_JOBS (files compiled at once), DST_OPS_CACHE
(folder of built libraries, default $TORCH_EXTENSIONS_DIR/dst_ops or ~/.cache/dst_ops), DST_OPS_REQUIRE_FUSED=1 (a failed
build is an error), DST_OPS_ISA (portable, avx2, avx512 or avx512_48k, for processors with
AVX-512 and more than 32 KiB of first-level cache: at most this instruction set).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
SHIPPED = Path(__file__).parent / "lib"
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
# Machine code for A100 and H100, and the assembly that a driver compiles for later chips. That must be of 90, not 80: a launch that
# may begin early there needs kernels that wait for the one before (platform.h).
ARCHITECTURES = "80;90-virtual;90a"
# Of lock(): what file systems without it answer.
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
COMMON_FLAGS = ("-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall")
# One file per instruction set; the choice among them is made when the library runs.
INSTRUCTION_SETS = ("", "portable", "avx2", "avx512", "avx512_48k")
X86_FLAGS = {
    "kernels_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512.cpp": ("-mavx512f", "-mfma"),
    "kernels_avx512_48k.cpp": ("-mavx512f", "-mfma"),
}


@dataclass
class _Library:
    """What is said of a library, and what became of it in this process."""

    name: str
    duration: str
    without: str
    fix: str
    loaded: Path | None = None
    error: str | None = None


_libraries = {
    "cpu": _Library("CPU", "some 10 s", "slower than a dense layer", "Install a C++ compiler"),
    "cuda": _Library(
        "CUDA",
        "a minute or so",
        "which forms the dense weight for each call",
        "Install the CUDA toolkit (nvcc) of torch's major version and set CUDA_HOME to it",
    ),
}
_lock = threading.Lock()


@dataclass(frozen=True)
class _Recipe:
    """How a library is built. The paths of sources and torch are not in it, so that it can be part of the name."""

    compiler: str  # as a command in build.ninja
    version: str
    flags: tuple[str, ...]
    sources: dict[str, tuple[str, ...]]  # file: flags of its own
    link: tuple[str, ...]


def load(device: str = "cpu") -> bool:
    """Build if needed and load a library; True if compiled kernels serve the device, False if the reference does.

    The first call of an op on the device does this (see registration.py); calling it earlier only chooses the moment.

    Raises:
        RuntimeError: the build fails and DST_OPS_REQUIRE_FUSED=1. Otherwise a failed build warns, once.
        ValueError: DST_OPS_ISA names no instruction set, or DST_OPS_CUDA_ARCHS no list of chips.
    """
    library = _libraries[device]
    if library.loaded is None and library.error is None:
        with _lock:
            if library.loaded is None and library.error is None:
                _load(device)
    return library.loaded is not None


def status(device: str = "cpu") -> tuple[Path | None, str | None]:
    """(the loaded library, why there is none); both None before the first use."""
    return _libraries[device].loaded, _libraries[device].error


def instruction_set() -> str:
    """The instruction set that the loaded CPU library chose: portable, avx2, avx512 or avx512_48k."""
    function = ctypes.CDLL(str(_libraries["cpu"].loaded)).dst_ops_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def generates_code() -> bool:
    """Whether products of many tokens run code that is generated for their offsets: not if the system forbids it."""
    function = ctypes.CDLL(str(_libraries["cpu"].loaded)).dst_ops_generates
    function.restype = ctypes.c_bool
    return bool(function())


def library_path(device: str = "cpu") -> Path:
    """Where the library came with the package; or is, or will be, for these sources, this torch and this compiler.

    Raises:
        OSError, subprocess.CalledProcessError: for CUDA, if there can be none: torch without CUDA, or no nvcc for it;
            for both, if there is no folder to build in (see cache).
        ValueError: DST_OPS_CUDA_ARCHS is no list of chips.
    """
    if device == "cuda" and torch.version.cuda is None:
        raise OSError(f"torch {torch.__version__} is built without CUDA; install one that is built with it")
    shipped = SHIPPED / f"dst_ops_{device}.so"
    if shipped.is_file():
        return shipped
    key = hashlib.sha256()
    for path in [*sorted(SOURCES.glob("*.h")), *sorted((SOURCES / device).rglob("*"))]:
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            key.update(path.name.encode() + path.read_bytes())
    key.update(repr((_recipe(device), torch.__version__, platform.machine())).encode())
    return cache() / f"dst_ops_{device}-{key.hexdigest()[:16]}.so"


def build(device: str = "cpu") -> Path:
    """The library, built if it neither came with the package nor is in the cache.

    Raises:
        OSError, subprocess.CalledProcessError: no compiler, no ninja, or sources that do not compile; see library_path.
    """
    library = library_path(device)
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        lock_file = (library.parent / "lock").open("w")
    except OSError as error:
        raise OSError(f"{error}; set DST_OPS_CACHE to a folder that can be written") from error
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
            warnings.warn(
                f"dst_ops: {library.parent} has no locks ({error}); processes build side by side", stacklevel=2
            )
        if not library.is_file():  # another process may have built it while this one waited
            duration = _libraries[device].duration
            print(f"dst_ops: building {library} ({duration}, once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                _run_ninja(Path(folder), device)
                _sync(Path(folder) / "library.so")  # a power cut must not leave a name without what belongs to it
                # Without locks, or with locks of one host alone, another may have been quicker: what it has put there may be in use.
                if not library.is_file():
                    os.replace(Path(folder) / "library.so", library)
    return library


def _load(device: str) -> None:
    library = _libraries[device]
    isa = os.environ.get("DST_OPS_ISA", "")
    if device == "cpu" and isa not in INSTRUCTION_SETS:
        raise ValueError(f"DST_OPS_ISA is {isa!r}, expected portable, avx2, avx512 or avx512_48k")
    try:
        path = build(device)
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise OSError(f"{error}; remove {path} to build it anew") from error
        library.loaded = path
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stdout", None) or ""
        reason = f"{error}\n{output.strip()[-2000:]}".strip()
        failure = f"dst_ops: the {library.name} kernels could not be built or loaded"
        if os.environ.get("DST_OPS_REQUIRE_FUSED") == "1":
            raise RuntimeError(f"{failure}: {reason}") from error
        library.error = reason
        warnings.warn(
            f"{failure}; the reference in plain PyTorch serves instead, {library.without}. "
            f"{library.fix}, or set DST_OPS_REQUIRE_FUSED=1 to make this an error. {reason}",
            stacklevel=3,
        )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _recipe(device: str) -> _Recipe:
    files = sorted(path.name for path in (SOURCES / device).iterdir())
    if device == "cuda":
        nvcc, version = _nvcc()
        host = f" -ccbin {_quoted(os.environ['CXX'])}" if os.environ.get("CXX") else ""
        flags = (*COMMON_FLAGS, f"-Xcompiler {','.join(HOST_FLAGS)}", *_chips())
        sources: dict[str, tuple[str, ...]] = {name: () for name in files if name.endswith(".cu")}
        # The runtime's symbols stay inside, so that any minor version of CUDA in torch will do.
        link = ("-cudart", "static", "-ltorch_cpu", "-ltorch_cuda")
        return _Recipe(_quoted(nvcc) + host, version, flags, sources, link)
    x86 = platform.machine() in ("x86_64", "AMD64")
    compiled = [name for name in files if name.endswith(".cpp") and (x86 or name not in X86_FLAGS)]
    sources = {name: X86_FLAGS.get(name, ()) for name in compiled}
    flags = (*COMMON_FLAGS, *HOST_FLAGS, *os.environ.get("CXXFLAGS", "").split())
    return _Recipe(os.environ.get("CXX") or "c++", "", flags, sources, ("-ltorch_cpu",))


def _nvcc() -> tuple[Path, str]:
    """The CUDA compiler and what it says of its version, which must be torch's but for the minor number."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", DEFAULT_NVCC]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    needed = str(torch.version.cuda).split(".")[0]
    if nvcc is None:
        looked = ", ".join("nvcc on PATH" if place == "nvcc" else place for place in places)
        raise FileNotFoundError(
            f"there is none of: {looked}; install the CUDA toolkit {needed} and set CUDA_HOME to it"
        )
    version = subprocess.run(
        [nvcc, "--version"], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout
    release = re.search(r"release ((\d+)\.\d+)", version)
    if release is None or release[2] != needed:
        raise OSError(
            f"{nvcc} is of CUDA {release[1] if release else '(no release named)'}, torch {torch.__version__} of CUDA "
            f"{torch.version.cuda}; install the CUDA toolkit {needed} and set CUDA_HOME to it"
        )
    return Path(nvcc), version


def _chips() -> list[str]:
    """nvcc's options for DST_OPS_CUDA_ARCHS: machine code for each chip, with +PTX assembly too, with -virtual that alone."""
    listed = os.environ.get("DST_OPS_CUDA_ARCHS") or ARCHITECTURES
    options = []
    for chip in listed.split(";"):
        parts = re.fullmatch(r"(\d+a?)(\+PTX|-virtual)?", chip.strip())
        if parts is None:
            raise ValueError(f'DST_OPS_CUDA_ARCHS is {listed!r}, expected chips such as "80" or "{ARCHITECTURES}"')
        for kind in {None: ("sm",), "+PTX": ("sm", "compute"), "-virtual": ("compute",)}[parts[2]]:
            options.append(f"-gencode=arch=compute_{parts[1]},code={kind}_{parts[1]}")
    return options


def _run_ninja(folder: Path, device: str) -> None:
    torch_root, recipe = Path(torch.__file__).parent, _recipe(device)
    jobs = os.environ.get("MAX_JOBS")
    chips_at_once = " --threads 0" if device == "cuda" and not jobs else ""
    include, library = _quoted(torch_root / "include"), _quoted(torch_root / "lib")
    rules = [
        "rule compile",
        f"  command = {recipe.compiler}{chips_at_once} {' '.join(recipe.flags)} -isystem {include} $flags -c $in -o $out",
        "rule link",
        f"  command = {recipe.compiler} -shared $in -o $out -L{library} {' '.join(recipe.link)}",
    ]
    objects = []
    for name, flags in recipe.sources.items():
        objects.append(f"{Path(name).stem}.o")
        rules += [f"build {objects[-1]}: compile {_escaped(SOURCES / device / name)}", f"  flags = {' '.join(flags)}"]
    rules.append(f"build library.so: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    subprocess.run(
        [_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _quoted(path: Path | str) -> str:
    """For a command in build.ninja, where $ is special besides what the shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def _escaped(path: Path) -> str:
    """For the name of a file in build.ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja() -> str:
    """ninja of the Python package, which need not be on PATH when the environment is not activated, or of the system."""
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    if found is None:
        raise FileNotFoundError("ninja is neither beside the Python executable nor on PATH; pip install ninja")
    return found


def cache() -> Path:
    """The folder of built libraries and tables of times. Raises OSError if no variable names it and there is no home."""
    # Absolute: the loader looks for a name without a slash elsewhere, and the working directory may change.
    if os.environ.get("DST_OPS_CACHE"):
        return Path(os.environ["DST_OPS_CACHE"]).absolute()
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"]).absolute() / "dst_ops"
    try:
        return Path.home() / ".cache" / "dst_ops"
    except RuntimeError as error:
        raise OSError("there is no home folder for ~/.cache/dst_ops; set DST_OPS_CACHE to another folder") from error
