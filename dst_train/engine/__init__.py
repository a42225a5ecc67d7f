"""Training with DeepSpeed: the only package that imports it.

`import dst_train.engine.params` makes `Topology.bind` accept DeepSpeed engines.
"""

from typing import TYPE_CHECKING, Any

from dst_train.engine.build import sparsify_by, topology_of
from dst_train.engine.config import compile_config

if TYPE_CHECKING:
    from dst_train.engine.runner import Outcome, run
    from dst_train.engine.session import leave_distributed

__all__ = ["Outcome", "compile_config", "leave_distributed", "run", "sparsify_by", "topology_of"]


def __getattr__(name: str) -> Any:
    # DeepSpeed takes seconds to import, and `dst-train plan` needs what stands above only.
    if name in ("Outcome", "run"):
        from dst_train.engine import runner

        return getattr(runner, name)
    if name == "leave_distributed":
        from dst_train.engine import session

        return session.leave_distributed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
