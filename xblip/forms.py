"""The forms that rows of training data come in, and the one that they become: a `Row`.

A form is recognised by its keys, so that one manifest may mix them: ours, captions, questions, chat messages, LLaVA's
conversations and the annotations that LAVIS reads. Answers are held with their weights, one row at a time, until one
of them is drawn: there is no list of a batch's answers that could come out of step with its questions.
"""

import math
import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xblip.errors import ConfigError, InputError, suggest
from xblip.media import is_url
from xblip.sample import Media, Sample, check_text, from_messages, media_of

ANSWERS = {
    "answer": "",
    "answers": "",
    "direct_answers": "",
    "caption": "caption",
    "captions": "caption",
    "label": "classification",
}
"""Keys of what is to be learnt, and the task of a row that says nothing else; `direct_answers` is A-OKVQA's."""

TEXTS = {"instruction", "question", "questions", "weights", "media", "messages", "conversations", *ANSWERS}

PASSED_OVER = {
    *"id image_id question_id sample_id video_id instance_id dataset split".split(),
    *"choices correct_choice_idx difficult_direct_answer rationales".split(),
}
"""Columns of well-known annotation files that say nothing to a model."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Who speaks in LLaVA's conversations, and how chat messages call them."""

MARK = re.compile(r"<(\w+)>")
"""What LLaVA puts on a line of its own, first or last in a conversation's first turn, where a file stands."""


@dataclass(frozen=True)
class Row:
    """One row of a manifest.

    Attributes:
      sample: its inputs, unread, and its words: an instruction, a bare question, or None; the answer is yet to be drawn.
      answers: each answer that counts as right, with the share of visits in which it is to be learnt.
      task: "caption", "question" or "classification", for which templates give instructions; "" if it has its own.
      origin: file and line.
      num_answers: how many answers it lists, equal ones counted each; 0 where `weights` say how often each was given.
    """

    sample: Sample
    answers: dict[str, float]
    task: str
    origin: str
    num_answers: int = 1

    def answered(self) -> Sample:
        """Returns the sample with its likeliest answer, the first among equals; None if it has none."""
        return replace(self.sample, answer=max(self.answers, key=self.answers.get, default=None))


def count_parts(values: Mapping[str, Any]) -> int:
    """Returns how many rows a record makes: each answer of a conversation is one, and each of several `questions`."""
    turns, questions = values.get("conversations"), values.get("questions")
    if isinstance(turns, Sequence):
        return max(1, sum(isinstance(turn, Mapping) and ROLES.get(turn.get("from")) == "assistant" for turn in turns))
    return max(1, len(questions)) if isinstance(questions, list) else 1


def read_row(
    values: Mapping[str, Any], *, modalities: Collection[str], root: Path | None = None, origin: str = "", part: int = 0
) -> Row:
    """Makes a row of a record.

    Args:
      values: the record, by column; a column that is None or "" is absent.
      modalities: the modalities' names that are known here.
      root: folder that relative paths start from; None leaves them as they are.
      origin: file and line.
      part: which of the rows that the record makes.

    Raises:
      InputError: the record has none of the forms; the message does not say where it stands.
    """
    words = {*ANSWERS, "instruction", "question"}
    empty = [f"`{key}`" for key, value in values.items() if key in words and (value is None or value == "")]
    values = {
        key: value for key, value in values.items() if value is not None and value != "" and key not in PASSED_OVER
    }
    if "messages" in values or "conversations" in values:
        sample = _talk(values, modalities, root, part)
        _check_sources(sample)
        answers = {} if sample.answer is None else {sample.answer: 1.0}
        return Row(replace(sample, answer=None, origin=origin), answers, "", origin)
    for key in values:
        if key not in TEXTS and key not in modalities:
            raise InputError(f'Unknown key "{key}" in a sample.{suggest(str(key), TEXTS | set(modalities))}')
    if "questions" in values:
        values = _one_of_several(values, part)
    keys = [key for key in ANSWERS if key in values]
    if len(keys) > 1 or ("instruction" in values and "question" in values):
        twice = keys if len(keys) > 1 else ["instruction", "question"]
        raise InputError(
            f"A sample has {' and '.join(f'`{key}`' for key in twice)}: keep one, or choose with `fields`."
        )
    instruction = values.get("instruction", values.get("question"))
    task = "question" if "question" in values else "" if "instruction" in values else ANSWERS[keys[0]] if keys else ""
    if instruction is None and not task and empty:
        are = "is" if len(empty) == 1 else "are"
        raise InputError(f"A sample's {' and '.join(empty)} {are} empty: fill in, or remove the row.")
    if instruction is None and not task:
        raise InputError(
            f"A sample lacks its `instruction`; it has {', '.join(map(str, values)) or 'nothing'}. Add an `instruction` "
            "or a `question`, or call what is to be learnt `caption` or `label`."
        )
    sample = Sample(instruction, media_of(values, modalities=modalities, root=root), origin=origin)
    _check_sources(sample)
    if not keys:
        return Row(sample, {}, task, origin, 0)
    given = values[keys[0]]
    listed = 0 if "weights" in values else len(given) if isinstance(given, list) else 1
    return Row(sample, _weighted(given, values.get("weights")), task, origin, listed)


def _check_sources(sample: Sample) -> None:
    """Raises `InputError` for what is no source to any modality: a single number, a mapping, nothing, or a URL."""
    for modality, source in ((media.modality, media.source) for media in sample.all_media):
        if source is None or isinstance(source, (bool, int, float, Mapping)):
            raise InputError(
                f"The source of an input of {modality} must be a path, bytes or a list that it reads, not {source!r:.80}."
            )
        if is_url(source):
            raise InputError(f'"{source}" is a URL, which is not read. Download it and give the file\'s path.')


def _weighted(given: Any, weights: Any) -> dict[str, float]:
    """Answers and the shares they are drawn by; equal ones add up."""
    answers = given if isinstance(given, list) else [given]
    # The answers of VQA's own files are objects, with the confidence of who gave them.
    answers = [answer.get("answer", answer) if isinstance(answer, Mapping) else answer for answer in answers]
    if weights is None:
        weights = [1.0] * len(answers)
    if not isinstance(weights, list) or len(weights) != len(answers):
        raise InputError(
            f"`weights` must be a list with a number for each of the {len(answers)} answers, not {weights!r:.80}."
        )
    if not all(isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0 for weight in weights):
        raise InputError(f"The weights of answers must be numbers of at least 0, not {weights!r:.80}.")
    shares: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        check_text(answer, "An answer")
        if answer.strip():
            shares[answer] = shares.get(answer, 0.0) + weight
    total = sum(shares.values())
    if shares and not total:
        raise InputError("The weights of a sample's answers are all 0: give at least one of them more.")
    return {answer: weight / total for answer, weight in shares.items() if weight}


def _one_of_several(values: Mapping[str, Any], part: int) -> dict[str, Any]:
    """The record of one of a list of questions, to which the list of answers runs parallel."""
    questions, answers = values["questions"], values.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        raise InputError("`questions` must be a list, with `answers` a list of the same length, one for each.")
    if not questions:
        raise InputError("`questions` is empty: remove the row.")
    kept = {key: value for key, value in values.items() if key not in ("questions", "answers")}
    return {**kept, "question": questions[part], "answer": answers[part]}


def _talk(values: Mapping[str, Any], modalities: Collection[str], root: Path | None, part: int) -> Sample:
    """A sample of `messages`, or of LLaVA's `conversations` with its media beside them."""
    key = "messages" if "messages" in values else "conversations"
    unknown = [str(other) for other in values if other not in TEXTS and other not in modalities]
    if unknown and key == "conversations":
        raise InputError(
            f'"{unknown[0]}" is no input of this run.{suggest(unknown[0], modalities)} Rename it with `fields`, or remove '
            "it."
        )
    beside = [str(other) for other in values if other != key and (key == "messages" or other not in modalities)]
    if beside:
        raise InputError(
            f"A sample has `{key}`, which say everything, and {', '.join(beside)} beside them: remove one."
        )
    if key == "messages":
        return from_messages(values["messages"], modalities=modalities, root=root)
    messages = _messages_of(values, modalities, root)
    ends = [index for index, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    from_messages(messages, modalities=modalities)  # what comes later is checked too
    return from_messages(messages[: ends[part]] if ends else messages, modalities=modalities)


def _messages_of(values: Mapping[str, Any], modalities: Collection[str], root: Path | None) -> list[dict[str, Any]]:
    """Chat messages of LLaVA's conversations: `<image>` marks where an image stands; without a mark it stands first."""
    turns = values["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError('`conversations` must be a list such as [{"from": "human", "value": "..."}, ...].')
    waiting: list[Media] = []
    for name in values:
        if name in modalities:
            value = values[name]
            several = isinstance(value, list) and all(isinstance(source, str) for source in value)
            sources = [[name, source] for source in value] if several else [[name, value]]
            waiting += media_of({"media": sources}, modalities=modalities, root=root)
    marks = re.compile(f"<({'|'.join(map(re.escape, sorted(modalities)))})>")
    marked = any(marks.search(str(turn.get("value"))) for turn in turns)
    lines = str(turns[0].get("value")).strip().splitlines() if turns else []
    for line in lines[:1] + lines[-1:]:
        if (mark := MARK.fullmatch(line.strip())) and mark[1] not in modalities:
            raise InputError(
                f"{mark[0]} in `conversations` marks no input of this run.{suggest(mark[1], modalities)} Rename it, or "
                "remove it."
            )
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn.get("from") not in ROLES:
            raise InputError(f'A turn of `conversations` is from {turn.get("from")!r}, not from "human" or "gpt".')
        role = ROLES[turn["from"]]
        check_text(turn.get("value"), "The `value` of a turn")
        content = [] if marked or role != "user" else [_chat_part(waiting.pop(0)) for _ in range(len(waiting))]
        for index, text in enumerate(marks.split(turn["value"]) if role == "user" else [turn["value"]]):
            if index % 2:
                content.append(_chat_part(_taken(waiting, text)))
            elif text.strip():
                content.append({"type": "text", "text": text.strip()})
        messages.append({"role": role, "content": content})
    if waiting:
        raise InputError(
            f"No <{waiting[0].modality}> in `conversations` says where {waiting[0].source} stands: add it."
        )
    return messages


def _taken(waiting: list[Media], modality: str) -> Media:
    for media in waiting:
        if media.modality == modality:
            waiting.remove(media)
            return media
    raise InputError(f"<{modality}> stands in `conversations` more often than the row names a file: add `{modality}`.")


def _chat_part(media: Media) -> dict[str, Any]:
    return {"type": media.modality, "source": media.source}


class Fields:
    """Which columns of somebody's table are which of our keys: names, or format strings, `{"caption": "{name}, {place}"}`.

    With fields, a row is what they name; other columns are left out. Without, all columns are kept.
    """

    def __init__(self, fields: Mapping[str, str] | None, *, modalities: Collection[str]):
        """Checks them.

        Args:
          fields: for each key a column's name, or a format string over columns; none for the columns as they are.
          modalities: the modalities' names that are known here.

        Raises:
          ConfigError: a key that no form has, or a value that is neither.
        """
        self.fields = dict(fields) if fields else None
        for key, value in (fields or {}).items():
            if key not in TEXTS and key not in modalities:
                raise ConfigError(f'Unknown key "{key}" in fields.{suggest(str(key), TEXTS | set(modalities))}')
            if not isinstance(value, str) or not value:
                raise ConfigError(f'fields.{key} must be a column\'s name, or a text such as "{{id}}.png": {value!r}.')
            try:
                self._columns(value)
            except ValueError as cause:
                raise ConfigError(f'fields.{key}: "{value}" is no format string over columns: {cause}.') from cause

    @staticmethod
    def _columns(value: str) -> list[str]:
        """The columns that a field takes."""
        names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
        if not all(name.isidentifier() or name.replace("-", "_").replace(" ", "_").isidentifier() for name in names):
            raise ValueError("name a column in each pair of braces")
        return names or [value]

    def missing(self, columns: Collection[str]) -> str:
        """Returns what to say of fields whose columns are not among `columns`; "" if all are there."""
        for key, value in (self.fields or {}).items():
            for name in self._columns(value):
                if name not in columns:
                    return f'fields.{key} takes the column "{name}", which is not there.{suggest(name, columns)}'
        return ""

    def of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a record by our keys, without those whose columns are absent.

        Raises:
          InputError: a column cannot be formatted as its field asks.
        """
        if self.fields is None:
            return dict(record)
        values = {}
        for key, value in self.fields.items():
            columns = self._columns(value)
            if all(record.get(name) not in (None, "") for name in columns):
                values[key] = record[value] if columns == [value] else _formatted(value, record, key)
        return values


def _formatted(form: str, record: Mapping[str, Any], key: str) -> str:
    """As `str.format`, which knows no column with a space; a number that a table holds as text is one if need be."""
    text = ""
    for literal, name, spec, _ in string.Formatter().parse(form):
        text += literal
        if name is not None:
            value = record[name]
            try:
                number = spec and isinstance(value, str)
                text += format((int if spec.endswith("d") else float)(value) if number else value, spec or "")
            except (ValueError, TypeError) as cause:
                raise InputError(
                    f'fields.{key} cannot format "{name}", {value!r:.80}, as {spec!r}: {cause}.'
                ) from cause
    return text
