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
LABEL = re.compile(r"(\.L_\w+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);")


@dataclass(frozen=True)
class Kernel:
    """name and template arguments, such as band_stream and ("__half", "64", "true")."""

    name: str
    arguments: tuple[str, ...]
    registers: int
    stack: int  # bytes of a thread, where what does not fit the registers lies
    instructions: tuple[str, ...]  # with their modifiers: HMMA.16816.F32.BF16
    loops: tuple[tuple[int, int], ...]  # the innermost: first and last instruction

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>"

    def count(self, prefix: str) -> int:
        """Instructions whose name begins so."""
        return sum(name.startswith(prefix) for name in self.instructions)

    def hottest_loop(self, prefix: str) -> Counter[str]:
        """How often each instruction is in the innermost loop that has most of those that begin so."""
        bodies = [Counter(self.instructions[first : last + 1]) for first, last in self.loops]
        return max(bodies, key=lambda body: sum(n for name, n in body.items() if name.startswith(prefix)))


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
    sections = re.split(r"\n\.text\.", _run([_tool("nvdisasm"), "-c", str(cubin)]))[1:]
    listings = {section.split(":", 1)[0]: section.splitlines() for section in sections}
    symbols = [symbol for symbol, _, _ in resources]
    assert set(symbols) == listings.keys()
    declarations = _run(["c++filt"], input="\n".join(symbols)).splitlines()
    return [
        _kernel(declaration, int(registers), int(stack), listings[symbol])
        for declaration, (symbol, registers, stack) in zip(declarations, resources, strict=True)
    ]


def _tool(name: str) -> str:
    """Of the toolkit, or of triton, which comes with torch for CUDA."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or str(shipped)


def _run(command: list[str], **options: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def _kernel(declaration: str, registers: int, stack: int, lines: list[str]) -> Kernel:
    name = re.search(r"dst_ops::(\w+)(?:<([^>]*)>)?\(", declaration)
    assert name is not None, declaration
    instructions, jumps, labels = [], [], {}
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        if found := INSTRUCTION.search(line):
            if found["name"].startswith("BRA") and (target := re.search(r"\.L_\w+", found["operands"])):
                jumps.append((target[0], len(instructions)))
            instructions.append(found["name"])
    loops = {(labels[target], at) for target, at in jumps if labels[target] <= at}
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    arguments = tuple(name[2].split(", ")) if name[2] else ()
    return Kernel(name[1], arguments, registers, stack, tuple(instructions), tuple(sorted(inner)))
