"""Known noise of libraries that says nothing about a run; errors and other warnings stay."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries(rank: int) -> None:
    """Call before DeepSpeed is imported. Ranks other than 0 say warnings and errors only."""
    # "No CUDA runtime is found", once a rank, on every machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # DeepSpeed's accelerator detection and its INFO lines about every default.
    os.environ.setdefault("DS_LOG_LEVEL", "WARNING")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)(\..*)?")
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
