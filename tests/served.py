"""A server of the toy model on a free port of this machine, for tests that speak HTTP to it."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from xblip.serve import COMPLETIONS, Server
from xblip.serve_config import ServeConfig
from xblip.serve_run import server_of


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
    found = Running(server_of(model, ServeConfig(**settings), name=name))
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


SOURCE = '''
import os
import signal
import time
from dataclasses import dataclass

import xblip
from xblip.testing import ToyModality


class Rows(ToyModality):
    """Rows of four numbers from a text file, which may also ask for trouble."""

    name = "rows"
    cue = "input : "
    suffixes = (".txt",)
    mime_types = ("text/plain",)

    @dataclass
    class Config(ToyModality.Config):
        max_numbers: int = 100

    def load(self, source):
        file = xblip.media_file(source, kind="rows")
        if file is None:
            return super().load(source)
        with xblip.decoding(file.label, "rows of four numbers"), file.open() as opened:
            words = opened.read().decode().split()
            if words[0] == "sleep":
                time.sleep(float(words[1]))
            if words[0] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            numbers = [float(word) for word in words if word not in ("sleep", "die")]
        if len(numbers) > self.config.max_numbers:
            raise xblip.MediaError(f"Cannot read {file.label}: more than max_numbers = {self.config.max_numbers}.")
        return super().load(numbers)


class Lines(Rows):
    name = "lines"
    cue = "red input : "


@xblip.hookimpl
def register_modalities(register):
    register(Rows)
'''
LINES = {"type": "input_lines", "input_lines": {"data": "NCAzIC0yIDE=", "format": "txt"}}  # 4 3 -2 1
QUESTION = "what is this ?"
KEY = "secret-1"


def rows(content):
    """A part that holds this file, or has this URL."""
    return {"type": "rows_url", "rows_url": {"url": data_url(content) if isinstance(content, bytes) else content}}


ROWS = rows(b"1 2 3 4 4 3 2 1")


BAD = {"model": "toys", "messages": user(QUESTION)}


def asking(*content):
    """A body of one turn."""
    return {**BAD, "messages": user(*content)}


def post(served, body, **headers):
    """A response to a body: bytes, or what JSON holds."""
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return httpx.post(served.url + COMPLETIONS, content=content, headers=headers, timeout=30)


def ask(client, *content, **settings):
    """A completion by the official client."""
    return client.chat.completions.create(model="toys", messages=user(*content), **settings)
