"""What stands in Ray's proxies, before the replicas: which of them gets a request, and how Ray's own errors are said.

Every machine has a proxy, so neither torch nor the server is imported here.
"""

import random
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xblip.serve_reply import error_body, event

SESSION = "x-session-id"
ORDERS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id"}
"""Headers by which a client could tell Ray's proxy what to do."""
LOST = 500, "The replica that had this request died, or failed at it: ask again."
ERRORS = {
    404: (503, "The server is starting or shutting down: ask again in a while."),
    408: (504, "No replica had answered in time: ask again in a while."),
    429: (429, "Too many requests wait for a replica already: ask again in a while."),
    503: (503, "No replica takes requests now: ask again in a while."),
}
"""What is said where Ray gives a status itself: another status, and why."""
KINDS = {429: "rate_limit_error", 504: "timeout_error"}


class Router(ConsistentHashRouter):
    """One session's requests go to one replica, which knows its files; others to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranked = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or pending_request.metadata.session_id:
            return ranked
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


class Words:
    """Says Ray's own errors in OpenAI's form, also in the midst of a stream; the replicas say theirs themselves."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        reply = _Reply(send)
        await self.app({**scope, "headers": [*filter(_is_let_in, scope["headers"])]}, receive, reply.send)
        await reply.end(scope, receive)


class _Reply:
    """A response as it passes; what Ray says itself is held back."""

    def __init__(self, send: Send):
        self._send = send
        self._error: tuple[int, str] | None = LOST
        self._is_stream = self._has_begun = self._has_ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            is_ours = message["status"] < 400 or kind == "application/json"
            self._error = None if is_ours else ERRORS.get(message["status"], LOST)
            self._has_begun, self._is_stream = is_ours, kind.startswith("text/event-stream")
            message["headers"] = _first_of_each(message["headers"])
        elif message["type"] == "http.response.body":
            self._has_ended = not message.get("more_body")
        if self._error is None:
            await self._send(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        """Says what is missing."""
        if self._error:
            status, text = self._error
            headers = {"Retry-After": "1"} if status in (429, 503) else None
            body = error_body(text, KINDS.get(status, "server_error"))
            await JSONResponse(body, status, headers=headers)(scope, receive, self._send)
        elif self._is_stream and not self._has_ended:
            body = event(error_body(LOST[1], "server_error"))
            await self._send({"type": "http.response.body", "body": body})


def _is_let_in(header: tuple[bytes, bytes]) -> bool:
    """Whether Ray may see it: it takes no orders from clients, and cannot read every session."""
    name, value = header
    return name not in ORDERS and (name not in (SESSION.encode(), b"x-request-id") or value.isascii())


def _first_of_each(headers: Any) -> list[tuple[bytes, bytes]]:
    """Ray adds a request id of its own to ours."""
    found: dict[bytes, tuple[bytes, bytes]] = {}
    for name, value in headers:
        found.setdefault(name.lower(), (name, value))
    return [*found.values()]


def middlewares() -> list[Middleware]:
    """What Ray's proxies are told to put before themselves."""
    return [Middleware(Words)]
