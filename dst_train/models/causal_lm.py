"""Language models of Hugging Face transformers, built from their configuration; nothing is ever downloaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from dst_train.job import JobError
from dst_train.job.schema import TransformersModel

# not for a job to choose: training needs neither a cache of keys and values nor tuples, and has train.precision
FIXED: dict[str, Any] = {"use_cache": False, "return_dict": True, "dtype": "float32"}
NOT_ARGUMENTS = {*FIXED, "model_type", "transformers_version"}

# values are checked by the configuration, or surface somewhere inside the model
BAD_VALUE = (
    StrictDataclassError,
    TypeError,
    ValueError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    LookupError,
    ImportError,
)


def causal_lm(spec: TransformersModel) -> nn.Module:
    """The model, from int64 tokens [batch, length] to logits [batch, length, vocab_size], with initial values from
    torch's global generator.

    Raises JobError for a name without a causal language model and for arguments that its configuration does not take.
    """
    import transformers  # here, as it takes seconds that no other job should wait

    _check_name(spec.name)
    try:
        _check_names_of_arguments(spec, transformers.AutoConfig.for_model(spec.name))
        config = transformers.AutoConfig.for_model(spec.name, **spec.args, **FIXED)
        model = transformers.AutoModelForCausalLM.from_config(config)
    except BAD_VALUE as error:
        raise JobError(
            f"model.args: transformers {transformers.__version__} cannot build {spec.name} with {spec.args}: "
            f"{type(error).__name__}: {error}",
            ("model", "args"),
        ) from error
    model.register_forward_hook(_logits)
    return model


def _check_name(name: str) -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if name not in NAMES:
        raise JobError(
            f"model.name: transformers {__version__} has no causal language model {name!r}{_near(name, NAMES)}",
            ("model", "name"),
        )


def _check_names_of_arguments(spec: TransformersModel, defaults: Any) -> None:
    """A configuration would keep whatever it is given."""
    known = {*defaults.to_dict(), *defaults.attribute_map} - NOT_ARGUMENTS
    for name in spec.args:
        if name not in known:
            raise JobError(
                f"model.args: the configuration of {spec.name} has no {name!r}{_near(name, known)}", ("model", "args")
            )


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=5)
    return f"; close names: {', '.join(close)}" if close else f"; it has, for example, {', '.join(sorted(known)[:5])}"


def _logits(model: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return output.logits
