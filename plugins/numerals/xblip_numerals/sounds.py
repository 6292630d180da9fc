"""Spoken numbers of the numerals world: human takes at several speeds and pitches, and synthetic voices beside them.

Loudness is a fact, so a voice is set to a level (RMS in dB relative to full scale) and nothing afterwards, neither
here nor in the encoder's front end, evens levels out again.
"""

import ctypes
from functools import cache
from math import gcd

import numpy as np
import soundfile
from scipy.signal import resample_poly

from xblip_numerals.sources import Source

LEVELS_DBFS = {"loud": (-20.0, -14.0), "quiet": (-42.0, -34.0)}
SOUNDS = ("clean", "noisy")
# A recording handed over as it is counts as loud or quiet a little beyond the levels rendered, and as neither between.
_RAW_LOUD_DBFS, _RAW_QUIET_DBFS = -21.0, -33.0
_NOISY_SNR_DB = (6.0, 14.0)
_HISS_DBFS = (-85.0, -65.0)
# Voices of espeak-ng: accents of English times variants that a listener understands (whispering and robots left out).
_ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
_VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen Reed"
    " adam anika antonio aunty belinda benjamin boris caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa"
    " gustave ian iven iven2 john kaukovalta klatt klatt2 klatt4 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel"
    " miguel norbert pablo paul pedro quincy rob robert sandro shelby steph steph2 travis victor zac"
).split()


def read_take(source: Source) -> tuple[np.ndarray, int]:
    """Reads one spoken digit: float32 (T,) in -1 to 1, and its sample rate in Hz."""
    samples, sample_rate_hz = soundfile.read(source.path, dtype="float32")
    return samples, sample_rate_hz


def raw_facts(samples: np.ndarray) -> dict[str, str]:
    """Facts of a recording as it is: clean, and loud or quiet where its level leaves no doubt."""
    level_dbfs = _level_dbfs(samples)
    facts = {"sound": "clean"}
    if level_dbfs >= _RAW_LOUD_DBFS:
        facts["loudness"] = "loud"
    elif level_dbfs <= _RAW_QUIET_DBFS:
        facts["loudness"] = "quiet"
    return facts


def render_speech(
    voice: tuple[np.ndarray, int], facts: dict[str, str], others: list[Source], rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A voice at another speed and pitch, loud or quiet, clean or in noise.

    Args:
        voice: Samples (T,) in -1 to 1 and their rate in Hz, from `read_take` or `synthesize`.
        facts: `loudness` ("loud": -20 to -14 dBFS, "quiet": -42 to -34) and `sound` ("noisy": 6 to 14 dB SNR).
        others: Takes whose reverse makes babble.
        rng: Chooses everything the facts leave open.

    Returns:
        Samples (T,) in -1 to 1, and their rate, 8,000 or 16,000 Hz.
    """
    samples, sample_rate_hz = voice
    out_hz = int(rng.choice((8000, 16000)))
    samples = _resample(_trim(samples), sample_rate_hz, out_hz)
    pitch = rng.uniform(0.93, 1.08)
    samples = _resample(samples, round(100 * pitch), 100)
    samples = _stretch(samples, rng.uniform(0.85, 1.2) / pitch)
    samples = samples * 10 ** ((rng.uniform(*LEVELS_DBFS[facts["loudness"]]) - _level_dbfs(samples)) / 20)
    level_dbfs = _level_dbfs(samples)
    before, after = (int(seconds * out_hz) for seconds in rng.uniform(0.0, 0.25, 2))
    samples = np.pad(samples, (before, after))
    if facts["sound"] == "noisy":
        noise = _noise(len(samples), out_hz, others, rng)
        noise_dbfs = level_dbfs - rng.uniform(*_NOISY_SNR_DB)
    else:
        noise = rng.normal(size=len(samples))
        noise_dbfs = min(rng.uniform(*_HISS_DBFS), level_dbfs - 28)
    samples = samples + noise * 10 ** ((noise_dbfs - _level_dbfs(noise)) / 20)
    return samples.clip(-1, 1).astype(np.float32), out_hz


def synthesize(number: str, rng: np.random.Generator) -> tuple[np.ndarray, int, str]:
    """Says a number in a random voice of espeak-ng.

    Args:
        number: The word to say.
        rng: Chooses accent, variant, rate (110 to 230 words a minute), pitch and its range.

    Returns:
        Samples (T,) in -1 to 1, their rate in Hz, and the voice's name, such as "en-us+f3".
    """
    name = f"{rng.choice(_ACCENTS)}+{rng.choice(_VARIANTS)}"
    rate, pitch, pitch_range = (int(rng.integers(*bounds)) for bounds in ((110, 231), (15, 86), (20, 80)))
    samples, sample_rate_hz = _espeak()(number, name, rate, pitch, pitch_range)
    return samples, sample_rate_hz, name


@cache
def _espeak():
    """Opens espeak-ng once a process: a function of text, voice, rate, pitch and range to (samples, rate in Hz).

    The library's constants are those of speak_lib.h.
    """
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2
    sample_rate_hz = library.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, events):
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)

    def say(text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> tuple[np.ndarray, int]:
        pieces.clear()
        failed = library.espeak_SetVoiceByName(voice.encode())
        for parameter, value in ((1, rate), (3, pitch), (4, pitch_range)):
            failed |= library.espeak_SetParameter(parameter, value, 0)
        encoded, utf8 = text.encode(), 1
        failed |= library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, utf8, None, None)
        assert not failed and pieces, (text, voice)
        return np.concatenate(pieces).astype(np.float32) / 32768, sample_rate_hz

    # Freed with the function, not before: the library goes on calling it.
    say.collect = collect  # type: ignore[attr-defined]
    return say


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


def _stretch(samples: np.ndarray, speed: float, window: int = 256) -> np.ndarray:
    """Phase vocoder: `speed` times as fast at the same pitch."""
    hop = window // 4
    padded = np.pad(samples, window)
    taper = np.hanning(window)
    starts = np.arange(0, len(padded) - window - hop, hop * speed).astype(int)
    spectra = np.fft.rfft(padded[starts[:, None] + np.arange(window)] * taper)
    # The phase a bin gains over one hop is measured on a second frame, one hop later.
    later = np.fft.rfft(padded[starts[:, None] + hop + np.arange(window)] * taper)
    gained = np.angle(later) - np.angle(spectra)
    phase = np.angle(spectra[0]) + np.concatenate((np.zeros((1, gained.shape[1])), np.cumsum(gained[:-1], axis=0)))
    frames = np.fft.irfft(np.abs(spectra) * np.exp(1j * phase)) * taper
    stretched = np.zeros(hop * (len(starts) - 1) + window)
    for index, frame in enumerate(frames):
        stretched[index * hop : index * hop + window] += frame
    return _trim(stretched / 1.5)


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
