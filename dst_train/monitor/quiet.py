"""Known noise of libraries that says nothing about a run; errors and other warnings stay."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries(rank: int) -> None:
    """Call before DeepSpeed is imported. Ranks other than 0 say warnings and errors only."""
    # "No CUDA runtime is found", once a rank, on every machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    deepspeed.addFilter(_is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)(\..*)?$")
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the warning that a machine without a GPU uses its CPU."""
    return not record.getMessage().startswith("Setting accelerator to CPU.")
