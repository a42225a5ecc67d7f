"""densify(): the way back from sparse layers to plain linear ones."""

from __future__ import annotations

import torch
from torch import nn

from dst_train.sparse.butterfly import ButterflyLinear
from dst_train.sparse.layer import SparseLayer
from dst_train.sparse.sdgp import SdgpLinear
from dst_train.sparse.sr_ste import SrSteLinear


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """Replace the sparse layers of `model` in place by `nn.Linear` of the same weights, zeros included; returns the model.

    For export, or where the op is not at hand. What a gate, a learned order or a low-rank path does is in the weights.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLayer | SrSteLinear | ButterflyLinear | SdgpLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            dense.weight = nn.Parameter(module.to_dense().clone())
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.clone())
            dense.train(module.training)
            if not name:
                return dense
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
    return model
