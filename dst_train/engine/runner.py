"""run(): a job from start, or from its newest checkpoint, to its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dst_train import job as jobs
from dst_train.engine.checkpoint import Checkpoints, broadcast
from dst_train.engine.config import compile_config
from dst_train.engine.manifest import CheckpointError, Found
from dst_train.engine.resume import check_job
from dst_train.engine.session import (
    Session,
    build_session,
    close_session,
    extend_collective_timeouts,
    init_distributed,
    seed_random_numbers,
)
from dst_train.engine.trainer import Trainer
from dst_train.engine.watchdog import Watchdog
from dst_train.files import write_text
from dst_train.job import BatchPlan, Job, differences
from dst_train.monitor import Monitor, RunDirectory
from dst_train.monitor.run_directory import UNLOCKABLE
from dst_train.processes import signals


@dataclass(frozen=True)
class Outcome:
    """finished: all steps are done, and the last evaluation. evaluation: loss and accuracy (0 to 1) on data.eval, empty without it."""

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
        CheckpointError, JobChangedError: a checkpoint exists and cannot be continued, or another process trains into its directory.
        NonFiniteError, DataError, TopologyMismatchError: see there.
    """
    rank, world_size = init_distributed()
    extend_collective_timeouts(job.monitor.hang_minutes)
    plan = BatchPlan.of(job, world_size)
    directory = RunDirectory(Path(job.run_root) / job.name)
    with _exclusive(directory, rank) as notes:
        return _run(job, plan, directory, rank, stop_at, notes)


def _run(
    job: Job, plan: BatchPlan, directory: RunDirectory, rank: int, stop_at: int | None, notes: list[str]
) -> Outcome:
    checkpoints = Checkpoints(directory.checkpoints, keep=job.checkpoint.keep)
    found, more = _resumable(job, checkpoints)
    monitor = Monitor(
        directory,
        rank=rank,
        tensorboard=job.monitor.tensorboard,
        total_steps=plan.total_steps,
        start_step=0 if found is None else found.step,
    )
    watchdog = Watchdog(rank, job.monitor.hang_minutes)
    try:
        for note in [*notes, *more]:
            monitor.message(note)
        if rank == 0:
            write_text(directory.path / "job.yaml", jobs.dump(job))
            write_text(directory.path / "ds_config.json", json.dumps(compile_config(job, plan), indent=2))
            directory.write_environment()
        # Only noted: collectives in a handler deadlock, as launchers signal one rank at a time.
        with signals() as received:
            session = build_session(job, plan)
            if session.report.sparsity_warning is not None:
                monitor.message(session.report.sparsity_warning)
            if session.topology.layers and (not session.topology.update_steps or session.topology.warning):
                monitor.message(f"topology {session.topology}")

            def save(step: int) -> None:
                facts = {"job": job.model_dump(mode="json"), "topology_digest": session.topology.digest()}
                state = {"trainer": trainer.state_dict(), "topology": session.topology.state_dict()}
                for note in checkpoints.save(session.engine, step, state, facts):
                    monitor.message(note)

            trainer = Trainer(job, plan, session, monitor, watchdog, save=save, stop_requested=lambda: bool(received))
            if found is not None:
                for note in _resume(trainer, session, checkpoints, found, job, plan):
                    monitor.message(note)
            trainer.fit(plan.total_steps if stop_at is None else min(stop_at, plan.total_steps))
        close_session(session)  # not after an error: the ranks are no longer in step, and the process ends
        return Outcome(directory.path, trainer.step, trainer.finished, trainer.last_evaluation)
    finally:
        watchdog.close()
        monitor.close()


@contextmanager
def _exclusive(directory: RunDirectory, rank: int) -> Iterator[list[str]]:
    """No other training of the same name beside this one: each would take the other's checkpoints for its own, and remove them.

    Yields what there is to say of it.
    """
    with ExitStack() as held:
        notes, problem = [], None
        try:
            if rank == 0:
                held.enter_context(directory.lock())
        except BlockingIOError as error:
            problem = f"is in use by {error.strerror}, which trains a job of this name; stop that, or give this job another name"
        except OSError as error:
            if error.errno in UNLOCKABLE:
                notes = [
                    f"{directory.path} cannot be locked ({error.strerror}): see that no second training of this name starts"
                ]
            else:
                problem = f"cannot be written: {error}"
        problem = broadcast(problem)
        if problem is not None:
            raise CheckpointError(f"{directory.path} {problem}")
        yield notes


def _resumable(job: Job, checkpoints: Checkpoints) -> tuple[Found | None, list[str]]:
    """The checkpoint that this job continues, and what there is to say of the choice."""
    found, notes = checkpoints.newest()
    if found is None:
        return None, notes
    if job.checkpoint.resume == "never":
        raise CheckpointError(
            f"{Path(job.run_root) / job.name} already holds {found.tag} and checkpoint.resume is never; "
            "give the job another name, or set checkpoint.resume=auto"
        )
    notes += [f"resuming with {change}" for change in check_job(found.job, job.model_dump(mode="json"))]
    return found, notes


def _resume(
    trainer: Trainer, session: Session, checkpoints: Checkpoints, found: Found, job: Job, plan: BatchPlan
) -> Iterator[str]:
    """Loads the checkpoint; yields what there is to say of it."""
    state = checkpoints.load(session.engine, found)
    trainer.load_state_dict(state["trainer"])
    if differences(found.job["data"]["eval"], job.model_dump(mode="json")["data"]["eval"]):
        trainer.forget_evaluation()
    session.topology.load_state_dict(state["topology"])
    if session.topology.digest() != found.topology_digest:
        raise CheckpointError(
            f"{found.tag}: the topology that was loaded is not the one that its manifest has the digest of"
        )
    yield f"resumed {found.tag} at step {trainer.step} of {plan.total_steps}"
    if found.world_size != plan.world_size:
        seed_random_numbers(job.seed, dist.get_rank(), trainer.step)
        yield (
            f"ranks: {found.world_size} when {found.tag} was written, {plan.world_size} now; what follows differs by the order "
            "of sums, and by random numbers such as dropout's"
        )
