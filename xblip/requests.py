"""What is asked of an engine, and what it says while it answers."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xblip.answer import Answer
from xblip.errors import InputError, LateError, XBlipError
from xblip.sample import Sample
from xblip.sampling import Drawn


@dataclass(frozen=True)
class Request:
    """One question with what it may take.

    Attributes:
      sample: what is asked; sources are whatever a model takes, features too; None in an engine's tickets.
      options: transformers' generation options.
      seed: of sampling; None for one of chance.
      stop: strings that end the answer, which is cut before them; or one.
      top_log_probabilities: how many of the likeliest tokens are told with each; None where likelihoods are not asked for.
      seconds: that it may take in all; None for as long as it takes.
      caller: callers take turns.
    """

    sample: Sample | Mapping[str, Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] | str = ()
    top_log_probabilities: int | None = None
    seconds: float | None = None
    caller: str = ""

    def __post_init__(self):
        """Raises `InputError` for what can be no such request."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        if not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop must be texts, not {self.stop!r:.100}.")
        top = self.top_log_probabilities
        if top is not None and (not isinstance(top, int) or top < 0):
            raise InputError(f"top_log_probabilities must be a whole number from 0 on, not {top!r:.100}.")
        seconds = self.seconds
        if seconds is not None and (not isinstance(seconds, (int, float)) or not seconds > 0):
            raise InputError(f"seconds must be a number above 0, not {seconds!r:.100}.")


@dataclass(frozen=True)
class Said:
    """A piece of an answer: text that is certain, and the tokens drawn since the last piece."""

    text: str
    drawn: list[Drawn]


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
      answer: all of it.
      reason: "stop" at an end of sequence or a stop string, "length" where max_new_tokens were said.
      drawn: its tokens; none where transformers generated it.
    """

    answer: Answer
    reason: str
    drawn: list[Drawn]


Event = Said | Finished | XBlipError


def late(seconds: float) -> LateError:
    """Returns the error of a request that had so many seconds."""
    return LateError(f"The answer was not whole after {seconds:.6g} s: ask for less, or give more time.")


class Ticket:
    """A request's place in an engine.

    Attributes:
      request: what is asked.
      tell: called with every event, in an engine's thread: it must not wait. The last is `Finished` or an error.
      submitted: when, by `time.monotonic`.
      is_cancelled: whether anybody still wants the answer.
    """

    def __init__(self, request: Request, tell: Callable[[Event], None]):
        self.request = request
        self.tell = tell
        self.submitted = time.monotonic()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Gives the answer up; nothing more is told."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def is_late(self) -> bool:
        seconds = self.request.seconds
        return seconds is not None and time.monotonic() - self.submitted > seconds

    @property
    def is_given_up(self) -> bool:
        """Whether the answer is wanted no more, or too late."""
        return self.is_cancelled or self.is_late
