"""Memory that was freed and is still held: glibc keeps pages that lie between pieces in use, so that a busy server grows."""

import ctypes


def give_back() -> None:
    """Gives pages without anything in use back to the system; takes milliseconds, and nothing where there is no glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
