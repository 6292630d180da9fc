"""Samples: media, text and an instruction in the order the LLM will see them.

Everything that is asked or trained on becomes a `Sample` first: keyword arguments, rows of a manifest and chat messages
are three ways of writing one. The instruction always comes last, as in InstructBLIP; it is what the Q-Formers read too.
"""

import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from xblip.errors import InputError, suggest
from xblip.media import is_url


@dataclass(frozen=True)
class Media:
    """One input.

    Attributes:
      modality: what reads it.
      source: whatever that modality's `load` accepts.
      instruction: what its Q-Former reads in the place of the sample's instruction, where a question about several inputs
        asks something else of each; None for the sample's own.
    """

    modality: str
    source: Any
    instruction: str | None = None

    def with_source(self, source: Any) -> "Media":
        """Returns the same input with another source, such as what was read of it."""
        return replace(self, source=source)


@dataclass(frozen=True)
class Turn:
    """One earlier exchange of a conversation: what the user gave, in order, and what was answered."""

    content: tuple[str | Media, ...]
    answer: str


@dataclass
class Sample:
    """What is asked about what.

    Attributes:
      instruction: the user's words, read by the Q-Formers and by the LLM; None for none at all, as when a caption is
        learnt from the input alone.
      media: inputs in the LLM's order; a string among them is text that stands between them. A pair
        (modality, source) may stand for `Media`.
      answer: the answer to learn; None when asking.
      history: earlier turns of the conversation, oldest first.
      accepted: answers that would be as right as `answer`, for what measures.
      origin: where it comes from, for messages, such as "captions.jsonl, line 17"; "" if nobody said.
    """

    instruction: str | None
    media: list[str | Media] = field(default_factory=list)
    answer: str | None = None
    history: list[Turn] = field(default_factory=list)
    accepted: Sequence[str] = field(default=(), compare=False)
    origin: str = field(default="", compare=False)

    def __post_init__(self):
        if self.instruction is not None:
            if not isinstance(self.instruction, str) or not self.instruction.strip():
                raise InputError("The instruction is empty: say what to do or ask, in words.")
            check_text(self.instruction, "The instruction")
        if self.answer is not None:
            check_text(self.answer, "An answer")
        self.media = as_parts(self.media)
        if not isinstance(self.history, Sequence) or not all(isinstance(turn, Turn) for turn in self.history):
            raise InputError(f"history must be a list of Turn(content, answer), not {self.history!r:.80}.")
        for turn in self.history:
            as_parts(turn.content)
            check_text(turn.answer, "An answer")

    @property
    def all_media(self) -> list[Media]:
        """Every input of the sample, those of earlier turns first."""
        parts = [part for turn in self.history for part in turn.content] + list(self.media)
        return [part for part in parts if isinstance(part, Media)]

    def changed(self, change: Callable[[int, Media], Media | None]) -> "Sample":
        """Returns a sample with other inputs: what `change` gives of each, counted as in `all_media`; None leaves it out."""
        count = itertools.count()

        def parts(content: Sequence[str | Media]) -> list[str | Media]:
            new = [change(next(count), part) if isinstance(part, Media) else part for part in content]
            return [part for part in new if part is not None]

        history = [replace(turn, content=tuple(parts(turn.content))) for turn in self.history]
        return replace(self, history=history, media=parts(self.media))


class Input(NamedTuple):
    """One input of a batch: whose it is, its place in `Sample.all_media`, and what its bridge reads it for."""

    row: int
    column: int
    source: Any
    instruction: str


def by_modality(samples: Sequence[Sample]) -> dict[str, list[Input]]:
    """Groups the inputs of a batch."""
    groups: dict[str, list[Input]] = {}
    for row, sample in enumerate(samples):
        for column, media in enumerate(sample.all_media):
            given = media.instruction or sample.instruction or ""
            groups.setdefault(media.modality, []).append(Input(row, column, media.source, given))
    return groups


def check_text(text: Any, what: str) -> None:
    """Raises `InputError` for what is no text that a tokenizer takes; `what` begins the message."""
    if not isinstance(text, str):
        raise InputError(f"{what} must be text, not {text!r:.80}: make it a string.")
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise InputError(
            f"{what} holds a character that is not valid Unicode, {text[cause.start]!a} at position {cause.start}: "
            "give it as UTF-8."
        ) from cause


def as_parts(media: Any) -> list[str | Media]:
    """Checks inputs and the text between them, and makes `Media` of pairs.

    Raises:
      InputError: they are no list, or an entry is neither text nor (modality, source).
    """
    if isinstance(media, (str, bytes)) or not isinstance(media, Sequence):
        raise InputError(f"media must be a list such as [(modality, source), ...], not {type(media).__name__}.")
    return [_as_part(part) for part in media]


def _as_part(part: Any) -> str | Media:
    if isinstance(part, str):
        check_text(part, "A text between inputs")
    if isinstance(part, (str, Media)):
        return part
    if isinstance(part, Sequence) and len(part) == 2 and isinstance(part[0], str):
        return Media(*part)
    raise InputError(f"An entry of media must be (modality, source) or text between inputs, not {part!r:.80}.")


def from_row(row: Mapping[str, Any], *, modalities: Collection[str], root: Path | None = None) -> Sample:
    """Makes a sample of a manifest's row or a dictionary.

    Accepted keys: `instruction` and optionally `answer`, with inputs either as `<modality>: source` (in the order of
    the row), or as `media: [[modality, source], "text between", ...]`; or `messages`, as `from_messages` takes them.

    Args:
      row: the row.
      modalities: the modalities' names that are known here.
      root: folder that relative paths start from; None leaves them as they are.

    Raises:
      InputError: a key that is neither of those nor a modality, or `instruction` missing.
    """
    if "messages" in row:
        if len(row) > 1:
            beside = ", ".join(str(key) for key in row if key != "messages")
            raise InputError(f"A sample has `messages`, which say everything, and {beside} beside them: remove one.")
        return from_messages(row["messages"], modalities=modalities, root=root)
    other = {"instruction", "answer", "media"}
    for key in row:
        if key not in other and key not in modalities:
            raise InputError(f'Unknown key "{key}" in a sample.{suggest(str(key), other | set(modalities))}')
    if row.get("instruction") is None:
        raise InputError(f"A sample lacks its `instruction`; it has {', '.join(row) or 'nothing'}.")
    return Sample(row["instruction"], media_of(row, modalities=modalities, root=root), row.get("answer"))


def media_of(row: Mapping[str, Any], *, modalities: Collection[str], root: Path | None = None) -> list[str | Media]:
    """Returns a row's inputs in its order: those of its `media`, then `<modality>: source`.

    Raises:
      InputError: `media` is no list of inputs and texts, or names an unknown modality.
    """
    media = as_parts(row.get("media", ()))
    media += [Media(key, source) for key, source in row.items() if key in modalities]
    for part in media:
        if isinstance(part, Media) and part.modality not in modalities:
            raise InputError(f'Unknown modality "{part.modality}" in a sample.{suggest(part.modality, modalities)}')
    return [part.with_source(_at(part.source, root)) if isinstance(part, Media) else part for part in media]


def from_messages(
    messages: Sequence[Mapping[str, Any]], *, modalities: Collection[str], root: Path | None = None
) -> Sample:
    """Makes a sample of chat messages in the style of `transformers`.

    Args:
      messages: `{"role": "user" | "assistant", "content": text or list of parts}`, user and assistant taking turns. A
        part is `{"type": "text", "text": ...}` or `{"type": <modality>, "path" | <modality> | "source": ...}`. A last
        message by the assistant is the answer to learn.
      modalities: the modalities' names that are known here.
      root: folder that relative paths start from; None leaves them as they are.

    Returns:
      A sample whose instruction is the last text of the last user message.

    Raises:
      InputError: no messages, roles out of turn, or a malformed part.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError('Messages must be a list such as [{"role": "user", "content": "..."}].')
    if not messages:
        raise InputError("There are no messages: give at least one with role user.")
    turns: list[Turn] = []
    asked: list[str | Media] | None = None
    for message in messages:
        role = message.get("role")
        if role == "user" and asked is None:
            asked = _content(message.get("content"), modalities, root)
        elif role == "assistant" and asked is not None:
            turns.append(Turn(tuple(asked), _text_of(message.get("content"))))
            asked = None
        else:
            raise InputError(
                f'A message has the role {role!r} where "{"user" if asked is None else "assistant"}" was expected: '
                "user and assistant take turns, the user first."
            )
    answer = None
    if asked is None:
        last = turns.pop()
        asked, answer = list(last.content), last.answer
    texts = [index for index, part in enumerate(asked) if isinstance(part, str)]
    instruction = asked.pop(texts[-1]) if texts else ""
    return Sample(instruction, asked, answer, turns)


def _content(content: Any, modalities: Collection[str], root: Path | None) -> list[str | Media]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise InputError(f"A message's content must be text or a list of parts, not {type(content).__name__}.")
    return [_chat_part(part, modalities, root) for part in content]


def _chat_part(part: Any, modalities: Collection[str], root: Path | None) -> str | Media:
    if not isinstance(part, Mapping):
        raise InputError(f'A part of a message must be such as {{"type": "text", "text": ...}}, not {part!r:.80}.')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError('A part of type "text" lacks its "text".')
        return part["text"]
    if not isinstance(kind, str) or kind not in modalities:
        raise InputError(f'Unknown part of type "{kind}" in a message.{suggest(str(kind), {"text", *modalities})}')
    for key in ("path", kind, "source"):
        if key in part:
            return Media(kind, _at(part[key], root))
    raise InputError(f'A part of type "{kind}" names no source: give it a "path" or a "{kind}".')


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if not texts or len(texts) != len(parts):
        raise InputError("A message of the assistant must hold text alone.")
    return " ".join(texts)


def _at(source: Any, root: Path | None) -> Any:
    """A source's path, or those of a list, from the root on; what is no path stays as it is."""
    if root is not None and isinstance(source, list):
        return [_at(part, root) for part in source]
    if root is None or not isinstance(source, str) or is_url(source):
        return source
    return os.path.join(root, os.path.expanduser(source))
