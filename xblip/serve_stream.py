"""An answer as server-sent events, told piece by piece as the engine says it."""

from collections.abc import AsyncIterator, Sequence

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from xblip.errors import XBlipError
from xblip.requests import Event, Finished, Said, Ticket
from xblip.serve_metrics import Metrics
from xblip.serve_reply import Replies, error_body, event, status_of
from xblip.serve_schema import ChatRequest


class EventStream(StreamingResponse):
    """A response whose requests are given up and counted when it ends: whole, by an error, or by a client that leaves.

    That client may leave before the first piece is asked for, when no `finally` of what makes the pieces would run.
    """

    def __init__(
        self,
        asked: ChatRequest,
        replies: Replies,
        events: AsyncIterator[tuple[int, Event]],
        tickets: Sequence[Ticket],
        *,
        metrics: Metrics,
        path: str,
        started: float,
    ):
        """Makes the response; nothing is said until it is sent.

        Args:
          asked: the request.
          replies: what writes the pieces.
          events: what the engine tells, each with the choice that it is of.
          tickets: of the choices.
          metrics: where it is noted how it ended.
          path: that was asked, for counting.
          started: when, by the monotonic clock.
        """
        self._asked, self._replies, self._tickets = asked, replies, tickets
        self._metrics, self._path, self._started = metrics, path, started
        self._finished: dict[int, Finished] = {}
        self._status = 499
        super().__init__(self._pieces(events), media_type="text/event-stream", headers={"X-Request-Id": replies.id})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()
            known = {"started": self._started, "id": self._replies.id}
            if self._status == 200:
                self._metrics.answered(self._path, self._ordered, **known)
            else:
                self._metrics.told(self._path, self._status, **known)

    @property
    def _ordered(self) -> list[Finished]:
        return [self._finished[index] for index in range(len(self._tickets))]

    async def _pieces(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        async for index, one in events:
            if isinstance(one, XBlipError):
                self._status, kind = status_of(one)
                yield event(error_body(str(one), kind, place=one.place))
                return
            if index not in begun:
                begun.add(index)
                yield event(self._replies.first(index))
            if isinstance(one, Said):
                if one.text or self._asked.logprobs:
                    yield event(self._replies.said(index, one))
                continue
            self._finished[index] = one
            yield event(self._replies.last(index, one))
            if len(self._finished) == len(self._tickets):
                break
        if self._asked.stream_options and self._asked.stream_options.include_usage:
            yield event(self._replies.usage(self._ordered))
        yield event("[DONE]")
        self._status = 200
