"""Rows of manifests for evaluation: each with an id that stays, its words put into the task's prompt."""

import dataclasses
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xblip.errors import ConfigError, InputError
from xblip.eval_task import EvalTask
from xblip.forms import Row
from xblip.modality import Modality
from xblip.sample import Sample
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


def prompted(sample: Sample, prompt: str, *, words: str) -> Sample:
    """Returns a sample whose instruction is the prompt with the sample's own words in the place of `{words}`.

    A row that brings an instruction of its own, where the prompt has no place for it, is asked by the prompt.
    """
    return dataclasses.replace(sample, instruction=prompt.replace(f"{{{words}}}", sample.instruction or ""))


def check_prompt(prompt: str, where: str, *, words: str = "") -> None:
    """Raises `ConfigError` for a prompt that is empty, or has other braces than `{words}` once."""
    try:
        holes = [name for _, name, *_ in string.Formatter().parse(prompt) if name is not None]
    except ValueError:
        holes = None
    wanted = [words] if words else []
    if holes != wanted or not prompt.strip():
        expected = f"{{{words}}} once, and no other braces" if words else "words without braces"
        raise ConfigError(f'{where}: the prompt "{prompt}" must hold {expected}.')
