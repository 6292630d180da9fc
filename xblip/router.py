"""The router: cues, soft prompts, text and instruction in one order before the LLM.

There is one piece of code for training, generation and scoring: `pieces` says what comes in which order, `assemble`
turns pieces into embeddings, and only padding side and labels differ. (The reference assembles in four places, which
disagree.)

Order of a turn: prefix, then the media in the user's order, each as cue + soft prompt + separator with the user's text
between them, then the instruction, then the postfix, then the answer.
"""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jinja2 import TemplateError
from torch import Tensor

from xblip.errors import ConfigError, InputError, UnknownWordsWarning
from xblip.llm import IGNORE, FrozenLLM, PromptBatch
from xblip.sample import Media, Sample

MAX_WARNED = 1_000
"""Texts and words that are remembered as warned of; then there is no warning more."""
MAX_LISTED = 20
"""Words that one warning names."""


class Bos(Enum):
    """Where the tokenizer's beginning-of-sequence token goes."""

    start = "start"
    instruction = "instruction"
    every = "every"
    none = "none"


@dataclass
class RouterConfig:
    """How a prompt is laid out.

    Attributes:
      cues: put each modality's cue before its soft prompt.
      prefix: text that begins a turn.
      postfix: text after the instruction.
      separator: text after each soft prompt.
      bos: `start` of the prompt; before the last `instruction` (as transformers' InstructBLIP does); before `every` text
        (prefix, cue, user's text, instruction), as X-InstructBLIP does; `none`.
      earlier_turns: the LLM sees the texts of earlier turns; if not, it sees their media and the last question alone.
      chat_template: lay turns out by the tokenizer's chat template; prefix, postfix and bos are then its own.
      system: system message for the chat template.
    """

    cues: bool = True
    prefix: str = ""
    postfix: str = ""
    separator: str = ""
    bos: Bos = Bos.start
    earlier_turns: bool = True
    chat_template: bool = False
    system: str = ""


OPEN, CLOSE, PLACE = "\ue000", "\ue001", "\ue002"
"""Marks around an input's number in text for a chat template, and what stands for both when the text is tokenised:
private characters, cut from what users write."""

Piece = str | Media | int | list[int]
"""Text, an input, the id of a special token, or the ids of a text."""


class Router:
    """Lays out samples for one LLM.

    Attributes:
      cues: each modality's cue.
    """

    def __init__(self, config: RouterConfig, *, llm: FrozenLLM, cues: Mapping[str, str]):
        if config.chat_template and not llm.tokenizer.chat_template:
            raise ConfigError(
                "router.chat_template is on, but the LLM's tokenizer has no chat template: turn it off, and say how a "
                "turn looks with router.prefix and router.postfix."
            )
        self.config = config
        self.llm = llm
        self.cues = dict(cues)
        self._warned: set[str] = set()
        if config.chat_template:
            # Knows the mark as a special token, which splits text as the media tokens of transformers' processors do.
            self._tokenizer = copy.deepcopy(llm.tokenizer)
            self._tokenizer.add_special_tokens({"additional_special_tokens": [PLACE]})
        around = [] if config.chat_template else [config.prefix, config.postfix]
        for text in [*around, config.separator, *(self.cues.values() if config.cues else ())]:
            self._tokenize(text)

    def pieces(self, sample: Sample) -> list[Piece]:
        """Returns text, media and special tokens in the order the LLM sees them, without the answer."""
        turns = [(list(turn.content), turn.answer) for turn in sample.history]
        current = list(sample.media)
        if not self.config.earlier_turns:
            current = [part for content, _ in turns for part in content if isinstance(part, Media)] + current
            turns = []
        if self.config.chat_template:
            return self._templated(turns, current, sample.instruction or "")
        tokenizer = self.llm.tokenizer
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        pieces: list[Piece] = bos if self.config.bos is Bos.start else []
        for content, answer in turns:
            *before, last = self._cued(content) or [""]
            after = [last + self.config.postfix] if isinstance(last, str) else [last, self.config.postfix]
            pieces = [*pieces, self.config.prefix, *before, *after, answer, tokenizer.eos_token_id]
        pieces = [*pieces, self.config.prefix, *self._cued(current)]
        pieces += bos if self.config.bos is Bos.instruction else []
        pieces += [(sample.instruction or "") + self.config.postfix, *self.llm.prompt_end()]
        if self.config.bos is Bos.every:
            begun = [[*bos, piece] if isinstance(piece, str) and piece else [piece] for piece in pieces]
            pieces = [piece for part in begun for piece in part]
        return pieces

    def _cued(self, content: Sequence[str | Media]) -> list[str | Media]:
        pieces: list[str | Media] = []
        for part in content:
            if isinstance(part, Media):
                cue = self.cues[part.modality] if self.config.cues else ""
                pieces += [cue, part, self.config.separator]
            else:
                pieces.append(part)
        return pieces

    def _templated(self, turns: list, current: list, instruction: str) -> list[Piece]:
        """Renders the chat template with a mark for every input, then cuts the text at the marks."""
        media: list[Media] = []

        def render(content: Sequence[str | Media]) -> str:
            text = ""
            for part in self._cued(content):
                if isinstance(part, Media):
                    text += f"{OPEN}{len(media)}{CLOSE}"
                    media.append(part)
                else:
                    text += _unmarked(part)
            return text

        messages = [{"role": "system", "content": _unmarked(self.config.system)}] if self.config.system else []
        for content, answer in turns:
            messages.append({"role": "user", "content": render(content)})
            messages.append({"role": "assistant", "content": _unmarked(answer)})
        messages.append({"role": "user", "content": render([*current, instruction])})
        try:
            rendered = self.llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as cause:
            raise ConfigError(f"The tokenizer's chat template refuses this conversation: {cause}.") from cause
        marks = re.compile(f"{OPEN}(\\d+){CLOSE}")
        numbers = [int(number) for number in marks.findall(rendered)]
        if numbers != list(range(len(media))):
            raise ConfigError(
                f"The tokenizer's chat template gives {len(numbers)} of {len(media)} inputs, or in another order: "
                "turn router.chat_template off, or router.earlier_turns if the template drops earlier turns."
            )
        ids = self._tokenizer(marks.sub(PLACE, rendered), add_special_tokens=False).input_ids
        self._warn_of_unknown(marks.sub(" ", rendered), ids)
        pieces: list[Piece] = []
        for source in media:
            place = ids.index(self._tokenizer.convert_tokens_to_ids(PLACE))
            pieces += [ids[:place], source]
            ids = ids[place + 1 :]
        return [*pieces, ids]

    def assemble(
        self,
        samples: Sequence[Sequence[Piece]],
        soft_prompts: Sequence[Sequence[Tensor]],
        *,
        answers: Sequence[str | Sequence[int]] | None = None,
        room: int = 0,
    ) -> PromptBatch:
        """Turns pieces into what the LLM takes.

        Args:
          samples: the pieces of each sample.
          soft_prompts: of each sample, one (L, D_llm) per input in the order of its pieces.
          answers: to learn or score; then the batch is right-padded and labelled. Without, it is left-padded, and for
            an encoder-decoder right-padded too. A text is followed by the end of sequence; token ids are all there is.
          room: positions that generation will add, which must fit the LLM's context too.

        Raises:
          InputError: a sample is longer than the LLM's context.
        """
        rows, ids = [], []
        apart = self.llm.is_encoder_decoder
        end = self.llm.tokenizer.eos_token_id
        spoken = [
            [*self._tokenize(answer), end] if isinstance(answer, str) else list(answer) for answer in answers or ()
        ]
        for index, (pieces, softs) in enumerate(zip(samples, soft_prompts, strict=True)):
            row = self._lay_out(pieces, softs, [] if apart or answers is None else spoken[index], ids)
            self._check_length(row, room, index)
            rows.append(row)
        embedded = self.llm.embed(ids)
        embeds = [
            torch.cat([embedded[part] if isinstance(part, slice) else part.to(embedded) for part in row])
            for row in rows
        ]
        side = "right" if apart or answers is not None else "left"
        lengths = [row.shape[0] for row in embeds]
        positions = torch.arange(max(lengths), device=embedded.device)[None]
        if side == "left":
            positions = positions.flip(1)
        mask = (positions < torch.tensor(lengths, device=embedded.device)[:, None]).long()
        batch = PromptBatch(torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True, padding_side=side), mask)
        batch.lengths = lengths if side == "right" else None
        if answers is not None:
            batch.labels = _labels(spoken, None if apart else lengths)
        return batch

    def count_answer_tokens(self, answer: str) -> int:
        """Returns how many tokens of an answer are learnt, the end of sequence included."""
        return len(self.llm.tokenize(answer)) + 1

    def _lay_out(
        self, pieces: Sequence[Piece], softs: Sequence[Tensor], answer: list[int], ids: list[int]
    ) -> list[slice | Tensor]:
        """Appends a row's token ids to `ids`; returns its parts, slices of `ids` and soft prompts, the answer last."""
        softs = iter(softs)
        row: list[slice | Tensor] = []
        for piece in [*pieces, answer]:
            if isinstance(piece, Media):
                row.append(next(softs))
                continue
            new = self.ids_of(piece)
            row.append(slice(len(ids), len(ids) + len(new)))
            ids.extend(new)
        return row

    def ids_of(self, piece: str | int | list[int]) -> list[int]:
        """Returns the token ids of a piece that is no input."""
        return [piece] if isinstance(piece, int) else self._tokenize(piece) if isinstance(piece, str) else piece

    def _tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text, of a prompt or an answer."""
        ids = self.llm.tokenize(text) if text else []
        self._warn_of_unknown(text, ids)
        return ids

    def _warn_of_unknown(self, text: str, ids: list[int]) -> None:
        """Warns, once of each, of words in a text that the LLM does not know; `ids` are the text's."""
        unknown = self.llm.tokenizer.unk_token_id
        if unknown not in ids or text in self._warned or len(self._warned) > MAX_WARNED:
            return
        words = [word for word in text.split() if unknown in self.llm.tokenize(word)]
        new = [word for word in words or [text] if word not in self._warned]
        self._warned.update([text, *new])
        if not new:
            return
        listed = ", ".join(f'"{word:.80}"' for word in new[:MAX_LISTED])
        warnings.warn(
            f'The LLM does not know {listed} in "{text:.1000}": it reads every such word as the same one, and its answers '
            "suffer. Use words of its vocabulary.",
            UnknownWordsWarning,
            stacklevel=3,
        )

    def measure(self, pieces: Sequence[Piece], softs: Sequence[Tensor], *, room: int, index: int = 0) -> int:
        """Returns how many positions a sample takes; arguments and errors are those of `assemble`, `index` the sample's."""
        row = self._lay_out(pieces, softs, [], [])
        text, soft = self._check_length(row, room, index)
        return text + soft

    def _check_length(self, row: list[slice | Tensor], room: int, index: int) -> tuple[int, int]:
        """Returns a row's positions of text and of soft prompts."""
        text = sum(part.stop - part.start for part in row if isinstance(part, slice))
        soft = sum(part.shape[0] for part in row if not isinstance(part, slice))
        room = 0 if self.llm.is_encoder_decoder else room
        limit = self.llm.context_length
        if limit is not None and text + soft + room > limit:
            error = InputError(
                f"The prompt is too long for the LLM: {soft} soft-prompt and {text} text positions"
                f"{f' with {room} new tokens' if room else ''} exceed its context of {limit}. Give fewer or shorter "
                "inputs, a shorter instruction, or a smaller max_new_tokens."
            )
            error.row = index
            raise error
        return text, soft


def _labels(answers: Sequence[list[int]], ends: Sequence[int] | None) -> Tensor:
    """The answers' ids, each where its row `ends`, and -100 elsewhere; from the start of the row without `ends`."""
    ends = [len(answer) for answer in answers] if ends is None else ends
    rows = [[IGNORE] * (end - len(answer)) + answer for answer, end in zip(answers, ends, strict=True)]
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)


def _unmarked(text: str) -> str:
    return re.sub(f"[{OPEN}{CLOSE}{PLACE}]", "", text)
