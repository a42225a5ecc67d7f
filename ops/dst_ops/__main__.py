"""`python -m dst_ops`: build the kernels ahead of the first use and say which backend serves what."""

import torch

from dst_ops.build import load
from dst_ops.report import backend_report

load()
if torch.cuda.is_available():
    load("cuda")
print(backend_report())
