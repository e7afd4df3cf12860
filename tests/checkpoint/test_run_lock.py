"""Two processes cannot have one directory; a killed one does not keep it."""

import os
import re
import signal
import subprocess
import sys

import pytest

from v4train.checkpoint import run_lock

HOLD = """
import sys, time
from v4train.checkpoint import run_lock
lock = run_lock.RunLock(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""


def test_the_second_process_is_told_who_holds_the_directory(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            expected = f"{re.escape(str(tmp_path))} is in use by process {holder.pid} on .+ since .+Stop that process, or choose another"
            with pytest.raises(ValueError, match=expected):
                run_lock.RunLock(tmp_path)
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
    with run_lock.RunLock(tmp_path):
        pass


def test_it_can_be_taken_again_after_release(tmp_path):
    first = run_lock.RunLock(tmp_path / "new" / "run")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
        run_lock.RunLock(tmp_path / "new" / "run")
    first.release()
    first.release()
    with run_lock.RunLock(tmp_path / "new" / "run"):
        pass
