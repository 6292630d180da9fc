"""Errors a user can cause and mend.

One small family, so that callers catch `XBlipError` and nothing else. Every message says what is wrong, what was
expected or known, and what to do; `suggest` adds the nearest known name, since most wrong names are misspelt ones.
`some_of` and `in_units` say lists and bytes, here and in tables, in one way.
"""

import difflib
from collections.abc import Iterable, Sequence


class XBlipError(Exception):
    """What a user of xblip can cause and mend; its text, one line, is written to be read by that user.

    Attributes:
      place: what part of a request it is about; None if that is not known.
    """

    place: str | None = None

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class ConfigError(XBlipError):
    """A config file, an override or an option is wrong."""


class MediaError(XBlipError):
    """A media source cannot be read, or is not what its modality accepts."""


class PluginError(XBlipError):
    """A plugin is missing, broken, restricted or clashes with another."""


class BundleError(XBlipError):
    """A bundle or branch is missing, damaged, or was trained for other frozen parts."""


class InputError(XBlipError):
    """What was asked cannot be answered as it stands: empty, too long, of unequal lengths.

    Attributes:
      row: which sample of a batch it is about; None if that is not known.
    """

    row: int | None = None


class BusyError(XBlipError):
    """Too much is asked at once: ask again later."""


class ClosedError(BusyError):
    """What was asked is being shut down; ask again in a while, or elsewhere."""


class LateError(XBlipError):
    """A request's time was over before its answer was whole."""


class UnknownWordsWarning(UserWarning):
    """The LLM's tokenizer does not know words that it is given."""


def some_of(names: Sequence[str], most: int = 3, *, between: str = ", ") -> str:
    """Returns the first names, of `most` at most, and how many more: "a, b, c and 2 more", "a; b; c; and 2 more"."""
    more = f"{between.strip(', ')} and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `name` most likely stands for, or None when none is near."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown `name`.

    Args:
      name: what the user wrote.
      known: the names that would have been right.

    Returns:
      `' Did you mean "x"?'` when a known name is near, followed by all known names unless they are very many.
    """
    known = sorted(known)
    near = nearest(name, known)
    hint = f' Did you mean "{near}"?' if near else ""
    if len(known) > 30:
        return hint
    return f"{hint} Known: {', '.join(known) if known else 'none'}."


def in_units(count: float) -> str:
    """Bytes in the largest unit that they fill."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
