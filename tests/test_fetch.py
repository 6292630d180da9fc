"""Parts in base64 and files of the server's own: what is allowed comes whole, and everything else is one sentence."""

import base64
import os
from pathlib import Path

import pytest
from fetching import DATA, TOO_LARGE, Toy, assert_it_is, of, refusal

from xblip import plugins
from xblip.errors import ConfigError, MediaError
from xblip.fetch import FetchConfig, Fetcher, suffix_of

pytestmark = pytest.mark.usefixtures("no_file_left")


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("head", "suffix"),
    [
        ("data:text/plain;base64,", ".txt"),
        ("DATA:Text/Plain;charset=utf-8;BASE64,", ".txt"),
        ("data:audio/x-wav;base64,", ".wav"),
        ("data:image/png;base64,", ""),
        ("data:;base64,", ""),
    ],
)
def test_a_data_url(head, suffix):
    assert_it_is(of().fetch(head + in_base64(DATA), Toy), DATA, suffix)


@pytest.mark.parametrize(("format", "suffix"), [("wav", ".wav"), ("WAV", ".wav"), ("mp3", ""), ("../x", ""), ("", "")])
def test_base64_with_a_format(format, suffix):
    assert_it_is(of().fetch_base64(in_base64(DATA), Toy(), format=format), DATA, suffix)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 10, 11])
def test_base64_of_several_chunks(monkeypatch, size):
    monkeypatch.setattr("xblip.fetch.CHUNK", 4)
    assert_it_is(of().fetch_base64(in_base64(DATA[:size]), Toy), DATA[:size], "")


NO_DATA_URL = "Cannot fetch the data URL of the toy: expected data:TYPE/SUBTYPE;base64,... with the file in base64."
NOT_BASE64 = "Cannot fetch the data URL of the toy: it is not in base64 ({}). Encode it by the standard alphabet, padded and in one line, as `base64 -w 0 FILE` does."  # fmt: skip  # noqa: E501
ONLY = "Only base64 data is allowed"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:", NO_DATA_URL),
        ("data:text/plain,hello", NO_DATA_URL),
        ("data:text/plain;charset=utf-8,hello", NO_DATA_URL),
        (f"data:text/plain;{'a' * 300};base64,QUJD", NO_DATA_URL),
        ("data:text/plain;base64,QUJ", NOT_BASE64.format("Incorrect padding")),
        ("data:text/plain;base64,QUJD\nQUJD", NOT_BASE64.format(ONLY)),
        ("data:text/plain;base64, QUJD", NOT_BASE64.format(ONLY)),
        ("data:text/plain;base64,QU%4AD", NOT_BASE64.format(ONLY)),
        ("data:text/plain;base64,QU-_", NOT_BASE64.format(ONLY)),
        ("data:text/plain;base64,QQ==QQ==", NOT_BASE64.format("Excess data after padding")),
        ("data:text/plain;base64,\ud800", NOT_BASE64.format("string argument should contain only ASCII characters")),
        ("data:text/plain;base64,", "Cannot fetch the data URL of the toy: it is empty. Send a file that holds something."),
    ],
)  # fmt: skip
def test_a_data_url_that_is_none(url, message):
    with pytest.raises(MediaError) as caught:
        of().fetch(url, Toy)
    assert str(caught.value) == message


def test_padding_between_chunks(monkeypatch):
    monkeypatch.setattr("xblip.fetch.CHUNK", 4)
    with pytest.raises(MediaError, match="Excess data after padding"):
        of().fetch_base64("QQ==QUJD", Toy)


LARGE = "Cannot fetch {}: it is larger than the 1000 B that one part may have. Send a smaller file."


def test_a_part_that_is_too_large_is_refused_before_it_is_decoded(monkeypatch):
    fetcher = of(max_part_bytes=1000)
    for size in (999, 1000):
        fetcher.fetch_base64(in_base64(bytes(size)), Toy).__exit__()
    with pytest.raises(MediaError) as caught:
        fetcher.fetch_base64(in_base64(bytes(1001)), Toy)
    assert str(caught.value) == LARGE.format("the toy in base64")
    monkeypatch.setattr("binascii.a2b_base64", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(MediaError) as caught:
        fetcher.fetch("data:;base64," + "A" * 10_000_000, Toy)
    assert str(caught.value) == LARGE.format("the data URL of the toy")


@pytest.mark.parametrize("url", ["ftp://example.org/x", "x.png", "", "javascript:alert(1)", "/etc/passwd"])
def test_other_urls(url):
    with pytest.raises(MediaError) as caught:
        of(allowed_media_domains=["example.org"]).fetch(url, Toy)
    assert str(caught.value) == (
        f"Cannot fetch '{url}': expected a URL that begins with data:, https:, http: or file:. Send the file as "
        "data:TYPE/SUBTYPE;base64,..."
    )


def test_messages_hold_no_more_than_the_beginning_of_a_url_and_no_half_characters():
    with pytest.raises(MediaError) as caught:
        of().fetch("ftp://\ud800" + "x" * 10_000, Toy)
    str(caught.value).encode()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["image", "video", "audio", "point_cloud"])
def test_mime_types_of_the_plugins_have_endings(name):
    modality = plugins.get("modality", name)
    without = [kind for kind in modality.mime_types if not suffix_of(kind, modality)]
    assert without == {"audio": ["audio/webm"], "image": ["image/x-portable-anymap"]}.get(name, [])
    assert all(suffix_of(suffix[1:], modality) == suffix for suffix in modality.suffixes)
    assert suffix_of("application/octet-stream", modality) == "", "which tells no format: Python's guess would be .obj"


@pytest.fixture
def folder(tmp_path):
    """Files that may be read, and beside them some that may not."""
    folder = tmp_path / "allowed"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a b.txt").write_bytes(DATA)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "secret.txt").write_text("secret")
    return folder


def test_a_file_in_the_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "within.wav").symlink_to("inner/a b.txt")
    for allowed in (folder, tmp_path / "link"):
        fetcher = of(allowed_local_media_path=allowed)
        for host in ("", "localhost"):
            assert_it_is(fetcher.fetch(f"file://{host}{folder}/inner/a%20b.txt", Toy), DATA, ".txt")
        assert_it_is(fetcher.fetch(f"file://{allowed}/within.wav", Toy), DATA, ".wav")
        assert_it_is(fetcher.fetch(f"FILE:{allowed}/inner/./a%20b.txt", Toy), DATA, ".txt")
    assert (folder / "inner" / "a b.txt").read_bytes() == DATA


def test_no_file_unless_a_folder_is_allowed(folder):
    expected = "this server reads no files of its own. Send the file as a data URL."
    assert refusal(of(), "file:///etc/passwd") == expected


OUTSIDE = "it is not in the folder whose files this server reads. Send the file as a data URL."
NO_PATH = "expected file:/// and an absolute path, percent-encoded."


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", OUTSIDE),
        ("{}/../secret.txt", OUTSIDE),
        ("{}/inner/../inner/a%20b.txt", OUTSIDE),
        ("{}/%2e%2e/secret.txt", OUTSIDE),
        ("{}/..%2fsecret.txt", OUTSIDE),
        ("{}-too/secret.txt", OUTSIDE),
        ("/{}/inner/a%20b.txt", OUTSIDE),
        ("", OUTSIDE),
        ("{}/out.txt", OUTSIDE),
        ("{}/up/secret.txt", OUTSIDE),
        ("{}/fd", OUTSIDE),
        ("evil.com{}/inner/a%20b.txt", NO_PATH),
        ("{}/inner/a%20b.txt?x", NO_PATH),
        ("{}/inner/a%20b.txt#x", NO_PATH),
        ("{}/inner/a%20b.txt%00.png", NO_PATH),
        ("{}/missing.txt", "No such file or directory. Check the path."),
        ("{}/loop", "Too many levels of symbolic links. Check the path."),
        ("{}/inner/a%20b.txt/x", "Not a directory. Check the path."),
        ("{}/inner", "it is a folder, pipe, socket or device. Give the path of a regular file."),
        ("{}/pipe", "it is a folder, pipe, socket or device. Give the path of a regular file."),
        ("{}/empty", "it is empty. Send a file that holds something."),
        ("{}/a b.txt", "it is no URL. Percent-encode blanks, backslashes and letters beyond ASCII."),
    ],
)
def test_files_that_may_not_be_read(folder, tmp_path, path, message):
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "fd").symlink_to("/proc/self/fd/0")
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    assert refusal(of(allowed_local_media_path=folder), f"file://{path.format(folder)}") == message


def test_devices_are_not_opened():
    fetcher = of(allowed_local_media_path=Path("/dev"))
    expected = "it is a folder, pipe, socket or device. Give the path of a regular file."
    assert refusal(fetcher, "file:///dev/zero") == expected


def test_a_local_file_that_is_too_large_or_grows(folder, monkeypatch):
    file = folder / "inner" / "a b.txt"
    os.truncate(file, 1001)
    fetcher = of(allowed_local_media_path=folder, max_part_bytes=1000)
    url = f"file://{folder}/inner/a%20b.txt"
    assert refusal(fetcher, url) == TOO_LARGE
    os.truncate(file, 1000)
    opened = Fetcher._open

    def growing(self, *arguments):
        found = opened(self, *arguments)
        os.truncate(file, 1001)
        return found

    monkeypatch.setattr(Fetcher, "_open", growing)
    assert refusal(fetcher, url) == TOO_LARGE


def test_a_link_that_is_put_in_the_place_of_a_file_meanwhile(folder, tmp_path, monkeypatch):
    """Between the look and the reading, a file becomes a link that leads out."""
    file = folder / "inner" / "a b.txt"
    read_link = os.readlink

    def exchanging(path):
        found = read_link(path)
        file.unlink()
        file.symlink_to(tmp_path / "secret.txt")
        return found

    monkeypatch.setattr("os.readlink", exchanging)
    fetcher = of(allowed_local_media_path=folder)
    assert_it_is(fetcher.fetch(f"file://{folder}/inner/a%20b.txt", Toy), DATA, ".txt")


@pytest.mark.parametrize(
    "domain",
    [
        "https://example.org",
        "*.example.org",
        "example.org/",
        "",
        "example.org:",
        "example.org:0",
        "me@example.org",
        "bücher",
    ],
)
def test_domains_that_are_none(domain):
    with pytest.raises(ConfigError) as caught:
        FetchConfig(allowed_media_domains=["example.com", domain])
    assert str(caught.value) == (
        f'"{domain}" among allowed_media_domains is no host. Expected one such as "example.org", or "example.org:8080" for '
        "another port than 80 and 443; beyond ASCII, in Punycode."
    )


def test_other_settings_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError) as caught:
        FetchConfig(allowed_local_media_path=tmp_path / "missing")
    assert str(caught.value) == (
        f'allowed_local_media_path "{tmp_path}/missing" is no folder. Relative ones start at {Path.cwd()}.'
    )
    with pytest.raises(ConfigError, match="max_part_bytes must be at least 1, not 0"):
        FetchConfig(max_part_bytes=0)
    with pytest.raises(ConfigError, match="seconds must be at least 0.1, not 0"):
        FetchConfig(seconds=0)


def test_a_file_that_is_here_is_taken_where_it_lies(tmp_path):
    file = tmp_path / "own.txt"
    file.write_bytes(DATA)
    found, sent = of().found(file), of().fetch("data:text/plain;base64," + in_base64(DATA), Toy)
    with sent:
        assert found.path == file and (found.size, found.digest) == (sent.size, sent.digest)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "Cannot read own.txt: No such file or directory. Give the file again."),
        (b"", "Cannot read own.txt: it is empty. Give a file that holds something."),
        (b"x" * 100, "own.txt"),
    ],
)
def test_a_file_that_is_gone_empty_or_too_large(tmp_path, data, message):
    if data is not None:
        (tmp_path / "own.txt").write_bytes(data)
    with pytest.raises(MediaError, match=message) as caught:
        of(max_part_bytes=50).found(tmp_path / "own.txt")
    assert str(tmp_path) not in str(caught.value)
