"""Whether two short answers say the same, and what a reply decides: by whole words, not by letters.

The reference compares letters (partial_ratio > 90), to which "red" stands in "scarred" and "not red" says "red", and whose
list of first things has "one", as in "the second one".
"""

from collections.abc import Sequence
from difflib import SequenceMatcher

from xblip.metrics import normalise_answer

ALIKE = 0.85
"""How alike the letters of equal words are at least: "dog" and "dogs" are, "seven" and "seventeen" are not."""
NEGATIONS = {"no", "not", "never", "neither", "without"}
PLACES = ({"first", "1st"}, {"second", "2nd"})


def stands_in(short: str, text: str) -> bool:
    """Whether the words of one text stand in another, next to each other; endings may differ."""
    words, others = normalise_answer(short).split(), normalise_answer(text).split()
    windows = (others[start : start + len(words)] for start in range(len(others) - len(words) + 1))
    wanted = " ".join(words)
    return bool(words) and any(SequenceMatcher(None, wanted, " ".join(window)).ratio() > ALIKE for window in windows)


def agree(one: str, other: str) -> bool:
    """Whether two answers say the same: one stands in the other, and both or neither deny something."""
    denied = [bool(NEGATIONS & set(normalise_answer(text).split())) for text in (one, other)]
    return denied[0] == denied[1] and (stands_in(one, other) or stands_in(other, one))


def yes_or_no(reply: str) -> str:
    """Returns "yes" or "no" if a reply begins with it, else ""."""
    first = (normalise_answer(reply).split() or [""])[0]
    return first if first in ("yes", "no") else ""


def which_of(reply: str, answers: Sequence[str]) -> int | None:
    """Returns which of two inputs a reply names, 0 or 1; None if none, or both.

    Args:
      reply: what was said.
      answers: what they are called; else "first" and "second" decide.
    """
    plain = normalise_answer(reply)
    named = [place for place, answer in enumerate(answers) if normalise_answer(answer) == plain]
    if not named:
        named = [place for place, names in enumerate(PLACES) if names & set(plain.split())]
    return named[0] if len(named) == 1 else None
