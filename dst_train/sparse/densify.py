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
    """Put dense layers of the same weights, zeros included, in the place of the sparse ones of `model`; returns the model.

    They are of the class that `sparsify` found there, so that the library of the model reads its state: `nn.Linear`, or Hugging
    Face's `Conv1D`. For export, or where the op is not at hand. What a gate, a learned order or a low-rank path does is in the weights.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLayer | SrSteLinear | ButterflyLinear | SdgpLinear):
            dense = _dense(module)
            if not name:
                return dense
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
    return model


def _dense(layer: SparseLayer | SrSteLinear | ButterflyLinear | SdgpLinear) -> nn.Module:
    weight, sizes = layer.to_dense(), (layer.in_features, layer.out_features)
    with torch.device("meta"):
        if layer.replaced is nn.Linear:
            dense: nn.Module = nn.Linear(*sizes, bias=layer.bias is not None)
        else:  # Conv1D, of the transposed weight
            dense, weight = layer.replaced(*reversed(sizes)), weight.t()
    dense.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.clone(), requires_grad=layer.bias.requires_grad)
    return dense.train(layer.training)
