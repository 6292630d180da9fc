"""Training data: manifests of rows.

A manifest is a file, or several of one kind: JSONL, JSON, CSV, TSV, Parquet, or the tars of a WebDataset (`xblip.tables`).
Its rows come in any of the forms of `xblip.forms`, and stay on disk until they are used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from xblip.errors import InputError, XBlipError
from xblip.forms import Fields, Row, read_row
from xblip.media import FilePart
from xblip.modality import Modality
from xblip.records import Record
from xblip.sample import Media, Sample, Turn
from xblip.tables import Table, write_whole

CHECKED = 2  # a number in what names a check that is kept: raise it when rows are read otherwise than before


class Visit(NamedTuple):
    """One time that a row is learnt from.

    Attributes:
      source: index of its manifest in the mixture.
      index: of the row in its manifest.
      epoch: how often all rows of its manifest have been visited before.
    """

    source: int
    index: int
    epoch: int


class RowReader:
    """Makes rows of records, by the columns and modalities that a manifest is told of.

    Attributes:
      fields: which columns are which of our keys.
      modalities: what reads the media, by name.
      root: folder that relative paths of media start from.
    """

    def __init__(self, fields: Fields, modalities: Mapping[str, Modality], root: Path):
        self.fields, self.modalities, self.root = fields, dict(modalities), root.expanduser().absolute()

    def read(self, record: Record, part: int | None = None) -> Row:
        """Makes a row of a record, or of one `part` of a record that makes several.

        Raises:
          InputError: the record has none of the forms; the message names file and line.
        """
        origin = record.origin if part is None else f"{record.origin}, part {part + 1}"
        try:
            values = self.fields.of(record.values)
            if record.in_tar:
                self._name_members(values, record.values)
            return read_row(values, modalities=self.modalities.keys(), root=self.root, origin=origin, part=part or 0)
        except XBlipError as error:
            raise type(error)(f"{origin}: {error}{self._missing(record)}") from error

    def check(self, record: Record, row: Row) -> None:
        """Raises `InputError` for a row that nothing can be learnt from."""
        lacking = "answer" if not row.answers else "" if row.sample.all_media else "input"
        if lacking:
            raise InputError(
                f"{row.origin}: it has no {lacking}; a branch learns from rows that have both an input "
                f"and an answer. Add it, or remove the row.{self._missing(record)}"
            )

    def _name_members(self, values: dict[str, Any], members: Mapping[str, Any]) -> None:
        """Gives members of a tar that no field takes to the modalities that know their endings."""
        chosen = self.fields.fields
        if chosen is None:
            for name in [name for name, value in values.items() if isinstance(value, FilePart)]:
                del values[name]
            for name, key in (("txt", "caption"), ("cls", "label")):
                if name in values:
                    values.setdefault(key, values.pop(name))
        for name, part in members.items():
            if not isinstance(part, FilePart) or part in values.values():
                continue
            suffix = Path(part.name).suffix.lower()
            fitting = [name for name, modality in self.modalities.items() if suffix in modality.suffixes]
            fitting = [modality for modality in fitting if modality not in (chosen or ())]
            if len(fitting) > 1 or any(modality in values for modality in fitting):
                raise InputError(f'It may have ".{name}" or another member as {" or ".join(fitting)}: say in `fields`.')
            values.update({modality: part for modality in fitting})

    def _missing(self, record: Record) -> str:
        fault = self.fields.missing(record.values)
        return f" Mind that {fault}" if fault else ""


class Manifest(Dataset):
    """The rows of a file; fetched by index, samples with their media read."""

    def __init__(
        self,
        path: str | Path,
        *,
        modalities: Mapping[str, Modality],
        fields: Mapping[str, str] | None = None,
        root: str | Path | None = None,
    ):
        """Opens the file.

        Args:
          path: the file, or a pattern such as "shards/*.tar".
          modalities: what reads the media, by name; rows may name no other.
          fields: for each of our keys the column, or the format string over columns, that it is.
          root: folder that relative paths of media start from; that of the manifest if None.

        Raises:
          ConfigError: no such file, no row in it, or a column of `fields` that it has not.
        """
        self.path = Path(path)
        self.modalities = dict(modalities)
        self._fields = Fields(fields, modalities=self.modalities)
        self._table = Table(path, self._fields)
        self._reader = RowReader(self._fields, modalities, self._table.folder if root is None else Path(root))
        self._ends = None if self._table.parts is None else np.cumsum(self._table.parts)
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._table) if self._ends is None else int(self._ends[-1])

    def row(self, index: int) -> Row:
        """Returns a row, media unread.

        Raises:
          InputError: the row has none of the forms; the message names file and line.
        """
        if self._ends is None:
            return self._reader.read(self._table[index])
        record = int(np.searchsorted(self._ends, index, side="right"))
        parts = self._table.parts[record]
        part = index - int(self._ends[record] - parts)
        return self._reader.read(self._table[record], part if parts > 1 else None)

    def rows(self) -> Iterator[Row]:
        """Yields all rows in their order, quicker than one by one; raises as `row` does."""
        return (row for _, row in self._all())

    def sources(self, modality: str) -> Iterator[Any]:
        """Yields the sources of one modality that its rows name, as often as they do; raises as `row` does."""
        return (media.source for row in self.rows() for media in row.sample.all_media if media.modality == modality)

    def sample(self, index: int) -> Sample:
        """Returns a row as a sample with its likeliest answer, media unread; raises as `row` does."""
        return self.row(index).answered()

    def check(self) -> set[tuple[str, str]]:
        """Reads every row, media unread, so that a bad one is told before anything is loaded.

        What it finds is kept beside the table in the cache: the next run, and other processes, do not read again.

        Returns:
          The tasks of its rows, each with the modality of the first input.

        Raises:
          InputError: a row has none of the forms, or lacks an answer or an input; the message names file and line.
        """
        asked = (CHECKED, self._fields.fields, [(name, kind.suffixes) for name, kind in self.modalities.items()])
        lengths = self._table.cache / f"{hashlib.sha256(repr(asked).encode()).hexdigest()[:32]}.npy"
        tasks = lengths.with_suffix(".json")
        if not tasks.exists():
            found = self._find()
            write_whole(lengths, lambda file: np.save(file, found[0]))
            write_whole(tasks, lambda file: file.write(json.dumps(sorted(found[1])).encode()))
        self._lengths = np.load(lengths, mmap_mode="r")
        return {(modality, task) for modality, task in json.loads(tasks.read_text())}

    def lengths(self) -> np.ndarray:
        """Returns the characters of text of each row, with its longest answer: what tokens go by. Checks all rows."""
        if self._lengths is None:
            self.check()
        return self._lengths

    def _find(self) -> tuple[np.ndarray, set[tuple[str, str]]]:
        lengths, tasks = np.empty(len(self), np.int32), set()
        for index, (record, row) in enumerate(self._all()):
            self._reader.check(record, row)
            lengths[index] = _characters(row)
            tasks.add((row.sample.all_media[0].modality, row.task))
        return lengths, tasks

    def __getitem__(self, index: int) -> Sample:
        sample = self.sample(index)
        try:
            return with_media(
                sample, lambda media: media.with_source(self.modalities[media.modality].load(media.source))
            )
        except XBlipError as error:
            raise type(error)(f"{sample.origin}: {error}") from error

    def _all(self) -> Iterator[tuple[Record, Row]]:
        for index, record in enumerate(self._table):
            if isinstance(record, XBlipError):
                raise record
            parts = 1 if self._ends is None else self._table.parts[index]
            for part in range(parts) if parts > 1 else [None]:
                yield record, self._reader.read(record, part)


def with_media(sample: Sample, read: Callable[[Media], Media]) -> Sample:
    """Returns the sample with each of its inputs, those of earlier turns too, as `read` gives it."""

    def part(given: str | Media) -> str | Media:
        return read(given) if isinstance(given, Media) else given

    return dataclasses.replace(
        sample,
        media=[part(given) for given in sample.media],
        history=[Turn(tuple(map(part, turn.content)), turn.answer) for turn in sample.history],
    )


def _characters(row: Row) -> int:
    sample = row.sample
    texts = [sample.instruction or "", *(part for part in sample.media if isinstance(part, str))]
    for turn in sample.history:
        texts += [turn.answer, *(part for part in turn.content if isinstance(part, str))]
    return sum(map(len, texts)) + max(map(len, row.answers), default=0)
