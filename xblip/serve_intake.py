"""How requests come in: so many at once, bodies bounded together, files read for as long as somebody waits for them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from xblip.errors import BusyError
from xblip.requests import late
from xblip.sample import Sample
from xblip.serve_config import ServeConfig
from xblip.serve_media import MediaDoor
from xblip.serve_reply import LeftError, Refused
from xblip.serve_sample import sample_of
from xblip.serve_schema import ChatRequest

READERS = 32
"""Requests whose files are fetched and read at once."""


class Intake:
    """Takes requests in, for one event loop.

    Attributes:
      count: requests that are being taken in.
      held_bytes: of their bodies.
      is_leaving: no more are taken in.
      has_given_up: those that were are not waited for either.
    """

    def __init__(self, door: MediaDoor, config: ServeConfig):
        """Begins with nothing.

        Args:
          door: that lets media in.
          config: the server's.
        """
        self.door, self.config = door, config
        self.count = self.held_bytes = 0
        self.is_leaving = self.has_given_up = False
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="xblip server reads")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of the places for requests that come in, which a thousand clients would else fill memory by."""
        if self.is_leaving:
            raise shutting_down()
        if self.count >= self.config.max_requests:
            message = f"{self.config.max_requests} requests are being taken in already: ask again in a while."
            raise Refused(429, message, "rate_limit_error", "too_many_requests")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request, whose bytes count as held until the context ends."""
        most, body, size = self.config.max_body_bytes, bytearray(), 0
        length = request.headers.get("content-length", "")
        too_large = Refused(413, f"The body is larger than the {most} bytes that are allowed: send less.")
        if length.isdecimal() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.config.request_seconds):
                async for piece in request.stream():
                    body += piece
                    size += len(piece)
                    self.held_bytes += len(piece)
                    if size > most:
                        raise too_large
                    if self.held_bytes > self.config.max_held_bytes:
                        raise BusyError(
                            "The requests that are being taken in are too large together: ask again in a while."
                        )
            yield body
        except ClientDisconnect:
            raise LeftError from None
        finally:
            self.held_bytes -= size

    async def sample(
        self, asked: ChatRequest, *, caller: str, leaving: asyncio.Task, started: float, size: int
    ) -> Sample:
        """Lets the files of a request in, by a thread that may wait for them; texts wait for nobody.

        Args:
          asked: the request.
          caller: whose it is.
          leaving: done when the client has left.
          started: when the request came, by `time.monotonic`.
          size: of its body, which counts as held until its thread is done with it.

        Raises:
          InputError, MediaError: a message or a part is wrong; `place` says which.
          LeftError, LateError, Refused: nobody waits any more.
        """
        check = partial(self._check, leaving, started)
        make = partial(sample_of, asked, self.door, caller=caller, most=self.config.max_parts, check=check)
        if not asked.has_inputs:
            return make()
        reading = asyncio.ensure_future(self.aside(make))
        left = started + self.config.request_seconds - time.monotonic()
        try:
            await asyncio.wait({reading, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not reading.done():
                self.held_bytes += size
                reading.add_done_callback(partial(self._let_go, size))
        if not reading.done():
            check()
            raise late(self.config.request_seconds)
        return reading.result()

    def _let_go(self, size: int, reading: asyncio.Future) -> None:
        self.held_bytes -= size
        if not reading.cancelled():
            reading.exception()  # which has been told, as nobody waited

    def _check(self, leaving: asyncio.Task, started: float) -> None:
        if self.has_given_up:
            raise shutting_down()
        if leaving.done():
            raise LeftError
        if time.monotonic() - started > self.config.request_seconds:
            raise late(self.config.request_seconds)

    async def aside(self, work: Callable[[], Any]) -> Any:
        """Runs what waits for files in a thread of those that do."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def close(self) -> None:
        """Takes nothing more in; threads end when they are done."""
        self.is_leaving = self.has_given_up = True
        self._readers.shutdown(wait=False)


def shutting_down() -> Refused:
    """Returns the error of who asks a server that ends."""
    return Refused(503, "The server is shutting down: ask again in a while.", "server_error", "shutting_down")
