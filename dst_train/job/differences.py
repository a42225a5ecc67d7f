"""In what two jobs differ."""

from __future__ import annotations

from typing import Any, NamedTuple


class Difference(NamedTuple):
    """key: dotted."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def differences(old: Any, new: Any, path: str = "") -> list[Difference]:
    """Everything that differs between two nested mappings, such as the canonical forms of two jobs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(set(old) | set(new)):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [Difference(path, old, new)]
