"""From the model of a job to a dense module."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from dst_train.job import JobError
from dst_train.job.schema import MLPModel, Model, TimmModel, TransformersModel
from dst_train.models.causal_lm import causal_lm
from dst_train.models.mlp import MLP

# timm does not check arguments: a wrong one surfaces as any of these, somewhere inside the model
BAD_ARGUMENT = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError)


def build(spec: Model, *, seed: int) -> nn.Module:
    """The model on the CPU in fp32; its initial values depend on `seed` only, and global generators are left as found.

    Raises JobError for a name that the library does not have, with those that are close, and for arguments it does not
    take.
    """
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would also seed the CUDA generators, which fork_rng then has to restore
        torch.default_generator.manual_seed(seed)
        if isinstance(spec, MLPModel):
            return MLP(spec.in_features, spec.hidden_features, spec.num_classes)
        return causal_lm(spec) if isinstance(spec, TransformersModel) else _timm(spec)


def _timm(spec: TimmModel) -> nn.Module:
    import timm  # here, as it takes seconds that no other job should wait

    model_class = getattr(timm.models, spec.name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        model_class = None
    if model_class is None and not timm.is_model(spec.name):
        close = difflib.get_close_matches(spec.name, timm.list_models(), n=5)
        hint = f"close names: {', '.join(close)}" if close else "see timm.list_models()"
        raise JobError(f"model.name: timm {timm.__version__} has no model {spec.name!r}; {hint}", ("model", "name"))
    try:
        return model_class(**spec.args) if model_class else timm.create_model(spec.name, **spec.args)
    except BAD_ARGUMENT as error:
        raise JobError(
            f"model.args: timm cannot build {spec.name} with {spec.args}: {type(error).__name__}: {error}",
            ("model", "args"),
        ) from error


def untrained(spec: Model) -> Model:
    """Without the arguments that fetch weights, for a model whose weights are replaced anyway."""
    if not isinstance(spec, TimmModel):
        return spec
    args = {key: value for key, value in spec.args.items() if key not in ("pretrained", "checkpoint_path")}
    return spec.model_copy(update={"args": args})
