"""How requests come in: so many at once, what they hold bounded together, files read for as long as somebody waits."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from xblip.errors import BusyError, ClosedError, in_units
from xblip.requests import late
from xblip.sample import Sample
from xblip.serve_config import ServeConfig
from xblip.serve_reply import LeftError, Refused

READERS = 32
"""Requests whose files are fetched and read at once."""


class Visit:
    """A request while it is taken in: what is held of it, and whether anybody waits for it; for any thread.

    Attributes:
      started, ends: when it came and when its time is over, by `time.monotonic`.
      size: bytes that are held of it.
      leaving: done when its client has left; None until that is looked at.
      reading: done when its files are read.
    """

    def __init__(self, intake: "Intake", started: float):
        self.started, self.ends = started, started + intake.config.request_seconds
        self.size = 0
        self.leaving: asyncio.Future | None = None
        self.reading: asyncio.Future | None = None
        self._intake = intake

    def hold(self, size: int) -> None:
        """Counts bytes as held.

        Raises:
          BusyError, Refused: they are too many, those of others counted, or by themselves.
        """
        most = self._intake.config.max_held_bytes
        self._count(size)
        if self.size > most:
            message = f"What is read of these files takes more than {in_units(most)}: send fewer, or smaller ones."
            raise Refused(413, message)
        if self._intake.held_bytes > most:
            raise BusyError("The requests that are being taken in are too large together: ask again in a while.")

    def let_go(self, size: int) -> None:
        """Counts bytes as held no more."""
        self._count(-size)

    def _count(self, size: int) -> None:
        with self._intake.counting:
            self.size += size
            self._intake.held_bytes += size

    @property
    def seconds_left(self) -> float:
        """That there are for the answer: a moment where there are none, after which whoever answers tells so."""
        return max(0.001, self.ends - time.monotonic())

    def check(self) -> None:
        """Raises an error if nobody waits any more, or not for longer."""
        if self._intake.has_given_up:
            raise shutting_down()
        if self.leaving and self.leaving.done():
            raise LeftError
        if time.monotonic() > self.ends:
            raise late(self._intake.config.request_seconds)

    def end(self, reading: asyncio.Future | None = None) -> None:
        """Lets go of all."""
        self.let_go(self.size)
        if reading and not reading.cancelled():
            reading.exception()  # which has been told, as nobody waited


class Intake:
    """Takes requests in, for one event loop.

    Attributes:
      config: the server's.
      count: requests that are being taken in.
      held_bytes: of them.
      counting: held while these are counted.
      is_leaving: no more are taken in.
      has_given_up: those that were are not waited for either.
    """

    def __init__(self, config: ServeConfig):
        """Begins with nothing."""
        self.config = config
        self.count = self.held_bytes = 0
        self.counting = threading.Lock()
        self.is_leaving = self.has_given_up = False
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="xblip server reads")

    @contextlib.contextmanager
    def place(self, started: float) -> Iterator[Visit]:
        """One of the places for requests that come in, which a thousand clients would else fill memory by.

        What is held in it is let go when it ends, or when the thread that reads for it has ended.
        """
        if self.is_leaving:
            raise shutting_down()
        if self.count >= self.config.max_requests:
            message = f"{self.config.max_requests} requests are being taken in already: ask again in a while."
            raise Refused(429, message, "rate_limit_error", "too_many_requests")
        self.count += 1
        visit = Visit(self, started)
        try:
            yield visit
        finally:
            self.count -= 1
            if visit.reading and not visit.reading.done():
                visit.reading.add_done_callback(visit.end)
            else:
                visit.end()

    async def body(self, request: Request, visit: Visit) -> bytearray:
        """Returns the body of a request, whose bytes count as held."""
        most, body = self.config.max_body_bytes, bytearray()
        length = request.headers.get("content-length", "")
        too_large = Refused(413, f"The body is larger than the {most} bytes that are allowed: send less.")
        if length.isdecimal() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.config.request_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise too_large
                    visit.hold(len(piece))
        except ClientDisconnect:
            raise LeftError from None
        return body

    async def read(self, visit: Visit, make: Callable[[], Sample]) -> Sample:
        """Lets a thread make a sample, for as long as somebody waits for it.

        Args:
          visit: for which; `leaving` is known.
          make: what waits for files, and checks by `visit` whether to go on.

        Raises:
          LeftError, LateError, ClosedError: nobody waits any more.
        """
        visit.reading = reading = asyncio.ensure_future(self.aside(make))
        waited = {reading, visit.leaving}
        await asyncio.wait(waited, timeout=visit.seconds_left, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            visit.check()
            raise late(self.config.request_seconds)
        visit.reading = None
        return reading.result()

    async def aside(self, work: Callable[[], Any]) -> Any:
        """Runs what waits for files in a thread of those that do."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def close(self) -> None:
        """Takes nothing more in; threads end when they are done."""
        self.is_leaving = self.has_given_up = True
        self._readers.shutdown(wait=False)


def shutting_down() -> ClosedError:
    """Returns the error of who asks a server that ends."""
    return ClosedError("The server is shutting down: ask again in a while.")
