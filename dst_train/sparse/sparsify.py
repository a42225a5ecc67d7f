"""sparsify(): swap the linear layers of any model for sparse ones, by rules over module names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from dst_train.sparse.budget import densities
from dst_train.sparse.butterfly import ButterflyLinear
from dst_train.sparse.layer import SparseLayer, generator_of
from dst_train.sparse.linear import DiagonalLinear
from dst_train.sparse.masked import PATTERNS, MaskedLinear
from dst_train.sparse.report import LayerReport, SparsityReport
from dst_train.sparse.sdgp import SdgpLinear
from dst_train.sparse.sr_ste import SrSteLinear


class RuleError(ValueError):
    """A rule that cannot be followed. `number`: its place in the list, from 0."""

    def __init__(self, message: str, number: int = 0) -> None:  # a default: exceptions are pickled by their message
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class SparsityRule:
    """`match`: glob over module names. `sparsity`: share of absent weights in [0, 1), or None to keep the layer dense.

    `pattern`: `diagonal` (see `DiagonalLinear`, `band`), `sr_ste`, `butterfly` and `sdgp` (see
    `SrSteLinear`, `ButterflyLinear` and `SdgpLinear`, `size`), or one of `MaskedLinear`'s (`size`:
    of `n_m`, blocks and `tile_wise`). `permute`: `none`, or `learned` for a permutation of the
    inputs of diagonal layers.
    """

    match: str
    sparsity: float | None
    pattern: str = "diagonal"
    band: int = 1
    size: int = 1
    permute: str = "none"


_OWNERS = {
    "band": ("diagonal",),
    "size": ("n_m", "block", "shuffled_block", "tile_wise", "sr_ste", "butterfly", "sdgp"),
}


# Layers whose pattern is fixed: `Topology` never updates them.
_NotDynamic = SrSteLinear | ButterflyLinear | SdgpLinear


@dataclass(frozen=True)
class _Options:
    """Arguments of sparsify that layers take."""

    explore: float
    gate: str | None
    rank: int
    accumulation: int


@dataclass(frozen=True)
class _Dense:
    """A layer that can be replaced; weight is [out_features, in_features]."""

    name: str
    weight: Tensor
    bias: Tensor | None


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by name, in the order of `named_modules()`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


def sparsify(
    model: nn.Module,
    rules: Sequence[Any],
    *,
    budget: str = "uniform",
    seed: int = 0,
    explore: float = 1.0,
    gate: str | None = None,
    accumulation: int = 1,
    rank: int = 0,
) -> SparsityReport:
    """Replace `nn.Linear` (and Hugging Face `Conv1D`) modules of `model` in place.

    For each layer the last rule whose glob matches its name decides. The values start from the layer's own dense
    initialisation (see `DiagonalLinear.load_dense_init`); a trained layer is *not* approximated.

    Args:
        rules: SparsityRule, or mappings or objects with the same keys (`{"match": "*.mlp.*", "sparsity": 0.9}`).
        budget: see `dst_train.sparse.densities`.
        seed: the first active units are a pure function of (seed, position of the layer in the model).
        explore: active units at first, as a multiple of those that stay (`Topology` shrinks them); inf for all.
        gate: of diagonal layers, see `DiagonalLinear`; `straight_through` for the method dynadiag.
        accumulation: micro-batches per optimiser step; of `SrSteLinear`.
        rank: of the low-rank path of diagonal layers, see `LowRank`; 0 for none.

    Raises:
        RuleError (a ValueError), where it is about one rule; ValueError: a rule that matches no linear layer, a pattern or budget that is unknown, a band or size that does not
            divide a layer or does not belong to the pattern, a model that is a linear layer, a weight that two modules share or that
            is frozen, a layer with hooks, sparsity outside [0, 1), explore below 1, an unknown gate, a rank above a layer's size, a gate or rank for a layer
            that is not diagonal, or `sdgp` under another budget than `uniform`.
    """
    rules = rules if isinstance(rules, str | Mapping) else list(rules)
    if isinstance(rules, str | Mapping) or not all(isinstance(r, Mapping) or hasattr(r, "match") for r in rules):
        raise ValueError(
            f"rules={rules!r}: expected a list of rules, such as [{{'match': '*.mlp.*', 'sparsity': 0.9}}]"
        )
    parsed = []
    for number, rule in enumerate(rules):
        with _about(number):
            parsed.append(_parse(rule))
    dense = _replaceable(model)
    if "" in dense:
        raise ValueError(
            "the model is a linear layer itself and cannot be replaced in place; wrap it: nn.Sequential(model)"
        )
    chosen = _assign(parsed, dense, model)
    for layer, number in chosen:
        if parsed[number].pattern == "sdgp" and budget != "uniform":
            raise RuleError(
                f"layer {layer.name} (rule {parsed[number].match!r}): pattern sdgp prunes gradients, not weights, and has no share "
                f"in budget {budget!r}; use uniform",
                number,
            )
    density = densities(
        budget,
        [(layer.weight.shape[0], layer.weight.shape[1]) for layer, _ in chosen],
        [1.0 - (parsed[number].sparsity or 0.0) for _, number in chosen],
    )
    dense_parameters = sum(p.numel() for p in model.parameters())
    options, built = _Options(explore, gate, rank, accumulation), []
    for i, ((layer, number), share) in enumerate(zip(chosen, density, strict=True)):
        with _about(number):
            built.append(_build(layer, parsed[number], share, generator_of("first units", seed, i), options))
    for report, module in built:
        parent, _, child = report.name.rpartition(".")
        module.replaced = type(model.get_submodule(report.name))
        setattr(model.get_submodule(parent), child, module)
    _keep_off_the_fast_path(model)
    return SparsityReport(tuple(r for r, _ in built), sum(p.numel() for p in model.parameters()), dense_parameters)


@contextmanager
def _about(number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RuleError(str(error), number) from error


def _parse(rule: Any) -> SparsityRule:
    names = [f.name for f in fields(SparsityRule)]
    if isinstance(rule, Mapping):
        unknown = sorted(set(rule) - set(names))
        if unknown or "match" not in rule or "sparsity" not in rule:
            raise ValueError(f"rule {dict(rule)}: needs match and sparsity, and knows only {', '.join(names)}")
        rule = SparsityRule(**rule)
    else:
        rule = SparsityRule(**{name: getattr(rule, name) for name in names})
    known = ("diagonal", *PATTERNS, "sr_ste", "butterfly", "sdgp")
    if rule.pattern not in known:
        raise ValueError(f"rule {rule.match!r}: pattern {rule.pattern!r} is unknown; choose one of {', '.join(known)}")
    for key, owners in _OWNERS.items():
        if getattr(rule, key) != 1 and rule.pattern not in owners:
            raise ValueError(f"rule {rule.match!r}: {key} belongs to {', '.join(owners)}, not to {rule.pattern}")
    if rule.permute not in ("none", "learned"):
        raise ValueError(f"rule {rule.match!r}: permute {rule.permute!r} is unknown; choose one of none, learned")
    if rule.permute != "none" and rule.pattern != "diagonal":
        raise ValueError(f"rule {rule.match!r}: permute belongs to diagonal, not to {rule.pattern}")
    for key, kinds in (("sparsity", Real | None), ("band", Integral), ("size", Integral)):
        if not isinstance(getattr(rule, key), kinds):
            raise ValueError(f"rule {rule.match!r}: {key} {getattr(rule, key)!r} is not a number as it should be")
    if rule.sparsity is not None and not 0.0 <= rule.sparsity < 1.0:
        raise ValueError(f"rule {rule.match!r}: sparsity {rule.sparsity} must be in [0, 1), or null to stay dense")
    return rule


def _replaceable(model: nn.Module) -> dict[str, _Dense]:
    found = {}
    for name, module in model.named_modules():
        # Exactly nn.Linear: subclasses such as the out_proj of nn.MultiheadAttention are read by their weight, not called.
        if type(module) is nn.Linear:
            found[name] = _Dense(name, module.weight, module.bias)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            found[name] = _Dense(name, module.weight.t(), module.bias)  # type: ignore[operator, arg-type]
    return found


def _assign(rules: list[SparsityRule], dense: dict[str, _Dense], model: nn.Module) -> list[tuple[_Dense, int]]:
    """The layers to replace, each with the number of the rule that decides."""
    for number, rule in enumerate(rules):
        if not any(fnmatchcase(name, rule.match) for name in dense):
            near = difflib.get_close_matches(rule.match, list(dense), n=3, cutoff=0.0)
            raise RuleError(
                f"rule {rule.match!r} matches no linear layer of the model; it has, for example, {', '.join(near)}",
                number,
            )
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    places = Counter(id(child) for m in model.modules() for child in m._modules.values())
    chosen = []
    for name, layer in dense.items():
        matching = [number for number, rule in enumerate(rules) if fnmatchcase(name, rule.match)]
        if not matching or rules[matching[-1]].sparsity is None:
            continue
        with _about(matching[-1]):
            _check_replaceable(name, model.get_submodule(name), owners, places)
        chosen.append((layer, matching[-1]))
    return chosen


def _check_replaceable(name: str, module: nn.Module, owners: Counter[int], places: Counter[int]) -> None:
    """owners, places: how often each parameter and each module is in the model, by id."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if owners[id(weight)] > 1 or places[id(module)] > 1:
        raise ValueError(
            f"layer {name} shares its weight with another module; keep it dense: add a rule with sparsity: null"
        )
    if not weight.requires_grad:
        raise ValueError(
            f"layer {name} is frozen (its weight has requires_grad=False), and a sparse layer in its place would start to "
            "learn; keep it dense: add a rule with sparsity: null, or freeze it after sparsify()"
        )
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if any(hooks) or "forward" in vars(module):
        raise ValueError(
            f"layer {name} has hooks, as torch.nn.utils.weight_norm registers them, which its replacement would not have; "
            "remove them or register them after sparsify(), or keep it dense: add a rule with sparsity: null"
        )


def _build(
    layer: _Dense, rule: SparsityRule, density: float, generator: torch.Generator, options: _Options
) -> tuple[LayerReport, SparseLayer | _NotDynamic]:
    try:
        # The constructor's own draw from the global generator is overwritten below: leave no trace of it.
        with torch.random.fork_rng(devices=[layer.weight.device] if layer.weight.is_cuda else []):
            module = _module(layer, rule, density, generator, options)
    except ValueError as error:
        raise ValueError(f"layer {layer.name} (rule {rule.match!r}): {error}") from error
    module.load_dense_init(layer.weight, layer.bias)
    if module.bias is not None and layer.bias is not None:
        module.bias.requires_grad_(layer.bias.requires_grad)
    report = LayerReport(
        name=layer.name,
        in_features=module.in_features,
        out_features=module.out_features,
        pattern=rule.pattern,
        size=rule.band if rule.pattern == "diagonal" else rule.size,
        num_final=module.num_final,
        num_units=module.num_units,
        target_sparsity=1.0 - density,
        parameters=sum(p.numel() for p in module.parameters()),
        dense_parameters=layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel()),
        rank=options.rank,
    )
    return report, module


def _keep_off_the_fast_path(model: nn.Module) -> None:
    """In evaluation mode torch's encoder layers read the weights of their children instead of calling them, where the activation is one
    of which they have a fused version: without such a mark they call them, as in training."""
    for module in model.modules():
        if any(isinstance(child, SparseLayer | _NotDynamic) for child in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _module(
    layer: _Dense, rule: SparsityRule, density: float, generator: torch.Generator, options: _Options
) -> DiagonalLinear | MaskedLinear | _NotDynamic:
    out_features, in_features = layer.weight.shape
    shared: dict[str, Any] = {
        "sparsity": max(0.0, 1.0 - density),
        "bias": layer.bias is not None,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    drawn: dict[str, Any] = {"explore": options.explore, "generator": generator, **shared}
    if rule.pattern == "diagonal":
        learned, gate, rank = rule.permute == "learned", options.gate, options.rank
        return DiagonalLinear(in_features, out_features, band=rule.band, gate=gate, permute=learned, rank=rank, **drawn)
    if options.rank:
        raise ValueError(f"rank={options.rank}: only diagonal layers have a low-rank path, this one is {rule.pattern}")
    if rule.pattern == "sr_ste":
        return SrSteLinear(in_features, out_features, size=rule.size, accumulation=options.accumulation, **shared)
    if rule.pattern == "butterfly":
        return ButterflyLinear(in_features, out_features, size=rule.size, generator=generator, **shared)
    if rule.pattern == "sdgp":
        return SdgpLinear(in_features, out_features, size=rule.size, **shared)
    if options.gate is not None:
        raise ValueError(
            f"gate={options.gate!r}, as method dynadiag needs: only diagonal layers have gates, this one is {rule.pattern}"
        )
    return MaskedLinear(in_features, out_features, pattern=rule.pattern, size=rule.size, **drawn)
