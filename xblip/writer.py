"""Who makes questions of captions: an LLM by prompts, or rules where the LLM at hand cannot write.

Writing and answering are apart, so that what one has written may be tried on another: an LLM that checks itself passes over
its own habits, and rules would always agree with themselves. Rules write, therefore, and only LLMs read.
"""

import random
import string
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from xblip.errors import ConfigError, InputError
from xblip.llm import FrozenLLM, LLMConfig
from xblip.model import XBlip
from xblip.router import RouterConfig
from xblip.sample import Sample


class Told(NamedTuple):
    """A caption, and what says it of what.

    Attributes:
      caption: the text.
      modality: in words, such as "point cloud".
      cue: the modality's, such as "3d: ".
    """

    caption: str
    modality: str = ""
    cue: str = ""


class Contrast(NamedTuple):
    """A question which one of two inputs answers.

    Attributes:
      question: it; "" if none was found.
      wanted, other: what the one has that is asked for, and what the other has instead.
    """

    question: str
    wanted: str
    other: str


class Writer(ABC):
    """Writes about captions; each method takes B captions and gives B results, "" where it finds nothing."""

    def rewritten(self, told: Sequence[Told]) -> list[Told]:
        """Returns captions in the words that all else is made of: as they are, unless a writer says otherwise."""
        return list(told)

    @abstractmethod
    def answers(self, told: Sequence[Told]) -> list[str]:
        """Returns a short answer that each caption holds."""

    @abstractmethod
    def questions(self, told: Sequence[Told], answers: Sequence[str]) -> list[str]:
        """Returns a question to each answer."""

    @abstractmethod
    def checks(self, told: Sequence[Told], others: Sequence[Told]) -> list[tuple[str, str]]:
        """Returns a question each that the caption answers by yes, and one by no; another caption may serve the second."""

    @abstractmethod
    def contrasts(self, wanted: Sequence[Told], others: Sequence[Told]) -> list[Contrast]:
        """Returns a question each, which of two inputs has something, that the first of a pair has and the second not."""


class Reader(ABC):
    """Answers what a writer has asked, from captions alone."""

    @abstractmethod
    def replies(self, told: Sequence[Told], questions: Sequence[str]) -> list[str]:
        """Returns the answer to a question about each caption."""

    @abstractmethod
    def choices(self, firsts: Sequence[Told], seconds: Sequence[Told], questions: Sequence[str]) -> list[str]:
        """Returns which of two captions each question is answered by, in words."""


@dataclass
class Prompts:
    """What an LLM is asked, with holes in braces; the first three are X-InstructBLIP's.

    Every prompt may hold `{modality}` and `{cue}`; those about two captions have them with `first_` and `second_`, or
    `wanted_` and `other_`.

    Attributes:
      rewrite: asks for a caption in other words before all else, such as one without colours for what has none; null for
        the caption as it is.
      answer: asks for a word that the caption tells.
      question: asks for a question to that answer.
      reply: asks the question, of the caption.
      properties: asks for what may be told of a caption.
      contrast: asks for a question that tells two captions apart.
      choice: asks that question, of both captions.
      checks: questions that a right caption answers by yes; one of them is drawn.
    """

    rewrite: str | None = None
    answer: str = "Generate a potential answer word from the following text: {caption}"
    question: str = (
        "Generate a question for the answer using the context. Context: {caption} Answer: {answer} Question:"
    )
    reply: str = "Answer the question given the context. Context: {caption} Question: {question} Answer:"
    properties: str = "List three properties of what is described. Description: {caption} Properties:"
    contrast: str = (
        "Ask which of two things has a property that A has and B has not. Name neither A nor B.\n"
        "A: a dog barks near a road. Properties: animal, loud, outdoors. B: a wooden chair. Properties: made of wood, "
        "still, furniture. Question: Which of the two is alive?\n"
        "A: {wanted} Properties: {wanted_properties} B: {other} Properties: {other_properties} Question:"
    )
    choice: str = (
        "First: {first} Second: {second} Question: {question} Answer with the word first or the word second. Answer:"
    )
    checks: list[str] = field(default_factory=lambda: ["Is this {caption}?", "Can it be described as {caption}?"])


HOLES = {
    "rewrite": {"caption"},
    "answer": {"caption"},
    "question": {"caption", "answer"},
    "reply": {"caption", "question"},
    "properties": {"caption"},
    "contrast": {"wanted", "other"},
    "choice": {"first", "second", "question"},
    "checks": {"caption"},
}
"""What each prompt must hold."""
MAY = {"contrast": ("wanted", "other"), "choice": ("first", "second")}
"""Whom a prompt about two is about; what it may hold of each goes by these names."""


@dataclass
class LLMWriterConfig:
    """An LLM that writes or reads.

    Attributes:
      source, revision, dtype, tokens, options: as of a training config's `llm`.
      prompts: what it is asked.
      router: how a prompt is laid out; chat models want `chat_template: true`.
      generation: transformers' generation options.
    """

    source: str
    revision: str | None = None
    dtype: str = "auto"
    tokens: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    prompts: Prompts = field(default_factory=Prompts)
    router: RouterConfig = field(default_factory=RouterConfig)
    generation: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 40, "do_sample": False})

    @property
    def llm(self) -> LLMConfig:
        """What loads it."""
        return LLMConfig(**{entry.name: getattr(self, entry.name) for entry in fields(LLMConfig)})


class LLMWriter(Writer, Reader):
    """Any LLM that transformers loads, asked by prompts."""

    def __init__(self, config: LLMWriterConfig, llm: FrozenLLM):
        """Checks the prompts.

        Args:
          config: what is asked, and how.
          llm: the LLM that it names, loaded.

        Raises:
          ConfigError: a prompt lacks a hole, or has one that nothing goes into.
        """
        check_prompts(config.prompts)
        self.prompts = config.prompts
        self._model = XBlip(llm=llm, branches={}, router=config.router, generation=config.generation).eval()

    def rewritten(self, told: Sequence[Told]) -> list[Told]:
        if self.prompts.rewrite is None:
            return list(told)
        texts = self._say(self.prompts.rewrite, [_holes(one) for one in told])
        return [one._replace(caption=text) for one, text in zip(told, texts, strict=True)]

    def answers(self, told: Sequence[Told]) -> list[str]:
        return [text.rstrip(".") for text in self._say(self.prompts.answer, [_holes(one) for one in told])]

    def questions(self, told: Sequence[Told], answers: Sequence[str]) -> list[str]:
        holes = [_holes(one) | {"answer": answer} for one, answer in zip(told, answers, strict=True)]
        return self._say(self.prompts.question, holes)

    def checks(self, told: Sequence[Told], others: Sequence[Told]) -> list[tuple[str, str]]:
        pairs = []
        for one, other in zip(told, others, strict=True):
            form = random.Random(one.caption).choice(self.prompts.checks)
            bare = [text._replace(caption=text.caption.rstrip(". ")) for text in (one, other)]
            right, wrong = (form.format(**_holes(text)) for text in bare)
            pairs.append((right, wrong))
        return pairs

    def contrasts(self, wanted: Sequence[Told], others: Sequence[Told]) -> list[Contrast]:
        said = self._say(self.prompts.properties, [_holes(one) for one in [*wanted, *others]])
        properties = list(zip(said[: len(wanted)], said[len(wanted) :], strict=True))
        holes = [
            _holes(one, "wanted") | _holes(two, "other") | {"wanted_properties": of_one, "other_properties": of_two}
            for one, two, (of_one, of_two) in zip(wanted, others, properties, strict=True)
        ]
        questions = self._say(self.prompts.contrast, holes)
        return [Contrast(question, *own) for question, own in zip(questions, properties, strict=True)]

    def replies(self, told: Sequence[Told], questions: Sequence[str]) -> list[str]:
        holes = [_holes(one) | {"question": question} for one, question in zip(told, questions, strict=True)]
        return self._say(self.prompts.reply, holes)

    def choices(self, firsts: Sequence[Told], seconds: Sequence[Told], questions: Sequence[str]) -> list[str]:
        holes = [
            _holes(one, "first") | _holes(two, "second") | {"question": question}
            for one, two, question in zip(firsts, seconds, questions, strict=True)
        ]
        return self._say(self.prompts.choice, holes)

    def _say(self, prompt: str, holes: Sequence[Mapping[str, str]]) -> list[str]:
        """What the LLM says to each prompt, the first line of it; "" to one that is too long for it."""
        prompts = [prompt.format(**own) for own in holes]
        left, said = list(range(len(prompts))), [""] * len(prompts)
        while left:
            try:
                answers = self._model.generate([Sample(prompts[place]) for place in left])
            except InputError as error:
                if error.row is None:
                    raise
                del left[error.row]
                continue
            for place, answer in zip(left, answers, strict=True):
                said[place] = _first_line(answer.text)
            break
        return said


def check_prompts(prompts: Prompts) -> None:
    """Raises `ConfigError` for a prompt without what it is to hold, or with what nothing goes into."""
    if not prompts.checks:
        raise ConfigError("prompts.checks is empty: give at least one question with {caption} in it.")
    for name, wanted in HOLES.items():
        given = getattr(prompts, name)
        about = MAY.get(name)
        extra = {f"{one}_{hole}" for one in about for hole in ("modality", "cue")} if about else {"modality", "cue"}
        if name == "contrast":
            extra |= {"wanted_properties", "other_properties"}
        for form in given if isinstance(given, list) else [given] if given is not None else []:
            check_holes(form, wanted, extra, where=f"prompts.{name}")


def check_holes(form: str, wanted: Collection[str], more: Collection[str] = (), *, where: str) -> None:
    """Raises `ConfigError` for a text that lacks one of its holes, or has another one than these."""
    try:
        holes = {name for _, name, *_ in string.Formatter().parse(form) if name is not None}
    except ValueError:
        holes = {""}
    if not set(wanted) <= holes <= {*wanted, *more}:
        needed = ", ".join(f"{{{name}}}" for name in sorted(wanted))
        also = f", may hold {', '.join(f'{{{name}}}' for name in sorted(more))}," if more else ""
        raise ConfigError(f'{where}: "{form:.80}" must hold {needed}{also} and no other braces.')


def _holes(told: Told, name: str = "") -> dict[str, str]:
    """What a prompt may hold of a caption."""
    if not name:
        return {"caption": told.caption, "modality": told.modality, "cue": told.cue}
    return {name: told.caption, f"{name}_modality": told.modality, f"{name}_cue": told.cue}


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[0].strip('"') if lines else ""
