"""Files of training data as tables of records, memory-mapped by `datasets`.

JSONL, JSON, CSV and tars become one kind of table: a record as JSON text, with the place it came from. Text is parsed
when a record is used, so types may differ from row to row, the order of keys stays, and a bad record has a line to
name. `datasets` keeps the table in its cache (HF_DATASETS_CACHE), never beside the user's files, under a key of the
files' sizes, inodes and times of change, which a copy or `touch` cannot put back: a changed file is read anew.
"""

import contextlib
import csv
import glob
import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xblip.errors import ConfigError, InputError, XBlipError, suggest
from xblip.forms import Fields, count_parts
from xblip.media import FilePart

READ = 1  # a number in the cache's key: raise it when the readers below give something else than before
BATCH = 1000
MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]+)")
"""A tar's member: what its sample is called, and what part of it this is; hidden files are none."""
TEXT_MEMBERS = ("json", "txt", "cls")


class Place(NamedTuple):
    """A record as text.

    Attributes:
      file: index of its file.
      place: line, entry or name in it.
      text: JSON.
    """

    file: int
    place: str
    text: str


class Record(NamedTuple):
    """What a table says in one place.

    Attributes:
      origin: file and line.
      values: by column.
    """

    origin: str
    values: dict[str, Any]


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
        """
        self.path = Path(path)
        self.files = _found(self.path)
        self.folder = self.files[0].parent
        self.suffix = self.files[0].suffix.lower()
        self.cache = self._cache_of(fields)
        if self.suffix == ".parquet":
            self._data = self._loaded(fields, self._parquet)
            columns = [column for column in _splitting(fields) if column in self._data.column_names]
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
            return Record(f"{self.path}, row {index + 1}", _without_none(row))
        origin = f"{self.files[row['file']]}, {row['place']}"
        try:
            values = json.loads(row["text"])
        except json.JSONDecodeError as cause:
            raise InputError(f"{origin}: not JSON ({cause.msg} at column {cause.colno}).") from cause
        except RecursionError as cause:
            raise InputError(f"{origin}: not JSON that can be read: it is nested too deeply.") from cause
        if not isinstance(values, dict):
            raise InputError(f"{origin}: expected an object with keys such as instruction and answer.")
        return Record(origin, self._members(values, row["file"], origin) if self.suffix == ".tar" else values)

    def _members(self, found: Mapping[str, Any], file: int, origin: str) -> dict[str, Any]:
        """The columns of a tar's sample: what its JSON holds, its texts, and its other members by their endings."""
        path, texts = str(self.files[file]), dict(found["texts"])
        try:
            values = json.loads(texts.pop("json", "{}"))
        except json.JSONDecodeError as cause:
            raise InputError(f"{origin}: its .json is not JSON ({cause.msg} at column {cause.colno}).") from cause
        if not isinstance(values, dict):
            raise InputError(f"{origin}: its .json must hold an object with keys such as instruction and answer.")
        parts = {ending: FilePart(path, *where) for ending, where in found["members"].items()}
        return {**values, **{name: text.strip() for name, text in texts.items()}, **parts}

    def _cache_of(self, fields: Fields) -> Path:
        import datasets

        facts = [(str(file.resolve()), *_state(file)) for file in self.files]
        key = hashlib.sha256(repr((READ, facts, _splitting(fields))).encode()).hexdigest()[:32]
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
            if isinstance(reason, UnicodeDecodeError):
                raise ConfigError(
                    f'The manifest "{self.path}" is not UTF-8 text that can be read: {reason}.'
                ) from cause
            raise ConfigError(
                f'Cannot read the manifest "{self.path}" into the cache {self.cache}: {type(reason).__name__}: {reason}. '
                "Check the file, and that there is room; HF_DATASETS_CACHE puts the cache elsewhere."
            ) from cause

    def _text(self, fields: Fields) -> Any:
        from datasets import Dataset, Features, Value

        columns = Features(
            {"file": Value("int32"), "place": Value("string"), "text": Value("large_string"), "parts": Value("int32")}
        )
        # A tuple: for each entry of a list the generator would be called once.
        arguments = {"files": tuple(map(str, self.files)), "suffix": self.suffix, "fields": fields}
        return Dataset.from_generator(
            _places, features=columns, cache_dir=str(self.cache), gen_kwargs=arguments, fingerprint="records"
        )

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


def _found(path: Path) -> list[Path]:
    """The files that a path or pattern names."""
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(f'No manifest at "{path}". Expected a file ({", ".join(KINDS)}) or a pattern of several.')
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1:
        raise ConfigError(f'"{path}" names files of several kinds, {", ".join(suffixes)}: name those of one.')
    if suffixes[0] not in KINDS:
        raise ConfigError(f'"{path}" has the ending "{suffixes[0]}".{suggest(suffixes[0], KINDS)}')
    return files


def _state(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


def _splitting(fields: Fields) -> list[str]:
    """The columns that may make several rows of a record."""
    names = ("conversations", "questions")
    return [name if fields.fields is None else fields.fields.get(name, "") for name in names]


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


def _without_none(value: Any) -> Any:
    """Without the empty fields that a typed table gives every record, and files as their bytes or path."""
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _places(files: tuple[str, ...], suffix: str, fields: Fields) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table of text."""
    splitting = [name for name in _splitting(fields) if name]
    empty = True
    for number, file in enumerate(files):
        for place, text in KINDS[suffix](file):
            empty = False
            split = any(name in text for name in splitting)
            yield {"file": number, "place": place, "text": text, "parts": _parts_of(text, fields) if split else 1}
    if empty:
        raise ConfigError(f'The manifest "{", ".join(files)}" has no rows.')


def _parts_of(text: str, fields: Fields) -> int:
    try:
        values = json.loads(text)
        return count_parts(fields.of(values)) if isinstance(values, dict) else 1
    except (ValueError, RecursionError, XBlipError):
        return 1  # said with its line when it is used


def _jsonl(file: str) -> Iterator[tuple[str, str]]:
    with open(file, encoding="utf-8-sig", newline="\n") as lines:  # JSON allows other ends of lines inside a string
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", line.rstrip("\r\n")


def _json(file: str) -> Iterator[tuple[str, str]]:
    """A list of records; or, as LAVIS has them, an object of records or of anything by their ids."""
    with open(file, encoding="utf-8-sig") as opened:
        try:
            records = json.load(opened)
        except json.JSONDecodeError as cause:
            raise ConfigError(
                f'The manifest "{file}" is not JSON ({cause.msg} at line {cause.lineno}, column {cause.colno}). If each '
                'of its lines is a record, end its name in ".jsonl".'
            ) from cause
    if isinstance(records, dict):
        records = [
            {"sample_id": key, **(value if isinstance(value, dict) else {"data": value})}
            for key, value in records.items()
        ]
    if not isinstance(records, list):
        raise ConfigError(f'The manifest "{file}" must hold a list of records, or an object of them by their ids.')
    for number, record in enumerate(records, start=1):
        yield f"entry {number}", json.dumps(record)


def _csv(file: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)
    with open(file, encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(opened, delimiter="\t" if file.lower().endswith(".tsv") else ",", strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) != len(header):
                raise ConfigError(f"{file}, line 1: two columns have the same name: {', '.join(header)}.")
            while True:
                line = rows.line_num + 1
                row = next(rows, None)
                if row is None:
                    return
                if row and len(row) != len(header):
                    raise ConfigError(
                        f"{file}, line {line}: it has {len(row)} columns where line 1 names {len(header)}. Put a value "
                        "that holds the delimiter in double quotes."
                    )
                if row:
                    yield f"line {line}", json.dumps(dict(zip(header, row, strict=True)))
        except csv.Error as cause:
            raise ConfigError(f"{file}, line {rows.line_num}: {cause}.") from cause


def _tar(file: str) -> Iterator[tuple[str, str]]:
    """The samples of a WebDataset: neighbours that share a name up to its first dot."""
    found, current = {"texts": {}, "members": {}}, None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                tar.members = []  # it would keep them all
                match = MEMBER.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
                if match is None:
                    continue
                name, ending = match[1], match[2]
                if name != current:
                    if current is not None:
                        yield f"sample {current}", json.dumps(found)
                    found, current = {"texts": {}, "members": {}}, name
                if ending in found["texts"] or ending in found["members"]:
                    raise ConfigError(f'{file}: the sample "{name}" has two members ".{ending}".')
                if ending in TEXT_MEMBERS:
                    found["texts"][ending] = tar.extractfile(member).read().decode()
                else:
                    found["members"][ending] = [member.name, member.offset_data, member.size]
    except (tarfile.TarError, EOFError) as cause:
        raise ConfigError(f"{file} is no tar that can be read in place: {cause}. Is it cut, or compressed?") from cause
    if current is not None:
        yield f"sample {current}", json.dumps(found)


KINDS: dict[str, Any] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".tar": _tar,
    ".parquet": None,
}
