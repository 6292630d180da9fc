"""What tasks are made of: rows of manifests, each with an id that stays, prompts, and names to choose from."""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xblip.errors import ConfigError, InputError
from xblip.eval_task import EvalTask
from xblip.forms import Row
from xblip.loading import first_line
from xblip.modality import Modality
from xblip.train_config import open_manifests, sources_of
from xblip.train_data import digest


def read_rows(data: Any, modalities: Mapping[str, Modality]) -> Iterator[tuple[str, Row]]:
    """Yields the rows of the manifests that a task's `data` names, each with its id: its place in its manifest.

    Raises:
      ConfigError, InputError: there is no manifest, or a row is wrong or has no answer; the message says where.
    """
    manifests = open_manifests(data, "data", modalities=modalities)
    if not manifests:
        raise ConfigError("A task's data names no manifest: give the path of one.")
    for number, manifest in enumerate(manifests):
        for index, row in enumerate(manifest.rows()):
            if not row.answers:
                raise InputError(
                    f"{row.origin}: it has no answer, and nothing to be measured by. Add it, or remove the row."
                )
            yield f"{number}-{index}" if len(manifests) > 1 else str(index), row


class ManifestTask(EvalTask):
    """A task over manifests, in any form that training reads."""

    @dataclass
    class Config(EvalTask.Config):
        """`data`: a manifest or several, as `data.eval` of a training config names them."""

        data: Any

    def facts(self) -> dict[str, str]:
        return {source.path: digest(source.path) for source in sources_of(self.config.data, "data")}


def check_prompt(prompt: str, where: str, *, hole: str = "") -> None:
    """Raises `ConfigError` for a prompt that is empty, or that lacks its hole, or has other braces."""
    try:
        holes = [name for _, name, *_ in string.Formatter().parse(prompt) if name is not None]
    except ValueError:
        holes = None
    if holes != ([hole] if hole else []) or not prompt.strip():
        expected = f"{{{hole}}} once, and no other braces" if hole else "words without braces"
        raise ConfigError(f'{where} is "{prompt}": it must hold {expected}.')


def read_names(given: Any) -> list[str]:
    """Returns the names to choose from that a config lists, or that a file has, one a line.

    Raises:
      ConfigError: there is no such file, it is no text, or two names are the same.
    """
    names = given
    if isinstance(given, (str, Path)):
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as cause:
            raise ConfigError(f'Cannot read the names in "{given}": {first_line(cause)}') from cause
        names = [line.strip() for line in lines if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"names must be a list of names, or a file with one a line, not {given!r:.80}.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f'names has "{twice[0]}" twice: keep one.')
    return names
