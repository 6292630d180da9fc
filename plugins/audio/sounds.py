"""Sounds for the tests, and files of them."""

import av
import numpy as np
import soundfile


def tone(hertz, seconds, rate_hz=16000):
    """A sine of half the full loudness, (N,) float32."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def noise(samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def pitch(samples, rate_hz):
    """The loudest frequency in hertz."""
    return np.abs(np.fft.rfft(samples)).argmax() * rate_hz / len(samples)


def write(
    path, samples, rate_hz, *, codec="aac", container=None, options=None, bit_rate=128000, video=False, sound=True
):
    """Writes samples (N,) with PyAV, in stereo, beside a short grey video if asked to."""
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        if video:
            picture = file.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
        if sound:
            track = file.add_stream(codec, rate=rate_hz, layout="stereo")
            track.bit_rate = bit_rate
        if video:
            for _ in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
                file.mux(picture.encode(frame))
            file.mux(picture.encode(None))
        if sound:
            encode(file, track, np.stack([samples, samples]), rate_hz)
    return path


def encode(file, track, channels, rate_hz):
    size = track.codec_context.frame_size or 1024
    for start in range(0, channels.shape[1], size):
        part = np.ascontiguousarray(channels[:, start : start + size])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate_hz, start
        file.mux(track.encode(frame))
    file.mux(track.encode(None))


def write_mp3_without_length(path, samples, rate_hz):
    """An MP3 of variable bit rate whose Xing header, its first frame, has been taken off."""
    soundfile.write(path, samples, rate_hz, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = path.read_bytes()
    header = max(data.find(b"Xing"), data.find(b"Info"))
    path.write_bytes(data[data.find(data[:2], header) :])
    return path


def flac_without_length(path):
    """The FLAC file at `path`, its count of samples zeroed as by a writer that could not seek back."""
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)
