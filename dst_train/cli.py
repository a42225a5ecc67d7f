"""The `dst-train` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 when training or a run of a study failed; 2 when the job or study cannot be run as written, or
    there is nothing to export; 130 after Ctrl-C or another signal that stops a study."""
    parser = argparse.ArgumentParser(prog="dst-train", description="Declarative dynamic sparse training.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    plan = verbs.add_parser("plan", help="check a job and print what it would do; needs no GPU")
    plan.add_argument("job", help="the job's YAML file")
    plan.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key"
    )
    plan.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    plan.add_argument("--no-data", action="store_true", help="do not look for the shards and at run_root")
    run = verbs.add_parser("run", help="train a job on this machine; continues from its last checkpoint")
    run.add_argument("job", help="the job's YAML file")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key")
    run.add_argument("--ranks", type=int, help="number of ranks (default: one for each GPU, one without)")
    study = verbs.add_parser("study", help="run a job over a grid of overrides and seeds; continues where it stopped")
    study.add_argument("study", type=Path, help="the study's YAML file")
    study.add_argument(
        "--out", type=Path, metavar="DIR", help="copy results.csv, table.md and plot.png there at the end"
    )
    study.add_argument("--table", action="store_true", help="run nothing, rewrite the outputs from what is there")
    export = verbs.add_parser("export", help="write the trained model of a run to a file of its own")
    export.add_argument("run", type=Path, help="the run's directory")
    export.add_argument(
        "target", type=Path, help="a safetensors file to write; for --dense of a transformers model a folder"
    )
    export.add_argument(
        "--dense", action="store_true", help="dense weights, for the model's library; else sparse, for load_exported"
    )
    report = verbs.add_parser("report", help="where runs are and what they reached; of one run its layers, too")
    report.add_argument("runs", nargs="+", type=Path, metavar="run", help="a run's directory")
    schema = verbs.add_parser("schema", help="print the JSON Schema of a job, for editors")
    schema.add_argument(
        "--markdown", action="store_true", help="print a table of all keys instead, as docs/job.md has it"
    )
    args = parser.parse_args(argv)
    if args.verb in ("plan", "run") and args.ranks is not None and args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: must be at least 1")

    from dst_train.job import JobError

    try:
        return {"plan": _plan, "run": _run, "study": _study, "export": _export, "report": _report, "schema": _schema}[
            args.verb
        ](args)
    except JobError as error:
        print(error, file=sys.stderr)
        return 2


def _plan(args: argparse.Namespace) -> int:
    from dst_train.job import JobError, load, locate
    from dst_train.plan import prepare

    try:
        print(prepare(load(args.job, args.overrides), args.ranks, check_data=not args.no_data))
    except JobError as error:
        raise locate(error, args.job, args.overrides) from error
    return 0


def _run(args: argparse.Namespace) -> int:
    from dst_train.processes import launcher_problem, run_ranks, visible_gpus

    gpus = len(visible_gpus())
    problem = launcher_problem()
    if "RANK" in os.environ:
        problem = "RANK is set: this process is a rank already; have the launcher start `-m dst_train.train --job JOB`"
    elif gpus and args.ranks is not None and args.ranks > gpus:
        problem = f"--ranks {args.ranks}: this machine has {gpus} GPUs, and each rank takes one"
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "dst_train.train", "--job", args.job]
    for override in args.overrides:
        command += ["--set", override]
    return run_ranks(command, args.ranks or gpus or 1)


def _study(args: argparse.Namespace) -> int:
    from dst_train.study import run_study

    return run_study(args.study, out=args.out, only_table=args.table)


def _export(args: argparse.Namespace) -> int:
    from dst_train.engine import CheckpointError
    from dst_train.export import export

    try:
        print(export(args.run, args.target, dense=args.dense))
    except (CheckpointError, FileExistsError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _report(args: argparse.Namespace) -> int:
    from dst_train.summary import report

    print(report(args.runs))
    return 0


def _schema(args: argparse.Namespace) -> int:
    from dst_train.job import reference_markdown, schema_json

    sys.stdout.write(reference_markdown() if args.markdown else schema_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
