"""Proof that the emulator finds what it is there to find: bugs put into the kernels, each of which a small check must meet.

A bug's text is looked for in the sources as they are, so that a change of the kernels may ask for a change here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu import emulated
from tests.gpu.seeded import CHECKS
from tests.unit.ops.process import environment

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not emulated.available, reason="the emulator's fibers are for x86_64"),
]

ROOT = Path(__file__).parents[2]
DIFFERS = "numbers differ"
STUCK = "threads wait at different barriers"
NOT_SHARED = "not 16 aligned bytes of shared memory"
REPEATED = "offsets repeats a unit"
OVERFLOW = "AddressSanitizer: heap-"
TOO_MANY = "more threads arrive at a barrier than it was initialised for"
# Which bug shows: a number that seeded.py sets, 0 for none.
SWITCH = """
extern "C" { __attribute__((visibility("default"))) inline int dst_ops_seeded = 0; }
inline bool seeded(int number) { return dst_ops_seeded == number; }
"""


@dataclass(frozen=True)
class Seeded:
    """A change of the sources: `old`, found exactly once in `file`, is `new`, in which BUG says whether the change is to show.

    checks: of seeded.py; the name's first word is the file of launchers that they need. symptom: what they must print, or
    nothing for sources without a bug. sanitized: with AddressSanitizer, for what no comparison sees.
    """

    name: str
    checks: tuple[str, ...]
    symptom: str = ""
    file: str = ""
    old: str = ""
    new: str = ""
    sanitized: bool = False

    @property
    def launchers(self) -> tuple[str, bool]:
        """Which are compiled together."""
        return self.checks[0].split("_")[0], self.sanitized


def _unchanged(kernel: str) -> Seeded:
    return Seeded(f"{kernel} unchanged", tuple(name for name in CHECKS if name.startswith(kernel)))


def _bug(name: str, check: str, symptom: str, file: str, old: str, new: str, *, sanitized: bool = False) -> Seeded:
    return Seeded(name, (check,), symptom, file, old, new, sanitized)


UNCHANGED = [
    *(_unchanged(kernel) for kernel in ("scalar", "band", "dense", "sums")),
    # Not a bug: so many tokens that a grid has them in z take too long.
    Seeded(
        "tokens in z",
        ("band_stream",), "", "band_product.h",
        "constexpr unsigned most_blocks_in_y = 65535;",
        "#define most_blocks_in_y (BUG ? 1u : 65535u)",
    ),
]  # fmt: skip
BUGS = [
    # Synchronization.
    _bug(
        "no barrier after staging",
        "scalar_product", DIFFERS, "scalar.h",
        "s.in, Groups);\n  __syncthreads();",
        "s.in, Groups);\n  if (!BUG) __syncthreads();",
    ),
    _bug(
        "no barrier after staging in the gradient",
        "scalar_gradient", DIFFERS, "scalar.h",
        "s.longer, 1);\n    __syncthreads();",
        "s.longer, 1);\n    if (!BUG) __syncthreads();",
    ),
    _bug(
        "no barrier before staging again",
        "scalar_gradient", DIFFERS, "scalar.h",
        "    __syncthreads();\n    stage_packs(packs, longer",
        "    if (!BUG) __syncthreads();\n    stage_packs(packs, longer",
    ),
    _bug(
        "no barrier before a stage is filled again",
        "band_gradient", DIFFERS, "band_gradient.h",
        "    __syncthreads();\n    const SharedAddress filled",
        "    if (!BUG) __syncthreads();\n    const SharedAddress filled",
    ),
    _bug(
        "no barrier after copies have arrived",
        "band_resident", DIFFERS, "band_product.h",
        "  __syncthreads();\n\n  const auto warp_token",
        "  if (!BUG) __syncthreads();\n\n  const auto warp_token",
    ),
    _bug(
        "no wait for copies",
        "band_resident", DIFFERS, "band_product.h",
        "  await_previous();\n  copies_wait<0>();",
        "  await_previous();\n  if (!BUG) copies_wait<0>();",
    ),
    _bug(
        "no barrier before a window is filled again",
        "band_stream", DIFFERS, "band_product.h",
        "    __syncthreads();\n    const SharedAddress filled",
        "    if (!BUG) __syncthreads();\n    const SharedAddress filled",
    ),
    _bug(
        "one window's wait too few",
        "band_stream", DIFFERS, "band_product.h",
        "copies_wait<1>();",
        "BUG ? copies_wait<2>() : copies_wait<1>();",
    ),
    _bug(
        "one stage's wait too few",
        "band_gradient", DIFFERS, "band_gradient.h",
        "copies_wait<1>();",
        "BUG ? copies_wait<2>() : copies_wait<1>();",
    ),
    _bug(
        "no wait for a stage of boxes",
        "band_boxes", STUCK, "band_boxes.h",
        "      barrier_wait(full(stage), turn);\n",
        "      if (!BUG) barrier_wait(full(stage), turn);\n",
    ),
    _bug(
        "boxes asked for over those that are read",
        "band_boxes", TOO_MANY, "band_boxes.h",
        "        barrier_wait(empty(stage), turn ^ 1);\n",
        "        if (!BUG) barrier_wait(empty(stage), turn ^ 1);\n",
    ),
    _bug(
        "a stage of boxes given back by half of the warps",
        "band_boxes", STUCK, "band_boxes.h",
        "if (lane == 0) barrier_arrive(empty(stage));",
        "if (lane == 0 && (!BUG || part == 0)) barrier_arrive(empty(stage));",
    ),
    _bug(
        "no wait for a stage of boxes in the gradient",
        "band_boxes_gradient", STUCK, "band_boxes_gradient.h",
        "    barrier_wait(full(stage), turn);\n",
        "    if (!BUG) barrier_wait(full(stage), turn);\n",
    ),
    _bug(
        "boxes asked for over those that are read in the gradient",
        "band_boxes_gradient", TOO_MANY, "band_boxes_gradient.h",
        "      barrier_wait(empty(stage), turn ^ 1);\n",
        "      if (!BUG) barrier_wait(empty(stage), turn ^ 1);\n",
    ),
    _bug(
        "no __syncwarp before lines are written",
        "band_resident", DIFFERS, "band.h",
        "T()));\n      __syncwarp();",
        "T()));\n      if (!BUG) __syncwarp();",
    ),
    _bug(
        "no barrier before rows are added",
        "sums_tokens", DIFFERS, "sums.cu",
        "= sum[i];\n  __syncthreads();",
        "= sum[i];\n  if (!BUG) __syncthreads();",
    ),
    _bug(
        "no __syncwarp before the list is read",
        "scalar_product", DIFFERS, "scalar.h",
        "{k, first}; });\n      __syncwarp();",
        "{k, first}; });\n      if (!BUG) __syncwarp();",
    ),
    _bug(
        "no barrier after a pack is staged",
        "scalar_few", DIFFERS, "scalar_few.h",
        "s.in, 1);\n  }\n  __syncthreads();",
        "s.in, 1);\n  }\n  if (!BUG) __syncthreads();",
    ),
    _bug(
        "one stage's wait too few, few tokens",
        "scalar_few", DIFFERS, "scalar_few.h",
        "copies_wait<few_stages - 1>();",
        "BUG ? copies_wait<few_stages>() : copies_wait<few_stages - 1>();",
    ),
    _bug(
        "weights fetched over those that other lanes read",
        "scalar_few_long", DIFFERS, "scalar_few.h",
        "      __syncwarp();\n      fetch(stage",
        "      if (!BUG) __syncwarp();\n      fetch(stage",
    ),
    _bug(
        "diagonals beyond a warp's first list left out",
        "scalar_few_long", DIFFERS, "scalar_few.h",
        "    begin += few_list;",
        "    begin += BUG ? diagonals : few_list;",
    ),
    _bug(
        "no barrier before slices are added",
        "scalar_few", DIFFERS, "scalar_few.h",
        "sum[e];\n  __syncthreads();",
        "sum[e];\n  if (!BUG) __syncthreads();",
    ),
    _bug(
        "a barrier that part of the block meets",
        "scalar_product", STUCK, "scalar.h",
        "  for (int block = blockIdx.y * rows;",
        "  if (BUG && threadIdx.x % 32 < 16) __syncthreads();\n  for (int block = blockIdx.y * rows;",
    ),
    _bug(
        "slots cleared while others set them",
        "dense", REPEATED, "dense.h",
        "slots[i] = -1;\n  __syncthreads();",
        "slots[i] = -1;\n  if (!BUG) __syncthreads();",
    ),
    # Arithmetic of indices.
    _bug(
        "negative indices not wrapped",
        "scalar_product", NOT_SHARED, "geometry.h",
        "  if (i < 0) i += n;\n",
        "  if (i < 0 && !BUG) i += n;\n",
    ),
    _bug(
        "indices beyond the end not wrapped",
        "band_resident", DIFFERS, "geometry.h",
        "return i >= n ? i - n : i;",
        "return i >= n && !BUG ? i - n : i;",
    ),
    _bug(
        "a line's half where another row's is",
        "band_stream", DIFFERS, "band_product.h",
        "return is_half(line, before) ? half(token)",
        "return is_half(line, before) ? half(token ^ BUG)",
    ),
    _bug(
        "a window's line one too early",
        "band_stream", DIFFERS, "band_product.h",
        "middle = before ? next : line;",
        "middle = before || BUG ? next : line;",
    ),
    _bug(
        "a gradient's window not wrapped",
        "band_gradient", DIFFERS, "band_gradient.h",
        "        while (at >= s.longer) at -= s.longer;",
        "        while (at >= s.longer && !BUG) at -= s.longer;",
    ),
    _bug(
        "window not wrapped",
        "band_stream", DIFFERS, "band_product.h",
        "    while (block >= s.blocks) block -= s.blocks;",
        "    while (block >= s.blocks && !BUG) block -= s.blocks;",
    ),
    _bug(
        "sub-bands beyond the first 32 left out",
        "band_stream", DIFFERS, "band.h",
        "      begin += 32;\n",
        "      begin += BUG ? 64 : 32;\n",
    ),
    _bug(
        "no instruction for a block without a partner",
        "band_resident", DIFFERS, "band.h",
        "else if (second) mma_k8",
        "else if (second && !BUG) mma_k8",
    ),
    _bug(
        "corners of the parallelogram not zero",
        "band_resident", DIFFERS, "band.h",
        "present = diagonal >= 0 && diagonal < W && row",
        "present = (BUG || (diagonal >= 0 && diagonal < W)) && row",
    ),
    _bug(
        "pieces of a line not where they were put",
        "band_resident", DIFFERS, "band.h",
        "(lane % 8 ^ lane / 8) * 16;",
        "(lane % 8 ^ (BUG ? 0 : lane / 8)) * 16;",
    ),
    _bug(
        "a window not wrapped, boxes",
        "band_boxes", DIFFERS, "band_boxes.h",
        "            if (column >= s.longer) column = 0;\n",
        "            if (column >= s.longer && !BUG) column = 0;\n",
    ),
    _bug(
        "pieces of a box not where the engine puts them",
        "band_boxes", DIFFERS, "band_boxes.h",
        ": row / 2 % 4;",
        ": (BUG ? row : row / 2) % 4;",
    ),
    _bug(
        "a warp's fifth block in the wrong box",
        "band_boxes_gradient", DIFFERS, "band_boxes_gradient.h",
        "(half ? Layout::long_box : 0)",
        "(half && !BUG ? Layout::long_box : 0)",
    ),
    _bug(
        "bands left over forgotten",
        "band_boxes_gradient", DIFFERS, "band_boxes_gradient.h",
        "block * each + min(block, more);",
        "block * each + (BUG ? 0 : min(block, more));",
    ),
    # Splits of the tokens.
    _bug(
        "the first part left out",
        "scalar_splits", DIFFERS, "parts.h",
        "for (int part = 0;",
        "for (int part = BUG;",
    ),
    _bug(
        "the last token of a split left out, scalar",
        "scalar_splits", DIFFERS, "scalar.h",
        "(blockIdx.z + 1) / gridDim.z;",
        "(blockIdx.z + 1) / gridDim.z - BUG;",
    ),
    _bug(
        "the last piece of a split left out, boxes",
        "band_boxes_gradient", DIFFERS, "band_boxes_gradient.h",
        "(blockIdx.z + 1) / gridDim.z);",
        "(blockIdx.z + 1) / gridDim.z) - BUG;",
    ),
    _bug(
        "the first split left out, sums",
        "sums_tokens", DIFFERS, "sums.cu",
        "for (int split = lane;",
        "for (int split = lane + BUG;",
    ),
    _bug(
        "the last token of a split left out, band",
        "band_splits", DIFFERS, "band_gradient.h",
        "(blockIdx.z + 1) / gridDim.z;",
        "(blockIdx.z + 1) / gridDim.z - BUG;",
    ),
    # Out of bounds.
    _bug(
        "shared memory read beyond its end",
        "scalar_gradient", NOT_SHARED, "scalar.h",
        "% s.band, s.longer) : s.longer;",
        "% s.band, s.longer) : s.longer + BUG;",
    ),
    _bug(
        "tokens stored beyond the last, scalar",
        "scalar_few", OVERFLOW, "scalar.h",
        "if (first_token + e >= s.tokens) return;",
        "if (first_token + e >= s.tokens && !BUG) return;",
        sanitized=True,
    ),
    _bug(
        "tokens stored beyond the last, band",
        "band_resident", OVERFLOW, "band.h",
        "static_cast<int>(s.tokens - first_token < 16 * M ? s.tokens - first_token : 16 * M)",
        "(BUG ? 16 * M : static_cast<int>(s.tokens - first_token < 16 * M ? s.tokens - first_token : 16 * M))",
        sanitized=True,
    ),
]  # fmt: skip
# What finds a bug with a sanitizer finds nothing without the bug; `make sanitize` runs all kernels with one.
UNCHANGED += [
    Seeded(f"{check} unchanged, sanitized", (check,), sanitized=True)
    for check in dict.fromkeys(bug.checks[0] for bug in BUGS if bug.sanitized)
]


class _Checker:
    """seeded.py's `serve`, with AddressSanitizer's runtime if `sanitized`."""

    def __init__(self, sanitized: bool) -> None:
        env = {}
        if sanitized:
            runtime = subprocess.run(["c++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
            # A fiber has a stack of its own, of which the sanitizer knows nothing.
            options = "detect_leaks=0:detect_stack_use_after_return=0"
            env = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": options}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.seeded"],
            cwd=ROOT, env=environment(**env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def check(self, library: Path, seeded: Seeded, number: int) -> tuple[int, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        printed = library.with_name(f"printed by {seeded.name}")
        request = [str(library), seeded.checks, number, seeded.symptom or None, str(printed)]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), printed.read_text()

    def close(self) -> None:
        self._process.communicate()


def _compiled(launchers: str, changes: list[Seeded], folder: Path, *options: str) -> Path:
    """A library of one file of launchers in which change i shows where the switch is i + 1: compiling each takes longer than to check it."""
    paths = (*emulated.SOURCES.glob("*.h"), emulated.SOURCES / f"{launchers}.cu")
    sources = {path.name: path.read_text() for path in paths}
    # Without fp16, which would be half of what is compiled.
    _replace(sources, "launch.h", "  else if (dtype == ScalarType::Half) f(__half());\n", "")
    for number, change in enumerate(changes, 1):
        _replace(sources, change.file, change.old, change.new.replace("BUG", f"seeded({number})"))
    folder.mkdir()
    for name, text in {**sources, "seeded.h": SWITCH}.items():
        (folder / name).write_text(text)
    compiled = (emulated.RUNTIME, folder / f"{launchers}.cu")
    objects = emulated.compile_objects(compiled, folder, "-include", str(folder / "seeded.h"), *options)
    emulated.link(objects, folder / "library.so")
    return folder / "library.so"


def _replace(sources: dict[str, str], file: str, old: str, new: str) -> None:
    assert sources[file].count(old) == 1, f"{file}, with the bugs before, must hold exactly once: {old!r}"
    sources[file] = sources[file].replace(old, new)


def _outcomes(chosen: list[Seeded], folder: Path) -> dict[str, tuple[int, str]]:
    """What the checks say of each: 0 if nothing is wrong, and what they print. Of one file of launchers."""
    launchers, sanitized = chosen[0].launchers
    # Optimised, what is sanitized takes longer to compile, and nothing else.
    options = ("-fsanitize=address", "-O0") if sanitized else ()
    changes = [change for change in chosen if change.file]
    library = _compiled(launchers, changes, folder, *options)
    numbers = {change.name: number for number, change in enumerate(changes, 1)}
    checker = _Checker(sanitized)
    try:
        return {change.name: checker.check(library, change, numbers.get(change.name, 0)) for change in chosen}
    finally:
        checker.close()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Of the selected tests, two files of launchers at a time."""
    chosen = [item.callspec.params["seeded"] for item in request.session.items if item.path == request.path]
    folder = tmp_path_factory.mktemp("seeded")
    with ThreadPoolExecutor(2) as pool:
        outcomes = [
            pool.submit(
                _outcomes, [s for s in chosen if s.launchers == launchers], folder / "-".join(map(str, launchers))
            )
            for launchers in dict.fromkeys(s.launchers for s in chosen)
        ]
        return {name: outcome for future in outcomes for name, outcome in future.result().items()}


@pytest.mark.parametrize("seeded", UNCHANGED, ids=lambda s: s.name)
def test_sources_without_bugs_pass(seeded: Seeded, outcomes: dict[str, tuple[int, str]]) -> None:
    assert outcomes[seeded.name] == (0, "")


@pytest.mark.parametrize("seeded", BUGS, ids=lambda s: s.name)
def test_bugs_are_found(seeded: Seeded, outcomes: dict[str, tuple[int, str]]) -> None:
    code, printed = outcomes[seeded.name]
    assert code != 0
    assert seeded.symptom in printed
