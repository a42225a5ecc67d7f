"""Known noise is hidden, and nothing else."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from dst_train.monitor import quiet_libraries

LOGGERS = ("", "DeepSpeed", "torch.utils.cpp_extension")


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What the libraries' loggers let through; loggers and warning filters are put back afterwards."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, list(logger.filters), logger.propagate) for logger in loggers]
    collector = _Collector()
    for logger in loggers:
        logger.addHandler(collector)
        logger.propagate = False
    with warnings.catch_warnings():
        yield collector.texts
    for logger, (level, filters, propagate) in zip(loggers, before, strict=True):
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.filters[:] = filters
        logger.propagate = propagate


@pytest.mark.parametrize("rank", [0, 1])
def test_deepspeed_says_warnings_but_not_that_there_is_no_gpu(heard, rank):
    quiet_libraries(rank)
    logger = logging.getLogger("DeepSpeed")
    logger.info("zero_allow_untested_optimizer: True")
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("checkpoint %s was not found", "x")
    logger.error("broken")
    assert heard == ["checkpoint x was not found", "broken"]


def test_cpp_extension_says_errors_only(heard):
    quiet_libraries(0)
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.warning("No CUDA runtime is found, using CUDA_HOME='/usr/local/cuda'")
    logger.error("ninja failed")
    assert heard == ["ninja failed"]


def test_other_ranks_say_warnings_and_errors_only(heard):
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    quiet_libraries(0)
    root.info("rank 0")
    quiet_libraries(1)
    root.info("rank 1")
    root.warning("warning of rank 1")
    assert heard == ["rank 0", "warning of rank 1"]


@pytest.mark.parametrize(
    ("category", "module", "hidden"),
    [
        (FutureWarning, "deepspeed.comm.torch", True),
        (FutureWarning, "torch.distributed.distributed_c10d", True),
        (FutureWarning, "torch.optim", False),
        (FutureWarning, "deepspeed_tools", False),
        (UserWarning, "deepspeed.comm.torch", False),
    ],
)
def test_only_future_warnings_of_the_distributed_libraries_are_hidden(heard, category, module, hidden):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries(0)
        warnings.warn_explicit("changes soon", category, "file.py", 1, module=module)
    assert [w.category for w in caught] == ([] if hidden else [category])
