"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dst_train.files import atomic_file, write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of the new text, then \ud800")  # a lone surrogate is not UTF-8
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [child.name for child in tmp_path.iterdir()] == ["job.yaml"]
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_fails_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_modes_is_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, mode: int) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("os.chmod", refused)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
