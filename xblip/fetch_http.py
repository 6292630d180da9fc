"""Files from hosts that are allowed, by one connection each to an address that was looked at before.

A name is resolved once, and the connection goes to an address that this gave: a name that leads elsewhere the second time
(DNS rebinding) leads nowhere. httpcore is the lower half of httpx; the upper would read proxies from the environment,
follow redirects, unpack bodies and parse the URL a second time, in its own way.
"""

import contextlib
import functools
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

import xblip
from xblip.errors import MediaError, in_units, some_of

MAX_URL = 8192
"""Characters."""
LOOK_SECONDS = 0.25
"""Between looks at whether anybody still waits for what a host is about to send."""
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
HEADERS = {
    "User-Agent": f"xblip/{xblip.__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
LETTERS = re.compile(r"[!-\[\]-~]+")
"""What may stand in a URL: ASCII that is visible, without the backslash, which parsers take for different things."""
HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
UNICAST = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def split_url(url: str, label: str) -> SplitResult:
    """Splits a URL.

    Raises:
      MediaError: it is too long, or no URL.
    """
    if len(url) > MAX_URL:
        raise MediaError(f"Cannot fetch {label}: it is longer than {MAX_URL} characters. Give a shorter URL.")
    try:
        parts = urlsplit(url)
        if LETTERS.fullmatch(url) and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise MediaError(
        f"Cannot fetch {label}: it is no URL. Percent-encode blanks, backslashes and letters beyond ASCII."
    )


def parse_domains(domains: Collection[str]) -> set[tuple[str, int | None]]:
    """Returns hosts with their ports; None for 80 and 443.

    Raises:
      ValueError: one of them, which it names, is no host.
    """
    found = set()
    for domain in domains:
        host, colon, port = domain.lower().partition(":")
        if not HOST.fullmatch(host) or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16)):
            raise ValueError(domain)
        found.add((host, int(port) if colon else None))
    return found


def public_addresses(host: str) -> list[str]:
    """Resolves a host.

    Raises:
      ValueError: it has no address, or one that is not public; it says so.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError("its host is not known. Check the address.") from None
    addresses = list(dict.fromkeys(address[0] for *_, address in found))
    if not all(map(is_public, addresses)):
        raise ValueError("its host has an address that is not public. Send the file as a data URL.")
    return addresses


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, and so is the IPv4 address inside of it, if there is one.

    6to4 addresses are not: nobody should use them any more (RFC 7526), and Python's versions differ about them.
    """
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved
    if parsed.ipv4_mapped or parsed in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed in UNICAST and parsed.is_global and parsed.sixtofour is None


@dataclass(frozen=True)
class Download:
    """A file that a host has begun to send.

    Attributes:
      mime_type: what the host calls it; "" if it does not.
      path: of the URL that it came from in the end.
      chunks: its bytes.
    """

    mime_type: str
    path: str
    chunks: Iterator[bytes]


@dataclass(frozen=True)
class Hosts:
    """The hosts that files are fetched from.

    Attributes:
      domains: as they were given, for messages.
      resolve: gives the addresses of a host that may be connected to, or raises `ValueError` with the reason.
    """

    domains: Sequence[str]
    resolve: Callable[[str], Sequence[str]] = public_addresses

    @contextlib.contextmanager
    def open(
        self, url: str, label: str, *, max_bytes: int, seconds: float, check: Callable[[], None]
    ) -> Iterator[Download]:
        """Asks for a file, following redirects to hosts that are allowed; what goes wrong while it is read is told here too.

        Args:
          url: begins with http: or https:.
          label: how errors call it.
          max_bytes: that its host may announce. How many come, whoever reads them counts.
          seconds: until its last byte.
          check: called again and again while it is waited for, but for connecting; what it raises ends that.

        Raises:
          MediaError: it is no URL, its host is not allowed or not public, does not answer, answers too slowly or something
            else than the file, or the file is too large.
        """
        patience = _Patience(time.monotonic() + seconds, check)
        try:
            for redirected in range(MAX_REDIRECTS + 1):
                parts = split_url(url, label)
                self._check(parts, label, bool(redirected))
                with self._ask(parts, label, patience) as response:
                    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                    if response.status in REDIRECTS and b"location" in headers:
                        url = _next(url, headers[b"location"], label)
                        continue
                    _check_answer(response.status, headers, label, max_bytes)
                    yield Download(headers.get(b"content-type", ""), parts.path, response.iter_stream())
                    return
            raise MediaError(
                f"Cannot fetch {label}: it redirects more than {MAX_REDIRECTS} times. Give the last address."
            )
        except httpcore.TimeoutException:
            raise MediaError(
                f"Cannot fetch {label}: it did not come within {seconds:g} s. Try again, or send the file as a data URL."
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError) as cause:
            raise MediaError(
                f"Cannot fetch {label}: the connection to its host failed ({cause}). Try again, or send the file as a data "
                "URL."
            ) from cause

    @functools.cached_property
    def _allowed(self) -> set[tuple[str, int | None]]:
        return parse_domains(self.domains)

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return httpcore.default_ssl_context()

    def _check(self, parts: SplitResult, label: str, redirected: bool) -> None:
        if "@" in parts.netloc:
            raise MediaError(f"Cannot fetch {label}: it holds a user's name. Give a URL without credentials.")
        port = parts.port or PORTS.get(parts.scheme)
        if parts.scheme in PORTS and (
            (parts.hostname, port) in self._allowed
            or ((parts.hostname, None) in self._allowed and port in PORTS.values())
        ):
            return
        what = f"it redirects to {parts.scheme}://{parts.netloc:.80}, and " if redirected else ""
        only = f"from {some_of(self.domains)} only" if self.domains else "no URLs"
        raise MediaError(f"Cannot fetch {label}: {what}this server fetches {only}. Send the file as a data URL.")

    @contextlib.contextmanager
    def _ask(self, parts: SplitResult, label: str, patience: "_Patience") -> Iterator[httpcore.Response]:
        try:
            addresses = self.resolve(parts.hostname)
        except ValueError as reason:
            raise MediaError(f"Cannot fetch {label}: {reason}") from None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        url = httpcore.URL(scheme=parts.scheme, host=parts.hostname, port=parts.port, target=target)
        backend = _Pinned(addresses, patience)
        context = self._context if parts.scheme == "https" else None
        with (
            httpcore.ConnectionPool(ssl_context=context, network_backend=backend) as pool,
            pool.stream("GET", url, headers=HEADERS) as response,
        ):
            yield response


def too_large(label: str, max_bytes: int) -> MediaError:
    """The error for a file that is larger than it may be."""
    return MediaError(
        f"Cannot fetch {label}: it is larger than the {in_units(max_bytes)} that one part may have. Send a smaller file."
    )


def _next(url: str, location: str, label: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise MediaError(f"Cannot fetch {label}: it redirects to what is no URL. Give another address.") from None


def _check_answer(status: int, headers: dict[bytes, str], label: str, max_bytes: int) -> None:
    if status != 200:
        raise MediaError(
            f"Cannot fetch {label}: its host answers {status} in the place of the file. Check the address."
        )
    encoding = headers.get(b"content-encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaError(
            f"Cannot fetch {label}: its host packs it ({encoding:.40}), though asked not to. Send the file as a data URL."
        )
    if int(headers.get(b"content-length", 0)) > max_bytes:
        raise too_large(label, max_bytes)


@dataclass(frozen=True)
class _Patience:
    """How long a host is waited for, and for whom."""

    deadline: float
    check: Callable[[], None]

    @property
    def seconds_left(self) -> float:
        """That there are for it; raises what `check` does, and `httpcore.ReadTimeout` where there are none."""
        self.check()
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout
        return left


class _Pinned(httpcore.NetworkBackend):
    """Connects to the first of some addresses that answers, whatever host is asked for, and ends all with patience."""

    def __init__(self, addresses: Sequence[str], patience: _Patience):
        self._addresses, self._patience = addresses, patience

    def connect_tcp(self, host: str, port: int, *_: Any, **options: Any) -> httpcore.NetworkStream:
        error: Exception = httpcore.ConnectError("it has no address")
        for number, address in enumerate(self._addresses):
            seconds = self._patience.seconds_left / (len(self._addresses) - number)
            try:
                return _Stream(httpcore.SyncBackend().connect_tcp(address, port, seconds), self._patience)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as cause:
                error = cause
        raise error


class _Stream(httpcore.NetworkStream):
    """A connection that ends with patience, however often a little comes."""

    def __init__(self, stream: httpcore.NetworkStream, patience: _Patience):
        self._stream, self._patience = stream, patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            seconds = min(self._patience.seconds_left, LOOK_SECONDS)
            with contextlib.suppress(httpcore.ReadTimeout):
                return self._stream.read(max_bytes, seconds)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._patience.seconds_left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._patience.seconds_left)
        return _Stream(stream, self._patience)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
