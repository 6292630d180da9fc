"""Parts from hosts: those that are allowed and public, within limits, whatever a host answers."""

import socket
import ssl
import subprocess
import time
from collections.abc import Callable

import pytest
from fetching import DATA, TOO_LARGE, Site, Toy, assert_it_is, of, refusal

from xblip.errors import ClosedError
from xblip.fetch import FetchConfig, Fetcher
from xblip.fetch_http import LOOK_SECONDS, is_public, public_addresses

pytestmark = pytest.mark.usefixtures("no_file_left")
WELL = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def test_a_file_of_an_allowed_host(site):
    site.answers["/some/file.wav?a=b&c=%20"] = WELL % len(DATA) + DATA
    assert_it_is(site.fetcher().fetch(site.url("/some/file.wav?a=b&c=%20#part"), Toy), DATA, ".txt")
    lines = site.asked[0].decode().lower().split("\r\n")
    assert f"host: media.example:{site.port}" in lines and "accept-encoding: identity" in lines


@pytest.mark.parametrize(("path", "suffix"), [("/a.WAV", ".wav"), ("/a%2Ewav", ".wav"), ("/a.exe", ""), ("/", "")])
def test_the_path_tells_the_ending_where_the_type_does_not(site, path, suffix):
    site.answers[path] = b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n" + DATA
    assert_it_is(site.fetcher().fetch(site.url(path), Toy), DATA, suffix)


def test_no_url_unless_a_host_is_allowed():
    assert refusal(of(), "https://example.org/x") == "this server fetches no URLs. Send the file as a data URL."


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "https://www.example.org/",  # as in vLLM, a host stands for itself alone
        "https://example.org.evil.com/",
        "https://example.org:8443/",
        "https://other.example/",
        "https://other.example:8081/",
        "https://evil.com#@example.org/",
        "https://evil.com?@example.org/",
        "http:///x",
        "http:example.org",
        "https://[::1]/",
        "https://2130706433/",
    ],
)
def test_hosts_that_are_not_allowed(url, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("it was looked up"))
    fetcher = of(allowed_media_domains=["example.org", "other.example:8080"])
    expected = "this server fetches from example.org, other.example:8080 only. Send the file as a data URL."
    assert refusal(fetcher, url) == expected


@pytest.mark.parametrize(
    "url", ["https://me@example.org/", "https://me:secret@example.org/", "https://example.org@evil.com/"]
)
def test_credentials(url):
    fetcher = of(allowed_media_domains=["example.org"])
    assert refusal(fetcher, url) == "it holds a user's name. Give a URL without credentials."


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a b",
        "https://example.org/\n",
        "https://evil.com\\@example.org/",
        "https://bücher.example/",
        "https://example.org:70000/",
        "https://example.org:x/",
        "https://[example.org/",
        "https://example.org/\ud800",
    ],
)
def test_what_is_no_url(url):
    fetcher = of(allowed_media_domains=["example.org"])
    assert refusal(fetcher, url) == "it is no URL. Percent-encode blanks, backslashes and letters beyond ASCII."


def test_a_very_long_url():
    fetcher = of(allowed_media_domains=["example.org"])
    expected = "it is longer than 8192 characters. Give a shorter URL."
    assert refusal(fetcher, "https://example.org/" + "x" * 10_000) == expected


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "239.1.1.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::", "2001:0:7f00:1::",
        "100::1", "4000::1", "2002:101:101::",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


class Names:
    """The network's names, each of which gives other addresses each time."""

    def __init__(self, monkeypatch, *answers: list[str]):
        self.answers, self.asked, self.connected = list(answers), [], []
        monkeypatch.setattr("socket.getaddrinfo", self.resolve)
        monkeypatch.setattr("socket.create_connection", self.connect)

    def resolve(self, host, *_, **__):
        self.asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.answers.pop(0)]

    def connect(self, address, *_, **__):
        self.connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")


PRIVATE = "its host has an address that is not public. Send the file as a data URL."


def test_a_host_is_resolved_once_and_that_address_connected_to(monkeypatch):
    names = Names(monkeypatch, ["1.1.1.1", "1.0.0.1"], ["127.0.0.1"])
    assert refusal(of(allowed_media_domains=["example.org"]), "https://example.org/x") == (
        "the connection to its host failed ([Errno 111] Connection refused). Try again, or send the file as a data URL."
    )
    assert names.asked == ["example.org"] and names.connected == [("1.1.1.1", 443), ("1.0.0.1", 443)]


def test_one_address_that_is_not_public_refuses_the_host(monkeypatch):
    names = Names(monkeypatch, ["1.1.1.1", "10.0.0.1"])
    assert refusal(of(allowed_media_domains=["example.org"]), "http://example.org/x") == PRIVATE
    assert not names.connected


def test_loopback_is_refused_by_default(site):
    fetcher = of(allowed_media_domains=[f"localhost:{site.port}", f"127.0.0.1:{site.port}"])
    for host in ("localhost", "127.0.0.1", "LOCALHOST"):
        assert refusal(fetcher, f"http://{host}:{site.port}/x") == PRIVATE
    assert not site.asked


def test_an_unknown_host(monkeypatch):
    def resolve(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    assert refusal(of(allowed_media_domains=["example.org"]), "http://example.org/x") == (
        "its host is not known. Check the address."
    )


def moved(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_to_allowed_hosts(site, status):
    site.answers |= {"/a/1": moved("2", status), "/a/2": moved(f"//media.example:{site.port}/3", status)}
    site.answers |= {"/3": moved(site.url("/4.wav"), status), "/4.wav": b"HTTP/1.1 200 OK\r\n\r\n" + DATA}
    assert_it_is(site.fetcher().fetch(site.url("/a/1"), Toy), DATA, ".wav")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("http://evil.com/", "it redirects to http://evil.com, and this server fetches from media.example:{} only. "
         "Send the file as a data URL."),
        ("http://127.0.0.1/", "it redirects to http://127.0.0.1, and this server fetches from media.example:{} only. "
         "Send the file as a data URL."),
        ("file:///etc/passwd", "it redirects to file://, and this server fetches from media.example:{} only. "
         "Send the file as a data URL."),
        ("//me@media.example/", "it holds a user's name. Give a URL without credentials."),
        ("http://[", "it redirects to what is no URL. Give another address."),
        ("/\xe4", "it is no URL. Percent-encode blanks, backslashes and letters beyond ASCII."),
        ("/x", "it redirects more than 3 times. Give the last address."),
    ],
)  # fmt: skip
def test_redirects_elsewhere(site, to, message):
    site.answers["/x"] = moved(to)
    assert refusal(site.fetcher(), site.url()) == message.format(site.port)


def test_a_redirect_to_a_private_address(site):
    resolved = []

    def resolve(host):
        resolved.append(host)
        return ["127.0.0.1"] if host == "media.example" else public_addresses(host)

    site.answers["/x"] = moved(f"http://localhost:{site.port}/y")
    domains = [f"media.example:{site.port}", f"localhost:{site.port}"]
    assert refusal(Fetcher(FetchConfig(domains), resolve=resolve), site.url()) == PRIVATE
    assert resolved == ["media.example", "localhost"] and len(site.asked) == 1


def drip(head: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(drop)
            time.sleep(0.02)

    return answer


SLOW = pytest.mark.parametrize(
    "answer",
    [
        drip(b"", b""),
        drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(WELL % 1_000_000, b"x"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["nothing", "head", "informational", "body", "chunks"],
)


@SLOW
def test_a_host_that_takes_its_time(site, answer):
    site.answers["/x"], began = answer, time.monotonic()
    assert refusal(site.fetcher(seconds=0.3), site.url()) == (
        "it did not come within 0.3 s. Try again, or send the file as a data URL."
    )
    assert time.monotonic() - began < 2


@SLOW
def test_a_host_is_waited_for_no_longer_than_anybody_waits(site, answer):
    site.answers["/x"], began = answer, time.monotonic()

    def check():
        if time.monotonic() > began + 0.2:
            raise ClosedError("nobody waits")

    with pytest.raises(ClosedError, match="nobody waits"):
        site.fetcher(seconds=20).fetch(site.url(), Toy, check=check)
    assert time.monotonic() - began < 2


def pausing(connection: socket.socket) -> None:
    connection.sendall(WELL % len(DATA) + DATA[:100])
    time.sleep(2.5 * LOOK_SECONDS)
    connection.sendall(DATA[100:])


def test_a_host_may_pause_for_longer_than_whoever_waits_is_asked(site):
    site.answers["/x"] = pausing
    assert_it_is(site.fetcher().fetch(site.url(), Toy), DATA, ".txt")


@pytest.mark.parametrize(
    "answer",
    [
        WELL % 1001,
        WELL % 10**18,
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1001),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"1F4\r\n"
        + bytes(500)
        + b"\r\n1F5\r\n"
        + bytes(501),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", bytes(500)),
    ],
    ids=["announced", "absurd", "unannounced", "chunks", "endless"],
)
def test_a_file_that_is_too_large(site, answer):
    site.answers["/x"] = answer
    assert refusal(site.fetcher(max_part_bytes=1000), site.url()) == TOO_LARGE


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "its host answers 404 in the place of the file. Check the address."),
        (b"HTTP/1.1 206 Partial\r\n\r\nx", "its host answers 206 in the place of the file. Check the address."),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "its host answers 304 in the place of the file. Check the address."),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: GZIP\r\n\r\nx",
         "its host packs it (GZIP), though asked not to. Send the file as a data URL."),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "it is empty. Send a file that holds something."),
    ],
)  # fmt: skip
def test_what_is_not_the_file(site, answer, message):
    site.answers["/x"] = answer
    assert refusal(site.fetcher(), site.url()) == message


@pytest.mark.parametrize(
    "answer",
    [
        WELL % 1000 + bytes(500),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 200_000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
    ids=["length", "chunk", "transfer", "negative", "lengths", "head", "protocol", "nothing"],
)
def test_a_host_that_breaks_off_or_breaks_the_rules(site, answer):
    site.answers["/x"] = answer
    assert refusal(site.fetcher(), site.url()).startswith("the connection to its host failed (")


def test_less_than_the_announced_length_and_no_proxy(site, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    site.answers["/x"] = WELL % 3 + b"abcdef"
    assert_it_is(site.fetcher().fetch(site.url(), Toy), b"abc", ".txt")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of media.example, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x".split()
    extra = ["-addext", "subjectAltName=DNS:media.example", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    if subprocess.run([*command, *extra], capture_output=True).returncode:
        pytest.skip("making a certificate takes openssl")
    return folder / "cert.pem", folder / "key.pem"


def test_tls_goes_by_the_name_and_not_by_the_address(certificate, monkeypatch):
    context, named = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda _, name, __: named.append(name)
    site = Site(context)
    site.answers["/x"] = pausing
    try:
        reason = refusal(site.fetcher(), site.url(scheme="https"))
        assert reason.startswith("the connection to its host failed (") and "certificate verify failed" in reason
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        assert_it_is(site.fetcher().fetch(site.url(scheme="https"), Toy), DATA, ".txt")
        assert set(named) == {"media.example"}
        domains = [f"other.example:{site.port}"]
        reason = refusal(site.fetcher(allowed_media_domains=domains), f"https://other.example:{site.port}/x")
        assert "certificate is not valid for 'other.example'" in reason
    finally:
        site.close()
