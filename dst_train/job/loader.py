"""From a YAML file to a Job, with every error of the file at once, and back."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dst_train.job.errors import JobError
from dst_train.job.schema import Job
from dst_train.job.source import Key, Source, dotted, read

PATHS: tuple[Key, ...] = (("data", "train", "shards"), ("data", "eval", "shards"), ("data", "cache_dir"), ("run_root",))
BUILDERS = ("timm", "transformers", "mlp")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job. `overrides` are `dotted.key=value`, split at the first `=`, the value read as YAML.

    Raises:
        JobError: a line `file:line key.path: what is wrong` for everything that is wrong.
    """
    source = read(Path(path), overrides)
    problems = _expand_variables(source)
    try:
        job = Job.model_validate(source.data)
    except ValidationError as errors:
        problems += [_describe(error, source) for error in errors.errors(include_url=False)]
    if problems:
        raise JobError("\n".join(sorted(set(problems), key=_by_line)))
    return job


def dump(job: Job) -> str:
    """YAML with every default written out; `load` reads it back to an equal job."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, width=120)


def digest(job: Job) -> str:
    """sha256 of the canonical form."""
    return hashlib.sha256(json.dumps(job.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _expand_variables(source: Source) -> list[str]:
    problems = []
    for key in PATHS:
        parent: Any = source.data
        for name in key[:-1]:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if not isinstance(parent, dict) or not isinstance(parent.get(key[-1]), str):
            continue
        text = parent[key[-1]]
        for name in sorted(set(_VARIABLE.findall(text)) - set(os.environ)):
            problems.append(f"{source.place(key)} {dotted(key)}: the environment variable {name} is not set")
        parent[key[-1]] = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), text)
    return problems


def _describe(error: Any, source: Source) -> str:
    location, kind = error["loc"], error["type"]
    # pydantic puts the tag of a discriminated union into the location; the file has no such level.
    key: Key = tuple(
        part for i, part in enumerate(location) if not (i == 1 and location[0] == "model" and part in BUILDERS)
    )
    name = str(key[-1]) if key else ""
    if kind == "extra_forbidden":
        allowed = _allowed(key[:-1], source.data)
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
    return f"{source.place(key)} {dotted(key)}: {text}" if key else f"{source.place(key)}: {text}"


def _nearest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _allowed(key: Key, data: Any) -> list[str]:
    """The fields of the model that stands at `key`."""
    model: type[BaseModel] = Job
    for name in key:
        data = data[name]
        if isinstance(name, str):  # an item of a list has the model that the list names
            models = _models(model.model_fields[name].annotation)
            model = models[0] if len(models) == 1 else _tagged(models, data)
    return [*model.model_fields, *([] if key else ["extends"])]


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
