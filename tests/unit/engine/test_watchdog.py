"""What hangs ends, with its stack; what takes its time in pieces does not."""

from __future__ import annotations

from tests.unit.ops.process import python

HANGS = """
import os, signal, subprocess, time
from dst_train.engine.watchdog import Watchdog

def never_ends():
    time.sleep(60)

watchdog = Watchdog(3, minutes=1 / 60)
for step in range(8):
    watchdog.begin(f"step {step}")
    time.sleep(0.25)
watchdog.begin("what is suspended")
time.sleep(0.4)
subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.1)
watchdog.rest()
time.sleep(1.5)
closed = Watchdog(4, minutes=1 / 60)
closed.begin("what nobody waits for")
closed.close()
print("alive", flush=True)
watchdog.begin("step 8")
never_ends()
"""


def test_what_takes_too_long_ends_the_process_and_is_named() -> None:
    done = python(HANGS)
    assert (done.returncode, done.stdout) == (1, "alive\n")
    first, *stacks = done.stderr.splitlines()
    assert first.startswith("rank 3 on ")
    assert ": step 8 has not ended after 0.0166667 minutes (monitor.hang_minutes)" in first
    assert any("never_ends" in line for line in stacks)
