"""Media read in processes of their own, within limits of memory and time: a hostile file kills one of these, no more.

What a worker sends back is safetensors, never a pickle: whoever has read hostile bytes may be hostile. Workers are forked
by a process that has imported everything and read nothing (`xblip.decode_worker`), so that another one stands ready in a
moment. Linux only.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from xblip import config as configs
from xblip.decode_process import ForkServer, Worker, quoted
from xblip.decode_worker import LONGEST, OUT_OF_MEMORY
from xblip.errors import ClosedError, InputError, MediaError, in_units, suggest
from xblip.modality import Modality

COUNTED = ("loads", "refused", "timed_out", "out_of_memory", "died", "failed", "replaced")
HEADROOM = 2**20
"""Bytes that a reply may have beside the tensors themselves."""
ABORTS_FOR_MEMORY = (b"bad_alloc", b"memory allocation of")
"""What C++ and Rust say when they abort for want of memory."""
log = logging.getLogger("xblip")


@dataclass(frozen=True)
class DecodeCounters:
    """What a pool has done.

    Attributes:
      loads: files that were read.
      refused: files that their modality refused, and those whose tensors are too large.
      timed_out, out_of_memory: files that went over a limit.
      died: files at which a worker died.
      failed: files at which a modality raised what it should not.
      replaced: workers that were put in the place of others.
      alive: workers that live now.
      seconds: how long workers have read, in all.
    """

    loads: int
    refused: int
    timed_out: int
    out_of_memory: int
    died: int
    failed: int
    replaced: int
    alive: int
    seconds: float


class DecodePool:
    """Workers that read media, for many threads at once; a context manager that ends them.

    Those who come while all workers are busy wait, and are served in the order in which they came.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        workers: int = 2,
        seconds: float = 20.0,
        memory_bytes: int = 2 * 2**30,
        result_bytes: int = 512 * 2**20,
    ):
        """Starts the workers, which takes as long as it takes to import what the modalities need.

        Args:
          modalities: by the names that `load` will be given. Their own names and settings go to the workers, nothing else.
          workers: how many.
          seconds: for one file.
          memory_bytes: address space that a worker may get for files, beside what it has before the first.
          result_bytes: of the tensors of one file.

        Raises:
          PluginError: a worker cannot build a modality, for one since it is registered by hand and not installed.
          ConfigError: a limit is too small.
        """
        self.workers, self.seconds, self.memory_bytes, self.result_bytes = workers, seconds, memory_bytes, result_bytes
        configs.at_least(self, workers=1, seconds=0.1, memory_bytes=1, result_bytes=1)
        parts = {name: (modality.name, configs.plain(modality.config)) for name, modality in modalities.items()}
        self._order = {"modalities": parts, "memory_bytes": memory_bytes, "result_bytes": result_bytes}
        self._lock, self._forking = threading.Lock(), threading.Lock()
        self._counts, self._busy_seconds, self._closed = dict.fromkeys(COUNTED, 0), 0.0, False
        self._waiting: deque[Future[int]] = deque()
        self._kills = _kills_for_memory()
        self._server = ForkServer(self._order)
        self._at: list[Worker | None] = [self._server.fork() for _ in range(workers)]
        self._free = deque(range(workers))

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        seconds: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Tensor]:
        """Reads one file; to be called from any thread.

        Args:
          name: of the modality.
          path: of the file.
          seconds: from when a worker has it until its tensors are here; None for the pool's own.
          check: called when a worker is free for it; what it raises ends that.

        Returns:
          What the modality's `load` gave, on the CPU.

        Raises:
          MediaError: the modality refuses the file, it takes more time or memory than it may, or the worker died of it.
          InputError: there is no such modality here.
          ClosedError: the pool is closed.
        """
        if name not in self._order["modalities"]:
            raise InputError(f'No modality of this pool is called "{name}".{suggest(name, self._order["modalities"])}')
        place = self._take()
        try:
            check()
            facts, tensors = self._ask(place, name, path, self.seconds if seconds is None else seconds)
        finally:
            self._give_back(place)
        return self._result(name, path, facts, tensors)

    def revive(self) -> None:
        """Puts others in the place of workers that died while they had nothing to do.

        Raises:
          PluginError: they do not start.
        """
        with self._lock:
            dead = [place for place in self._free if not (self._at[place] and self._at[place].is_alive())]
            for place in dead:
                self._free.remove(place)
        with contextlib.ExitStack() as places:
            for place in dead:
                places.callback(self._give_back, place)
            for place in dead:
                self._replace(place)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.pid for worker in self._at if worker]

    @property
    def counters(self) -> DecodeCounters:
        """What the pool has done until now."""
        alive = sum(worker is not None and worker.is_alive() for worker in self._at)
        with self._lock:
            return DecodeCounters(alive=alive, seconds=self._busy_seconds, **self._counts)

    def close(self) -> None:
        """Ends all workers. Files that are being read are lost, and those who wait get a `ClosedError`."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            free, self._free = self._free, deque()
        for turn in waiting:
            turn.set_exception(_closed())
        with self._forking:
            self._server.close()
        for place in free:
            if self._at[place]:
                self._at[place].close()

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> int:
        """Returns a place at which no other thread is, waiting for it behind those who wait already."""
        with self._lock:
            if self._closed:
                raise _closed()
            if self._free:
                return self._free.popleft()
            turn: Future[int] = Future()
            self._waiting.append(turn)
        return turn.result()

    def _give_back(self, place: int) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set_result(place)
            elif not self._closed:
                self._free.append(place)
            elif self._at[place]:
                self._at[place].close()

    def _ask(self, place: int, name: str, path: str | Path, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Lets the worker at a place read a file; returns its answer. Whatever goes wrong, a good one stands there then."""
        if not (self._at[place] and self._at[place].is_idle()):  # killed by someone, or another could not be had
            self._replace(place)
        worker = self._at[place]
        try:
            with self._timed():
                facts, tensors = worker.ask([name, os.fspath(path)], seconds, self.result_bytes + HEADROOM)
        except TimeoutError:
            self._replace(place)
            self._count("timed_out")
            raise MediaError(
                f"Cannot read the {name}: it was not read within the {seconds:g} s that there are for one. Give a smaller "
                "or shorter one."
            ) from None
        except (EOFError, OSError, ValueError, RecursionError):
            raise self._why_died(name, path, self._replace(place), worker) from None
        except BaseException:  # the answer is still to come, and must not be taken for another's
            self._replace(place)
            raise
        if facts.get("used_up"):
            self._replace(place)
        return facts, tensors

    def _replace(self, place: int) -> int:
        """Ends the worker at a place and puts another there; returns the wait status of the first."""
        old, self._at[place] = self._at[place], None
        status = int(signal.SIGKILL)
        with self._forking:
            if old:
                with contextlib.suppress(ConnectionError):
                    status = self._server.end(old)
            if self._closed:
                raise _closed()
            try:
                self._at[place] = self._server.fork()
            except ConnectionError:
                log.warning("The process that forks decode workers has died, and they with it: starting another.")
                self._server.close()
                self._server = ForkServer(self._order)
                self._at[place] = self._server.fork()
        self._count("replaced")
        return status

    def _why_died(self, name: str, path: str | Path, status: int, worker: Worker) -> MediaError:
        code, said = os.waitstatus_to_exitcode(status), worker.said
        kills, self._kills = self._kills, _kills_for_memory()
        if (
            code == OUT_OF_MEMORY
            or (code == -signal.SIGABRT and any(words in said for words in ABORTS_FOR_MEMORY))
            or (code == -signal.SIGKILL and self._kills > kills)
        ):
            self._count("out_of_memory")
            return MediaError(
                f"Cannot read the {name}: reading it takes more than the {in_units(self.memory_bytes)} of memory that "
                "there are for one, so it is too large or damaged. Give a smaller one."
            )
        self._count("died")
        how = f"exit status {code}" if code >= 0 else signal.strsignal(-code)
        log.warning("A decode worker died (%s) of %s %s.%s", how, name, path, quoted(said.decode(errors="replace")))
        return MediaError(
            f"Cannot read the {name}: the process that read it died ({how}), so it is probably damaged. Give another file."
        )

    def _result(self, name: str, path: str | Path, facts: dict[str, Any], tensors: bytes) -> dict[str, Tensor]:
        """What a worker's answer, which may be anything, means."""
        from safetensors.torch import load

        outcome = facts.get("outcome")
        if outcome == "refused":
            self._count("refused")
            raise MediaError(_text(facts.get("message")))
        if outcome == "too_large":
            self._count("refused")
            raise MediaError(
                f"Cannot read the {name}: its tensors take more than the {in_units(self.result_bytes)} that there are "
                "for one. Give a smaller one."
            )
        said = _text(facts.get("traceback"))
        if outcome == "read":
            try:
                loaded = load(tensors)
                self._count("loads")
                return loaded
            except (SafetensorError, ValueError, KeyError, TypeError) as cause:
                said = f"its answer holds no tensors: {cause}"
        self._count("failed")
        log.error("A decode worker failed at %s %s.%s", name, path, quoted(said))
        raise MediaError(f"Cannot read the {name}: reading it failed, and the log says why. Give another file.")

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy_seconds += time.monotonic() - started

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def _text(said: Any) -> str:
    """What a worker says, without the halves of characters that no encoding takes."""
    return str(said)[:LONGEST].encode(errors="replace").decode()


def _closed() -> ClosedError:
    return ClosedError("No more media are read here, as this is being shut down: ask again in a while.")


def _kills_for_memory() -> int:
    """How many processes the system has killed for want of memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
