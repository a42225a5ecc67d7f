"""The `dst-train` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, or 2 when the job cannot be run as written."""
    parser = argparse.ArgumentParser(prog="dst-train", description="Declarative dynamic sparse training.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    plan = verbs.add_parser("plan", help="check a job and print what it would do; needs no GPU")
    plan.add_argument("job", help="the job's YAML file")
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key"
    )
    plan.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    plan.add_argument("--no-data", action="store_true", help="do not look for the shards")
    verbs.add_parser("schema", help="print the JSON Schema of a job, for editors")
    args = parser.parse_args(argv)

    from dst_train.job import JobError, load, schema_json

    if args.verb == "schema":
        sys.stdout.write(schema_json())
        return 0
    if args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: must be at least 1")
    from dst_train.plan import prepare

    try:
        print(prepare(load(args.job, args.overrides), args.ranks, check_data=not args.no_data))
    except JobError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
