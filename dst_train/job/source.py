"""YAML with the place of every key: files, `extends`, and `--set` overrides merged into one tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dst_train.job.errors import JobError, Key


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-3 is a number, as in YAML 1.2, and that 010, 1:30 and dates are text."""


class Dumper(yaml.SafeDumper):
    """Puts in quotes all text that would be no text without them, for this loader or for PyYAML's."""


_TAG = "tag:yaml.org,2002:"
# The tags that a node of each kind may have.
_TYPES: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
}
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)$|^[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _reader in (_Loader, Dumper):
    _reader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
    _reader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Override:
    """`dotted.key=value`, and the place that errors name."""

    text: str
    place: str


@dataclass
class Source:
    """A tree of plain Python values, and for each key the place it came from: `file:line`, or that of an override."""

    data: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """The place of the key or of its nearest ancestor that was written down."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]


def read(path: Path, overrides: Sequence[Override]) -> Source:
    """The file, over its chain of parents, under the overrides.

    Raises:
        JobError: a file that cannot be read or parsed, a repeated key, a circle of `extends`, a malformed override.
    """
    source = _read_chain(path, ())
    for override in overrides:
        _apply(source, override)
    return source


def _read_chain(path: Path, children: tuple[Path, ...]) -> Source:
    if path.resolve() in children:
        raise JobError(f"{path}: extends itself through {' -> '.join(str(p) for p in children)}")
    source = read_file(path)
    if "extends" not in source.data:
        return source
    place, parent = source.place(("extends",)), source.data.pop("extends")
    if not isinstance(parent, str):
        raise JobError(f"{place} extends: {parent!r} is not the path of one YAML file")
    if not (path.parent / parent).is_file():
        raise JobError(
            f"{place} extends: {path.parent / parent} {'is no file' if (path.parent / parent).exists() else 'does not exist'}"
        )
    base = _read_chain(path.parent / parent, (*children, path.resolve()))
    _merge(base.data, source.data, base.places, source.places, ())
    base.places[()] = source.places[()]
    return base


def read_file(path: Path) -> Source:
    """One file, as it stands.

    Raises:
        JobError: it cannot be read or parsed, a key is repeated or not text, a value is not of the type that it says.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read: {error}") from error
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise JobError(f"{where}: not valid YAML: {_problem(error)}") from error
    except RecursionError as error:
        raise JobError(f"{path}: is nested too deeply") from error
    if not isinstance(node, yaml.MappingNode):
        raise JobError(f"{path}:1: a job or a study is a mapping of keys to values")
    places: dict[Key, str] = {(): f"{path}:1"}
    data = _build(node, (), places, lambda node: f"{path}:{node.start_mark.line + 1}")
    return Source(data, places)


def _problem(error: yaml.YAMLError) -> str:
    """What PyYAML says, and for the two commonest slips what to do."""
    problem = getattr(error, "problem", None) or str(error)
    if "scanning an alias" in (getattr(error, "context", None) or ""):
        return f'{problem}; a value that begins with * must be in quotes: match: "*.fc"'
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces"
    return problem


def _build(
    node: yaml.Node,
    key: Key,
    places: dict[Key, str],
    where: Callable[[yaml.Node], str],
    around: tuple[yaml.Node, ...] = (),
) -> Any:
    """The value of `node`, which stands at `key` inside of `around`; notes the place of every key below it.

    What an alias stands for is built anew, as PyYAML does not: the tree is edited in place, and two keys must not share a value.
    """
    here = places[key] + (f" {dotted(key)}" if key else "")
    if node in around:
        raise JobError(f"{here}: an alias stands inside of what it stands for")
    kind = node.tag.removeprefix(_TAG)
    if kind not in _TYPES[type(node)]:
        raise JobError(f"{here}: the tag {node.tag} does not fit this value")
    if isinstance(node, yaml.MappingNode):
        mapping = {}
        for name, child in node.value:
            place = where(name)
            if not isinstance(name, yaml.ScalarNode) or name.tag != f"{_TAG}str":
                parent = f" {dotted(key)}" if key else ""
                if getattr(name, "value", None) == "<<":
                    raise JobError(f"{place}{parent}: merge keys are not read; write the keys out, or use `extends`")
                raise JobError(
                    f"{place}{parent}: the key {getattr(name, 'value', name)!r} is not text; put it in quotes"
                )
            inner = (*key, name.value)
            if inner in places:
                first = "" if places[inner] == place else f", first at {places[inner]}"
                raise JobError(f"{place} {dotted(inner)}: stands twice{first}")
            places[inner] = place
            mapping[name.value] = _build(child, inner, places, where, (*around, node))
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, child in enumerate(node.value):
            inner = (*key, i)
            places[inner] = where(child)
            items.append(_build(child, inner, places, where, (*around, node)))
        return items
    try:
        return _Loader("").construct_object(node)
    except (ValueError, KeyError, IndexError) as error:
        raise JobError(f"{here}: {node.value!r} is not a valid {kind}") from error


def _merge(base: dict[str, Any], child: dict[str, Any], places: dict[Key, str], new: dict[Key, str], key: Key) -> None:
    """Mappings merge, everything else (lists too) is replaced."""
    for name, value in child.items():
        inner = (*key, name)
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge(base[name], value, places, new, inner)
            places[inner] = new[inner]
            continue
        base[name] = value
        for stale in [k for k in places if k[: len(inner)] == inner]:
            del places[stale]
        places.update({k: v for k, v in new.items() if k[: len(inner)] == inner})


def _apply(source: Source, override: Override) -> None:
    """Sets one key. A mapping does not merge into the old one; mappings that are not there yet are made."""
    name, equals, value = override.text.partition("=")
    place = f"{override.place}:"
    names = name.split(".")
    if names[0] == "extends":
        raise JobError(f"{place} a job extends another in its file only; write `extends` there")
    if not equals or not all(names):
        raise JobError(f"{place} expected KEY=VALUE with a dotted key, for example train.batch_size=64")
    try:
        node = _Loader(value).get_single_node()
    except yaml.YAMLError as error:
        raise JobError(f"{place} the value is not valid YAML: {_problem(error)}") from error
    except RecursionError as error:
        raise JobError(f"{place} the value is nested too deeply") from error
    parent: Any = source.data
    key: Key = ()
    for i, name in enumerate(names):
        part = _part(parent, name, key, place)
        key = (*key, part)
        last = i == len(names) - 1
        if last or not isinstance(parent[part] if isinstance(part, int) else parent.get(part), dict | list):
            for stale in [k for k in source.places if k[: len(key)] == key]:
                del source.places[stale]
            source.places[key] = place
            parent[part] = {}
            if last:
                parent[part] = _build(node, key, source.places, lambda _: place) if node else None
        parent = parent[part]


def _part(parent: dict[str, Any] | list[Any], name: str, key: Key, place: str) -> str | int:
    """The key of a mapping, or the index of an item that a list has."""
    if isinstance(parent, dict):
        return name
    if not (name.isascii() and name.isdigit() and int(name) < len(parent)):
        raise JobError(
            f"{place} {dotted(key)} is a list of {len(parent)}; {name!r} is not the index (from 0) of one of its items"
        )
    return int(name)


def dotted(key: Key) -> str:
    return ".".join(str(k) for k in key)
