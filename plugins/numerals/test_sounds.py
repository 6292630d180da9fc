"""Recordings are as loud, clean, slow and dry as their facts say, and say their number once or twice."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter1d
from scipy.signal import spectrogram
from xblip_numerals.sounds import ECHOES, LONGEST_SECONDS, SPEEDS, TIMES, read_take, render_speech
from xblip_numerals.sources import SPLITS
from xblip_numerals.voices import synthesize, voices_of

PLAIN = {"number": "four", "loudness": "loud", "sound": "clean", "speed": "slow", "echo": "dry", "times": "once"}


def spoken(sources, seed: int, **facts: str) -> tuple[np.ndarray, int]:
    take = next(source for source in sources["speech"] if source.number == "four")
    return render_speech(read_take(take), {**PLAIN, **facts}, sources["speech"], np.random.default_rng(seed))


def heard(samples: np.ndarray, rate_hz: int, below_db: float = 20) -> np.ndarray:
    """Boolean (T,): where the level over 20 ms is within so many dB of the loudest."""
    power = uniform_filter1d(samples.astype(float) ** 2, rate_hz // 50)
    return power > power.max() * 10 ** (-below_db / 10)


@pytest.mark.parametrize("sound", ("clean", "noisy"))
@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize(("loudness", "low", "high"), (("loud", -26, -10), ("quiet", -48, -30)))
def test_speech_is_as_loud_and_clean_as_said(sources, loudness, low, high, echo, sound):
    for seed in range(4):
        samples, rate_hz = spoken(sources, seed, loudness=loudness, sound=sound, echo=echo)
        assert rate_hz in (8000, 16000) and np.abs(samples).max() <= 1
        assert low < 10 * np.log10(np.mean(samples.astype(float) ** 2)) < high
        _, _, power = spectrogram(samples.astype(float), rate_hz, nperseg=512)
        above = 10 * np.log10(power.max() / np.median(power))
        assert (above < 52) == (sound == "noisy"), above


@pytest.mark.parametrize("speed", SPEEDS)
def test_words_last_as_long_as_said_whoever_says_them(sources, speed):
    for seed in range(6):
        samples, rate_hz = spoken(sources, seed, speed=speed)
        on = np.flatnonzero(heard(samples, rate_hz))
        assert (0.3 < (on[-1] - on[0]) / rate_hz < 0.75) if speed == "slow" else (on[-1] - on[0]) / rate_hz < 0.29


@pytest.mark.parametrize("times", TIMES)
def test_numbers_are_said_once_or_twice(sources, times):
    for seed in range(6):
        on = heard(*spoken(sources, seed, times=times))
        assert (np.diff(on.astype(int), prepend=0) == 1).sum() == TIMES.index(times) + 1


def test_an_echo_trails_away_and_leaves_the_length_alone(sources):
    for seed in range(4):
        (dry, rate_hz), (wet, _) = (spoken(sources, seed, echo=echo) for echo in ("dry", "echoing"))
        assert len(dry) == len(wet)
        assert heard(wet, rate_hz, 30).sum() > 1.15 * heard(dry, rate_hz, 30).sum()


def test_no_recording_is_longer_than_its_encoder_hears():
    long = np.sin(np.arange(16000) / 5) * np.hanning(16000)
    facts = {**PLAIN, "number": "zero", "echo": "echoing", "times": "twice"}
    for seed in range(8):
        samples, rate_hz = render_speech((long, 8000), facts, [], np.random.default_rng(seed))
        assert len(samples) <= LONGEST_SECONDS * rate_hz


def test_synthetic_voices_are_heard_and_differ():
    pytest.importorskip("espeakng_loader")
    voices = [synthesize("seven", np.random.default_rng(seed)) for seed in range(5)]
    assert len({name for *_, name in voices}) == len({len(samples) for samples, *_ in voices}) == 5
    for samples, rate_hz, _ in voices:
        assert 0.2 < len(samples) / rate_hz < 1.6 and np.abs(samples).max() > 0.05


def test_no_synthetic_voice_is_in_two_splits():
    kept = [{name.split("+")[1] for name in voices_of(split)} for split in SPLITS]
    assert all(len(part) >= 8 for part in kept) and len(set.union(*kept)) == sum(map(len, kept))
