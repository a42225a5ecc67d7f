"""Restores what another number of ranks, or another ZeRO stage, has written: each rank reads its elements out of all shards.

DeepSpeed (0.19) has a conversion, to a copy on disk in another form, which leaves buffers out and knows no way between the stages
1 and 3. A checkpoint that says which rank has which elements needs none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from dst_train.engine.params import DeepSpeedEditor, Place

# Where a rank has what it owns of each parameter, as plain tuples: a checkpoint is to outlive the names of classes.
Layout = Mapping[str, tuple[int, ...]]
Group = dict[str, Any]
MASTER = "master"


def layout(engine: DeepSpeedEngine) -> Layout:
    """The `Place`s of this rank; none at stage 0, which DeepSpeed itself restores on any number of ranks."""
    if engine.zero_optimization_stage() == 0:
        return {}
    editor = DeepSpeedEditor(engine, engine.world_size)
    places = {name: editor.place(parameter) for name, parameter in _trained(engine.module)}
    return {name: tuple(place) for name, place in places.items() if place is not None}


def rank_0(folder: Path) -> dict[str, Any]:
    """What rank 0 wrote beside its shard: the module (of stage 3 its buffers only), DeepSpeed's counters and the client state."""
    stage_3 = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    path = stage_3 if stage_3.exists() else folder / "mp_rank_00_model_states.pt"
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return saved


def restore(engine: DeepSpeedEngine, folder: Path, saved: dict[str, Any], layouts: list[Layout]) -> None:
    """Restore masters, optimiser state, what the forward pass reads, buffers and counters, all under ZeRO 1 to 3.

    Call it on every rank, on an engine that has not trained. Frozen parameters stay as they were built, which is what they were.

    Args:
        saved: `rank_0(folder)`.
        layouts: by rank that wrote, what `layout` gave there.

    Raises:
        ValueError: on every rank, when the shards do not hold every element once, or not all after the same number of steps.
    """
    shards = [_shard(folder, rank) for rank in range(len(layouts))]
    _require_whole(engine.module, layouts)
    buffers = {name: saved["module"][name] for name in saved["buffer_names"]}
    parameters = {name for name, _ in engine.module.named_parameters()}
    other = buffers.keys() ^ (engine.module.state_dict().keys() - parameters)
    if other:
        raise ValueError(f"buffers that only one of both has: {', '.join(sorted(other))}")
    editor = DeepSpeedEditor(engine, engine.world_size)
    _begin_state(editor, shards)
    for name, parameter in _trained(engine.module):
        piece = editor.piece(parameter)
        if piece is not None:
            for key, target in {MASTER: piece.master, **piece.state}.items():
                _fill(target, piece.start, _held(shards, layouts, name, key))
    editor.refresh()
    engine.module.load_state_dict(buffers, strict=False)  # which layers notice
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, saved[counter])


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _shard(folder: Path, rank: int) -> list[Group]:
    """What a rank wrote, by group: its masters, and the state of its optimiser. Only what is used of it is read."""
    (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)[OPTIMIZER_STATE_DICT]
    if FP32_FLAT_GROUPS in saved:  # stage 3
        masters, optimizer = saved[FP32_FLAT_GROUPS], saved[OPTIMIZER_STATE_DICT]
    else:
        masters, optimizer = saved[SINGLE_PARTITION_OF_FP32_GROUPS], saved[BASE_OPTIMIZER_STATE]
    return [{MASTER: master, **optimizer["state"].get(group, {})} for group, master in enumerate(masters)]


def _require_whole(module: nn.Module, layouts: list[Layout]) -> None:
    sizes = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in _trained(module)}
    for name in sorted(sizes.keys() | {name for places in layouts for name in places}):
        end = 0
        for start, numel in sorted(Place(*places[name])[2:] for places in layouts if name in places):
            end = end + numel if start == end else -1
        if end != sizes.get(name, 0):
            raise ValueError(f"{name} has {sizes.get(name, 0)} elements, the shards not each of them once")


def _begin_state(editor: DeepSpeedEditor, shards: list[list[Group]]) -> None:
    """Zeros for what the optimiser holds of each element; what it holds of all, as AdamW's number of steps, from the shards."""
    like = shards[0][0]
    common = {key: value for key, value in like.items() if not isinstance(value, Tensor) or value.dim() == 0}
    for rank, shard in enumerate(shards):
        for key, value in common.items():
            for found in (group.get(key) for group in shard):
                if found != value:
                    raise ValueError(f"{key!r} of the optimiser is {value} on rank 0 and {found} on rank {rank}")
    per_element = like.keys() - common.keys() - {MASTER}
    for flat in editor.flat_masters:
        editor.state[flat] = copy.deepcopy(common) | {key: torch.zeros_like(flat) for key in sorted(per_element)}


def _held(shards: list[list[Group]], layouts: list[Layout], name: str, key: str) -> Iterator[tuple[int, Tensor]]:
    """Pieces of a parameter's masters or state, each with the element that it starts at."""
    for shard, places in zip(shards, layouts, strict=True):
        if name in places:
            place = Place(*places[name])
            yield place.start, shard[place.group][key].narrow(0, place.offset, place.numel)


@torch.no_grad()
def _fill(target: Tensor, start: int, pieces: Iterator[tuple[int, Tensor]]) -> None:
    for at, piece in pieces:
        first, end = max(start, at), min(start + target.numel(), at + piece.numel())
        if first < end:
            target[first - start : end - start] = piece[first - at : end - at]
