"""Spoken numbers of the numerals world: human takes and synthetic voices, slow or fast, loud or quiet, in a room or not.

Loudness is a fact, so a voice is set to a level (RMS in dB relative to full scale) and nothing afterwards, neither
here nor in the encoder's front end, evens levels out again. Speed is a fact, so every take is brought to a length that
its word has when it is said slowly or fast, whoever says it.
"""

from math import gcd

import numpy as np
import soundfile
from scipy.signal import fftconvolve, resample_poly

from xblip_numerals.sources import NUMBERS, Source

LEVELS_DBFS = {"loud": (-20.0, -14.0), "quiet": (-42.0, -34.0)}
SOUNDS = ("clean", "noisy")
# Length as a multiple of the word's usual one.
SPEEDS = {"slow": (1.4, 1.65), "fast": (0.55, 0.68)}
ECHOES = ("echoing", "dry")
TIMES = ("once", "twice")
LONGEST_SECONDS = 2.24

_NOISY_SNR_DB = (8.0, 15.0)
_HISS_DBFS = (-85.0, -65.0)
# Median lengths of the words as five speakers say them.
_USUAL_SECONDS = dict(zip(NUMBERS, (0.46, 0.35, 0.34, 0.37, 0.38, 0.4, 0.34, 0.4, 0.37, 0.43), strict=True))
_MOST_STRETCHED = 2.0
_GAP_SECONDS = (0.16, 0.26)
_TAIL_SECONDS = 0.3
_REVERBERATION_SECONDS = (0.7, 1.1)


def read_take(source: Source) -> tuple[np.ndarray, int]:
    """Reads one spoken digit: float32 (T,) in -1 to 1, and its sample rate in Hz."""
    samples, sample_rate_hz = soundfile.read(source.path, dtype="float32")
    return samples, sample_rate_hz


def render_speech(
    voice: tuple[np.ndarray, int], facts: dict[str, str], others: list[Source], rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A voice that says its number slowly or fast, once or twice, loud or quiet, in a room or not, in noise or not.

    Args:
        voice: Samples (T,) in -1 to 1 and their rate in Hz, from `read_take` or `voices.synthesize`.
        facts: `number`; `loudness` ("loud": -20 to -14 dBFS, "quiet": -42 to -34); `sound` ("noisy": 8 to 15 dB SNR);
            `speed`; `echo` ("echoing": in a hall that falls silent in about a second); `times`.
        others: Takes whose reverse makes babble.
        rng: Chooses everything the facts leave open.

    Returns:
        Samples (T,) in -1 to 1, at most `LONGEST_SECONDS` long, and their rate, 8,000 or 16,000 Hz.
    """
    samples, sample_rate_hz = voice
    out_hz = int(rng.choice((8000, 16000)))
    samples = _resample(_trim(samples), sample_rate_hz, out_hz)
    pitch = rng.uniform(0.97, 1.03)
    samples = _resample(samples, round(100 * pitch), 100)
    seconds = rng.uniform(*SPEEDS[facts["speed"]]) * _USUAL_SECONDS[facts["number"]]
    speed = len(samples) / out_hz / seconds
    samples = _stretch(samples, float(np.clip(speed, 1 / _MOST_STRETCHED, _MOST_STRETCHED)), out_hz // 32)
    if facts["times"] == "twice":
        samples = np.concatenate([samples, np.zeros(int(rng.uniform(*_GAP_SECONDS) * out_hz)), samples])
    gain = 10 ** ((rng.uniform(*LEVELS_DBFS[facts["loudness"]]) - _level_dbfs(_heard(samples))) / 20)
    level_dbfs = _level_dbfs(_heard(samples)) + 20 * np.log10(gain)
    before, after = (int(seconds * out_hz) for seconds in rng.uniform((0.0, 0.2), (0.12, _TAIL_SECONDS)))
    samples = np.pad(gain * samples, (before, after))
    if facts["echo"] == "echoing":
        samples = _in_a_hall(samples, out_hz, rng)
    if facts["sound"] == "noisy":
        noise = _noise(len(samples), out_hz, others, rng)
        noise_dbfs = level_dbfs - rng.uniform(*_NOISY_SNR_DB)
    else:
        noise = rng.normal(size=len(samples))
        noise_dbfs = min(rng.uniform(*_HISS_DBFS), level_dbfs - 30)
    samples = samples + noise * 10 ** ((noise_dbfs - _level_dbfs(noise)) / 20)
    return samples.clip(-1, 1)[: int(LONGEST_SECONDS * out_hz)].astype(np.float32), out_hz


def _level_dbfs(samples: np.ndarray) -> float:
    """RMS in dB relative to full scale."""
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-12))


def _trim(samples: np.ndarray) -> np.ndarray:
    """Cuts off what is 35 dB below the peak at both ends."""
    heard = np.flatnonzero(np.abs(samples) > np.abs(samples).max() * 10 ** (-35 / 20))
    return samples[heard[0] : heard[-1] + 1]


def _resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resamples by the ratio of two whole rates."""
    divisor = gcd(from_hz, to_hz)
    return resample_poly(samples, to_hz // divisor, from_hz // divisor)


def _heard(samples: np.ndarray) -> np.ndarray:
    """The samples without the silence between two words."""
    return samples[samples != 0]


def _in_a_hall(samples: np.ndarray, sample_rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """What a microphone hears of a voice (T,) in a hall with bare walls: as loud, as long, but trailing away."""
    decay_seconds = rng.uniform(*_REVERBERATION_SECONDS)
    seconds = np.arange(int(decay_seconds * sample_rate_hz)) / sample_rate_hz
    # The hall's answer: noise whose energy falls by 60 dB in the reverberation time, after a first wall 20 ms away.
    answer = rng.normal(size=len(seconds)) * 10 ** (-3 * seconds / decay_seconds) * (seconds > 0.02)
    hall = fftconvolve(samples, answer)[: len(samples)]
    share = rng.uniform(0.75, 1.0) * np.sqrt(np.mean(samples**2) / np.mean(hall**2))
    echoed = samples + share * hall
    return echoed * np.sqrt(np.mean(samples**2) / np.mean(echoed**2))


def _stretch(samples: np.ndarray, speed: float, window: int) -> np.ndarray:
    """WSOLA: `speed` times as fast at the same pitch, from pieces that fit to what was laid down before them.

    Args:
        samples: (T,).
        speed: 1 or more shortens.
        window: Length of a piece in samples, two periods of a deep voice or more.
    """
    hop, reach = window // 2, window // 4
    taper = np.hanning(window)
    padded = np.pad(samples, (window, 2 * window))
    count = int((len(samples) + window) / (hop * speed))
    laid = np.zeros(hop * count + window)
    start = window - hop
    for index in range(count):
        wanted = window - hop + round(index * hop * speed)
        if index:
            follows = padded[start + hop : start + hop + window]  # what came next in the take
            around = padded[wanted - reach : wanted + reach + window]
            likeness = np.correlate(around, follows) / (np.linalg.norm(follows) + 1e-9)
            energy = np.sqrt(np.convolve(around**2, np.ones(window), "valid") + 1e-9)
            start = wanted - reach + int((likeness / energy).argmax())
        laid[index * hop : index * hop + window] += taper * padded[start : start + window]
    return _trim(laid)


def _noise(length: int, sample_rate_hz: int, others: list[Source], rng: np.random.Generator) -> np.ndarray:
    """White noise, pink noise, or four reversed voices at once."""
    kind = rng.choice(("white", "pink", "babble"))
    if kind == "babble":
        babble = np.zeros(length)
        for index in rng.integers(len(others), size=4):
            samples, from_hz = read_take(others[index])
            voice = _resample(_trim(samples)[::-1], from_hz, sample_rate_hz)
            voice = np.resize(voice / np.sqrt(np.mean(voice**2)), length)
            babble += np.roll(voice, int(rng.integers(length)))
        return babble
    noise = rng.normal(size=length)
    if kind == "pink":
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), length)
    return noise
