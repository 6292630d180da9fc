"""A context: media encoded once, to be asked about many times.

What another question does not change is not done again: encoders run once, bridges read again only what an instruction
changes, and the LLM goes on from the part of the prompt that stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xblip.answer import Answer
from xblip.contents import describe
from xblip.errors import InputError
from xblip.explain import Asked
from xblip.generation import says_how_to_cache
from xblip.media import held
from xblip.media_read import KeysValues
from xblip.prefixes import Prompt, lay_out, shared_by_all, soft_units
from xblip.router import Piece
from xblip.sample import Media, Sample, Turn, by_modality

if TYPE_CHECKING:
    from xblip.model import XBlip


class Context:
    """Media of one model, encoded; `XBlip.encode` makes it. Threads may ask one context at once.

    Attributes:
      model: whose they are.
      media: inputs and the text between them, each input's source its features.
      requery: whether bridges read the inputs anew for each question.
    """

    def __init__(
        self, model: "XBlip", media: Sequence[str | Media], *, requery: bool = True, instruction: str | None = None
    ):
        """Reads and encodes the inputs; see `XBlip.encode`."""
        if instruction is not None and requery:
            raise InputError(
                "A context that reads its inputs anew for each question has no instruction of its own: give requery=False "
                "beside instruction, or leave it out."
            )
        self.model = model
        self.requery = requery
        self._sources: dict[bytes, Any] = {}
        self.media = self.encoded(media)
        self._kept = {} if instruction is None else {"instruction": Sample(instruction).instruction}

    def ask(self, instruction: str, /, **options: Any) -> Answer:
        """Asks one question; `options` are transformers' generation options."""
        return self.ask_many([instruction], **options)[0]

    def ask_many(self, instructions: Sequence[str], /, **options: Any) -> list[Answer]:
        """Asks several questions as one batch.

        Args:
          instructions: the questions.
          options: transformers' generation options.

        Returns:
          An answer for each.
        """
        if isinstance(instructions, str) or not isinstance(instructions, Sequence):
            raise InputError(f'Expected a list of questions such as ["...", "..."], not {instructions!r:.80}.')
        samples = [Sample(instruction, list(self.media)) for instruction in instructions]
        if not samples:
            return []
        if not self.requery:
            kept = self._kept.setdefault("instruction", samples[0].instruction)
            samples = [replace(sample, media=_read_for(kept, self.media)) for sample in samples]
        return self.answers(samples, options)

    def chat(self, *, requery: bool | None = None) -> "Chat":
        """Begins a conversation about the media; `requery` is the context's unless given."""
        return Chat(self, requery=self.requery if requery is None else requery)

    def encoded(self, parts: Sequence[str | Media]) -> list[str | Media]:
        """Returns parts whose sources are features, and remembers where these are from."""
        given = Sample(None, list(parts)).changed(
            lambda _, part: part.with_source(held(part.source, kind=part.modality))
        )
        [read] = self.model.reader.encoded([given])
        for before, after in zip(given.all_media, read.all_media, strict=True):
            self._sources[after.source.key] = before.source
        return read.media

    def answers(self, samples: Sequence[Sample], options: Mapping[str, Any], *, go_on: bool = False) -> list[Answer]:
        """Answers samples whose sources are features; see `answer_all`."""
        return [
            answer.asked_as(lambda sample=sample: self._asked(sample))
            for answer, sample in zip(answer_all(self.model, samples, options, go_on=go_on), samples, strict=True)
        ]

    def _asked(self, sample: Sample) -> Asked:
        """Reads the inputs again as they were given, to explain an answer.

        Raises:
          InputError: one of them has changed meanwhile.
        """
        return Asked.read(self.model, sample.changed(lambda _, part: part.with_source(self._source_of(part))))

    def _source_of(self, part: Media) -> Any:
        source = self._sources[part.source.key]
        if self.model.reader.key(part.modality, source) not in (None, part.source.key):
            raise InputError(
                f'"{describe(source)}" has changed since it was encoded, so that an explanation would be about something '
                "else: encode it again, and ask that."
            )
        return source


class Chat:
    """A conversation about a context's media.

    With `requery` each turn's question is what bridges read all inputs for, as `XBlip.chat` has it. Without, an input keeps
    the soft prompt of the turn in which it came, and the LLM goes on from all that it has read and said.

    Attributes:
      turns: earlier ones.
    """

    def __init__(self, context: Context, *, requery: bool):
        self.context = context
        self.requery = requery
        self.turns: list[Turn] = []

    def ask(
        self, instruction: str, /, *, media: Sequence[str | Media | tuple[str, Any]] | None = None, **inputs: Any
    ) -> Answer:
        """Asks the next question; one that fails is no turn.

        Args:
          instruction: the question.
          media, inputs: further inputs, before the question, and generation options; as for `XBlip.ask`.
        """
        model = self.context.model
        options = model.take_options(inputs)
        parts = [*(() if self.turns else self.context.media), *self.context.encoded(model.parts(media, inputs))]
        sample = Sample(instruction, parts if self.requery else _read_for(instruction, parts), None, self.turns)
        [answer] = self.context.answers([sample], options, go_on=True)
        self.turns = [*self.turns, Turn((*sample.media, instruction), answer.text)]
        return answer


def answer_all(
    model: "XBlip", samples: Sequence[Sample], options: Mapping[str, Any], *, go_on: bool = False
) -> list[Answer]:
    """Answers a batch by what the model's caches hold.

    Args:
      model: to ask.
      samples: whose sources are features of `MediaReader.encode`.
      options: transformers' generation options.
      go_on: keep what the LLM has read and said, for a prompt that goes on from it; for one sample.

    Returns:
      One answer for each.
    """
    model.check_for_one(options)
    options = {**model.generation, **options}
    prompts = make_prompts(model, samples, [options["max_new_tokens"]] * len(samples))
    shared = shared_by_all(prompts)
    own_cache = says_how_to_cache(options, model.llm.model.generation_config)
    reuses = not own_cache and (go_on or shared > 0) and model.prefixes.work
    past = None
    if reuses:
        past = model.prefixes.longest(prompts[0].units) if go_on else model.prefixes.read(prompts[0], shared)
    kept: KeysValues | None = [] if reuses and go_on and prompts[0].goes_on else None
    batch = lay_out(prompts, past, right=model.llm.is_encoder_decoder)
    rows = model.llm.generate(batch, kept=kept, **options)
    if kept and len(kept[0][0]) == 1:
        model.prefixes.keep(np.append(prompts[0].units, rows[0]), kept)
    return Answer.of(model.llm, rows, [len(prompt.units) for prompt in prompts])


@torch.no_grad()
def make_prompts(model: "XBlip", samples: Sequence[Sample], rooms: Sequence[int]) -> list[Prompt]:
    """Makes the prompts of samples whose sources are features.

    Args:
      model: whose bridges, router and LLM.
      samples: B.
      rooms: positions that generation will add to each, which must fit the LLM's context too.

    Raises:
      InputError: a sample is longer than the LLM's context.
    """
    softs: list[dict[int, tuple[Tensor, bytes]]] = [{} for _ in samples]
    for name, inputs in by_modality(samples).items():
        made = model.reader.soft_prompts(name, [part.source for part in inputs], [part.instruction for part in inputs])
        for part, soft in zip(inputs, made, strict=True):
            softs[part.row][part.column] = soft
    prompts = []
    for index, (sample, own, room) in enumerate(zip(samples, softs, rooms, strict=True)):
        ordered = [own[column] for column in sorted(own)]
        pieces = model.router.pieces(sample)
        model.router.measure(pieces, [soft for soft, _ in ordered], room=room, index=index)
        prompts.append(_make_prompt(model, pieces, ordered))
    return prompts


def _make_prompt(model: "XBlip", pieces: Sequence[Piece], softs: Sequence[tuple[Tensor, bytes]]) -> Prompt:
    given = iter(softs)
    units: list[np.ndarray] = []
    embeds: list[Tensor] = []
    stable, is_stable, length = 0, True, 0
    for piece in pieces:
        if isinstance(piece, Media):
            soft, key = next(given)
            embeds.append(soft.to(model.llm.device, model.llm.dtype))
            units.append(soft_units(key, len(soft)))
            is_stable &= piece.instruction is not None or not model.branches[piece.modality].bridge.reads_instructions
        else:
            ids = model.router.ids_of(piece)
            embeds.append(model.llm.embed(ids))
            units.append(np.array(ids, np.int64))
        length += len(units[-1])
        if isinstance(piece, Media) and is_stable:
            stable = length
    return Prompt(torch.cat(embeds), np.concatenate(units), min(stable, length - 1), is_stable)


def _read_for(instruction: str, parts: Sequence[str | Media]) -> list[str | Media]:
    """Parts whose inputs are read for this instruction, if they have none of their own."""
    return [
        replace(part, instruction=part.instruction or instruction) if isinstance(part, Media) else part
        for part in parts
    ]
