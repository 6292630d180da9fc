"""Text as it grows: what is certain of an answer whose tokens come one by one."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns tokens into pieces of text that, put together, are the answer's text.

    What may still change is held back: the bytes of an unfinished character, space that may turn out to be the last, and
    what may be the beginning of a stop string.

    Attributes:
      text: said so far, without space around it; cut before a stop string.
      has_stopped: whether a stop string was said.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.text = ""
        self.has_stopped = False
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._told = ""

    def add(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """Takes all tokens of the answer so far; returns the text that is new and certain."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True).lstrip()
        places = [place for place in (text.find(end) for end in self._stop) if place >= 0]
        self.has_stopped = bool(places)
        self.text = text[: min(places)].rstrip() if places else text.rstrip()
        certain = self.text if is_last or places else self._certain(text)
        if not certain.startswith(self._told):
            return ""  # a tokenizer that changes what stands before
        new, self._told = certain[len(self._told) :], certain
        return new

    def _certain(self, text: str) -> str:
        text = text.rstrip("\ufffd")
        return text[: len(text) - max((_begun(text, end) for end in self._stop), default=0)].rstrip()


def _begun(text: str, end: str) -> int:
    """How many characters of `end`, but not all, `text` ends with."""
    sizes = range(min(len(end) - 1, len(text)), 0, -1)
    return next((size for size in sizes if end[size - 1] == text[-1] and text.endswith(end[:size])), 0)
