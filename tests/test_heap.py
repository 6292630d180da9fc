"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

HOLES = """
import psutil
from xblip import heap
own = psutil.Process()
pieces = [bytes(16_384) for _ in range(8_000)]
kept = pieces[::100]
del pieces
before = own.memory_info().rss
heap.give_back()
print((before - own.memory_info().rss) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back in its own way")
def test_pages_between_what_is_held_are_given_back():
    """In a process of its own, whose heap nobody else shapes."""
    given = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    assert int(given) > 80, "of 125 MiB, in MiB"
