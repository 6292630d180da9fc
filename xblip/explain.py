"""What an answer came from: how much less likely it is without an input or a segment, and where queries looked.

Leaving out is the measure, for it asks the model itself: the answer's own tokens are scored again, on a prompt without one
input. Attention only says where a bridge looked, not whether what it saw mattered; it is shown beside the measure.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xblip import explain_page
from xblip.contents import describe
from xblip.errors import InputError
from xblip.modality import Features, Modality
from xblip.sample import Media, Sample

if TYPE_CHECKING:
    from rich.table import Table

    from xblip.model import XBlip

ROWS = 8
"""Prompts that the LLM reads at once."""


@dataclass(frozen=True)
class Asked:
    """What an answer keeps of how it was asked for, as long as it lives itself.

    Attributes:
      model: that answered.
      sample: its inputs as they were read then, tensors or features, so that a file may change or go afterwards.
      sources: how each input is called.
    """

    model: "XBlip"
    sample: Sample
    sources: list[str]

    @classmethod
    def read(cls, model: "XBlip", sample: Sample) -> "Asked":
        """Reads the inputs of a checked sample."""
        sources = [describe(media.source) for media in sample.all_media]
        read = sample.changed(
            lambda _, media: media.with_source(model.branches[media.modality].read(media.source)),
        )
        return cls(model, read, sources)


@dataclass(frozen=True)
class InputEffect:
    """What one input did for the answer.

    Attributes:
      name: its modality's name, numbered where several inputs are of one.
      modality: its modality's name.
      cue: the text before its soft prompt; "" if the prompt has no cues.
      source: how it was given.
      bridge: the kind of bridge that read it.
      effect: nats that the answer's log-likelihood loses when the input, with its cue, is left out; below 0 if it gains.
      token_effects: the same of each of the answer's tokens; sums to `effect`.
      share: of all inputs' effects, taken without their signs; it keeps its own.
    """

    name: str
    modality: str
    cue: str
    source: str
    bridge: str
    effect: float
    token_effects: list[float]
    share: float

    @property
    def per_token(self) -> float:
        """`effect` as a mean over the answer's tokens."""
        return self.effect / len(self.token_effects)


@dataclass(frozen=True)
class SegmentEffect:
    """What one segment of an input did: nats that the answer loses when the bridge reads the input's other segments alone.

    Attributes:
      name: the input's.
      segment: which of its segments, from 0.
      effect, token_effects: as an input's.
    """

    name: str
    segment: int
    effect: float
    token_effects: list[float]

    @property
    def per_token(self) -> float:
        """`effect` as a mean over the answer's tokens."""
        return self.effect / len(self.token_effects)


@dataclass
class Explanation:
    """What an answer came from.

    Attributes:
      question: the instruction.
      answer: the text that is explained.
      tokens: the T tokens it was generated as; the end of sequence is none of them.
      log_likelihood: of these tokens, nats.
      without_inputs: the same when all inputs are left out.
      inputs: in the order of the prompt.
      segments: of inputs that have several, in order.
      attention: by an input's name, what the bridge's queries looked at: (layers, heads, Q, S, N), shares of each query's
        attention over the N tokens of S segments, as `Bridge.attention` says; None if the bridge has no queries.
      media: of each input, its modality and the tensors that were read of it, None of features given by hand.
    """

    question: str
    answer: str
    tokens: list[str]
    log_likelihood: float
    without_inputs: float
    inputs: list[InputEffect]
    segments: list[SegmentEffect]
    attention: dict[str, Tensor | None] = field(repr=False)
    media: list[tuple[Modality, dict[str, Tensor] | None]] = field(repr=False)

    def strongest(self) -> InputEffect:
        """Returns the input that the answer owes most to."""
        return max(self.inputs, key=lambda part: part.effect)

    def table(self) -> "Table":
        """Returns the inputs' effects and shares as a table of `rich`, for a terminal."""
        return explain_page.table(self)

    def save(self, folder: str | Path) -> Path:
        """Writes a page with its pictures and figures into a new or empty folder; returns the page's path.

        Raises:
          ConfigError: the folder is not empty, or cannot be written.
        """
        return explain_page.write(self, folder)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, attention as means over layers and heads, (Q, S, N)."""
        effects = [{**dataclasses.asdict(part), "per_token": part.per_token} for part in self.inputs]
        segments = [{**dataclasses.asdict(part), "per_token": part.per_token} for part in self.segments]
        attention = {
            name: None if weights is None else weights.mean((0, 1)).tolist() for name, weights in self.attention.items()
        }
        return {
            "question": self.question,
            "answer": self.answer,
            "tokens": self.tokens,
            "log_likelihood": self.log_likelihood,
            "without_inputs": self.without_inputs,
            "inputs": effects,
            "segments": segments,
            "attention": attention,
        }


@torch.no_grad()
def explain(asked: Asked, answer: str, token_ids: Sequence[int]) -> Explanation:
    """Measures what an answer came from.

    Args:
      asked: how it was asked for.
      answer: its text.
      token_ids: the T tokens that it was generated as.

    Raises:
      InputError: the answer is empty, or there was no input.
    """
    model, media = asked.model, asked.sample.all_media
    if not token_ids:
        raise InputError("The answer is empty, so there is nothing to explain: ask something else, or more clearly.")
    if not media:
        raise InputError(
            "The question came without inputs, so the answer came from none of them: give it at least one."
        )
    features = [model.branches[part.modality].encode([part.source]) for part in media]
    sample = asked.sample.changed(lambda index, part: part.with_source(features[index]))
    scores = _Scores(model, sample, token_ids)
    whole, bare, *without = scores.of(scores.cases([None, set(range(len(media))), *({i} for i in range(len(media)))]))
    names, cues = _names(media), model.router.cues if model.router.config.cues else {}
    effects = [whole - row for row in without]
    total = sum(abs(float(effect.sum())) for effect in effects) or 1.0
    inputs = [
        InputEffect(
            name,
            part.modality,
            cues.get(part.modality, ""),
            source,
            model.branches[part.modality].bridge.name,
            float(effect.sum()),
            effect.tolist(),
            float(effect.sum()) / total,
        )
        for name, part, source, effect in zip(names, media, asked.sources, effects, strict=True)
    ]
    segments = [
        SegmentEffect(names[index], segment, float((whole - row).sum()), (whole - row).tolist())
        for index in range(len(media))
        for segment, row in enumerate(scores.without_segments(index))
    ]
    attention = {}
    for name, part, found in zip(names, media, features, strict=True):
        instruction = part.instruction or sample.instruction or ""
        weights = model.branches[part.modality].bridge.attention(found, [instruction])
        attention[name] = None if weights is None else weights[0]
    return Explanation(
        question=sample.instruction or "",
        answer=answer,
        tokens=[model.llm.tokenizer.decode([token]) for token in token_ids],
        log_likelihood=float(whole.sum()),
        without_inputs=float(bare.sum()),
        inputs=inputs,
        segments=segments,
        attention=attention,
        media=[
            (model.branches[part.modality].modality, None if isinstance(part.source, Features) else part.source)
            for part in media
        ],
    )


class _Scores:
    """Log-likelihoods of one answer's tokens on prompts that differ in their inputs."""

    def __init__(self, model: "XBlip", sample: Sample, token_ids: Sequence[int]):
        """Makes the soft prompts of a sample whose sources are features."""
        self.model = model
        self.sample = sample
        self.token_ids = list(token_ids)
        [self.prompts] = model.soft_prompts([sample])

    def cases(self, left_out: Sequence[set[int] | None]) -> list[tuple[Sample, list[Tensor]]]:
        """The sample without each of these sets of inputs."""
        return [
            (
                self.sample.changed(lambda index, part, gone=gone: None if gone and index in gone else part),
                [prompt for index, prompt in enumerate(self.prompts) if not gone or index not in gone],
            )
            for gone in left_out
        ]

    def without_segments(self, index: int) -> list[Tensor]:
        """Scores (T,) without each segment of an input, which its bridge reads anew; none if it has but one."""
        part = self.sample.all_media[index]
        features, count = part.source, part.source.segments[0]
        cases = []
        for segment in range(count if count > 1 else 0):
            rest = [place for place in range(count) if place != segment]
            shorter = Features(features.values[rest], features.mask[rest], [count - 1])
            alone = dataclasses.replace(self.sample, media=[part.with_source(shorter)], history=[])
            [[prompt]] = self.model.soft_prompts([alone])
            cases.append((self.sample, [*self.prompts[:index], prompt, *self.prompts[index + 1 :]]))
        return self.of(cases)

    def of(self, cases: Sequence[tuple[Sample, list[Tensor]]]) -> list[Tensor]:
        """Log-likelihoods of the answer's tokens, (T,) on the CPU, for each sample with its soft prompts."""
        scores: list[Tensor] = []
        for start in range(0, len(cases), ROWS):
            samples, prompts = zip(*cases[start : start + ROWS], strict=True)
            pieces = [self.model.router.pieces(sample) for sample in samples]
            batch = self.model.router.assemble(pieces, prompts, answers=[self.token_ids] * len(samples))
            values, mask = self.model.llm.token_log_likelihoods(batch)
            scores += [row[real].cpu() for row, real in zip(values, mask, strict=True)]
        return scores


def _names(media: Sequence[Media]) -> list[str]:
    counts, seen = Counter(part.modality for part in media), Counter()
    names = []
    for part in media:
        seen[part.modality] += 1
        names.append(part.modality if counts[part.modality] == 1 else f"{part.modality} {seen[part.modality]}")
    return names
