"""`python -m dst_ops`: build the kernels ahead of the first use and say which backend serves what."""

from dst_ops.build import load
from dst_ops.report import backend_report

load()
print(backend_report())
