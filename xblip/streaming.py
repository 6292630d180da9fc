"""Streams: manifests that are read from their beginning to their end, for what is too long to keep in a cache.

A stream has no length and no epochs that all processes share: it goes on for ever, so a run says `max_steps`. Files, or
if they are few, rows, are divided among the workers of all processes. Nothing is drawn but by the seed, and to resume
is to pass over what was taken: its text is read again, its media are not. The number of processes and workers must
then be the same as before.

The shuffle buffer is ours and not `datasets`' own: there a worker's rows hang on its number, so that a run which
resumes between two batches of one worker could not give the next batch to another.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from xblip.data import RowReader, Visit
from xblip.errors import ConfigError, XBlipError
from xblip.examples import Examples, Skipped
from xblip.forms import Fields, Row
from xblip.mixture import Turns, shares_of
from xblip.modality import Modality
from xblip.records import Raw, find_files, parts_of, raw_records, read_record, splitting_columns
from xblip.sample import Sample

SHUFFLE, FILES = 5, 6  # streams of chance; `xblip.mixture` and `xblip.examples` have those before
TURNS = 1000  # steps within which each source gets its share
CHECKED = 1000  # rows that are checked before anything is loaded


class Taken(NamedTuple):
    """A row that waits to be read.

    Attributes:
      visit: which time it is.
      file: its file.
      raw: its record there.
      part: which part of the record it is, or None if it is all of it.
    """

    visit: Visit
    file: Path
    raw: Raw
    part: int | None


class Stream:
    """The rows of files, in an order that a buffer shuffles."""

    def __init__(
        self,
        path: str | Path,
        *,
        modalities: Mapping[str, Modality],
        fields: Mapping[str, str] | None = None,
        root: str | Path | None = None,
        buffer: int = 10_000,
    ):
        """Finds the files.

        Args:
          path, modalities, fields, root: as of `Manifest`.
          buffer: rows among which the next one is drawn; 1 keeps their order.

        Raises:
          ConfigError: no such file, or a buffer that holds nothing.
        """
        if buffer < 1:
            raise ConfigError(f"The buffer of a stream must hold at least 1 row, not {buffer}.")
        self.path, self.modalities, self.buffer = Path(path), dict(modalities), buffer
        self.files = find_files(self.path)
        self._reader = RowReader(
            Fields(fields, modalities=modalities), modalities, self.files[0].parent if root is None else Path(root)
        )

    def check(self) -> set[tuple[str, str]]:
        """Checks the first thousand rows as `Manifest.check` does all; the rest are checked as they come."""
        tasks = set()
        for taken in itertools.islice(self._in_order(self.files, 0, 0, 0, 1), CHECKED):
            row = self.row(taken)
            tasks.add((row.sample.all_media[0].modality, row.task))
        if not tasks:
            raise ConfigError(f'The manifest "{self.path}" has no rows.')
        return tasks

    def row(self, taken: Taken) -> Row:
        """Returns a row, media unread; raises as `Manifest.row` does."""
        record = read_record(taken.file, taken.raw)
        row = self._reader.read(record, taken.part)
        self._reader.check(record, row)
        return row

    def take(self, source: int, seed: int, number: int, count: int) -> Iterator[Taken]:
        """Yields rows without end.

        Args:
          source: the stream's index in its mixture.
          seed: of their order.
          number: which of the `count` that divide the stream this is; they divide files if those are enough.

        Raises:
          ConfigError: there is no row for this one.
        """
        draw = np.random.default_rng([seed, SHUFFLE, source, number])
        alone = len(self.files) >= count
        own = np.random.default_rng([seed, FILES, source]).permutation(len(self.files))[number::count]
        for epoch in itertools.count():
            order = np.random.default_rng([seed, FILES, source, epoch]).permutation(len(own if alone else self.files))
            files = [self.files[index] for index in (own[order] if alone else order)]
            share = (0, 1) if alone else (number, count)
            waiting: list[Taken] = []
            rows = 0
            for taken in self._in_order(files, source, epoch, *share):
                rows += 1
                if alone:  # so that no two of the dividing streams draw alike
                    taken = taken._replace(visit=taken.visit._replace(index=taken.visit.index * count + number))
                if len(waiting) < self.buffer:
                    waiting.append(taken)
                    continue
                at = int(draw.integers(self.buffer))
                yield waiting[at]
                waiting[at] = taken
            if not rows:
                raise ConfigError(
                    f'The stream "{self.path}" has no row for one of its {count} workers: use fewer processes or workers.'
                )
            yield from (waiting[at] for at in draw.permutation(len(waiting)))

    def _in_order(self, files: Sequence[Path], source: int, epoch: int, number: int, count: int) -> Iterator[Taken]:
        splitting = splitting_columns(self._reader.fields)
        index = 0
        for file in files:
            for raw in raw_records(file):
                parts = parts_of(raw, self._reader.fields, splitting)
                for part in range(parts):
                    if index % count == number:
                        yield Taken(Visit(source, index, epoch), file, raw, part if parts > 1 else None)
                    index += 1


class StreamedExamples(IterableDataset):
    """Micro-batches of streams, for a data loader with `batch_size=None`.

    Every micro-batch is of one source on all processes.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        weights: Any = "equal",
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        start: int = 0,
    ):
        """Keeps them.

        Args:
          examples: what makes samples; its sources are streams.
          batch_size: rows of a micro-batch on one process.
          seed: of everything here.
          weights: "equal", or a number for each stream.
          accumulation: micro-batches of one step.
          world_size: number of processes.
          rank: which of them this is.
          start: micro-batches that were taken before.

        Raises:
          ConfigError: weights that are none.
        """
        super().__init__()
        streams = examples.sources
        if weights in ("size", "sqrt") or isinstance(weights, Mapping):
            raise ConfigError(
                f'Nobody knows the size of a stream: instead of weights {weights!r}, say "equal" or numbers.'
            )
        self.examples, self.batch_size, self.seed, self.start = examples, batch_size, seed, start
        self.world_size, self.rank = world_size, rank
        shares = shares_of(weights, [1] * len(streams))
        self._turns = Turns(shares, [""] * len(streams), steps=TURNS, accumulation=accumulation, seed=seed)

    def __iter__(self) -> Iterator[list[Sample | Skipped | XBlipError]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # A loader asks its workers in turn: the first one has what comes first, which need not be the first one's.
        worker = (self.start + (info.id if info else 0)) % workers
        number, count = self.rank * workers + worker, self.world_size * workers
        streams = [stream.take(source, self.seed, number, count) for source, stream in enumerate(self.examples.sources)]
        chunks = (self._turns.of(epoch)[0].tolist() for epoch in itertools.count())
        for batch, source in enumerate(itertools.chain.from_iterable(chunks)):
            if batch % workers != worker:
                continue
            try:
                rows = list(itertools.islice(streams[source], self.batch_size))
            except XBlipError as error:  # as a value: torch makes a text of what a worker raises
                yield [error]
                return
            if batch >= self.start:
                yield self._made(source, rows)

    def _made(self, source: int, rows: Sequence[Taken]) -> list[Sample | Skipped | XBlipError]:
        """A batch; in the place of a row whose file is broken, the next one of the batch that is whole."""
        stream = self.examples.sources[source]
        found = []
        for place in range(len(rows)):
            turned = (*rows[place:], *rows[:place])
            candidates = ((taken.visit, functools.partial(stream.row, taken)) for taken in turned)
            found += self.examples.first_readable(stream, candidates)
        return found
