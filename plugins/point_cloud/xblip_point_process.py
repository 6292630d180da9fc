"""A process that has open3d ready and reads each file in a fork of itself, whose crash or hang costs that file alone.

Importing open3d takes a second or more, reading a mesh some milliseconds: a fork has it imported already. Where processes
cannot be forked (Windows), each file takes a process that imports it.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("xblip_point_open3d.py")
CAN_FORK = hasattr(os, "fork") and sys.platform == "linux"


@dataclass(frozen=True)
class Ended:
    """How the reading of a file ended: an exit status, below 0 of a signal, and what it said last."""

    status: int
    reason: str


class Open3DProcess:
    """Starts the process with the first file, and anew after it was killed; threads and forks may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        if CAN_FORK:
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def read(self, path: Path, result: Path, *, timeout_seconds: float) -> Ended:
        """Reads a file into a result, as the program says.

        Raises:
          TimeoutError: it took longer.
        """
        if not CAN_FORK:
            return _read_alone(path, result, timeout_seconds)
        with self._lock:
            told = self._asked(path, result, timeout_seconds)
        return Ended(*json.loads(told)) if told else _read_alone(path, result, timeout_seconds)

    def _asked(self, path: Path, result: Path, timeout_seconds: float) -> str:
        """Returns what the process answers; nothing if it has ended, as it does where open3d cannot be imported."""
        process = self._started()
        try:
            process.stdin.write(json.dumps([str(path), str(result)]) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], timeout_seconds)[0]:
                raise TimeoutError
            return process.stdout.readline()
        except BrokenPipeError:
            return ""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, with what it is reading."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM), "--many"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        return self._process

    def _forget(self) -> None:
        """In a fork, whose parent's process answers its parent."""
        self._process, self._lock = None, threading.Lock()


def _read_alone(path: Path, result: Path, timeout_seconds: float) -> Ended:
    command = [sys.executable, str(PROGRAM), str(path), str(result)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_seconds, text=True, errors="replace")
    except subprocess.TimeoutExpired as cause:
        raise TimeoutError from cause
    return Ended(done.returncode, (done.stderr.strip().splitlines() or [""])[-1])


OPEN3D = Open3DProcess()
