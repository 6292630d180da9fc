"""How whole files are broken: steps that each change bytes, drawn by hypothesis and done by plain functions.

A case is a seed's name and its steps and not the bytes they make, so that a finding is made smaller by leaving steps out.
Some formats guard themselves by checksums, behind which random damage never gets: some steps mend these after the others.
"""

import io
import itertools
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import hypothesis
from hypothesis import strategies as st

EXTREMES = (0, 1, 2, 127, 255, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (
    *("-1", "0", "1", "3.5", "65536", "2147483648", "999999999999", "9223372036854775808", "9" * 5000),
    *("nan", "inf", "-inf", "1e308", "-1e-320", "1e999", "0x10", "", "²", "1_0", "+7"),
)
MOST_BYTES = 2**20
PART = 250
"""Cases drawn at once: hypothesis remembers all of them, and takes longer for each."""


@dataclass(frozen=True)
class Step:
    """One change.

    Attributes:
      kind: a key of `KINDS`.
      at: where, as a share of the file; in its first `head` bytes alone if that is not 0.
      head: how many bytes count as the file; 0 for all.
      number: for lengths, values and choices, as the kind has it.
      other: a seed's name, or "".
    """

    kind: str
    at: float
    head: int
    number: int
    other: str = ""

    def offset(self, data: bytes) -> int:
        return int(self.at * min(len(data), self.head or len(data)))

    def span(self, data: bytes) -> slice:
        start = self.offset(data)
        return slice(start, start + 1 + self.number % 97)


@dataclass(frozen=True)
class Case:
    """A file to be read.

    Attributes:
      seed: the whole file that it was.
      steps: what was done to it.
      ending: what it is called by.
    """

    seed: str
    steps: tuple[Step, ...]
    ending: str

    def content(self, seeds: Mapping[str, bytes]) -> bytes:
        data = seeds[self.seed]
        for step in self.steps:
            data = KINDS[step.kind](data, step, seeds)[:MOST_BYTES]
        return data

    def smaller(self, holds: Callable[["Case"], bool]) -> "Case":
        """Leaves out what `holds` does not need."""
        found = self
        for place in reversed(range(len(self.steps))):
            shorter = replace(found, steps=(*found.steps[:place], *found.steps[place + 1 :]))
            if holds(shorter):
                found = shorter
        return found


def cases(seeds: Mapping[str, bytes], weights: Mapping[str, int] | None = None) -> st.SearchStrategy[Case]:
    """Cases of these files.

    Args:
      seeds: whole files by name.
      weights: how often files of an ending are drawn, against 4 for any other.
    """
    names = [name for name in seeds for _ in range((weights or {}).get(_ending(name), 4))]
    endings = sorted({_ending(name) for name in names})
    # hypothesis likes small numbers, which would break the beginnings of files alone
    chance = st.integers(0, 2**32).map(random.Random)
    step = st.builds(
        Step,
        kind=st.sampled_from([*KINDS]),
        at=chance.map(lambda source: source.random()),
        head=st.sampled_from([0, 0, 32, 128, 600]),
        number=chance.map(lambda source: source.getrandbits(32)),
        other=st.sampled_from([*seeds]),
    )

    def case(seed: str, steps: Sequence[Step], other: str, is_renamed: bool) -> Case:
        return Case(seed, tuple(steps), other if is_renamed else _ending(seed))

    renamed = st.integers(0, 19).map(lambda number: number == 7)
    return st.builds(
        case, st.sampled_from(names), st.lists(step, min_size=1, max_size=4), st.sampled_from(endings), renamed
    )


def drawn(strategy: st.SearchStrategy, count: int, seed: int) -> list:
    """Draws so many that are all different, the same for the same seed."""
    found: dict = {}
    for part in itertools.count():
        if len(found) >= count:
            return [*found][:count]

        @hypothesis.seed(1_000 * seed + part)
        @hypothesis.settings(
            max_examples=min(PART, 2 * count),
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def draw(value) -> None:
            found[value] = None

        draw()


def _ending(name: str) -> str:
    return name[name.rfind(".") :]


def _flip(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    place = step.offset(data)
    return data[:place] + bytes(byte ^ 1 << step.number % 8 for byte in data[place : place + 1]) + data[place + 1 :]


def _fill(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    span = step.span(data)
    length = len(data[span])
    runs = (bytes(length), b"\xff" * length, random.Random(step.number).randbytes(length), b" " * length)
    return data[: span.start] + runs[step.number // 97 % 4] + data[span.stop :]


def _cut(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    return data[: step.offset(data)] if step.number % 7 else b""


def _repeat(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    span = step.span(data)
    return data[: span.start] + data[span] * (2 + step.number // 97 % 2000) + data[span.stop :]


def _delete(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    span = step.span(data)
    return data[: span.start] + data[span.stop :]


def _insert(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    span = step.span(data)
    return data[: span.start] + random.Random(step.number).randbytes(span.stop - span.start) + data[span.start :]


def _swap(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    first = step.span(data)
    length, start = first.stop - first.start, first.stop + step.number // 97 % 200
    second = slice(start, start + length)
    return data[: first.start] + data[second] + data[first.stop : start] + data[first] + data[second.stop :]


def _integer(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    """Puts an extreme number where one may stand: of 1, 2, 4 or 8 bytes, in either order."""
    place, choice = step.offset(data), step.number
    width, order = (1, 2, 4, 8)[choice % 4], ("little", "big")[choice // 4 % 2]
    place -= place % width if choice // 8 % 2 else 0
    value = EXTREMES[choice // 16 % len(EXTREMES)] % 2 ** (8 * width)
    return data[:place] + value.to_bytes(width, order) + data[place + width :]


def _grow(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    """Makes a big-endian or little-endian number of four bytes a thousand times larger, or one more or less."""
    place, order = step.offset(data), ("little", "big")[step.number % 2]
    value = int.from_bytes(data[place : place + 4], order)
    value = (value * 1000, value + 1, value - 1)[step.number // 2 % 3] % 2**32
    return data[:place] + value.to_bytes(4, order) + data[place + 4 :]


def _splice(data: bytes, step: Step, seeds: Mapping[str, bytes]) -> bytes:
    other = seeds[step.other]
    return data[: step.offset(data)] + other[step.number % len(other) :]


def _text_number(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    """Edits a number that stands as text, as in headers of PLY and PCD."""
    found = list(re.finditer(rb"(?<![\w.])-?[0-9.]+", data[: step.head or len(data)]))
    if not found:
        return data
    hit = found[int(step.at * len(found))]
    return data[: hit.start()] + NUMBERS[step.number % len(NUMBERS)].encode() + data[hit.end() :]


def _text_word(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    """Puts one word of a text in the place of another."""
    found = list(re.finditer(rb"[A-Za-z_]+", data[: step.head or len(data)]))
    if not found:
        return data
    hit, other = found[int(step.at * len(found))], found[step.number % len(found)]
    return data[: hit.start()] + other[0] + data[hit.end() :]


def _mend_png(data: bytes, step: Step, _: Mapping[str, bytes]) -> bytes:
    """Makes a PNG's checksums right again, as far as its chunks can be told."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    out, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        body = data[place + 4 : end]
        out.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place = end + 4
    return b"".join(out)


def _inside_zip(data: bytes, step: Step, seeds: Mapping[str, bytes]) -> bytes:
    """Breaks the first member of a zip archive in another way, and packs it anew."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = archive.namelist()[0]
            member = archive.read(name)
    except (zipfile.BadZipFile, IndexError, NotImplementedError, RuntimeError, zlib.error, EOFError, ValueError):
        return data
    inner = replace(step, kind=[*INSIDE][step.number % len(INSIDE)])
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, INSIDE[inner.kind](member, inner, seeds))
        return file.getvalue()


INSIDE: dict[str, Callable[[bytes, Step, Mapping[str, bytes]], bytes]] = {
    "flip": _flip,
    "fill": _fill,
    "cut": _cut,
    "repeat": _repeat,
    "delete": _delete,
    "insert": _insert,
    "swap": _swap,
    "integer": _integer,
    "grow": _grow,
    "splice": _splice,
    "text_number": _text_number,
    "text_word": _text_word,
}
KINDS = {**INSIDE, "mend_png": _mend_png, "inside_zip": _inside_zip}
