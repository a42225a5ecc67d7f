"""Studies: a job over a grid of overrides and seeds, run to its end, as a table and a plot."""

from dst_train.study.command import run_study

__all__ = ["run_study"]
