"""Media as users give them: files, bytes, open files and arrays, told apart and checked before anything decodes them."""

import contextlib
import errno
import io
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from xblip.errors import MediaError, XBlipError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
LONGEST_REASON = 200
"""Characters of what a library says of a file, which it may have taken from the file."""
MP4_BOXES = set(b"ftyp moov mdat free skip wide uuid pnot styp sidx moof mfra".split())


@dataclass(frozen=True)
class FilePart:
    """A source that lies inside a file, as a member of a tar does; its bytes are read where they are used.

    Attributes:
      path: the file that holds it.
      name: its own name, whose ending tells its format.
      offset, size: where its bytes are.
    """

    path: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Returns its bytes.

        Raises:
          MediaError: the file is missing or unreadable, or ends before this part of it does.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as cause:
            raise MediaError(f"Cannot read {self.name!r} in {self.path}: {cause}.") from cause
        if len(data) < self.size:
            raise MediaError(
                f"Cannot read {self.name!r} in {self.path}: the file ends before it does. Has it changed, or been cut?"
            )
        return data


@dataclass(frozen=True)
class MediaFile:
    """A source that is a file: a path, bytes, an open binary file, or part of a file.

    Attributes:
      label: how error messages call it.
      path: where it lies, or None if it came as bytes.
      data: its bytes, or None if it has a path.
      name: what it is called, if it came as bytes and that is known.
    """

    label: str
    path: Path | None = None
    data: bytes | None = None
    name: str = ""

    @property
    def suffix(self) -> str:
        """The file's ending in lower case with its dot; "" when it has none or came as bytes without a name."""
        return (self.path or Path(self.name)).suffix.lower()

    def declared_bytes(self) -> int | None:
        """Returns how long its own headers say that an MP4, MOV, WebM, MKV, AVI or WAV file is at least, in bytes.

        Decoders play what is there of a cut file and say nothing; whoever compares this with `size` notices.

        Returns:
          The length; 0 if the file does not know (a live recorder's), None if it is of another container.

        Raises:
          ValueError: the header is damaged.
        """
        with self.open() as stream:
            return _declared_bytes(stream, self.size)

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.path.stat().st_size if self.path else len(self.data)

    def open(self) -> BinaryIO:
        """Opens it for reading."""
        return self.path.open("rb") if self.path else io.BytesIO(self.data)

    @contextlib.contextmanager
    def on_disk(self, suffix: str = "") -> Iterator[Path]:
        """Gives a path to it, for libraries that read nothing else; `suffix` is for sources that came as bytes."""
        if self.path:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"media{suffix}")
            path.write_bytes(self.data)
            yield path


class HeldFile(io.BytesIO):
    """What an open file held from where it stood, to be read as often as need be.

    Attributes:
      name: the file's own; "" if it says none.
    """

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def held(source: Any, *, kind: str) -> Any:
    """Reads what is open: it stands for what follows its position, where it is left if it can go back.

    Args:
      source: whatever the user gave.
      kind: the modality's name, for messages.

    Returns:
      A `HeldFile`, at its beginning, for an open file, and for each in a list; other sources as they are.

    Raises:
      MediaError: an open file cannot be read, or holds nothing there.
    """
    if isinstance(source, (list, tuple)) and any(hasattr(part, "read") for part in source):
        return [held(part, kind=kind) for part in source]
    if isinstance(source, FilePart) or not hasattr(source, "read"):
        return source
    label = _open_file(kind)
    data = source.getvalue() if isinstance(source, HeldFile) else _contents(source, label)
    if not data:
        raise MediaError(f"Cannot read {label}: it is empty, or read to its end: seek(0) goes back.")
    return HeldFile(data, str(getattr(source, "name", "")))


def media_file(source: Any, *, kind: str) -> MediaFile | None:
    """Tells files from objects.

    Args:
      source: whatever the user gave.
      kind: the modality's name, for messages.

    Returns:
      The file, or None when `source` is an object (array, tensor, PIL image, list).

    Raises:
      MediaError: the file is missing, a folder, unreadable or empty, or a URL.
    """
    name = ""
    if isinstance(source, FilePart):
        data, label, name = source.read(), f"{kind} {source.name!r} in {source.path}", source.name
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data, label = bytes(source), f"the {kind} given as bytes"
    elif hasattr(source, "read"):
        data, label = held(source, kind=kind).getvalue(), _open_file(kind)
    elif isinstance(source, (str, os.PathLike)):
        return _file_at(source, kind)
    else:
        return None
    if not data:
        raise MediaError(f"Cannot read {label}: it is empty.")
    return MediaFile(label=label, data=data, name=name)


def is_url(source: Any) -> bool:
    """Whether a source is the address of something elsewhere, such as "https://..." or "s3://..."."""
    return isinstance(source, str) and URL.match(source) is not None


def _open_file(kind: str) -> str:
    return f"the {kind} given as an open file"


def _contents(source: BinaryIO, label: str) -> bytes:
    try:
        start = source.tell() if hasattr(source, "seekable") and source.seekable() else None
        data = source.read()
        if start is not None:
            source.seek(start)
    except Exception as cause:
        raise MediaError(f"Cannot read {label}: {cause}. Open it for reading in binary mode ('rb').") from cause
    if isinstance(data, str):
        raise MediaError(f"Cannot read {label}: it is open as text. Open it in binary mode ('rb').")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise MediaError(f"Cannot read {label}: its read() gives {type(data).__name__}. Expected bytes.")
    return bytes(data)


def _file_at(source: str | os.PathLike, kind: str) -> MediaFile:
    label = f"{kind} {os.fspath(source)!r}"
    if is_url(source):
        raise MediaError(f"Cannot read {label}: URLs are not fetched. Download it and give the file's path.")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise MediaError(f"Cannot read {label}: it is a folder. Give the path of one file.")
        if not path.exists():
            where = "" if path.is_absolute() else f"; relative ones start at {Path.cwd()}"
            raise MediaError(f"Cannot read {label}: no such file. Check the path{where}.")
        if not path.is_file():
            raise MediaError(f"Cannot read {label}: it is a pipe, socket or device. Give the path of a regular file.")
        if path.stat().st_size == 0:
            raise MediaError(f"Cannot read {label}: the file is empty.")
        with path.open("rb"):
            pass
    except (OSError, ValueError, RuntimeError) as cause:  # RuntimeError: no such user in "~user"
        raise MediaError(f"Cannot read {label}: {cause}.") from cause
    return MediaFile(label=label, path=path)


@contextlib.contextmanager
def decoding(label: str, expected: str) -> Iterator[None]:
    """Turns whatever a decoding library raises inside the block into one clear `MediaError`.

    Args:
      label: what is being read, e.g. `MediaFile.label`.
      expected: the formats that would have been right.
    """
    try:
        yield
    except XBlipError:
        raise
    except MemoryError as cause:
        raise MediaError(
            f"Cannot read {label}: it asks for more memory than there is, so it is damaged or too large. "
            f"Expected {expected}."
        ) from cause
    except Exception as cause:
        raise MediaError(
            f"Cannot read {label}: it is damaged or of another format ({_reason(cause)}). Expected {expected}."
        ) from cause


def _reason(cause: Exception) -> str:
    """What a library said: one line of printable letters about the file, without paths and numbers of errors."""
    if isinstance(cause, UnicodeDecodeError):
        return "it has bytes that are no text where text must be"
    if isinstance(cause, (LookupError, TypeError, AttributeError, ArithmeticError, struct.error)):
        return "a part of it is missing or makes no sense"  # what is said then is said to who wrote the library
    if isinstance(cause, EOFError) and not str(cause):
        return "it ends before it should"
    if getattr(cause, "errno", None) == errno.EINVAL:  # of a seek to where no file has anything, for one
        return "it says something that cannot be"
    said = getattr(cause, "strerror", None) or str(cause)
    if said.startswith("Error number"):  # FFmpeg's for those that it has no words for
        return "its decoder gives no reason"
    line = (said.strip().splitlines() or [type(cause).__name__])[0]
    line = re.sub(r"^b'(.*)'$", r"\1", line)  # as Pillow puts it where it has read bytes
    line = re.sub(r"^invalid literal for int\(\) with base \d+: b?", "it has no whole number but ", line)
    shown = "".join(letter if letter.isprintable() else "?" for letter in line[:LONGEST_REASON])
    return shown + "..." * (len(line) > LONGEST_REASON)


def as_array(source: np.ndarray | Tensor, label: str) -> np.ndarray:
    """Gives an array or tensor as a plain numpy array; floats that numpy lacks, such as bfloat16, as float32.

    Args:
      source: what the user gave.
      label: how error messages call it.

    Raises:
      MediaError: its values are masked, or not there as numbers: a sparse, quantised or meta tensor.
    """
    if isinstance(source, np.ma.MaskedArray):
        raise MediaError(f"Cannot read {label}: it is a masked array. Fill in or leave out its masked values.")
    if isinstance(source, np.ndarray):
        return np.asarray(source)
    try:
        return (source.float() if source.is_floating_point() and source.itemsize < 4 else source).numpy(force=True)
    except (RuntimeError, TypeError) as cause:
        raise MediaError(
            f"Cannot read {label}: numpy cannot take it ({str(source.layout).removeprefix('torch.')}, "
            f"{source.dtype}, on {source.device}). Expected a dense tensor of plain numbers."
        ) from cause


def _declared_bytes(stream: BinaryIO, there: int) -> int | None:
    head = stream.read(12)
    if head[4:8] in MP4_BOXES:
        return _mp4_length(stream, there)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_length(stream)
    if head[:4] == b"RIFF" and head[8:] in (b"AVI ", b"WAVE"):
        return 8 + int.from_bytes(head[4:8], "little")
    return None


def _mp4_length(stream: BinaryIO, there: int) -> int:
    """Where the last top-level box that begins within `there` bytes ends (ISO/IEC 14496-12, 4.2).

    A size of 0 means the end of the file.
    """
    end = 0
    while end < there:
        stream.seek(end)
        header = stream.read(16)
        size = int.from_bytes(header[8:16] if header[:4] == b"\0\0\0\1" else header[:4])
        if header[4:8] not in MP4_BOXES or size < 8:
            break
        end += size
    return end


def _matroska_length(stream: BinaryIO) -> int:
    """Where the segment ends (RFC 8794, 4 and 6.2); 0 if it does not say."""
    stream.seek(4)
    stream.seek(_matroska_number(stream) or 0, 1)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    size = _matroska_number(stream)
    return 0 if size is None else stream.tell() + size


def _matroska_number(stream: BinaryIO) -> int | None:
    """A number whose first byte's leading zeros say how many bytes follow; None for all ones, "unknown"."""
    first = stream.read(1)
    if not first or not first[0]:
        raise ValueError("its header is damaged")
    width = 9 - first[0].bit_length()
    value = int.from_bytes(first + stream.read(width - 1)) - (1 << 7 * width)
    return value if value < (1 << 7 * width) - 1 else None
