"""The public sets that the numerals world is rendered from: handwriting, hands, voices, read from a folder.

A split never shares a hand with another one. Voices are shared, their takes are not: who speaks is one of the facts, and
nobody can name a voice never heard before.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xblip import XBlipError

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val", "test")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "yweweler")
FIRST_VAL_TAKE, FIRST_TEST_TAKE = 41, 45

_KINDS = {"mnist-t10k": "handwriting", "sign-language-digits": "sign", "fsdd": "speech"}


class SourcesError(XBlipError):
    """The folder with the public sets is missing or is not laid out as expected."""


@dataclass(frozen=True)
class Source:
    """One real file: a handwritten digit, a photograph of a hand, or a spoken digit.

    Attributes:
        path: The file. Handwriting: 28x28 grey PNG. Sign: 100x100 RGB JPEG. Speech: 8 kHz mono WAV.
        kind: "handwriting", "sign" or "speech".
        number: The digit, "zero" to "nine".
        index: The file's own number in its set; for speech the take.
        speaker: Who speaks; empty for the other kinds.
    """

    path: Path
    kind: str
    number: str
    index: int
    speaker: str = ""


def read_sources(data: str | Path, split: str) -> dict[str, list[Source]]:
    """Reads `data/manifest.jsonl` and keeps the files of one split.

    Handwriting is split by a hash of the file's index (80 / 10 / 10 %). Signs are split by picture number, which puts
    the last tenth of the students into test and the tenth before them into val: a student's pictures are numbered in
    a row, from the hand that shows zero on. Speech is split by takes: 41 to 44 of each speaker are val, those from 45
    on test. Speakers other than `SPEAKERS` are left out.

    Args:
        data: Folder with `manifest.jsonl`, one row a file: `file`, `number` (0 to 9), `source`, for speech `speaker`.
        split: "train", "val" or "test".

    Returns:
        Kind ("handwriting", "sign", "speech") to its sources, ordered by path.

    Raises:
        SourcesError: The folder or its manifest is missing, a row is not as described, or a number of a kind, or a
            speaker's, is without a file in this split.
    """
    if split not in SPLITS:
        raise SourcesError(f"No split is called {split!r}; choose one of {', '.join(SPLITS)}.")
    manifest = Path(data) / "manifest.jsonl"
    if not manifest.is_file():
        raise SourcesError(
            f"{manifest} does not exist. The numerals world is rendered from three public sets: the MNIST test images "
            "(PNG, in handwriting/), the Free Spoken Digit Dataset (WAV, in speech/) and the Sign Language Digits "
            "Dataset (JPEG, in signs/). Get them under these names, put them in one folder beside a manifest.jsonl "
            'with rows like {"file": "handwriting/00001.png", "number": 7, "source": "mnist-t10k"} '
            f"(sources: {', '.join(_KINDS)}), and pass that folder."
        )
    sources = sorted(_read_manifest(manifest), key=lambda source: source.path)
    first_val, first_test = _sign_bounds([source for source in sources if source.kind == "sign"])

    def split_of(source: Source) -> str:
        if source.kind == "speech":
            held_out = "test" if source.index >= FIRST_TEST_TAKE else "val"
            return held_out if source.index >= FIRST_VAL_TAKE else "train"
        if source.kind == "sign":
            return "test" if source.index >= first_test else "val" if source.index >= first_val else "train"
        bucket = zlib.crc32(str(source.index).encode()) % 10
        return {0: "test", 1: "val"}.get(bucket, "train")

    kept: dict[str, list[Source]] = {kind: [] for kind in _KINDS.values()}
    for source in sources:
        if split_of(source) == split and source.speaker in ("", *SPEAKERS):
            kept[source.kind].append(source)
    for kind, of_kind in kept.items():
        there = {(source.number, source.speaker) for source in of_kind}
        for speaker in SPEAKERS if kind == "speech" else ("",):
            missing = [number for number in NUMBERS if (number, speaker) not in there]
            if missing:
                raise SourcesError(
                    f"{manifest} has no {kind} file of {', '.join(missing)}{speaker and ' by '}{speaker} for the {split} "
                    "split; every number of every kind is needed, of speech by every speaker. Check that all three "
                    "public sets are complete."
                )
    return kept


def _read_manifest(manifest: Path) -> Iterator[Source]:
    """Yields a source a row of the manifest."""
    with manifest.open(encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                path = manifest.parent / row["file"]
                kind = _KINDS[row["source"]]
                yield Source(path, kind, NUMBERS[row["number"]], int(path.stem.split("_")[-1]), row.get("speaker", ""))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise SourcesError(
                    f"{manifest}, line {line_number}: cannot be read ({type(error).__name__}: {error}). Expected "
                    f"file, number (0 to 9) and source ({', '.join(_KINDS)}), with the file's index or take at the "
                    "end of its name."
                ) from error


def _sign_bounds(signs: list[Source]) -> tuple[int, int]:
    """Picture numbers at which val and test begin: each is a student's first picture, the one that shows zero."""
    firsts = sorted(source.index for source in signs if source.number == "zero")
    if not firsts:
        return 0, 0
    return firsts[len(firsts) * 8 // 10], firsts[len(firsts) * 9 // 10]
