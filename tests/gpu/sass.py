"""The machine code in the CUDA library: each kernel's registers, stack and instructions, by NVIDIA's disassembler."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

RESOURCES = re.compile(r"Function (\w+):\n\s+REG:(\d+) STACK:(\d+) ")
THREADS = re.compile(
    r"^\.nv\.info\.(\w+)\n(?:(?!\.nv\.).*\n)*?\s+Attribute:\s+EIATTR_MAX_THREADS\n.*\n\s+Value:\s+0x(\w+) ", re.M
)
LABEL = re.compile(r"(\.L_\w+):")
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<condition>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)


@dataclass(frozen=True)
class Kernel:
    """name and template arguments, such as band_stream and ("__half", "64", "true")."""

    name: str
    arguments: tuple[str, ...]
    registers: int
    stack: int  # bytes of a thread, where what does not fit the registers lies
    threads: int  # that a block may have
    instructions: tuple[str, ...]  # with their modifiers: HMMA.16816.F32.BF16
    loops: tuple[tuple[int, int], ...]  # the innermost: first and last instruction
    jumps: dict[int, tuple[int, bool]]  # instruction: the one that it jumps to, and whether it may go on instead

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>"

    def count(self, prefix: str) -> int:
        """Instructions whose name begins so."""
        return sum(name.startswith(prefix) for name in self.instructions)

    def hottest_loop(self, prefix: str) -> Counter[str]:
        """How often each instruction is in the innermost loop that has most of those that begin so."""
        bodies = [Counter(self.instructions[first : last + 1]) for first, last in self.loops]
        return max(bodies, key=lambda body: sum(n for name, n in body.items() if name.startswith(prefix)))

    def shortest_turn(self, *prefixes: str) -> Counter[str]:
        """How often each instruction is on the shortest way through the loop that holds most of those that begin so, of the ways that
        meet most of them: what a turn costs where nothing is special.
        """
        wanted = [name.startswith(prefixes) for name in self.instructions]
        loops = [(target, at) for at, (target, _) in self.jumps.items() if target <= at]
        first, last = max(loops, key=lambda loop: (sum(wanted[loop[0] : loop[1]]), loop[0] - loop[1]))
        ways: dict[int, tuple[int, int, int | None]] = {last: (0, -1, None)}  # wanted, less instructions, then where
        for at in range(last - 1, first - 1, -1):
            target, may_go_on = self.jumps.get(at, (at + 1, False))
            after = [n for n in {target, at + 1 if may_go_on else target} if n > at and n in ways]
            if self.instructions[at] != "EXIT" and after:
                best = max(after, key=lambda n: ways[n][:2])
                ways[at] = (ways[best][0] + wanted[at], ways[best][1] - 1, best)
        turn: Counter[str] = Counter()
        at: int | None = first
        while at is not None:
            turn[self.instructions[at]] += 1
            at = ways[at][2]
        return turn


def assembly(library: Path) -> list[str]:
    """The PTX in a library, a text for each of its files."""
    with tempfile.TemporaryDirectory() as folder:
        _run([_tool("cuobjdump"), "-xptx", "all", str(library)], cwd=folder)
        return [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]


def kernels(library: Path) -> dict[str, list[Kernel]]:
    """By the chip that they are compiled for, such as "80"."""
    found: dict[str, list[Kernel]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _run([_tool("cuobjdump"), "-xelf", "all", str(library)], cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            chip = re.search(r"sm_(\w+)\.cubin", cubin.name)
            assert chip is not None, cubin.name
            found.setdefault(chip[1], []).extend(_kernels(cubin))
    return found


def _kernels(cubin: Path) -> list[Kernel]:
    resources = RESOURCES.findall(_run([_tool("cuobjdump"), "-res-usage", str(cubin)]))
    threads = {symbol: int(n, 16) for symbol, n in THREADS.findall(_run([_tool("cuobjdump"), "-elf", str(cubin)]))}
    sections = re.split(r"\n\.text\.", _run([_tool("nvdisasm"), "-c", str(cubin)]))[1:]
    listings = {section.split(":", 1)[0]: section.splitlines() for section in sections}
    symbols = [symbol for symbol, _, _ in resources]
    assert set(symbols) == listings.keys()
    declarations = _run(["c++filt"], input="\n".join(symbols)).splitlines()
    return [
        _kernel(declaration, int(registers), int(stack), threads[symbol], listings[symbol])
        for declaration, (symbol, registers, stack) in zip(declarations, resources, strict=True)
    ]


def _tool(name: str) -> str:
    """Of the toolkit, or of triton, which comes with torch for CUDA."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or str(shipped)


def _run(command: list[str], **options: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def _kernel(declaration: str, registers: int, stack: int, threads: int, lines: list[str]) -> Kernel:
    name = re.search(r"dst_ops::(\w+)(?:<([^>]*)>)?\(", declaration)
    assert name is not None, declaration
    instructions, jumps, labels = [], [], {}
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        if found := INSTRUCTION.search(line):
            if found["name"].startswith("BRA") and (target := re.search(r"\.L_\w+", found["operands"])):
                may_go_on = found["condition"] is not None or re.match(r"!?U?P", found["operands"]) is not None
                jumps.append((target[0], len(instructions), may_go_on))
            instructions.append(found["name"])
    loops = {(labels[target], at) for target, at, _ in jumps if labels[target] <= at}
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    arguments = tuple(name[2].split(", ")) if name[2] else ()
    to = {at: (labels[target], may_go_on) for target, at, may_go_on in jumps}
    return Kernel(name[1], arguments, registers, stack, threads, tuple(instructions), tuple(sorted(inner)), to)
