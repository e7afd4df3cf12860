"""One process at a time in a directory.

Two trainers in one run directory (a job that was restarted while its predecessor still hangs) would delete each other's unfinished
steps. So whoever writes holds `flock` on a lock file. The operating system ties that lock to the process, not to the file: after
``kill -9`` it is free, and a lock file that lies around means nothing. (The rejected alternative, a file with a pid in it, needs a
guess about whether that pid is still alive, and on which host.) The file's content only feeds the message to the loser.
"""

import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
from types import TracebackType

_log = logging.getLogger(__name__)

FILE_NAME = ".lock"

# What file systems without locks answer (NFS without lockd, Lustre mounted without `flock`).
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Exclusive use of a directory, from construction to `release` or the end of the process.

    Raises:
        ValueError: another process, or another lock of this process, holds the directory; the message names it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(self.directory / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe_holder(self._file)
            self._close()
            raise ValueError(f"{self.directory} is in use by {holder}. Stop that process, or choose another run directory.") from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                self._close()
                raise
            _log.warning("%s is on a file system without locks (%s): nothing stops a second run there", self.directory, error.strerror)
        self._write_holder()

    def release(self) -> None:
        """Gives the directory back. The file stays: deleting it would let two processes lock two different files."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            self._close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _write_holder(self) -> None:
        assert self._file is not None
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, holder.encode(), 0)
        except OSError as error:
            # A full disk must not keep a run from starting: only the message to a second process gets poorer.
            _log.warning("%s could not be written: %s", self.directory / FILE_NAME, error.strerror)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _describe_holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
