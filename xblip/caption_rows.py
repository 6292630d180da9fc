"""Captions of manifests, one by one: those that can be worked with, and what is wrong with the others.

Captions that people have collected hold anything: nothing at all, whole pages, control characters, the same thing twice.
Such ones are put aside with a reason instead of ending a run of days; only when nothing is left is that an error.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xblip.errors import ConfigError, InputError, XBlipError
from xblip.media import FilePart
from xblip.modality import Modality
from xblip.sample import Media
from xblip.train_config import open_manifests

UNREADABLE, NO_CAPTION, EMPTY = "row that cannot be read", "no caption of one input", "empty"
TOO_LONG, TOO_SHORT, TWICE = "too long", "too short", "said twice of one file"


class Captioned(NamedTuple):
    """One input and one text that is said of it.

    Attributes:
      id: unlike any other's, and the same each time.
      row: the same for all captions of a row.
      media: the input, unread.
      caption: on one line, without control characters.
      origin: file and line.
    """

    id: str
    row: str
    media: Media
    caption: str
    origin: str


class PutAside(NamedTuple):
    """A caption that is not worked with.

    Attributes:
      origin: file and line.
      reason: one of this module's.
      detail: what more can be said, or "".
    """

    origin: str
    reason: str
    detail: str = ""


def read_captions(
    data: Any,
    modalities: Mapping[str, type[Modality] | Modality],
    *,
    where: str = "data",
    max_characters: int = 1000,
    min_words: int = 1,
) -> tuple[list[Captioned], list[PutAside]]:
    """Reads the captions of manifests, in any form that training reads; a row with several has each by itself.

    Args:
      data: a manifest or several, as `data.train` of a training config names them.
      modalities: by name; rows may name no other.
      where: what the data are, for messages.
      max_characters, min_words: what is longer or shorter is put aside.

    Raises:
      ConfigError: there is no manifest.
      InputError: no caption is left; the message tells why.
    """
    manifests = open_manifests(data, where, modalities=modalities)
    if not manifests:
        raise ConfigError(f"{where} names no manifest: give the path of one.")
    found: list[Captioned] = []
    aside: list[PutAside] = []
    seen: set[tuple[str, str, str]] = set()
    for number, manifest in enumerate(manifests):
        for index in range(len(manifest)):
            name = f"{number}-{index}" if len(manifests) > 1 else str(index)
            try:
                row = manifest.row(index)
            except XBlipError as error:
                aside.append(PutAside(f"{manifest.path}, row {index + 1}", UNREADABLE, str(error)))
                continue
            media = row.sample.all_media
            if row.task != "caption" or len(media) != 1 or not row.answers:
                aside.append(PutAside(row.origin, EMPTY if row.task == "caption" and media else NO_CAPTION))
                continue
            for place, text in enumerate(row.answers):
                caption = on_one_line(text)
                reason = _fault(caption, max_characters, min_words)
                key = (media[0].modality, str(media[0].source), caption.casefold())
                reason = reason or (TWICE if key in seen else "")
                if reason:
                    aside.append(PutAside(row.origin, reason, f"{caption:.80}"))
                    continue
                seen.add(key)
                own = f"{name}-{place}" if len(row.answers) > 1 else name
                found.append(Captioned(own, name, media[0], caption, row.origin))
    if not found:
        first = aside[0]
        reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(one.reason for one in aside).items())
        raise InputError(
            f"{where} holds no caption to work with: {reasons}. The first: {first.origin}: {first.detail or first.reason}"
        )
    return found, aside


def on_one_line(text: str) -> str:
    """Returns a text without control characters, which stand for spaces, and without spaces that say nothing."""
    plain = (" " if unicodedata.category(mark) in ("Cc", "Zl", "Zp") else mark for mark in text)
    return " ".join("".join(plain).split())


def _fault(caption: str, max_characters: int, min_words: int) -> str:
    if not any(mark.isalnum() for mark in caption):
        return EMPTY
    if len(caption) > max_characters:
        return TOO_LONG
    return TOO_SHORT if len(caption.split()) < min_words else ""


def placed(source: Any, folder: Path) -> Any:
    """Returns a source as a manifest in `folder` names it: a path from there, or plain numbers as they are.

    Raises:
      InputError: it lies inside another file, where a manifest cannot name it.
    """
    if isinstance(source, (str, Path)):
        return os.path.relpath(source, Path(folder).absolute())
    if isinstance(source, (FilePart, bytes)):
        inside = f"{source.path}, {source.name!r}" if isinstance(source, FilePart) else "a table's bytes"
        raise InputError(
            f"A file lies inside another ({inside}), and a JSONL manifest cannot name it there: unpack the files, and give "
            "a manifest with their paths."
        )
    return [placed(part, folder) for part in source] if isinstance(source, list) else source
