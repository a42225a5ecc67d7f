"""The runs of a study: the product of its axes and seeds, equal jobs once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dst_train.job import Job, JobError, digest, load, locate
from dst_train.job.source import Override, Source
from dst_train.study.schema import Study, read_study

Point = tuple[str, ...]
"""The label of a value of each axis, in the order of the axes."""

# A study runs hundreds of times what nobody watches, and that takes minutes; a job that says otherwise is obeyed.
NEVER = 2**31 - 1
OWN_KEYS = ("name", "run_root", "seed")


@dataclass(frozen=True)
class Run:
    """points: where in the grid the run is shown; the first one and the seed make its name.

    base, overrides: the file of the job, and what the study overrides in it.
    """

    job: Job
    ranks: int
    points: tuple[Point, ...]
    base: Path
    overrides: tuple[Override, ...]

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def directory(self) -> Path:
        return Path(self.job.run_root) / self.job.name

    @property
    def directories(self) -> list[Path]:
        """Where its result may be: its own, and those of its other points, the first of which it had in a study with other axes."""
        names = [f"{'-'.join(point)}-seed{self.job.seed}" for point in self.points]
        return [Path(self.job.run_root) / name for name in dict.fromkeys([self.name, *names])]

    def locate(self, error: JobError) -> JobError:
        """The error with the line, of the job's file or the study's, of the key that it is about."""
        return locate(error, self.base, self.overrides)


@dataclass(frozen=True)
class Grid:
    """runs: all points with the first seed, then all with the second, so that an unfinished table has few gaps."""

    study: Study
    runs: tuple[Run, ...]

    @property
    def folder(self) -> Path:
        return Path(self.study.run_root) / self.study.name

    def at(self, point: Point) -> list[Run]:
        """The runs of a point, one for each seed."""
        return [run for run in self.runs if point in run.points]


def fingerprint(job: Job) -> str:
    """sha256 of what the job does: of all but its name and where its files go."""
    return digest(job.model_copy(update={"name": "", "run_root": ""}))


def build(path: Path) -> Grid:
    """Read a study and resolve the job of each point.

    Raises:
        JobError: the study, its job or an override is wrong; with file, line and key.
    """
    study, source = read_study(path)
    base = path.parent / study.job
    if not base.is_file():
        raise JobError(f"{source.place(('job',))} job: {base} does not exist")
    load(base)  # its own mistakes are told once, without any override
    resolved = [_resolve(study, source, base, point) for point in itertools.product(*study.axes.values())]
    runs: dict[tuple[str, int], Run] = {}
    for seed in study.seeds:
        for at_point in resolved:
            (point,) = at_point.points
            own = {"name": f"{'-'.join(point)}-seed{seed}", "run_root": f"{study.run_root}/{study.name}", "seed": seed}
            job = at_point.job.model_copy(update=own)
            key = fingerprint(job), at_point.ranks
            run = runs.setdefault(key, replace(at_point, job=job, points=()))
            runs[key] = replace(run, points=(*run.points, point))
    return Grid(study, tuple(runs.values()))


def _resolve(study: Study, source: Source, base: Path, point: Point) -> Run:
    """The run of a point, without a seed; errors name the line of the override in the file of the study."""
    ranks, overrides = 1, []
    for override in _overrides(study, source, point):
        key, _, value = override.text.partition("=")
        if key == "ranks":
            if not (value.isascii() and value.isdigit() and int(value) > 0):
                raise JobError(f"{override.place}: must be a number of ranks, at least 1")
            ranks = int(value)
        elif key in OWN_KEYS:
            raise JobError(f"{override.place}: the study itself sets {', '.join(OWN_KEYS)} of each run")
        else:
            overrides.append(override)
    job = load(base, overrides)
    if job.data.eval is None:
        raise JobError(f"{source.place(('metric',))} metric: the job has no data.eval at {'-'.join(point)}")
    return Run(_unwatched(job), ranks, (point,), base, tuple(overrides))


def _overrides(study: Study, source: Source, point: Point) -> Iterator[Override]:
    for i, text in enumerate(study.set):
        yield Override(text, f"{source.place(('set', i))} {text}")
    for (axis, values), label in zip(study.axes.items(), point, strict=True):
        for i, text in enumerate(values[label]):
            yield Override(text, f"{source.place(('axes', axis, label, i))} {text}")


def _unwatched(job: Job) -> Job:
    """Without TensorBoard, and with no checkpoint before the end, where the job does not say what it wants."""
    if "tensorboard" not in job.monitor.model_fields_set:
        job = job.model_copy(update={"monitor": job.monitor.model_copy(update={"tensorboard": False})})
    if "every_steps" not in job.checkpoint.model_fields_set:
        job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every_steps": NEVER})})
    return job
