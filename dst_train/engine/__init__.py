"""Training with DeepSpeed: the only package that imports it."""

from dst_train.engine.config import compile_config

__all__ = ["DeepSpeedEditor", "Outcome", "compile_config", "run"]


def __getattr__(name: str) -> object:
    # DeepSpeed takes seconds to import; `dst-train plan` needs compile_config only.
    if name == "DeepSpeedEditor":
        from dst_train.engine.params import DeepSpeedEditor

        return DeepSpeedEditor
    if name in ("Outcome", "run"):
        from dst_train.engine import run as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
