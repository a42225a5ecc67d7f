"""docs/job.md: every key of a job, with its values, its default and what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dst_train.job.resumable import may_change
from dst_train.job.schema import Job

HEAD = """# Keys of a job

Written by `dst-train schema --markdown`. A key without a default is required. **R**: may be changed when a run is resumed; a run with
another value of any other key is refused, and starts anew under another `name`; stages 1 to 3 of ZeRO may follow one another. Keys are strict:
unknown ones are refused by name.
"""
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

Schema = dict[str, Any]


def reference_markdown() -> str:
    schema = Job.model_json_schema()
    models: dict[str, Schema] = schema["$defs"]
    plain: list[str] = []
    sections: list[tuple[str, str, list[str]]] = []
    for key, field in schema["properties"].items():
        if "discriminator" in field:
            for builder, place in field["discriminator"]["mapping"].items():
                rows = list(_rows(models[place.rpartition("/")[2]], models, key))
                sections.append((f"`{key}`, builder {builder}", "", rows))
        elif (inner := _inner(field, models)) is not None:
            about = field.get("description") or inner.get("description", "")
            sections.append((f"`{key}`", about, list(_rows(inner, models, key))))
        else:
            plain += _row(key, field, key in schema["required"])
    parts = [HEAD, _table(plain)]
    for title, about, rows in sections:
        parts += [f"## {title}\n", *([f"{about}\n"] if about else []), _table(rows)]
    return "\n".join(parts)


def _rows(model: Schema, models: dict[str, Schema], path: str) -> Iterator[str]:
    for name, field in model["properties"].items():
        key, inner = f"{path}.{name}", _inner(field, models)
        if inner is None:
            yield from _row(key, field, name in model.get("required", ()))
        else:
            several, may_be_null = field.get("type") == "array", "anyOf" in field
            about = field.get("description") or inner.get("description", "")
            if several or may_be_null or about:
                values = "list, an item as follows" if several else "mapping or null" if may_be_null else "mapping"
                default = "`null`" if may_be_null else "as below" if "default" in field else ""
                yield f"| `{key}` | {values} | {default} | {_line(about)} | {_mark(key)} |"
            yield from _rows(inner, models, f"{key}.0" if several else key)


def _row(key: str, field: Schema, required: bool) -> Iterator[str]:
    default = "" if required else f"`{json.dumps(field.get('default'))}`"
    yield f"| `{key}` | {_values(field)} | {default} | {_line(field.get('description', ''))} | {_mark(key)} |"


def _values(field: Schema) -> str:
    if "anyOf" in field:
        return " or ".join(_values(choice) for choice in field["anyOf"] if choice.get("type") != "null")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    bounds = [f"{sign} {_number(field[name])}" for name, sign in BOUNDS.items() if name in field]
    kind: str = field["type"]
    return ", ".join([{"object": "mapping", "array": "list"}.get(kind, kind), *bounds])


def _number(value: float) -> str:
    return f"2^{int(value).bit_length() - 1}" if value > 1e6 else f"{value:g}"


def _inner(field: Schema, models: dict[str, Schema]) -> Schema | None:
    """The model of a field that is one, may be null instead, or is a list of such."""
    for choice in (field, *field.get("anyOf", ()), field.get("items", {})):
        if "$ref" in choice:
            return models[choice["$ref"].rpartition("/")[2]]
    return None


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | values | default | meaning | |", "|---|---|---|---|---|", *rows, ""])


def _mark(key: str) -> str:
    return "R" if may_change(key) else ""


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
