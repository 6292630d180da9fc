"""Text as it grows: what is held back is what may still become a stop string, and holding it back takes no time."""

import random
import time

import pytest

from xblip.text_stream import TextStream


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def said_of(text, stop):
    """The pieces that are told of a text, a letter at a time until it is stopped."""
    told, stream, ids = [], TextStream(Letters(), stop), [ord(letter) for letter in text]
    while not stream.has_stopped and len(told) < len(ids):
        told.append(stream.add(ids[: len(told) + 1], is_last=len(told) + 1 == len(ids)))
    return told, stream


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_the_text_before_the_first_stop(seed):
    draw = random.Random(seed)
    for _ in range(200):
        text = "x" + "".join(draw.choices("ab ", k=draw.randrange(1, 12)))
        stop = ["".join(draw.choices("ab ", k=draw.randrange(1, 5))) for _ in range(draw.randrange(3))]
        places = [place for end in stop if (place := text.find(end)) >= 0]
        told, stream = said_of(text, stop)
        assert "".join(told) == stream.text == text[: min(places, default=len(text))].rstrip()
        assert stream.has_stopped == bool(places)


def test_a_stop_as_long_as_a_book_takes_no_time():
    started = time.monotonic()
    told, stream = said_of("ab" * 200, ["ab" * 2_000_000] * 4)
    assert time.monotonic() - started < 5 and stream.text == "ab" * 200 and told[-1] == stream.text
