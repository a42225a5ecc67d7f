"""The collectives of topology updates, on a process group of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TopologyMismatchError(RuntimeError):
    """Ranks hold different topologies: training on would silently average unrelated weights."""


class Ranks:
    """The ranks that train together. Create it on all ranks at the same time, after init_process_group.

    The group is separate from the engine's because growth signals are reduced inside the backward pass, between the
    engine's own collectives; NCCL orders collectives per group. Nothing of two groups may be under way on a GPU at once: kernels of
    both, on streams of their own, can wait for each other's room (torch.distributed.new_group). Without torch.distributed it is one rank.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group() if dist.is_available() and dist.is_initialized() else None
        self.world_size = dist.get_world_size() if self._group is not None else 1
        self.rank = dist.get_rank() if self._group is not None else 0

    def close(self) -> None:
        """Free the group, which holds threads and sockets. Collective."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank gets the same bits."""
        if self._group is not None:
            self._wait(tensor)
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self._group)
            self._wait(tensor)
        return tensor

    def _wait(self, tensor: Tensor) -> None:
        """For all that the device was asked to do, also on the streams on which ZeRO overlaps; update steps only."""
        if tensor.is_cuda and self.world_size > 1:
            torch.cuda.synchronize(tensor.device)

    def require_equal(self, tensors: Mapping[str, Tensor], moment: str) -> None:
        """Compare the digest of each named tensor over the ranks (min = max).

        Raises:
            TopologyMismatchError: on every rank, naming the entries and the ranks that differ from the majority.
        """
        if self._group is None:
            return
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        mine = torch.tensor([_digest(t) for t in tensors.values()], dtype=torch.int64, device=device)
        extremes = torch.stack([mine, -mine])
        dist.all_reduce(extremes, op=dist.ReduceOp.MIN, group=self._group)
        if torch.equal(extremes[0], -extremes[1]):
            return
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine, group=self._group)
        table = torch.stack(gathered).cpu()
        majority = table.mode(dim=0).values
        wrong = [
            f"{name} on rank {', '.join(str(r) for r in torch.nonzero(table[:, i] != majority[i]).flatten().tolist())}"
            for i, name in enumerate(tensors)
            if bool((table[:, i] != majority[i]).any())
        ]
        raise TopologyMismatchError(
            f"{moment}: the active units differ between ranks: {'; '.join(wrong)} (of {self.world_size} ranks). "
            "Restart from the last checkpoint"
        )


def _digest(tensor: Tensor) -> int:
    raw = tensor.cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 2  # 62 bits: its negative fits too
