"""Python in a process of its own: what happens at import and at first use can be seen only there."""

from __future__ import annotations

import os
import subprocess
import sys


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the variables that dst_ops reads, changed."""
    ours = ("DST_OPS_CACHE", "DST_OPS_ISA", "DST_OPS_REQUIRE_FUSED", "TORCH_EXTENSIONS_DIR", "CXX", "CXXFLAGS")
    return {**{k: v for k, v in os.environ.items() if k not in ours}, **changes}


def python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(**env), capture_output=True, text=True, timeout=300
    )
