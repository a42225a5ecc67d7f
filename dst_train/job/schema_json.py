"""The JSON Schema of a job file, for editors."""

from __future__ import annotations

import json

from dst_train.job.schema import Job


def schema_json() -> str:
    """JSON Schema with descriptions. A file that `extends` another one need not repeat the required keys."""
    schema = Job.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "A parent job, relative to this file."}
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return json.dumps(schema, indent=2) + "\n"
