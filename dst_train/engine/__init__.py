"""Training with DeepSpeed: the only package that imports it.

`import dst_train.engine.params` makes `Topology.bind` accept DeepSpeed engines.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dst_train.engine.build import build_topology, sparsify_model
from dst_train.engine.config import compile_config

if TYPE_CHECKING:
    from dst_train.engine.load import load_model
    from dst_train.engine.manifest import CheckpointError
    from dst_train.engine.resume import JobChangedError
    from dst_train.engine.runner import Outcome, run
    from dst_train.engine.session import shutdown_distributed

__all__ = [
    "CheckpointError",
    "JobChangedError",
    "Outcome",
    "build_topology",
    "compile_config",
    "load_model",
    "run",
    "shutdown_distributed",
    "sparsify_model",
]
# DeepSpeed takes seconds to import, and `dst-train plan` needs what stands above only.
_WITH_DEEPSPEED = {
    "CheckpointError": "manifest",
    "JobChangedError": "resume",
    "Outcome": "runner",
    "shutdown_distributed": "session",
    "load_model": "load",
    "run": "runner",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_DEEPSPEED:
        return getattr(import_module(f"{__name__}.{_WITH_DEEPSPEED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
