"""A device that is not the CPU, on the CPU: its ops refuse tensors of two devices. A program of its own, as torch can have one such device.

Trains with masks there and on the CPU, and prints of each case whether the results are the same to the bit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dst_train.sparse import sparsify
from dst_train.topology import Topology, TopologyUpdate

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("set", {"pattern": "unstructured"}),
    ("rigl", {"pattern": "unstructured"}),
    ("mest", {"pattern": "shuffled_block", "size": 4}),
    ("rigl", {"pattern": "tile_wise", "size": 4}),
    ("srigl", {"pattern": "constant_fan_in"}),
    ("chase", {"pattern": "unstructured"}),
    ("cht", {"pattern": "unstructured"}),
    ("chts", {"pattern": "unstructured"}),
    ("set", {"pattern": "n_m", "size": 4}),
)


class There(Tensor):
    """A tensor of the other device; `held` is its content, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="there:0"
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, *args, **(kwargs or {}))

    def tolist(self) -> list[Any]:
        return self.held.tolist()


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    there = {id(t.held): t for t in tensors if isinstance(t, There)}
    copies = op.__name__.startswith(("copy_.", "_to_copy."))
    if there and not copies and any(t.dim() > 0 for t in tensors if not isinstance(t, There)):
        raise RuntimeError(f"{op}: tensors of two devices")
    target = next((t for t in flat if isinstance(t, torch.device)), None)
    held = [t.held if isinstance(t, There) else torch.device("cpu") if isinstance(t, torch.device) else t for t in flat]
    args, kwargs = pytree.tree_unflatten(held, spec)
    to_cpu = target.type == "cpu" if target is not None else not there

    def result(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_cpu:
            return value
        return there[id(value)] if id(value) in there else There(value)

    return pytree.tree_map(result, op(*args, **kwargs))


def train(method: str, rule: dict[str, Any], *, there: bool) -> tuple[dict[str, Tensor], list[TopologyUpdate]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    x, target = torch.randn(6, 16), torch.randn(6, 16)
    sparsify(model, [{"match": "0", "sparsity": 0.4, **rule}])
    if there:
        layer, x, target = model[0], There(x), There(target)
        layer._buffers = {name: None if b is None else There(b) for name, b in layer._buffers.items()}
        for name, parameter in list(layer._parameters.items()):
            setattr(layer, name, nn.Parameter(There(parameter.detach())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    topology = Topology(model, method=method, every=1, total_steps=12).bind(optimizer)
    updates = []
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        updates.append(topology.step())
    topology.load_state_dict(topology.state_dict())
    return {name: t.held if isinstance(t, There) else t for name, t in model.state_dict().items()}, updates


def main() -> None:
    _setup_privateuseone_for_python_backend("there")
    torch.there.get_amp_supported_dtype = lambda: [torch.bfloat16]
    fallback, factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(run, "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):  # would resize a tensor, which a There cannot
        factories.impl(name, lambda *a, dtype=None, **_: There(torch.arange(*a, dtype=dtype)), "PrivateUse1")
    for method, rule in CASES:
        (plain, expected), (other, updates) = (train(method, rule, there=there) for there in (False, True))
        equal = all(torch.equal(plain[name], other[name]) for name in plain)
        same = [(u.digest, u.layers) for u in expected] == [(u.digest, u.layers) for u in updates]
        print(method, rule, "the same" if equal and same else "differs", flush=True)
    os._exit(0)  # autograd's thread for the device cannot be joined


if __name__ == "__main__":
    main()
