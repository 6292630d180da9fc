"""A server of the toy model on a free port of this machine, for tests that speak HTTP to it."""

import base64
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from xblip.serve import Server
from xblip.serve_config import ServeConfig


class Running:
    """A running server.

    Attributes:
      server: what runs.
      url: where, without a path.
    """

    def __init__(self, server: Server):
        self.server = server
        settings = uvicorn.Config(server.app, port=0, log_level="error", timeout_graceful_shutdown=10)
        self._uvicorn = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._uvicorn.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def running(model: Any, name: str = "toys", **settings: Any) -> Iterator[Running]:
    found = Running(Server(model, ServeConfig(**settings), name=name))
    try:
        yield found
    finally:
        found.stop()


def data_url(data: bytes, mime_type: str = "text/plain") -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


def user(*content: Any) -> list[dict[str, Any]]:
    """Messages of one turn: texts, and parts as they are."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]
