"""From a tree of values to a strict model, with every error of the file at once, each named by its place and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from dst_train.job.errors import JobError
from dst_train.job.source import Key, Source, dotted

M = TypeVar("M", bound=BaseModel)
BUILDERS = ("timm", "transformers", "mlp")


def validate(model: type[M], source: Source, problems: Sequence[str] = (), *, also: Sequence[str] = ()) -> M:
    """The model that `source` describes. `problems`: those found already; `also`: keys at the root that are no fields.

    Raises:
        JobError: a line `file:line key.path: what is wrong` for everything that is wrong.
    """
    found = list(problems)
    try:
        result = model.model_validate(source.data)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            found += _describe(error, model, source, also)
    if found:
        raise JobError("\n".join(sorted(dict.fromkeys(found), key=_by_line)))
    return result


def _describe(error: Any, model: type[BaseModel], source: Source, also: Sequence[str]) -> list[str]:
    location, kind = error["loc"], error["type"]
    if kind == "conflicts":
        return [f"{source.place(key)} {dotted(key)}: {text}" for key, text in error["ctx"]["conflicts"]]
    # pydantic puts the tag of a discriminated union into the location; the file has no such level.
    key: Key = tuple(
        part for i, part in enumerate(location) if not (i == 1 and location[0] == "model" and part in BUILDERS)
    )
    name = str(key[-1]) if key else ""
    if kind == "extra_forbidden":
        allowed = _allowed(model, key[:-1], source.data, also)
        text = f"unknown key{_nearest(name, allowed)} (allowed: {', '.join(allowed)})"
    elif kind == "missing":
        text = "this key is required"
    elif kind in ("literal_error", "union_tag_invalid"):
        choices = re.findall(r"'([^']*)'", error["ctx"].get("expected") or error["ctx"]["expected_tags"])
        given = error["input"].get("builder") if kind == "union_tag_invalid" else error["input"]
        key = (*key, "builder") if kind == "union_tag_invalid" else key
        text = f"{given!r} is unknown{_nearest(str(given), choices)} (choose one of {', '.join(choices)})"
    elif kind == "union_tag_not_found":
        key, text = (*key, "builder"), "this key is required"
    elif kind == "value_error":
        text = error["msg"].removeprefix("Value error, ")
    else:
        message = error["msg"][0].lower() + error["msg"][1:]
        text = f"{message}, got {error['input']!r}"
    return [f"{source.place(key)} {dotted(key)}: {text}" if key else f"{source.place(key)}: {text}"]


def _nearest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _allowed(model: type[BaseModel], key: Key, data: Any, also: Sequence[str]) -> list[str]:
    """The fields of the model that stands at `key` below `model`; `also`: further ones at the root."""
    for name in key:
        data = data[name]
        if isinstance(name, str):  # an item of a list has the model that the list names
            models = _models(model.model_fields[name].annotation)
            model = models[0] if len(models) == 1 else _tagged(models, data)
    return [*model.model_fields, *(() if key else also)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The model classes that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _tagged(models: list[type[BaseModel]], data: Any) -> type[BaseModel]:
    """The member of a union that the data's `builder` names."""
    return next(m for m in models if data["builder"] in get_args(m.model_fields["builder"].annotation))


def _by_line(problem: str) -> tuple[str, int]:
    match = re.match(r"(.*?):(\d+)[ :]", problem)
    return (match[1], int(match[2])) if match else (problem, 0)
