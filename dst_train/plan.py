"""The plan of a job: everything that can be known, and refused, without a GPU and before a rank starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import dst_ops
from dst_train import data, models
from dst_train.engine import build_topology, compile_config, sparsify_model
from dst_train.job import BatchPlan, Job, JobError, dump
from dst_train.sparse import DiagonalLinear, RuleError, SparsityReport
from dst_train.topology import Topology
from dst_train.topology.telemetry import History


@dataclass(frozen=True)
class Plan:
    """`flops`: of the matrix products of one sample's forward pass, an addition counted like a multiplication; sparse and dense.

    Memory is per rank, in bytes, without activations; `checkpoint_bytes` is over all ranks.
    """

    job: Job
    batch: BatchPlan
    report: SparsityReport
    topology: str
    flops: tuple[int, int]
    memory: dict[str, int]
    checkpoint_bytes: int
    ds_config: dict[str, Any]

    def __str__(self) -> str:
        sparse, dense = self.flops
        lines = [
            dump(self.job),
            "batch",
            f"  {self.batch}",
            "",
            "model",
            *_indent(str(self.report)),
            f"  forward, matrix products of one sample: {sparse:,} FLOPs, {dense:,} when dense ({dense / sparse:.2f}x)",
            "",
            "topology",
            f"  {self.topology}",
            "",
            f"memory on each of {self.batch.world_size} ranks, without activations",
        ]
        lines += [f"  {name:<13} {_bytes(size):>12}" for name, size in self.memory.items()]
        lines += [f"  checkpoint    {_bytes(self.checkpoint_bytes):>12}  (all ranks together)", "", "op"]
        lines += _indent(str(dst_ops.backend_report()))
        lines += ["", "ds_config", *_indent(json.dumps(self.ds_config, indent=2))]
        return "\n".join(lines)


def prepare(job: Job, world_size: int, *, check_data: bool = True) -> Plan:
    """Everything that must hold before the job starts on `world_size` ranks.

    Raises:
        JobError: the batch does not divide, runs cannot be written, shards are missing or miscounted, the model or one of its arguments is
            unknown, it does not take the samples or cannot be trained on several ranks, a glob matches no layer, or a band
            does not divide.
    """
    batch = BatchPlan.of(job, world_size)
    if check_data:
        _check_run_root(job)
        _check_data(job)
    model = models.build(job.model, seed=job.seed)
    if world_size > 1:
        _refuse_batch_norm(model)
    sample = data.example_input(job.data.train)
    dense = _trace(model, sample, "data.train")
    if job.data.eval is not None:
        _trace(model, data.example_input(job.data.eval), "data.eval")
    try:
        report = sparsify_model(job, batch, model)
    except RuleError as error:
        raise JobError(f"sparsity: {error}", ("sparsity", "rules", error.number)) from error
    except ValueError as error:
        raise JobError(f"sparsity: {error}", ("sparsity",)) from error
    try:
        topology = build_topology(job, batch, model)
    except ValueError as error:
        raise JobError(f"topology: {error}", ("topology",)) from error
    memory, checkpoint = _memory(job, report.parameters, world_size, topology, model)
    layers = {layer.name: model.get_submodule(layer.name) for layer in report.layers}
    flops = (_sparse_flops(_trace(model, sample, "data.train", layers), layers), dense.flops)
    return Plan(job, batch, report, str(topology), flops, memory, checkpoint, compile_config(job, batch))


def _check_run_root(job: Job) -> None:
    folder = Path(job.run_root).absolute() / job.name
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written" if there.is_dir() else "is no folder"
        raise JobError(f"run_root {job.run_root}: {there} {what}; choose another place for the runs", ("run_root",))


def _check_data(job: Job) -> None:
    for name, split in (("train", job.data.train), ("eval", job.data.eval)):
        if split is not None:
            try:
                data.check(split, job.data.cache_dir)
            except data.DataError as error:
                raise JobError(f"data.{name}: {error}", ("data", name)) from error


def _refuse_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, nn.SyncBatchNorm):
            raise JobError(
                f"model: {name} is a {type(module).__name__}, whose running statistics differ from rank to rank, so that "
                "evaluation and resume would depend on it; choose a model with LayerNorm or GroupNorm, or one rank",
                ("model",),
            )


@dataclass(frozen=True)
class _Trace:
    """A forward pass of one sample. flops: of what torch counts. tokens: that each of the watched layers got, if it was called."""

    flops: int
    tokens: dict[str, int]


@torch.no_grad()
def _trace(
    model: nn.Module, sample: torch.Tensor, split: str, watched: Mapping[str, nn.Module] = MappingProxyType({})
) -> _Trace:
    """Run one sample of a split through the model.

    Raises:
        JobError: the model does not take it, or reads one of the watched layers as if it were dense.
    """
    tokens: dict[str, int] = {}

    def count(name: str, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        tokens[name] = tokens.get(name, 0) + output.numel() // output.shape[-1]

    handles = [layer.register_forward_hook(partial(count, name)) for name, layer in watched.items()]
    training, learned = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in learned:  # the counter's hooks do not bear views of them without a gradient
        parameter.requires_grad_(False)
    try:
        # The counter does not know the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(sample)
    except AttributeError as error:
        reads = next((name for name, layer in watched.items() if layer is error.obj), None)
        if reads is None:
            raise
        raise _not_called(reads) from error
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:  # models check their inputs in many ways
        sort = f"{sample.dtype}" if sample.is_floating_point() else f"{sample.dtype} up to {sample.max():g}"
        raise JobError(
            f"model: it does not take a sample of {split}, of shape {tuple(sample.shape[1:])} ({sort}): {error}",
            ("model",),
        ) from error
    finally:
        model.train(training)
        for parameter in learned:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return _Trace(counter.get_total_flops(), tokens)


def _sparse_flops(trace: _Trace, layers: Mapping[str, nn.Module]) -> int:
    """With 2 K L per token for the diagonal layers, whose op torch's counter does not know; K is that of the settled topology. Masked
    layers count as what they are: dense.

    Raises:
        JobError: a layer was not called.
    """
    flops = trace.flops
    for name, layer in layers.items():
        if name not in trace.tokens:
            raise _not_called(name)
        if isinstance(layer, DiagonalLinear):
            flops += 2 * layer.num_final * layer.unit_entries * trace.tokens[name]
    return flops


def _not_called(name: str) -> JobError:
    return JobError(
        f"sparsity: layer {name} is not called by the model, which does not use it, or reads its weight to multiply by it itself; keep "
        f"it dense: add {{match: {name!r}, sparsity: null}}",
        ("sparsity",),
    )


def _memory(
    job: Job, parameters: int, world_size: int, topology: Topology, model: nn.Module
) -> tuple[dict[str, int], int]:
    """ZeRO's arithmetic (Rajbhandari et al. 2020, arXiv 1910.02054, section 5), with fp32 masters and moments."""
    stage = job.deepspeed.zero_optimization.stage
    low = 2 if job.train.precision == "bf16_params" else 4
    masters = 0 if stage == 0 else 4  # ZeRO keeps masters of its own, also beside fp32 parameters
    states = 4 * (2 if job.optimizer.name == "adamw" else int(job.optimizer.momentum > 0))

    def share(split_from: int) -> int:
        return world_size if stage >= split_from else 1

    memory = {
        "parameters": low * parameters // share(3),
        "gradients": low * parameters // share(2),
        "masters": masters * parameters // share(1),
        "optimiser": states * parameters // share(1),
        "buffers": sum(_size(buffer) for buffer in model.buffers()),
    }
    if topology.held_bytes:
        memory["growth signal"] = topology.held_bytes  # in update steps
    memory["total"] = sum(memory.values())
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = sum(_size(value) for name, value in model.state_dict().items() if name not in learned)
    saved += sum(layer.num_units * History.BYTES_PER_UNIT for layer in topology.layers.values())
    saved += ((low if stage < 3 else 0) + masters + states) * parameters  # at stage 3 the masters are all there is
    return memory, saved


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _indent(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
