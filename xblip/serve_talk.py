"""A conversation of the page: what a visitor gave and asked, and what was answered, in the server's terms.

It holds files as paths and not as what was read of them: asked again, they are known by their content, as over HTTP, and a
conversation that nobody goes on with holds no tensors.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xblip.errors import InputError
from xblip.requests import Finished, Request
from xblip.sample import Media, Sample, Turn
from xblip.serve_intake import Visit
from xblip.serve_reply import refusal

if TYPE_CHECKING:
    from xblip.serve import Server


@dataclass(frozen=True)
class Given:
    """A file that a visitor gave, and what reads it."""

    modality: str
    path: Path


@dataclass
class Exchange:
    """A question about files, and its answer, or why there is none."""

    question: str
    files: tuple[Given, ...]
    answer: str = ""
    error: str = ""


async def answers(
    server: "Server", exchange: Exchange, earlier: Sequence[Exchange], *, caller: str, path: str
) -> AsyncIterator[None]:
    """Has a question answered, by the way that requests over HTTP go.

    Args:
      server: that answers.
      exchange: the question; its `answer` grows, or its `error` is said.
      earlier: exchanges of the conversation; those that failed or said nothing are no turns of it.
      caller: who asks.
      path: of the page, for counting.

    Yields:
      None, whenever more is known. Leaving gives the answer up.
    """
    started, id, status = time.monotonic(), f"page-{uuid.uuid4().hex}", 499
    leaving, taken = asyncio.get_running_loop().create_future(), contextlib.ExitStack()
    try:
        visit = taken.enter_context(server.intake.place(started))
        visit.leaving = leaving
        sample = await server.intake.read(visit, partial(_sample, server, exchange, earlier, visit))
        request = Request(sample, seconds=visit.seconds_left, caller=caller)
        async for event in server.engine.astream(request):
            taken.close()
            if isinstance(event, Finished):
                exchange.answer, status = event.answer.text, 200
                server.metrics.answered(path, [event], started=started, id=id)
            else:
                exchange.answer += event.text
            yield
    except Exception as error:
        status, body, _ = refusal(error)
        exchange.error = body["error"]["message"]
        yield
    finally:
        leaving.cancel()
        taken.close()
        if status != 200:
            server.metrics.told(path, status, started=started, id=id, error=exchange.error)


def _sample(server: "Server", exchange: Exchange, earlier: Sequence[Exchange], visit: Visit) -> Sample:
    answered = [one for one in earlier if one.answer and not one.error]
    count, most = sum(len(one.files) for one in (*answered, exchange)), server.config.max_parts
    if count > most:
        raise InputError(
            f"There are {count} files in this conversation, and {most} are allowed: give fewer, or begin a new one."
        )
    turns = [Turn((*_media(server, one.files, visit), one.question), one.answer) for one in answered]
    return Sample(exchange.question, _media(server, exchange.files, visit), None, turns)


def _media(server: "Server", files: Sequence[Given], visit: Visit) -> list[Media]:
    return [
        Media(given.modality, server.door.take(given.modality, given.path, visit, place=given.path.name))
        for given in files
    ]
