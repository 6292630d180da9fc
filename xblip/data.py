"""Training data: manifests of samples, and the collator that reads their media in the data loader's workers.

A manifest is a JSONL file, one sample a row (the forms that `xblip.sample.from_row` takes), its relative paths starting
at its own folder. Rows are kept as text until they are used, so that a long manifest costs little memory.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from xblip.errors import ConfigError, InputError, XBlipError
from xblip.modality import Features, Modality
from xblip.sample import Media, Sample, Turn, from_row


class Manifest(Dataset):
    """The samples of a JSONL file, their media read when they are fetched.

    Attributes:
      features: frozen features that stand in for files, by path; see `xblip.features`.
    """

    def __init__(self, path: str | Path, *, modalities: Mapping[str, Modality]):
        """Reads the file's lines.

        Args:
          path: the JSONL.
          modalities: what reads the media, by name; rows may name no other.

        Raises:
          ConfigError: no such file, or no row in it.
        """
        self.path = Path(path)
        self.modalities = dict(modalities)
        self.features: dict[str, Features] = {}
        if not self.path.is_file():
            raise ConfigError(f'No manifest at "{self.path}". Expected a JSONL file with one sample a row.')
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as cause:
            raise ConfigError(f'The manifest "{self.path}" is not UTF-8 text that can be read: {cause}.') from cause
        # Not splitlines(), which ends a line at characters that JSON allows inside a string too.
        self.rows = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if not self.rows:
            raise ConfigError(f'The manifest "{self.path}" has no rows.')

    def check(self) -> None:
        """Reads every row, media unread, so that a bad one is told before anything is loaded.

        Raises:
          InputError: a row is no sample, or lacks an answer or an input; the message names file and line.
        """
        for index, (number, _) in enumerate(self.rows):
            sample = self.sample(index)
            lacking = "answer" if sample.answer is None else "" if sample.all_media else "input"
            if lacking:
                raise InputError(
                    f"{self.path}, line {number}: it has no {lacking}; a branch learns from rows that have both an input "
                    "and an answer. Add it, or remove the row."
                )

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        """Returns a sample as its row has it, media unread.

        Raises:
          InputError: the row is not JSON, or not a sample; the message names file and line.
        """
        number, line = self.rows[index]
        where = f"{self.path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as cause:
            raise InputError(f"{where}: not JSON ({cause.msg} at column {cause.colno}).") from cause
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with keys such as instruction and answer.")
        try:
            return from_row(row, modalities=self.modalities.keys(), root=self.path.parent)
        except XBlipError as error:
            raise type(error)(f"{where}: {error}") from error

    def __getitem__(self, index: int) -> Sample:
        sample = self.sample(index)
        try:
            return dataclasses.replace(
                sample,
                media=[self._read(part) for part in sample.media],
                history=[Turn(tuple(map(self._read, turn.content)), turn.answer) for turn in sample.history],
            )
        except XBlipError as error:
            raise type(error)(f"{self.path}, line {self.rows[index][0]}: {error}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[Sample | XBlipError]:
        """A batch for a data loader; a user's error comes as a value, since torch makes a text of what a worker raises."""
        return [self._sample_or_error(index) for index in indices]

    def _sample_or_error(self, index: int) -> Sample | XBlipError:
        try:
            return self[index]
        except XBlipError as error:
            return error

    def _read(self, part: str | Media) -> str | Media:
        if isinstance(part, str):
            return part
        kept = self.features.get(file_of(part))
        return Media(part.modality, self.modalities[part.modality].load(part.source) if kept is None else kept)


def file_of(media: Media) -> str:
    """Returns the path of an input that is a file of a manifest; "" for any other."""
    return str(media.source) if isinstance(media.source, (str, Path)) else ""


def collate_samples(samples: Sequence[Sample | XBlipError]) -> dict[str, Any]:
    """Returns what `XBlip.forward` takes, errors in the place of samples that cannot be read."""
    return {"samples": list(samples)}
