"""What the YAML file of a study may say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dst_train.job import JobError
from dst_train.job.loader import expand_variables
from dst_train.job.schema import Positive, Seed, Strict
from dst_train.job.source import Source, read_file
from dst_train.job.validate import validate

# No hyphen: it stands between the labels in the name of a run, which are so told apart.
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*$")]

# Columns of results.csv before and behind those of the axes and of the evaluation.
LEADING_COLUMNS = ("run",)
TRAILING_COLUMNS = ("seed", "ranks", "steps", "seconds", "threads", "revision", "machine", "torch", "job_digest")
METRICS = ("accuracy", "loss")


class Study(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the study's folder."""
    run_root: str = "runs/studies"
    """Where the study's folder is; ${ENV} is replaced, as in a job."""
    job: str
    """The base job, relative to the file of the study."""
    set: list[str] = Field(default_factory=list)
    """Overrides of every run, as `--set` takes them, before those of the axes."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Each point of the grid is run with each seed."""
    metric: Literal["accuracy", "loss"]
    """What the plot and the first table show of the evaluation at the end; a second table shows the other."""
    axes: Annotated[dict[Label, Annotated[dict[Label, list[str]], Field(min_length=1)]], Field(min_length=1)]
    """For each axis its values, and for each value overrides as `--set` takes them, or `ranks=N`; applied in the order of the axes."""
    columns: str
    """The axis of the table's columns and the plot's x; the others make rows and lines."""
    against: str | None = None
    """A row of the table, its labels joined by `-`: two more tables show the difference of every row from it, seed by seed."""
    parallel: Positive = 1
    """Runs at a time."""

    def rows(self) -> list[tuple[str, ...]]:
        """The labels of each row of the table: of all axes but that of the columns."""
        return list(itertools.product(*(values for axis, values in self.axes.items() if axis != self.columns)))

    @model_validator(mode="after")
    def _axes_and_seeds(self) -> Study:
        if self.columns not in self.axes:
            raise ValueError(f"columns is {self.columns!r}, must be one of the axes {', '.join(self.axes)}")
        rows = ["-".join(row) for row in self.rows()]
        if self.against is not None and self.against not in rows:
            raise ValueError(f"against is {self.against!r}, must be one of the rows {', '.join(rows)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: one stands twice")
        taken = [axis for axis in self.axes if axis in (*LEADING_COLUMNS, *METRICS, *TRAILING_COLUMNS)]
        if taken:
            raise ValueError(f"axes: {', '.join(taken)} is a column of results.csv already; give the axis another name")
        return self


def read_study(path: Path) -> tuple[Study, Source]:
    """The study, and where in the file each key stands.

    Raises:
        JobError: a line `file:line key.path: what is wrong` for everything that is wrong.
    """
    source = read_file(path)
    if not {"axes", "job"} & source.data.keys() and {"model", "extends"} & source.data.keys():
        raise JobError(f"{source.place(())}: this is a job: run it with deepspeed launch/train.py --job {path}")
    problems = expand_variables(source, (("run_root",),))
    return validate(Study, source, problems), source
