"""run(): a job from start, or from its newest checkpoint, to its end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dst_train import job as jobs
from dst_train.engine.checkpoint import CheckpointError, Checkpoints
from dst_train.engine.config import compile_config
from dst_train.engine.resume import check_job
from dst_train.engine.session import Session, build_session, start_distributed
from dst_train.engine.trainer import Trainer
from dst_train.job import BatchPlan, Job
from dst_train.monitor import Monitor, RunDirectory


@dataclass(frozen=True)
class Outcome:
    """finished: all steps are done. evaluation: loss and accuracy (0 to 1) on data.eval, empty without it."""

    run_directory: Path
    step: int
    finished: bool
    evaluation: dict[str, float]


def run(job: Job, *, stop_at: int | None = None) -> Outcome:
    """Train a job on the ranks of this process group.

    Args:
        stop_at: end after this optimiser step with a checkpoint, as if asked to by a signal.

    Raises:
        dst_train.job.JobError: the batch does not divide, or a rule, model or file is wrong.
        CheckpointError, JobChangedError: a checkpoint exists and cannot be continued.
        NonFiniteError, DataError, TopologyMismatchError: see there.
    """
    rank, world_size = start_distributed()
    plan = BatchPlan.of(job, world_size)
    directory = RunDirectory(Path(job.run_root) / job.name)
    with _stop_flag() as stop_requested:
        session = build_session(job, plan)
        monitor: Monitor | None = None
        pending: list[str] = []

        def say(text: str) -> None:
            if monitor is None:
                pending.append(text)
            else:
                monitor.message(text)

        checkpoints = Checkpoints(directory.checkpoints, keep=job.checkpoint.keep, say=say)
        found = checkpoints.newest()
        if found is not None:
            if job.checkpoint.resume == "never":
                raise CheckpointError(
                    f"{directory.path} already holds {found.tag} and checkpoint.resume is never; "
                    "give the job another name, or set checkpoint.resume=auto"
                )
            for change in check_job(found.manifest["job"], job.model_dump(mode="json")):
                say(f"resuming with {change}")
        state = None if found is None else checkpoints.load(session.engine, found)
        start_step = 0 if state is None else state["trainer"]["step"]
        monitor = Monitor(
            directory,
            rank=rank,
            tensorboard=job.monitor.tensorboard,
            total_steps=plan.total_steps,
            start_step=start_step,
        )
        for text in pending:
            monitor.message(text)
        try:
            return _train(job, plan, session, monitor, checkpoints, directory, state, stop_at, stop_requested, rank)
        finally:
            monitor.close()


def _train(
    job: Job,
    plan: BatchPlan,
    session: Session,
    monitor: Monitor,
    checkpoints: Checkpoints,
    directory: RunDirectory,
    state: dict | None,
    stop_at: int | None,
    stop_requested: Callable[[], bool],
    rank: int,
) -> Outcome:
    def save(step: int) -> None:
        facts = {
            "job": job.model_dump(mode="json"),
            "job_digest": jobs.digest(job),
            "topology_digest": session.topology.digest(),
        }
        content = {"trainer": trainer.state_dict(), "topology": session.topology.state_dict()}
        monitor.message(f"checkpoint {checkpoints.save(session.engine, step, content, facts)}")

    trainer = Trainer(job, plan, session, monitor, save=save, stop_requested=stop_requested)
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        session.topology.load_state_dict(state["topology"])
        monitor.message(f"resumed {directory.path} at step {trainer.step} of {plan.total_steps}")
    if rank == 0:
        directory.write_text("job.yaml", jobs.dump(job))
        directory.write_text("ds_config.json", json.dumps(compile_config(job, plan), indent=2))
        directory.write_environment()
        directory.truncate_topology(trainer.step)
    last = plan.total_steps if stop_at is None else min(stop_at, plan.total_steps)
    trainer.fit(last)
    finished = trainer.step == plan.total_steps
    if finished and not trainer.last_evaluation:
        trainer.evaluate()
    return Outcome(directory.path, trainer.step, finished, trainer.last_evaluation)


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGINT and SIGUSR1 only set a flag: collectives in a handler deadlock, as launchers signal one rank at a time."""
    received: list[int] = []
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in watched}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
