"""Synthetic voices of the numerals world: espeak-ng's, which are the speaker that facts call robot.

Each split has voices of its own: what is to be recognised is that a machine speaks, not which one.
"""

import ctypes
from functools import cache

import numpy as np

_TO_VAL, _TO_TEST, _OF = 0, 4, 8
# Voices of espeak-ng: accents of English times variants that a listener understands (whispering and robots left out).
_ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
_VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen Reed"
    " adam anika antonio aunty belinda benjamin boris caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa"
    " gustave ian iven iven2 john kaukovalta klatt klatt2 klatt4 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel"
    " miguel norbert pablo paul pedro quincy rob robert sandro shelby steph steph2 travis victor zac"
).split()


def voices_of(split: str) -> list[str]:
    """Names of a split's voices: an eighth of the variants each for val and test, the rest for train."""
    held_out = {_TO_VAL: "val", _TO_TEST: "test"}
    kept = [variant for place, variant in enumerate(_VARIANTS) if held_out.get(place % _OF, "train") == split]
    return [f"{accent}+{variant}" for accent in _ACCENTS for variant in kept]


def synthesize(number: str, rng: np.random.Generator, split: str = "train") -> tuple[np.ndarray, int, str]:
    """Says a number in a random voice of espeak-ng.

    Args:
        number: The word to say.
        rng: Chooses accent, variant, rate (130 to 190 words a minute), pitch and its range.
        split: Whose voices.

    Returns:
        Samples (T,) in -1 to 1, their rate in Hz, and the voice's name, such as "en-us+f3".
    """
    name = str(rng.choice(voices_of(split)))
    rate, pitch, pitch_range = (int(rng.integers(*bounds)) for bounds in ((130, 191), (15, 86), (20, 80)))
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
