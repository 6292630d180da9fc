"""Tables: the records of files, memory-mapped by `datasets`.

`datasets` keeps them in its cache (HF_DATASETS_CACHE), never beside the user's files, under a key of the files' sizes,
inodes and times of change, which neither a copy nor `touch` can put back: a changed file is read anew. Of text formats
the table has each record as JSON text with its place; Parquet keeps its types.
"""

import contextlib
import glob
import hashlib
import itertools
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from xblip.errors import ConfigError, XBlipError
from xblip.forms import Fields, count_parts
from xblip.records import Record, find_files, parts_of, raw_records, read_record, splitting_columns, without_none

READ = 2  # a number in the cache's key: raise it when `xblip.records` gives something else than before
BATCH = 1000


class Table:
    """The records of one file, or of several of one kind.

    Attributes:
      path: as the user gave it.
      folder: of the first file.
      cache: folder for what is made of these files as they are now.
      parts: how many rows each record makes, or None if all make one.
    """

    def __init__(self, path: str | Path, fields: Fields):
        """Opens files, reading them once if the cache does not have them.

        Args:
          path: a file, or a pattern such as "shards/*.tar".
          fields: which columns will be read.

        Raises:
          ConfigError: no such file, one that is not what its ending says, or no record in any.
          InputError: a tar is damaged or cut.
        """
        self.path = Path(path)
        self.files = find_files(self.path)
        self.folder = self.files[0].parent
        self.suffix = self.files[0].suffix.lower()
        self.cache = self._cache_of(fields)
        if self.suffix == ".parquet":
            self._data = self._loaded(fields, self._parquet)
            columns = [column for column in splitting_columns(fields) if column in self._data.column_names]
            counts = [count_parts(fields.of(row)) for row in self._data.select_columns(columns)] if columns else [1]
            counts = np.asarray(counts)
        else:
            self._data = self._loaded(fields, self._text)
            counts = self._data.data.column("parts").to_numpy()
        self.parts = counts if (counts != 1).any() else None
        if self.suffix in (".csv", ".tsv", ".parquet"):  # every record has all columns
            columns = self._data.column_names if self.suffix == ".parquet" else self[0].values
            if fault := fields.missing(columns):
                raise ConfigError(f"{self.path}: {fault}")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        return self._record(index, self._data[index])

    def __iter__(self) -> Iterator[Record | XBlipError]:
        """Yields every record, or what is wrong with it; quicker than one by one."""
        for start in range(0, len(self), BATCH):
            batch = self._data[start : start + BATCH]
            for offset in range(len(next(iter(batch.values())))):
                try:
                    row = {name: column[offset] for name, column in batch.items()}
                    yield self._record(start + offset, row)
                except XBlipError as error:
                    yield error

    def _record(self, index: int, row: Mapping[str, Any]) -> Record:
        if self.suffix == ".parquet":
            return Record(f"{self.path}, row {index + 1}", without_none(row))
        return read_record(self.files[row["file"]], (row["place"], row["text"]))

    def _cache_of(self, fields: Fields) -> Path:
        import datasets

        facts = [(str(file.resolve()), *_state(file)) for file in self.files]
        key = hashlib.sha256(repr((READ, facts, splitting_columns(fields))).encode()).hexdigest()[:32]
        return Path(datasets.config.HF_DATASETS_CACHE, "xblip", key)

    def _loaded(self, fields: Fields, load: Callable[[Fields], Any]) -> Any:
        """What `load` gives; whatever it raises as one clear error."""
        import datasets

        try:
            with _quiet():
                return load(fields)
        except Exception as cause:
            reason: BaseException | None = cause
            while isinstance(reason, datasets.exceptions.DatasetsError) and reason.__cause__:
                reason = reason.__cause__
            if isinstance(reason, XBlipError):
                raise reason from cause
            raise ConfigError(
                f'Cannot read the manifest "{self.path}" into the cache {self.cache}: {type(reason).__name__}: {reason}. '
                "Check the file, and that there is room; HF_DATASETS_CACHE puts the cache elsewhere."
            ) from cause

    def _text(self, fields: Fields) -> Any:
        from datasets import Dataset

        kept = self.cache / "records.arrow"
        if not kept.exists():
            write_whole(kept, lambda file: _write_records(file, self.files, fields))
        return Dataset.from_file(str(kept))

    def _parquet(self, fields: Fields) -> Any:
        from datasets import load_dataset
        from pyarrow.parquet import read_metadata

        if not any(read_metadata(file).num_rows for file in self.files):
            raise ConfigError(f'The manifest "{self.path}" has no rows.')
        files = [glob.escape(str(file)) for file in self.files]
        data = load_dataset("parquet", data_files=files, split="train", cache_dir=str(self.cache))
        for name, feature in data.features.items():
            if hasattr(feature, "decode"):  # images and the like: their bytes are for the modality to decode
                data = data.cast_column(name, type(feature)(decode=False))
        return data


def _state(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps bars of `datasets` for terminals."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _write_records(opened: BinaryIO, files: Sequence[Path], fields: Fields) -> None:
    """Writes the table of text files, as `datasets` keeps tables: file, place, text and number of rows of a record."""
    import pyarrow as pa

    schema = pa.schema({"file": pa.int32(), "place": pa.string(), "text": pa.large_string(), "parts": pa.int32()})
    splitting = splitting_columns(fields)
    records = (
        (number, *raw, parts_of(raw, fields, splitting))
        for number, file in enumerate(files)
        for raw in raw_records(file)
    )
    empty = True
    with pa.ipc.new_stream(opened, schema) as writer:
        while batch := list(itertools.islice(records, BATCH)):
            empty = False
            writer.write_batch(pa.record_batch([list(column) for column in zip(*batch, strict=True)], schema=schema))
    if empty:
        raise ConfigError(f'The manifest "{", ".join(map(str, files))}" has no rows.')


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file so that no process ever sees half of it; several may do so at once.

    Args:
      path: the file; its folder is made.
      write: writes into the open file that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
