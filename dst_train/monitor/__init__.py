"""What people see of a run: the run directory, TensorBoard, the progress line, and quiet libraries."""

from dst_train.monitor.environment import environment
from dst_train.monitor.monitor import Monitor
from dst_train.monitor.quiet import quiet_libraries
from dst_train.monitor.run_directory import RunDirectory

__all__ = ["Monitor", "RunDirectory", "environment", "quiet_libraries"]
