"""Audio files, decoded to one channel.

WAV, FLAC, Ogg and the other formats of libsndfile are read by soundfile, everything else by PyAV. MP3 goes to PyAV as
well: libsndfile guesses the length of an MP3 without a Xing header and leaves out what lies beyond its guess. Both
decoders play what is there of a cut file and say nothing, so each container is asked how long it should be.
"""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

import xblip

EXPECTED = "a WAV, FLAC, Ogg, MP3, AAC, MP4, WebM or MKV file with sound"
SOUNDFILE_MAGIC = (b"fLaC", b"OggS", b"RF64", b"FORM", b"caff", b"riff", b".snd")  # and RIFF...WAVE
BLOCK = 2**18  # samples decoded at once
UNKNOWN = 2**32 - 2**16  # from here on, sizes in a WAV header mean that its writer could not know them


def read_file(file: xblip.MediaFile, *, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decodes a file.

    Args:
      file: the file.
      max_seconds: longer sound is refused.

    Returns:
      Samples (N,) float32 in [-1, 1], the mean of all channels, and their rate in Hz.

    Raises:
      MediaError: the file is damaged, cut short, of another format, too long, or has no sound in it.
      PluginError: the decoder's package cannot be imported.
    """
    with file.on_disk() as path, open(os.open(path, os.O_RDONLY), "rb") as stream:  # no name to tell a format from
        head = stream.read(12)
        if head.startswith(SOUNDFILE_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WAVE"):
            return _read_with_soundfile(stream, file, max_seconds)
        return _read_with_pyav(stream, file, max_seconds)


def refuse_long(seconds: float, label: str, max_seconds: float) -> None:
    """Raises MediaError for sound that is longer than `max_seconds`."""
    if seconds > max_seconds:
        raise xblip.MediaError(
            f"Cannot read {label}: it lasts {seconds:.0f} seconds or more; at most {max_seconds:g} are read. Cut it, "
            "or raise max_seconds."
        )


def _read_with_soundfile(stream: BinaryIO, file: xblip.MediaFile, max_seconds: float) -> tuple[np.ndarray, int]:
    label = file.label
    try:
        import soundfile
    except (ImportError, OSError) as cause:
        raise _missing(label, "soundfile", cause) from cause
    with xblip.decoding(label, EXPECTED):
        _check_ogg(stream)
        stream.seek(0)
        with _said_by_libsndfile(soundfile.LibsndfileError), soundfile.SoundFile(stream) as sound:
            if sound.frames < 2**62 and sound.subtype != "MPEG_LAYER_III":
                refuse_long(sound.frames / sound.samplerate, label, max_seconds)
                _check_sizes(sound.extra_info)
                blocks = [np.empty(0, np.float32)]
                while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
                    blocks.append(block.mean(1))
                mono = np.concatenate(blocks)
                _check_length(len(mono), sound.frames)
                return mono, sound.samplerate
    # FLAC of a length its writer could not know, or MP3 in a WAV, of a length that is only guessed
    return _read_with_pyav(stream, file, max_seconds)


def _read_with_pyav(stream: BinaryIO, file: xblip.MediaFile, max_seconds: float) -> tuple[np.ndarray, int]:
    label = file.label
    try:
        import av
    except (ImportError, OSError) as cause:
        raise _missing(label, "av", cause) from cause
    with xblip.decoding(label, EXPECTED):
        _check_bytes(file.size, file.declared_bytes() or 0)
        knows_length = _mp3_counts_frames(stream)
        stream.seek(0)
        # a playlist opens no other file, and no title in Latin-1 keeps a sound from being heard
        with av.open(stream, options={"protocol_whitelist": ""}, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise xblip.MediaError(f"Cannot read {label}: it has no audio track. Expected {EXPECTED}.")
            track = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            blocks, samples = [], 0
            for frame in container.decode(track):
                blocks += [part.to_ndarray().mean(0) for part in to_float.resample(frame)]
                samples, rate = samples + frame.samples, frame.sample_rate  # of HE-AAC the track knows half the rate
                refuse_long(samples / rate, label, max_seconds)
            if not samples:
                raise ValueError("no sound can be decoded")
            if knows_length:  # some encoders count the header's own frame, some decoders drop the first
                slack = 2 * track.codec_context.frame_size
                _check_length(samples, container.duration * rate // av.time_base - slack)
            return np.concatenate(blocks), rate


@contextlib.contextmanager
def _said_by_libsndfile(kind: type[Exception]) -> Iterator[None]:
    """Says whose words an error's are, and not how the file is called within this process."""
    try:
        yield
    except kind as cause:
        raise ValueError(f"libsndfile says: {cause.error_string.rstrip('.')}") from cause


def _missing(label: str, package: str, cause: Exception) -> xblip.PluginError:
    return xblip.PluginError(
        f"Cannot read {label}: its format needs {package}, which cannot be imported here ({cause}). Install it: "
        f"pip install {package}."
    )


def _check_length(there: int, promised: int) -> None:
    if there < promised:
        raise ValueError(f"it is cut short: {there} of at least {promised} samples are there")


def _check_bytes(there: int, promised: int) -> None:
    if there < promised:
        raise ValueError(f"it is cut short: {there} of at least {promised} bytes are there")


def _check_sizes(log: str) -> None:
    """Compares sizes in the header with the file's, by libsndfile's log: it reads "data : 800 (should be 500)".

    RIFF and FORM enclose the others; writers that forget to update them do no harm.
    """
    for name, promised, there in re.findall(r"^ *(\w[\w ]*?) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        if name not in ("RIFF", "FORM") and int(promised) < UNKNOWN:
            _check_bytes(int(there), int(promised))


def _check_ogg(stream: BinaryIO) -> None:
    """An Ogg file is whole if its numbered pages follow on one another up to a last one (RFC 3533, 6).

    Several files in a row are valid Ogg as well, but their sampling rates and channels may differ, and libsndfile
    reads the first alone.
    """
    stream.seek(0)
    page, numbers, is_last = stream.read(27), {}, False
    if page[:4] != b"OggS":
        return
    while page[:4] == b"OggS":
        segments = stream.read(page[26]) if len(page) == 27 else b""
        there = len(page) + len(segments) + len(stream.read(sum(segments)))
        _check_bytes(there, 27 + page[26] + sum(segments) if len(page) == 27 else 27)
        _, kind, _, track, number, _, _ = struct.unpack("<BBqIIIB", page[4:])
        if kind & 2 and any(numbers.values()):
            raise ValueError("it is several Ogg files in a row: cut it where the next begins, or convert it")
        if number != numbers.get(track, number - 1) + 1:
            raise ValueError(f"pages are missing before its page {number}")
        numbers[track], is_last = number, kind & 4
        page = stream.read(27)
    if not is_last:
        raise ValueError("it is cut short: its last page is missing")


def _mp3_counts_frames(stream: BinaryIO) -> bool:
    """Whether a Xing header opens an MP3, behind its ID3 tag, and tells the number of frames."""
    stream.seek(0)
    tag = stream.read(10)
    size = sum(byte << 7 * place for place, byte in enumerate(reversed(tag[6:]))) + 10
    stream.seek(size if tag[:3] == b"ID3" else 0)
    frame = stream.read(64)
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    return frame[:1] == b"\xff" and 0 < place < 56 and bool(frame[place + 7] & 1)
