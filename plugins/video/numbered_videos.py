"""What the tests of the video modality share: videos whose frames carry their own number."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

import xblip


def has_decord():
    try:
        import decord
    except (ImportError, OSError):
        return False
    return bool(decord)


needs_decord = pytest.mark.skipif(not has_decord(), reason="decord cannot be imported here")
READERS = ["pyav", pytest.param("decord", marks=needs_decord)]
FASTSTART = {"container_options": {"movflags": "faststart"}}


def numbered(count, height=64, width=96):
    """Frames that carry their own number: its bits as eight black or white columns above a coloured half."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, height // 2 :] = (200, 40, 30)
    for number in range(count):
        for bit in range(8):
            if number >> bit & 1:
                frames[number, : height // 2, bit * width // 8 : (bit + 1) * width // 8] = 255
    return frames


def number_of(frame):
    """The number that a frame (H, W, 3) carries."""
    height, width, _ = frame.shape
    return sum(int(frame[height // 4, (2 * bit + 1) * width // 16].mean() > 127) << bit for bit in range(8))


def write(
    path,
    frames,
    codec="libx264",
    options=None,
    container_options=None,
    ticks=None,
    rotation=None,
    colours=None,
):
    """Writes frames (T, H, W, 3), 10 a second, or frame t at `ticks[t]` ms, and a display rotation."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        if colours:
            stream.codec_context.colorspace = colours
        if rotation:
            stream.set_display_rotation(rotation["degrees"], hflip=rotation.get("hflip", False))
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if colours:
                frame = frame.reformat(format="yuv420p", dst_colorspace=colours)
            if ticks:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path, cover=None):
    """Writes a second of silence, with a picture (H, W, 3) as its cover."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        if cover is not None:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "yuvj420p"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if cover is not None:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, "rgb24")))
            container.mux(picture.encode(None))
    return path


def rgb(modality, source):
    """The frames (S, H, W, 3) uint8 that a source becomes."""
    values = modality.load(source)["pixel_values"]
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def numbers(modality, source):
    return [number_of(frame) for frame in rgb(modality, source)]


def fails(modality, source, *fragments):
    with pytest.raises(xblip.MediaError) as caught:
        modality.load(source)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
