"""Where the bytes of a content part come from: a data URL, base64, a host that is allowed, a folder that is allowed.

Whatever they come from, they end in a temporary file, and no more of them are read than are allowed. A local file is copied
too: what was hashed is then what is decoded, whoever changes the original meanwhile.
"""

import binascii
import functools
import hashlib
import mimetypes
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes

from xblip import config as configs
from xblip.errors import ConfigError, MediaError
from xblip.fetch_http import Hosts, parse_domains, public_addresses, split_url, too_large
from xblip.modality import Modality

ANY_BYTES = "application/octet-stream"
"""What senders call files whose type they do not know; Python knows endings of it, which would be guesses."""
CHUNK = 2**20
"""Bytes or characters; a multiple of 4, as base64 wants."""
DIGEST_BYTES = 16
LONGEST_HEADER = 256
"""Characters of a data URL before its comma."""
SHOWN = 80
"""Characters of a URL in messages."""
MIME_TYPES = mimetypes.MimeTypes()  # Python's own, and not the machine's
OTHER_MIME_TYPES = {
    "audio/mp4": ".m4a",
    "model/gltf+json": ".gltf",
    "model/gltf-binary": ".glb",
    "video/x-matroska": ".mkv",
}
"""Those that Python does not know and whose ending is not their own name."""


@dataclass
class FetchConfig:
    """What may be fetched.

    Attributes:
      allowed_media_domains: hosts, such as "example.org", that http and https URLs may name, by ports 80 and 443, or by
        the port that stands there, "example.org:8080". As in vLLM, a host does not stand for those below it.
      allowed_local_media_path: folder whose files file URLs may name; None for no files.
      max_part_bytes: of one file.
      seconds: until a host has sent one file.
    """

    allowed_media_domains: list[str] = field(default_factory=list)
    allowed_local_media_path: Path | None = None
    max_part_bytes: int = 256 * 2**20
    seconds: float = 20.0

    def __post_init__(self):
        """Raises `ConfigError` for what cannot be."""
        configs.at_least(self, max_part_bytes=1, seconds=0.1)
        try:
            parse_domains(self.allowed_media_domains)
        except ValueError as domain:
            raise ConfigError(
                f'"{domain}" among allowed_media_domains is no host. Expected one such as "example.org", or '
                '"example.org:8080" for another port than 80 and 443; beyond ASCII, in Punycode.'
            ) from None
        if self.allowed_local_media_path is not None and not Path(self.allowed_local_media_path).is_dir():
            raise ConfigError(
                f'allowed_local_media_path "{self.allowed_local_media_path}" is no folder. Relative ones start at '
                f"{Path.cwd()}."
            )


@dataclass(frozen=True)
class Fetched:
    """A part's file; a context manager that deletes it.

    Attributes:
      path: of a temporary file, whose ending is the format that it is declared to have, if its modality knows that.
      size: in bytes.
      digest: blake2b of its bytes, 32 hexadecimal digits.
    """

    path: Path
    size: int
    digest: str

    def __enter__(self) -> "Fetched":
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


class Fetcher:
    """Fetches parts, for many threads at once."""

    def __init__(self, config: FetchConfig, *, resolve: Callable[[str], Sequence[str]] = public_addresses):
        """Keeps `config`; `resolve` gives the addresses of a host, and raises `ValueError` if it may not be connected to."""
        self.config = config
        self._hosts = Hosts(tuple(config.allowed_media_domains), resolve)

    def fetch(
        self, url: str, modality: type[Modality] | Modality, *, check: Callable[[], None] = lambda: None
    ) -> Fetched:
        """Fetches what a URL names.

        Args:
          url: data:, http:, https: or file:.
          modality: that will read it.
          check: called while a host is waited for; what it raises ends that.

        Raises:
          MediaError: it is no such URL, it may not be fetched or cannot be, or the file is empty or too large.
        """
        scheme = url[:LONGEST_HEADER].partition(":")[0].lower()
        if scheme == "data":
            return self._from_data(url, modality)
        label = repr(url[:SHOWN] + "..." * (len(url) > SHOWN))
        if scheme in ("http", "https"):
            limits = {"max_bytes": self.config.max_part_bytes, "seconds": self.config.seconds}
            with self._hosts.open(url, label, **limits, check=check) as download:
                suffix = suffix_of(download.mime_type, modality) or _suffix_in(unquote(download.path), modality)
                return self._write(download.chunks, suffix, label)
        if scheme == "file":
            path = self._local(url, label)
            with self._open(path, label) as file:
                return self._write(iter(lambda: file.read(CHUNK), b""), _suffix_in(path, modality), label)
        raise MediaError(
            f"Cannot fetch {label}: expected a URL that begins with data:, https:, http: or file:. Send the file as "
            "data:TYPE/SUBTYPE;base64,..."
        )

    def found(self, path: Path) -> Fetched:
        """Takes a file where it lies, which whoever calls keeps from changing; it is not for use as a context manager.

        Raises:
          MediaError: it is gone, empty or too large.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > self.config.max_part_bytes:
                    raise too_large(path.name, self.config.max_part_bytes)
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
        except OSError as cause:
            raise MediaError(f"Cannot read {path.name}: {cause.strerror}. Give the file again.") from None
        if not size:
            raise MediaError(f"Cannot read {path.name}: it is empty. Give a file that holds something.")
        return Fetched(path, size, digest)

    def fetch_base64(self, data: str, modality: type[Modality] | Modality, *, format: str = "") -> Fetched:
        """Takes a file that came as base64; `format` is its MIME type or ending, such as "wav".

        Raises:
          MediaError: it is no base64, or the file is empty or too large.
        """
        return self._decode(data, 0, suffix_of(format, modality), f"the {modality.name} in base64")

    def _from_data(self, url: str, modality: type[Modality] | Modality) -> Fetched:
        label = f"the data URL of the {modality.name}"
        comma = url.find(",", 0, LONGEST_HEADER)
        mime_type, *parameters = url[len("data:") : max(comma, 0)].split(";")
        if comma < 0 or not parameters or parameters[-1].strip().lower() != "base64":
            raise MediaError(f"Cannot fetch {label}: expected data:TYPE/SUBTYPE;base64,... with the file in base64.")
        return self._decode(url, comma + 1, suffix_of(mime_type, modality), label)

    def _decode(self, text: str, start: int, suffix: str, label: str) -> Fetched:
        """Takes what stands in base64 in a text from `start` on, a part at a time, so that it is there once, not thrice."""
        if (len(text) - start) // 4 * 3 - 2 > self.config.max_part_bytes:
            raise too_large(label, self.config.max_part_bytes)
        return self._write(_bytes_of(text, start, label), suffix, label)

    def _local(self, url: str, label: str) -> Path:
        """Returns the path in a file URL, if it is written as one in the folder that is allowed."""
        folder = self.config.allowed_local_media_path
        if folder is None:
            raise MediaError(
                f"Cannot fetch {label}: this server reads no files of its own. Send the file as a data URL."
            )
        parts = split_url(url, label)
        path = Path(os.fsdecode(unquote_to_bytes(parts.path)))
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in str(path):
            raise MediaError(f"Cannot fetch {label}: expected file:/// and an absolute path, percent-encoded.")
        if ".." in path.parts or not any(map(path.is_relative_to, (os.path.abspath(folder), self._folder))):
            raise _outside(label)
        return path

    def _open(self, path: Path, label: str) -> BinaryIO:
        """Opens a file, if it is one in the folder that is allowed wherever links lead.

        What it is and where it lies is asked of a handle that cannot read it, and then the handle is opened, not the path: a
        link that is changed meanwhile changes nothing, and a pipe or device is never opened.
        """
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                itself, facts = f"/proc/self/fd/{handle}", os.fstat(handle)
                if not Path(os.readlink(itself)).is_relative_to(self._folder):
                    raise _outside(label)
                if not stat.S_ISREG(facts.st_mode):
                    raise MediaError(
                        f"Cannot fetch {label}: it is a folder, pipe, socket or device. Give the path of a regular file."
                    )
                if facts.st_size > self.config.max_part_bytes:
                    raise too_large(label, self.config.max_part_bytes)
                return open(itself, "rb")
            finally:
                os.close(handle)
        except OSError as cause:
            raise MediaError(f"Cannot fetch {label}: {cause.strerror}. Check the path.") from None

    @functools.cached_property
    def _folder(self) -> Path:
        return Path(self.config.allowed_local_media_path).resolve()

    def _write(self, chunks: Iterable[bytes], suffix: str, label: str) -> Fetched:
        descriptor, name = tempfile.mkstemp(prefix="xblip-part-", suffix=suffix)
        digest, size = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
        try:
            with open(descriptor, "wb") as file:
                for chunk in chunks:
                    size += len(chunk)
                    if size > self.config.max_part_bytes:
                        raise too_large(label, self.config.max_part_bytes)
                    digest.update(chunk)
                    file.write(chunk)
            if not size:
                raise MediaError(f"Cannot fetch {label}: it is empty. Send a file that holds something.")
        except BaseException:
            os.unlink(name)
            raise
        return Fetched(Path(name), size, digest.hexdigest())


def suffix_of(kind: str, modality: type[Modality] | Modality) -> str:
    """Returns the ending of a MIME type or format, such as "audio/wav" or "wav", if it is one of a modality's; else ""."""
    kind = kind.partition(";")[0].strip().lower()
    if kind == ANY_BYTES:
        return ""
    own = f".{kind.rpartition('/')[2].removeprefix('x-')}"
    known = {own, OTHER_MIME_TYPES.get(kind), *MIME_TYPES.guess_all_extensions(kind)}
    return next((suffix for suffix in modality.suffixes if suffix in known), "")


def _suffix_in(path: str | Path, modality: type[Modality] | Modality) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if suffix in modality.suffixes else ""


def _bytes_of(text: str, start: int, label: str) -> Iterator[bytes]:
    """What a text holds in base64 from `start` on: of the standard alphabet, padded, with nothing between."""
    for place in range(start, len(text), CHUNK):
        try:
            data = binascii.a2b_base64(text[place : place + CHUNK], strict_mode=True)
            if place + CHUNK < len(text) and len(data) < CHUNK // 4 * 3:
                raise ValueError("Excess data after padding")
        except ValueError as cause:
            raise MediaError(
                f"Cannot fetch {label}: it is not in base64 ({cause}). Encode it by the standard alphabet, padded and in "
                "one line, as `base64 -w 0 FILE` does."
            ) from None
        yield data


def _outside(label: str) -> MediaError:
    return MediaError(
        f"Cannot fetch {label}: it is not in the folder whose files this server reads. Send the file as a data URL."
    )
