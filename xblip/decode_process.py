"""The server's side of the processes that decode media: what `DecodePool` holds of the fork server and of each worker."""

import json
import logging
import math
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from xblip.decode_worker import LONGEST, ORDER_BYTES, REPLY
from xblip.errors import PluginError

SAID_BYTES = 2**16
"""How much is kept of what a worker writes to its standard output and error while it reads one file."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "CUDA_VISIBLE_DEVICES": ""}
"""Of workers: no threads that a fork would lose, no address space for threads' own heaps, no accelerator."""
log = logging.getLogger("xblip")


class Worker:
    """A worker as the pool sees it; one thread uses it at a time.

    Attributes:
      pid: its process.
      said: the end of what it wrote to its standard output and error while it read the last file.
    """

    def __init__(self, pid: int, channel: socket.socket, errors: int, folder: str):
        self.pid, self.said, self._channel, self._errors, self._folder = pid, b"", channel, errors, folder
        os.set_blocking(errors, False)
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._poll.register(errors, select.POLLIN)

    def ask(self, order: list[str], seconds: float, most: int) -> tuple[dict[str, Any], bytes]:
        """Sends it an order; returns its facts and its tensors as safetensors, of `most` bytes at most.

        Raises:
          TimeoutError: there was no answer in time.
          EOFError, OSError, ValueError, RecursionError: it died, or its answer is none.
        """
        deadline, self.said = time.monotonic() + seconds, b""
        self._channel.sendall(json.dumps(order).encode() + b"\n")
        facts, tensors = REPLY.unpack(self._receive(REPLY.size, deadline))
        if facts > ORDER_BYTES or tensors > most:
            raise ValueError("Its answer is too long.")
        facts = json.loads(self._receive(facts, deadline))
        if not isinstance(facts, dict):
            raise ValueError("Its answer has no facts.")
        return facts, bytes(self._receive(tensors, deadline))

    def is_alive(self) -> bool:
        """Whether it can still be heard; also while another thread uses it."""
        return self._peek() != b""

    def is_idle(self) -> bool:
        """Whether it lives, and has said nothing unasked."""
        return self._peek() is None

    def close(self) -> None:
        """Forgets it, when it has ended; its temporary files too."""
        self._listen()
        self._channel.close()
        os.close(self._errors)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _peek(self) -> bytes | None:
        try:
            return self._channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _listen(self) -> bool:
        """Takes in what it has written to its standard output and error; returns whether it may write more."""
        try:
            said = os.read(self._errors, SAID_BYTES)
        except BlockingIOError:
            return True
        self.said = (self.said + said)[-SAID_BYTES:]
        return said != b""

    def _receive(self, count: int, deadline: float) -> bytearray:
        data, have = bytearray(count), 0
        while have < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            for descriptor, _ in self._poll.poll(math.ceil(1000 * left)):
                if descriptor == self._errors:
                    if not self._listen():
                        self._poll.unregister(descriptor)
                    continue
                size = self._channel.recv_into(memoryview(data)[have:])
                if not size:
                    raise EOFError
                have += size
        return data


class ForkServer:
    """The process that forks the workers; one thread talks to it at a time.

    Its methods raise `ConnectionError` when it has died, and its workers with it.
    """

    def __init__(self, order: dict[str, Any]):
        """Starts it, and waits until it has built the modalities."""
        self._folder = tempfile.TemporaryDirectory(prefix="xblip-decode-", ignore_cleanup_errors=True)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"from xblip.decode_worker import main; main({theirs.fileno()})"
        with tempfile.TemporaryFile() as errors:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                )
            try:
                error = json.loads(self._ask(json.dumps({**order, "folder": self._folder.name}).encode()))
            except ConnectionError:
                errors.seek(0)
                error = {"message": "their process died.", "traceback": errors.read().decode(errors="replace")}
        if error:
            self.close()
            log.error("The process that forks decode workers does not start.%s", quoted(error["traceback"]))
            raise PluginError(f"The workers that decode media do not start: {error['message']}")

    def fork(self) -> Worker:
        """Makes a worker."""
        try:
            folder = tempfile.mkdtemp(dir=self._folder.name)
        except FileNotFoundError as cause:  # it was closed, and no other could be started
            raise ConnectionResetError from cause
        channel, theirs = socket.socketpair()
        errors, write = os.pipe()
        try:
            pid = int(self._ask(f"fork {folder}".encode(), [theirs.fileno(), write]))
        except ConnectionError:
            channel.close()
            os.close(errors)
            raise
        finally:
            theirs.close()
            os.close(write)
        return Worker(pid, channel, errors, folder)

    def end(self, worker: Worker) -> int:
        """Kills a worker, if it lives, with all programs it has started; returns its wait status."""
        try:
            return int(self._ask(f"end {worker.pid}".encode()))
        finally:
            worker.close()

    def close(self) -> None:
        """Ends it and its workers."""
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _ask(self, message: bytes, descriptors: Sequence[int] = ()) -> bytes:
        try:
            socket.send_fds(self._control, [message], descriptors)
            answer = self._control.recv(ORDER_BYTES)
        except OSError as cause:
            raise ConnectionResetError from cause
        if not answer:
            raise ConnectionResetError
        return answer


def quoted(said: str) -> str:
    """What a process said, for the log: indented, so that nothing in it passes for a line of the log's own."""
    text = said.partition("\n\nExtension modules:")[0][-LONGEST:]  # which faulthandler lists
    lines = ("".join(letter if letter.isprintable() else "?" for letter in line) for line in text.splitlines())
    return "".join(f"\n    {line}" for line in lines)
