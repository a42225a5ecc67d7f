"""Building, loading and falling back, each in a process or a cache of its own."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dst_ops
from dst_ops import build
from tests.unit.ops.compilers import calls, commands, fake_compiler, fake_nvcc
from tests.unit.ops.process import environment, python

BUILD = "from dst_ops import build; print(build.build())"


def _forget(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As if this process had not used the library yet."""
    fresh = dataclasses.replace(build._libraries[device], loaded=None, error=None)
    monkeypatch.setitem(build._libraries, device, fresh)


def test_import_is_light(tmp_path: Path) -> None:
    code = """
import torch, dst_ops
assert not torch.cuda.is_initialized()
assert dst_ops.backend_report().entries[0].kernel == "unbuilt"
print(dst_ops.backend_report())
"""
    done = python(code, DST_OPS_CACHE=str(tmp_path), CXX="/bin/false", DST_OPS_REQUIRE_FUSED="1")
    assert done.returncode == 0, done.stderr
    assert "is built at first use" in done.stdout
    assert not list(tmp_path.iterdir())


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    compiler, cache = fake_compiler(tmp_path), tmp_path / "cache"
    env = environment(CXX=str(compiler), DST_OPS_CACHE=str(cache))
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(printed) == 1
    assert Path(printed.pop().strip()).read_text() == "built\n"
    assert len(calls(compiler)) == len(set(calls(compiler)))
    assert calls(compiler).count("library.so") == 1
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".so"]  # the lock and the library: nothing half built


def test_a_killed_build_does_not_block_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, cache = fake_compiler(tmp_path, "slow", seconds=60), tmp_path / "cache"
    env = environment(CXX=str(slow), DST_OPS_CACHE=str(cache))
    first = subprocess.Popen([sys.executable, "-c", BUILD], env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while not calls(slow):
            assert first.poll() is None
            time.sleep(0.05)
        first.kill()
        first.wait()
        monkeypatch.setenv("DST_OPS_CACHE", str(cache))
        monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "quick", seconds=0)))
        assert build.build().read_text() == "built\n"
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # the compilers it started


def test_folders_may_have_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "my $sources: 1"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu" / "ops.cpp").touch()
    compiler = fake_compiler(tmp_path, seconds=0)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("DST_OPS_CACHE", str(tmp_path / "my cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert build.build().is_file()
    assert calls(compiler) == ["ops.o", "library.so"]


def test_the_library_is_named_by_sources_compiler_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DST_OPS_CACHE", str(tmp_path))
    names = {build.library_path()}
    monkeypatch.setenv("CXX", "another")
    names.add(build.library_path())
    monkeypatch.setenv("CXXFLAGS", "-O1")
    names.add(build.library_path())
    monkeypatch.setattr(torch, "__version__", "0")
    names.add(build.library_path())
    (tmp_path / "cpu").mkdir()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    names.add(build.library_path())
    assert len(names) == 5
    assert {name.parent for name in names} == {tmp_path}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DST_OPS_CACHE", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert build.library_path().parent == Path.home() / ".cache" / "dst_ops"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/extensions")
    assert build.library_path().parent == Path("/extensions/dst_ops")
    monkeypatch.setenv("DST_OPS_CACHE", "/ours")
    assert build.library_path().parent == Path("/ours")
    monkeypatch.setenv("DST_OPS_CACHE", "relative")
    assert build.library_path().parent == Path.cwd() / "relative"
    monkeypatch.setenv("DST_OPS_CACHE", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    assert build.library_path().parent == Path.home() / ".cache" / "dst_ops"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a file for a folder", "set DST_OPS_CACHE to a folder that can be written"),
        ("no library", r"remove \S+\.so to build it"),
    ],
)
def test_what_is_wrong_with_the_cache_is_named_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    monkeypatch.delenv("DST_OPS_REQUIRE_FUSED", raising=False)
    _forget(monkeypatch, "cpu")
    cache = tmp_path / "cache"
    monkeypatch.setenv("DST_OPS_CACHE", str(cache))
    if damage == "no library":
        cache.mkdir()
        build.library_path().write_text("not what a linker writes")
    else:
        cache.touch()
    with pytest.warns(UserWarning, match=message):
        assert not build.load()
    assert dst_ops.backend_report().entries[0].kernel == "reference"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a user whom nobody entered."""
    for name in ("DST_OPS_CACHE", "TORCH_EXTENSIONS_DIR", "HOME", "DST_OPS_REQUIRE_FUSED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    _forget(monkeypatch, "cpu")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_reference_serves_and_says_so() -> None:
    expected = "there is no home folder for ~/.cache/dst_ops; set DST_OPS_CACHE"
    with pytest.raises(OSError, match=expected):
        build.cache()
    entry = dst_ops.backend_report().entries[0]
    assert entry.kernel == "reference"
    assert f"the library cannot be built: {expected}" in entry.reason
    with pytest.warns(UserWarning, match=f"the reference in plain PyTorch serves instead.*{expected}"):
        assert not build.load()
    assert expected in dst_ops.backend_report().entries[0].reason


def test_ninja_need_not_be_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(FileNotFoundError, match="pip install ninja"):
        build._ninja()
    (tmp_path / "bin").mkdir()
    beside = tmp_path / "bin" / "ninja"
    beside.touch()
    assert build._ninja() == str(beside)
    beside.unlink()
    on_path = tmp_path / "ninja"
    on_path.touch(0o755)
    assert build._ninja() == str(on_path)


FALL_BACK = """
import warnings, torch, dst_ops
from tests.unit.ops.oracle import case
warnings.simplefilter("always")
c = case(24, 60, 9, 1, torch.float32)
x, values, bias = (c[k].requires_grad_() for k in ("x", "values", "bias"))
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        y = dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"])
        with torch.autocast("cpu", dtype=torch.bfloat16):  # around the backward pass: its sums stay in fp32
            gradients = torch.autograd.grad(y, (x, values, bias), c["dy"])
assert len(caught) == 1, caught
print(caught[0].message)
weight = dst_ops.to_dense(values, c["offsets"], **c["sizes"])
expected = torch.nn.functional.linear(x, weight, bias)
torch.testing.assert_close(y, expected)
for got, want in zip(gradients, torch.autograd.grad(expected, (x, values, bias), c["dy"])):
    torch.testing.assert_close(got, want)
try:
    dst_ops.diagonal_linear(x, values, c["offsets"] - 60, bias, **c["sizes"])
except ValueError as error:
    assert "range" in str(error)
else:
    raise AssertionError("negative units were taken")
print(dst_ops.backend_report())
"""


def test_without_a_compiler_the_reference_serves_and_says_so(tmp_path: Path) -> None:
    done = python(FALL_BACK, CXX="/bin/false", DST_OPS_CACHE=str(tmp_path), PYTHONPATH=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert "the reference in plain PyTorch serves instead" in done.stdout
    assert "/bin/false" in done.stdout
    report = done.stdout.strip().splitlines()[-1]
    assert "reference" in report
    assert "the build failed" in report


def test_without_a_compiler_it_can_be_an_error(tmp_path: Path) -> None:
    done = python(
        "import dst_ops; dst_ops.load()", CXX="/bin/false", DST_OPS_CACHE=str(tmp_path), DST_OPS_REQUIRE_FUSED="1"
    )
    assert done.returncode == 1
    assert "RuntimeError: dst_ops: the CPU kernels could not be built or loaded" in done.stderr
    assert "/bin/false" in done.stderr


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch, "cpu")
    monkeypatch.setenv("DST_OPS_ISA", "sse9")
    with pytest.raises(ValueError, match="DST_OPS_ISA is 'sse9', expected portable, avx2, avx512 or avx512_48k"):
        build.load()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit of torch's release, small sources for both devices, and nothing else that could be found."""
    sources = tmp_path / "csrc"
    for name in ("diagonal.h", "cpu/ops.cpp", "cuda/ops.cu", "cuda/sums.cu", "cuda/sums.cuh"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).touch()
    fake_nvcc(tmp_path / "toolkit", "13.0")
    for name in ("CUDA_PATH", "CXX", "DST_OPS_CUDA_ARCHS", "DST_OPS_REQUIRE_FUSED", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("DST_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "DEFAULT_NVCC", str(tmp_path / "default" / "bin" / "nvcc"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _forget(monkeypatch, "cuda")
    return tmp_path / "toolkit"


def test_nvcc_compiles_each_file_for_each_chip(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my $compiler")
    assert build.build("cuda").read_text() == "built\n"
    assert sorted(calls(toolkit / "compiler")) == ["library.so", "ops.o", "sums.o"]
    *compiling, linking = commands(toolkit)
    for command in compiling:
        assert "-Xcompiler -fPIC,-fvisibility=hidden,-Wall" in command
        assert [word.removeprefix("-gencode=") for word in command.split() if word.startswith("-gencode")] == [
            "arch=compute_80,code=sm_80",
            "arch=compute_90,code=compute_90",
            "arch=compute_90a,code=sm_90a",
        ]
    assert linking.endswith("-cudart static -ltorch_cpu -ltorch_cuda")
    assert all(command.startswith("-ccbin my $compiler ") for command in (*compiling, linking))


def test_a_cache_without_locks_is_built_in_all_the_same(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = errno.ENOLCK

    def refused(file: object, how: int) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(build.fcntl, "flock", refused)
    with pytest.warns(UserWarning, match=r"cache has no locks \(.*no locks here\); processes build side by side"):
        assert build.build("cuda").read_text() == "built\n"
    build.library_path("cuda").unlink()
    code = errno.EIO
    with pytest.raises(OSError, match="no locks here"):
        build.build("cuda")


def test_a_library_that_another_process_has_built_meanwhile_stays(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build.library_path("cuda")

    def both(folder: Path, device: str) -> None:
        (folder / "library.so").write_text("mine")
        library.write_text("theirs")

    monkeypatch.setattr(build, "_run_ninja", both)
    assert build.build("cuda").read_text() == "theirs"


def test_the_chips_can_be_chosen(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.library_path("cuda")}
    for listed, expected in (
        ("80", ["80,code=sm_80"]),
        ("120+PTX", ["120,code=sm_120", "120,code=compute_120"]),
        ("120-virtual", ["120,code=compute_120"]),
    ):
        monkeypatch.setenv("DST_OPS_CUDA_ARCHS", listed)
        assert build._chips() == [f"-gencode=arch=compute_{chip}" for chip in expected]
        names.add(build.library_path("cuda"))
    assert len(names) == 4


@pytest.mark.parametrize("listed", ["ampere", "80,90", "80;", "8.0", "80+ptx"])
def test_chips_that_are_none_are_refused(toolkit: Path, monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setenv("DST_OPS_CUDA_ARCHS", listed)
    with pytest.raises(ValueError, match=re.escape(f"DST_OPS_CUDA_ARCHS is {listed!r}, expected chips such as")):
        build.load("cuda")


def test_where_nvcc_is_looked_for(tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, on_path, default = (tmp_path / name for name in ("other", "on_path", "default"))
    monkeypatch.setenv("CUDA_PATH", str(other))
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}:{os.environ['PATH']}")
    for place in (other, on_path, default):
        fake_nvcc(place, "13.0")
    assert build._nvcc()[0] == toolkit / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    assert build._nvcc()[0] == other / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_PATH")
    assert build._nvcc()[0] == on_path / "bin" / "nvcc"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build._nvcc()[0] == default / "bin" / "nvcc"
    (default / "bin" / "nvcc").unlink()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    expected = f"there is none of: /nowhere/bin/nvcc, nvcc on PATH, {default}/bin/nvcc; install the CUDA toolkit 13 and"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        build.library_path("cuda")


@pytest.mark.parametrize(("release", "named"), [("12.8", "12.8"), ("unknown", "(no release named)")])
def test_an_nvcc_of_another_major_release_is_refused(
    tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, release: str, named: str
) -> None:
    nvcc = fake_nvcc(tmp_path / "another", release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "another"))
    expected = (
        f"{nvcc} is of CUDA {named}, torch {torch.__version__} of CUDA 13.0; "
        "install the CUDA toolkit 13 and set CUDA_HOME to it"
    )
    with pytest.raises(OSError, match=re.escape(expected)):
        build.build("cuda")


def test_another_minor_release_of_nvcc_will_do_and_names_the_library(
    tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library_path("cuda")
    fake_nvcc(tmp_path / "minor", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "minor"))
    assert build.library_path("cuda") != first


def test_a_torch_without_cuda_warns_once_and_the_reference_serves(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.warns(UserWarning, match="which forms the dense weight for each call") as caught:
        assert not build.load("cuda")
    assert not build.load("cuda")  # a second warning would be an error
    message = str(caught[0].message)
    assert "the CUDA kernels could not be built or loaded" in message
    assert "Install the CUDA toolkit (nvcc) of torch's major version and set CUDA_HOME" in message
    assert "is built without CUDA" in message
    assert build.status("cuda") == (None, message[message.index(f"torch {torch.__version__}") :])


def test_a_torch_without_cuda_can_be_an_error(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("DST_OPS_REQUIRE_FUSED", "1")
    with pytest.raises(RuntimeError, match=r"the CUDA kernels could not be built or loaded: torch .* without CUDA"):
        build.load("cuda")


def test_each_library_is_named_by_its_own_sources(toolkit: Path) -> None:
    def changed(name: str) -> tuple[bool, bool]:
        before = build.library_path("cpu"), build.library_path("cuda")
        (build.SOURCES / name).write_text("changed")
        return build.library_path("cpu") != before[0], build.library_path("cuda") != before[1]

    assert changed("cpu/ops.cpp") == (True, False)
    assert changed("cuda/ops.cu") == (False, True)
    assert changed("cuda/sums.cuh") == (False, True)
    assert changed("diagonal.h") == (True, True)
    assert changed("cuda/notes.md") == (False, False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_library_of_the_package_is_taken_without_a_compiler(
    tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    loaded: list[str] = []
    shipped = tmp_path / f"dst_ops_{device}.so"
    shipped.touch()
    _forget(monkeypatch, device)
    monkeypatch.setattr(build, "SHIPPED", tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert build.load(device)
    assert loaded == [str(shipped)]
    assert build.status(device) == (shipped, None)
    assert build.library_path(device) == shipped


def test_max_jobs_limits_how_many_files_are_compiled_at_once(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "one")
    with pytest.raises(subprocess.CalledProcessError) as caught:  # by what ninja says of a wrong number
        build.build("cuda")
    assert "invalid -j parameter" in caught.value.stdout
    monkeypatch.setenv("MAX_JOBS", "1")
    assert build.build("cuda").is_file()


RESULTS_PER_CASE, Y, DX = 4, 0, 1
# In forks of one process, as each takes a library of its own but torch takes seconds to import.
RESULTS = """
import ctypes, os, sys, torch, dst_ops
from tests.unit.ops.oracle import CASES, case

def results():
    for shape in [*CASES, (768, 300, 60, 1), (300, 768, 60, 1)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            c = case(*shape, dtype, (45,))
            x, values, bias = (c[k].requires_grad_() for k in ("x", "values", "bias"))
            y = dst_ops.diagonal_linear(x, values, c["offsets"], bias, **c["sizes"])
            yield from (y.detach(), *torch.autograd.grad(y, (x, values, bias), c["dy"]))

for name in sys.argv[2:]:
    if os.fork() == 0:
        if name not in ("usual", "forbidden"):
            os.environ["DST_OPS_ISA"] = name
        if name == "forbidden" and ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
            print("no prctl", flush=True)
            os._exit(0)
        torch.save(list(results()), f"{sys.argv[1]}/{name}")
        print(str(dst_ops.backend_report()).replace("\\n", " "), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def _results(folder: Path, *names: str) -> list[str]:
    """Writes `folder`/NAME for each and returns a line that each has printed."""
    done = python(RESULTS, str(folder), *names, PYTHONPATH=os.getcwd())
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_instruction_sets_agree(tmp_path: Path) -> None:
    names = ("portable", "avx2", "avx512", "avx512_48k")  # at most: a processor without it takes the next lower
    assert "portable kernels" in _results(tmp_path, *names)[0]
    # Products have one order of sums; portable lacks fused multiply-add, so that the others may differ from it, but not
    # among themselves. Gradients are summed over tokens in blocks that fill the registers of each.
    loaded = [torch.load(tmp_path / name) for name in names]
    for index, (portable, avx2, *others) in enumerate(zip(*loaded, strict=True)):
        torch.testing.assert_close(portable, avx2)
        for other in others:
            if index % RESULTS_PER_CASE in (Y, DX):
                assert torch.equal(avx2, other)
            torch.testing.assert_close(avx2, other)


def test_where_the_system_forbids_generated_code_results_are_the_same(tmp_path: Path) -> None:
    usual, forbidden = _results(tmp_path, "usual", "forbidden")
    if "no generated code" in usual:
        pytest.skip("this machine generates none in any case")
    if forbidden == "no prctl":
        pytest.skip("needs PR_SET_MDWE of Linux 6.3")
    assert "no generated code" in forbidden
    pairs = zip(torch.load(tmp_path / "usual"), torch.load(tmp_path / "forbidden"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
