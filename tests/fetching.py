"""What the tests of fetching share: a modality, and a host of the network that answers as a test likes."""

import contextlib
import hashlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable

import pytest

from xblip.errors import MediaError
from xblip.fetch import FetchConfig, Fetched, Fetcher
from xblip.testing import ToyModality

DATA = bytes(range(256)) * 20
TOO_LARGE = "it is larger than the 1000 B that one part may have. Send a smaller file."


class Toy(ToyModality):
    suffixes = (".txt", ".wav")


def of(**settings) -> Fetcher:
    return Fetcher(FetchConfig(**settings))


def assert_it_is(fetched: Fetched, data: bytes, suffix: str) -> None:
    """It holds these bytes under that ending, and is gone afterwards."""
    with fetched as part:
        assert part.path.read_bytes() == data and part.path.suffix == suffix
        assert part.size == len(data) and part.digest == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert not part.path.exists()


def refusal(fetcher: Fetcher, url: str) -> str:
    """Why it is not fetched."""
    with pytest.raises(MediaError) as caught:
        fetcher.fetch(url, Toy)
    begin = f"Cannot fetch {url!r}: " if len(url) <= 80 else f"Cannot fetch {url[:80] + '...'!r}: "
    assert str(caught.value).startswith(begin)
    return str(caught.value).removeprefix(begin)


class Site:
    """A host of the network, by the name media.example; what it answers, each test says."""

    def __init__(self, context: ssl.SSLContext | None = None):
        site = self
        self.asked: list[bytes] = []
        self.answers: dict[str, bytes | Callable[[socket.socket], None]] = {}

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    site.answer(context.wrap_socket(self.request, server_side=True) if context else self.request)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        self.asked.append(head)
        answer = self.answers[head.split()[1].decode()]
        if callable(answer):
            answer(connection)
        else:
            connection.sendall(answer)
        connection.close()

    def fetcher(self, **settings) -> Fetcher:
        """Takes media.example for a public host."""
        domains = settings.pop("allowed_media_domains", [f"media.example:{self.port}"])
        return Fetcher(FetchConfig(domains, **settings), resolve=lambda host: ["127.0.0.1"])

    def url(self, path: str = "/x", scheme: str = "http") -> str:
        return f"{scheme}://media.example:{self.port}{path}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
