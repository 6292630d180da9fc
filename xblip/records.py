"""Records in files: what each kind of file holds, in its order, and where in it.

Records of text formats stay JSON text until they are used, so types may differ from one to the next, the order of keys
stays, and a bad one has a line to name.
"""

import csv
import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from xblip.errors import ConfigError, InputError, XBlipError, suggest
from xblip.forms import Fields, count_parts
from xblip.media import FilePart

MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]+)")
"""A tar's member: what its sample is called, and what part of it this is; hidden files are none."""
TEXT_MEMBERS = ("json", "txt", "cls")
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
"""What every tar ends in, with nothing but zeros after it."""

Raw = tuple[str, Any]
"""Where a record stands in its file, such as "line 7", and its JSON text; of Parquet its values."""


class Record(NamedTuple):
    """What a manifest says in one place.

    Attributes:
      origin: file and line.
      values: by column.
      in_tar: whether they are members of a tar, by their endings.
    """

    origin: str
    values: dict[str, Any]
    in_tar: bool = False


def find_files(path: Path) -> list[Path]:
    """Returns the files that a path or a pattern such as "shards/*.tar" names, in order of their names.

    Raises:
      ConfigError: there is none, or they are of several kinds, or of one that is not known.
    """
    path = path.expanduser()
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(f'No manifest at "{path}". Expected a file ({", ".join(KINDS)}) or a pattern of several.')
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1:
        raise ConfigError(f'"{path}" names files of several kinds, {", ".join(suffixes)}: name those of one.')
    if suffixes[0] not in KINDS:
        raise ConfigError(f'"{path}" has the ending "{suffixes[0]}".{suggest(suffixes[0], KINDS)}')
    return files


def raw_records(file: str | Path) -> Iterator[Raw]:
    """Yields what a file holds.

    Raises:
      ConfigError: the file is damaged, not UTF-8, or not of the kind that its ending says.
      InputError: a tar is damaged or cut after its first member, or holds links.
    """
    try:
        yield from KINDS[Path(file).suffix.lower()](str(file))
    except UnicodeDecodeError as cause:
        raise ConfigError(f'The manifest "{file}" is not UTF-8 text that can be read: {cause}.') from cause
    except OSError as cause:
        raise ConfigError(f'Cannot read the manifest "{file}": {cause}.') from cause


def read_record(file: str | Path, raw: Raw) -> Record:
    """Makes a record of what `raw_records` gave.

    Raises:
      InputError: it is no JSON, or no object; the message names file and line.
    """
    place, text = raw
    origin = f"{file}, {place}"
    if not isinstance(text, str):
        return Record(origin, without_none(text))
    values = _object(text, origin)
    if str(file).lower().endswith(".tar"):
        return Record(origin, _members(values, str(file), origin), in_tar=True)
    return Record(origin, values)


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_object_of)
    except json.JSONDecodeError as cause:
        raise InputError(f"{what}: not JSON ({cause.msg} at column {cause.colno}).") from cause
    except (ValueError, RecursionError) as cause:  # a number of thousands of digits, or lists of lists of lists
        raise InputError(f"{what}: not JSON that can be read ({cause}).") from cause
    if not isinstance(values, dict):
        raise InputError(f"{what}: expected an object with keys such as instruction and answer.")
    return values


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ; `json` itself keeps the last of equal ones."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'an object has the key "{twice:.80}" twice: keep one')
    return values


def _members(found: Mapping[str, Any], file: str, origin: str) -> dict[str, Any]:
    """The columns of a tar's sample: what its JSON holds, its texts, and its other members by their endings."""
    texts = dict(found["texts"])
    values = _object(texts.pop("json", "{}"), f"{origin}, its .json")
    parts = {ending: FilePart(file, *where) for ending, where in found["members"].items()}
    return {**values, **{name: text.strip() for name, text in texts.items()}, **parts}


def splitting_columns(fields: Fields) -> list[str]:
    """Returns the columns for whose sake a record may make several rows."""
    names = ("conversations", "questions")
    if fields.fields is None:
        return list(names)
    return [fields.fields[name] for name in names if name in fields.fields]


def parts_of(raw: Raw, fields: Fields, splitting: list[str]) -> int:
    """Returns how many rows a record makes; `splitting` are the columns that matter."""
    _, text = raw
    if not any(name in text for name in splitting):
        return 1
    try:
        values = json.loads(text) if isinstance(text, str) else text
        return count_parts(fields.of(values)) if isinstance(values, dict) else 1
    except (ValueError, RecursionError, XBlipError):
        return 1  # said with its line when it is used


def without_none(value: Any) -> Any:
    """Returns a value without the empty fields that a typed table gives every record, and files as their bytes or path."""
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def _jsonl(file: str) -> Iterator[Raw]:
    with open(file, encoding="utf-8-sig", newline="\n") as lines:  # JSON allows other ends of lines inside a string
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", line.rstrip("\r\n")


def _json(file: str) -> Iterator[Raw]:
    """A list of records; or, as LAVIS has them, an object of records or of anything by their ids."""
    with open(file, encoding="utf-8-sig") as opened:
        try:
            records = json.load(opened, object_pairs_hook=_object_of)
        except json.JSONDecodeError as cause:
            raise ConfigError(
                f'The manifest "{file}" is not JSON ({cause.msg} at line {cause.lineno}, column {cause.colno}). If each '
                'of its lines is a record, end its name in ".jsonl".'
            ) from cause
        except (ValueError, RecursionError) as cause:
            if isinstance(cause, UnicodeDecodeError):
                raise
            raise ConfigError(f'The manifest "{file}" is not JSON that can be read ({cause}).') from cause
    if isinstance(records, dict):
        records = [
            {"sample_id": key, **(value if isinstance(value, dict) else {"data": value})}
            for key, value in records.items()
        ]
    if not isinstance(records, list):
        raise ConfigError(f'The manifest "{file}" must hold a list of records, or an object of them by their ids.')
    for number, record in enumerate(records, start=1):
        yield f"entry {number}", json.dumps(record)


def _csv(file: str) -> Iterator[Raw]:
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


def _tar(file: str) -> Iterator[Raw]:
    """The samples of a WebDataset: neighbours that share a name up to its first dot."""
    found, current, samples = {"texts": {}, "members": {}}, None, 0
    with _open_tar(file) as tar:
        try:
            for member in tar:
                tar.members = []  # it would keep them all
                match = MEMBER.fullmatch(member.name.removeprefix("./"))
                if match is None or member.isdir():
                    continue
                if not member.isfile():
                    raise InputError(
                        f'{file}: the member "{member.name}" is a link or a device. Expected the files themselves: make '
                        "the tar with --dereference --hard-dereference."
                    )
                name, ending = match[1], match[2]
                if name != current:
                    if current is not None:
                        yield f"sample {current}", json.dumps(found)
                    found, current, samples = {"texts": {}, "members": {}}, name, samples + 1
                if ending in found["texts"] or ending in found["members"]:
                    raise ConfigError(f'{file}: the sample "{name}" has two members ".{ending}".')
                if ending in TEXT_MEMBERS:
                    found["texts"][ending] = tar.extractfile(member).read().decode()
                else:
                    found["members"][ending] = [member.name, member.offset_data, member.size]
            whole = _ends_at(file, tar.offset)
        except (tarfile.TarError, EOFError):
            whole = False
        if not whole:
            size = os.path.getsize(file)
            cut = tar.offset + len(END_OF_TAR) > size
            raise InputError(
                f"{file} is {f'cut at byte {size}' if cut else f'damaged at byte {tar.offset}'}, in or after its sample "
                f"{samples}: copy it again, or make it anew."
            )
    if current is not None:
        yield f"sample {current}", json.dumps(found)


def _open_tar(file: str) -> tarfile.TarFile:
    try:
        return tarfile.open(file, "r:")
    except (tarfile.TarError, EOFError) as cause:
        raise ConfigError(f"{file} is no tar that can be read in place: {cause}. Is it cut, or compressed?") from cause


def _ends_at(file: str, offset: int) -> bool:
    """Whether a tar ends there as it should; `tarfile` takes any damaged header for the end."""
    with open(file, "rb") as opened:
        opened.seek(offset)
        if opened.read(len(END_OF_TAR)) != END_OF_TAR:
            return False
        return not any(chunk.strip(b"\0") for chunk in iter(lambda: opened.read(2**20), b""))


def _parquet(file: str) -> Iterator[Raw]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(file).iter_batches(batch_size=1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except ArrowException as cause:
        raise ConfigError(f'Cannot read the manifest "{file}": {cause}') from cause


KINDS: dict[str, Any] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".tar": _tar,
    ".parquet": _parquet,
}
"""How a file is read, by its ending."""
