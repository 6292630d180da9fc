"""DisCRn: two inputs of different kinds and a question that only one of them answers (X-InstructBLIP, section 4.3).

An item's two halves each travel whole, medium, captions and names together, so that an order is nothing but an order: in
the released evaluation labels were swapped and media were not. Every item is asked in both orders unless said otherwise.
"""

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xblip import hookspecs
from xblip.answers import choice
from xblip.errors import ConfigError, InputError, suggest
from xblip.eval_data import check_prompt
from xblip.eval_task import EvalRow, EvalTask, Line
from xblip.intervals import Figure
from xblip.model import XBlip
from xblip.records import find_files, raw_records, read_record
from xblip.sample import Media, Sample
from xblip.train_data import digest

MODES = ("soft_prompts", "captions", "descriptions", "question")
ORDERS = ("both", "balanced", "given")


@dataclass(frozen=True)
class Half:
    """One of the two things that an item asks about, with all that belongs to it."""

    modality: str
    source: Any
    cue: str
    caption: str | None
    description: str | None
    names: list[str]


class DiscrnTask(EvalTask):
    """Which of two inputs answers a question, by the published fields of DisCRn."""

    name = "discrn"

    @dataclass
    class Config(EvalTask.Config):
        """Settings.

        Attributes:
          data: JSON or JSONL with `sample_ids`, `label` (0 or 1, which of these answers) and `question`; captions too where
            `modes` asks for them.
          inputs: modality and path of the first input, and of the second; a path may hold `{id}` and `{start}`. If null, an
            item names its own `modalities` and `sources`, as those that `xblip augment` writes do.
          modes: "soft_prompts" for the media themselves, "captions" for what a captioner said of them in their place,
            "descriptions" for the true `captions`, "question" for nothing.
          order: "both" for each item twice, in either order; "balanced" for once, the answer by turns the second and the
            first input; "given" for once, as it stands.
          prompt: what the LLM is asked, with `{question}` in it.
          preface: what it is told before the inputs.
          media_prompts: what a modality's Q-Former reads, with or without `{question}` in it; the question unless given.
          replace: words that are replaced in questions, in this order, so that they do not give a modality away.
          names: by modality, what an input of it may be called in an answer beside its own name.
          captions: by modality, the column with a captioner's captions of both samples.
          generation: generation options.
          root: folder that paths of inputs start from; that of `data` unless given.
        """

        data: str
        inputs: list[list[str]] | None = None
        modes: list[str] = field(default_factory=lambda: ["soft_prompts"])
        order: str = "both"
        prompt: str = "question: {question} answer:"
        preface: str = ""
        media_prompts: dict[str, str] = field(default_factory=dict)
        replace: dict[str, str] = field(default_factory=dict)
        names: dict[str, list[str]] = field(default_factory=dict)
        captions: dict[str, str] = field(default_factory=dict)
        generation: dict[str, Any] = field(default_factory=dict)
        root: str | None = None

    def rows(self, modalities: Mapping[str, Any]) -> Sequence[EvalRow]:
        self._check(modalities)
        files = find_files(Path(self.config.data))
        self._root = Path(self.config.root).expanduser() if self.config.root else files[0].parent
        records = [read_record(file, raw) for file in files for raw in raw_records(file)]
        rows = []
        for index, record in enumerate(records):
            try:
                halves, label, question = self._item(record.values, modalities)
            except InputError as error:
                raise InputError(f"{record.origin}: {error}") from error
            for swapped in self._orders(index, label):
                shown, truth = (halves[::-1], 1 - label) if swapped else (halves, label)
                for mode in self.config.modes:
                    row_id = f"{index}-{'swapped' if swapped else 'given'}-{mode}"
                    sample = self._sample(mode, shown, question, record.origin)
                    extra = {
                        "mode": mode,
                        "swapped": swapped,
                        "question": question,
                        "names": [half.names for half in shown],
                    }
                    rows.append(EvalRow(row_id, sample, truth, unit=str(index), extra=extra))
        return rows

    def _check(self, modalities: Mapping[str, Any]) -> None:
        settings = self.config
        for mode in settings.modes:
            if mode not in MODES:
                raise ConfigError(f'Unknown mode "{mode}".{suggest(str(mode), MODES)}')
        if not settings.modes:
            raise ConfigError(f"modes is empty: name at least one of {', '.join(MODES)}.")
        if settings.order not in ORDERS:
            raise ConfigError(f'Unknown order "{settings.order}".{suggest(settings.order, ORDERS)}')
        if settings.inputs is not None and [len(given) for given in settings.inputs] != [2, 2]:
            raise ConfigError('inputs must be two, each [modality, path], such as [image, "pictures/{id}.jpeg"].')
        for modality, path in settings.inputs or ():
            _check_read(modality, modalities)
            try:
                holes = {name for _, name, *_ in string.Formatter().parse(path) if name is not None}
            except ValueError:
                holes = set()
            if "id" not in holes or not holes <= {"id", "start"}:
                raise ConfigError(
                    f'inputs: the path "{path}" must hold {{id}}, may hold {{start}}, and no other braces.'
                )
        for name, given in (("media_prompts", settings.media_prompts), ("names", settings.names)):
            for modality in given:
                if modality not in modalities:
                    raise ConfigError(f'{name} has the unknown modality "{modality}".{suggest(modality, modalities)}')
        check_prompt(settings.prompt, "prompt", hole="question")

    def _item(self, values: Mapping[str, Any], modalities: Mapping[str, Any]) -> tuple[list[Half], int, str]:
        """The two halves of an item, which of them answers, and the question."""
        settings, ids, label = self.config, values.get("sample_ids"), values.get("label")
        if not isinstance(ids, list) or len(ids) != 2:
            raise InputError(f"`sample_ids` must be a list of two, not {ids!r:.80}.")
        if label not in (0, 1):
            raise InputError(f"`label` must be 0 or 1, not {label!r:.80}.")
        question = values.get("question")
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"`question` must be words, not {question!r:.80}.")
        question = " ".join(question.lower().split())
        for old, new in settings.replace.items():
            question = question.replace(old.lower(), new)
        question = question.rstrip(" ?") + "?"
        halves = []
        for place in (0, 1):
            modality, source = self._input(values, place)
            _check_read(modality, modalities)
            own = [modality, modality.replace("_", " "), *settings.names.get(modality, ())]
            column = settings.captions.get(modality)
            if "captions" in settings.modes and column is None:
                raise ConfigError(
                    f'captions lacks the column of "{modality}", such as captions_pred_{modality}: add it.'
                )
            halves.append(
                Half(
                    modality,
                    os.path.join(self._root, source) if isinstance(source, str) else source,
                    modalities[modality].cue,
                    str(_of_two(values, column, place)) if "captions" in settings.modes else None,
                    str(_of_two(values, "captions", place)) if "descriptions" in settings.modes else None,
                    list(dict.fromkeys(own)),
                )
            )
        if halves[0].modality == halves[1].modality:
            halves = [replace(half, names=[]) for half in halves]
        return halves, int(label), question

    def _input(self, values: Mapping[str, Any], place: int) -> tuple[str, Any]:
        """Modality and source of an item's first or second input."""
        if self.config.inputs is None:
            return _of_two(values, "modalities", place), _of_two(values, "sources", place)
        modality, path = self.config.inputs[place]
        start = int(float(_of_two(values, "start_seconds", place))) if "{start}" in path else ""
        return modality, path.format(id=values["sample_ids"][place], start=start)

    def _orders(self, index: int, label: int) -> list[bool]:
        """In which orders an item is asked; whether it is swapped."""
        if self.config.order == "balanced":
            return [label != (index + 1) % 2]
        return [False, True] if self.config.order == "both" else [False]

    def _sample(self, mode: str, halves: Sequence[Half], question: str, origin: str) -> Sample:
        parts: list[str | Media] = [self.config.preface] if self.config.preface else []
        for half in halves if mode != "question" else ():
            if mode == "soft_prompts":
                asked = self.config.media_prompts.get(half.modality, "{question}").replace("{question}", question)
                parts.append(Media(half.modality, half.source, asked))
            else:
                text = half.caption if mode == "captions" else half.description
                parts.append(f"{half.cue}{text.strip()} ")
        return Sample(self.config.prompt.replace("{question}", question), parts, origin=origin)

    def facts(self) -> Mapping[str, Any]:
        return {self.config.data: digest(self.config.data)}

    def predict(self, model: XBlip, rows: Sequence[EvalRow]) -> list[Line]:
        answers = model.generate([row.sample for row in rows], **self.config.generation)
        return [{"answer": answer.text} for answer in answers]

    def score(self, lines: Sequence[Line]) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        for mode in self.config.modes:
            own = [line for line in lines if line["mode"] == mode]
            if not own:
                continue
            chosen = [choice(line["answer"], names=line["names"], question=line["question"]) for line in own]
            right = [which == line["truth"] for which, line in zip(chosen, own, strict=True)]
            figures[f"{mode}: accuracy"] = Figure.of(own, right)
            pairs = _in_both_orders(own)
            if pairs:
                first = [own[one] for one, _ in pairs]
                figures[f"{mode}: right in both orders"] = Figure.of(
                    first, [right[one] and right[two] for one, two in pairs]
                )
            figures[f"{mode}: says the first"] = Figure.of(own, [which == 0 for which in chosen])
            figures[f"{mode}: says neither"] = Figure.of(own, [which is None for which in chosen])
        return figures


def _in_both_orders(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """The places of items that were asked in both orders."""
    places: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        places.setdefault(line["unit"], []).append(place)
    return [(found[0], found[1]) for found in places.values() if len(found) == 2]


def _check_read(modality: Any, modalities: Mapping[str, Any]) -> None:
    if not isinstance(modality, str) or modality not in modalities:
        raise ConfigError(f'The model does not read "{modality}".{suggest(str(modality), modalities)}')


def _of_two(values: Mapping[str, Any], column: str, place: int) -> Any:
    given = values.get(column)
    if not isinstance(given, list) or len(given) != 2 or given[place] is None:
        raise InputError(f"`{column}` must be a list of two, one for each sample, not {given!r:.80}.")
    return given[place]


@hookspecs.hookimpl
def register_tasks(register) -> None:
    register(DiscrnTask)
