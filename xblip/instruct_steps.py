"""What `xblip augment` does to a batch of captions: answer, question, round trip, and a check by yes and no.

A caption's line keeps all that was written and replied, and what was wrong with it, whether it is kept or not.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xblip.agreement import agree, stands_in, yes_or_no
from xblip.caption_rows import Captioned
from xblip.instruct_pairs import Pair, PairsConfig, compare
from xblip.llm import FrozenLLM
from xblip.rule_writer import RuleWriter
from xblip.writer import LLMWriter, LLMWriterConfig, Reader, Told, Writer

NOT_REWRITTEN, NOT_HELD = "nothing in other words", "answer is not in the caption"
NO_QUESTION, TELLING, DIFFERENT = "no question", "question tells the answer", "answered otherwise"


@dataclass
class WriterConfig:
    """Who writes: one of both.

    Attributes:
      llm: an LLM, asked by prompts.
      rules: a YAML of rules, see `xblip.rule_writer`.
    """

    llm: LLMWriterConfig | None = None
    rules: str | None = None


@dataclass
class AugmentConfig:
    """Making instructions of captions.

    Attributes:
      data: manifests of captions, as `data.train` of a training config names them.
      output_dir: where manifests, logs and the table go.
      writer: who asks.
      reader: which LLM answers in the round trip; the writer's unless given.
      pairs: questions which of two inputs has something; none if null.
      batch_size: captions that are worked on at once.
      max_characters: longer captions are put aside.
      min_words: captions of fewer words are put aside.
      seed: of all chance.
      use_cpu: leave accelerators alone.
    """

    data: Any
    output_dir: str
    writer: WriterConfig
    reader: LLMWriterConfig | None = None
    pairs: PairsConfig | None = None
    batch_size: int = 16
    max_characters: int = 1000
    min_words: int = 1
    seed: int = 42
    use_cpu: bool = False


class Work:
    """What is done to captions; LLMs are loaded when the first is asked.

    Attributes:
      items: all captions.
      told: what is said of each, by id.
    """

    def __init__(
        self,
        config: AugmentConfig,
        items: Sequence[Captioned],
        cues: Mapping[str, str],
        rules: RuleWriter | None,
        device: torch.device,
    ):
        self.config, self.items, self.device = config, items, device
        self.told = {
            item.id: Told(item.caption, item.media.modality.replace("_", " "), cues[item.media.modality])
            for item in items
        }
        self._writer: Writer | None = rules
        self._reader: Reader | None = None
        self._loaded: dict[str, FrozenLLM] = {}

    @property
    def writer(self) -> Writer:
        if self._writer is None:
            self._writer = self._load(self.config.writer.llm)
        return self._writer

    @property
    def reader(self) -> Reader:
        if self._reader is None:
            self._reader = self._load(self.config.reader) if self.config.reader else self.writer
        return self._reader

    def _load(self, config: LLMWriterConfig) -> LLMWriter:
        llm = config.llm
        if self.device.type != "cpu":
            llm.options.setdefault("device_map", str(self.device))
        if repr(llm) not in self._loaded:
            self._loaded[repr(llm)] = FrozenLLM.from_pretrained(llm)
        return LLMWriter(config, self._loaded[repr(llm)])

    def ask(self, batch: Sequence[Captioned]) -> list[dict[str, Any]]:
        """Returns a line for each caption of a batch: what was written and replied, and what is wrong with it."""
        lines = [
            {"id": item.id, "origin": item.origin, "modality": item.media.modality, "caption": item.caption}
            for item in batch
        ]
        given = [self.told[item.id] for item in batch]
        told = self.writer.rewritten(given)
        for line, one, new in zip(lines, given, told, strict=True):
            if new != one:
                line["rewritten"] = new.caption
        left = [place for place, one in enumerate(told) if one.caption]
        for place in set(range(len(lines))) - set(left):
            lines[place]["fault"] = NOT_REWRITTEN
        whole = list(left)

        def step(name: str, make: Callable[[list[Told], list[dict]], list[str]], fault: Callable[[dict], str]) -> None:
            values = make([told[place] for place in left], [lines[place] for place in left]) if left else []
            for place, value in zip(list(left), values, strict=True):
                lines[place][name] = value
                if wrong := fault({**lines[place], "told": told[place].caption}):
                    lines[place]["fault"] = wrong
                    left.remove(place)

        step(
            "answer",
            lambda texts, _: self.writer.answers(texts),
            lambda line: "" if stands_in(line["answer"], line["told"]) else NOT_HELD,
        )
        step(
            "question",
            lambda texts, own: self.writer.questions(texts, [line["answer"] for line in own]),
            lambda line: (
                (TELLING if stands_in(line["answer"], line["question"]) else "") if line["question"] else NO_QUESTION
            ),
        )
        step(
            "reply",
            lambda texts, own: self.reader.replies(texts, [line["question"] for line in own]),
            lambda line: "" if agree(line["reply"], line["answer"]) else DIFFERENT,
        )
        if whole:
            self._check([told[place] for place in whole], [lines[place] for place in whole])
        return lines

    def _check(self, told: Sequence[Told], lines: Sequence[dict[str, Any]]) -> None:
        """Adds "check": a question to answer by yes and one by no, the replies, and whether these are so."""
        others = [self._other(line["id"], one) for line, one in zip(lines, told, strict=True)]
        asked = self.writer.checks(told, others)
        for line, (yes, no) in zip(lines, asked, strict=True):
            if yes and no and yes != no:
                line["check"] = {"yes": yes, "no": no}
        having = [(line["check"], one) for line, one in zip(lines, told, strict=True) if "check" in line]
        for right in ("yes", "no") if having else ():
            replies = self.reader.replies([one for _, one in having], [check[right] for check, _ in having])
            for (check, _), reply in zip(having, replies, strict=True):
                check.setdefault("replies", []).append(reply)
        for check, _ in having:
            check["kept"] = [yes_or_no(reply) for reply in check["replies"]] == ["yes", "no"]

    def _other(self, name: str, told: Told) -> Told:
        """Another caption of the same modality, drawn at random; the same one if there is no other."""
        rng = random.Random(f"{self.config.seed} other {name}")
        for _ in range(100):
            other = self.told[rng.choice(self.items).id]
            if other.modality == told.modality and not agree(other.caption, told.caption):
                return other
        return told

    def compare(self, batch: Sequence[Pair]) -> list[dict[str, Any]]:
        """Returns a line for each pair of a batch."""
        return compare(batch, self.told, self.writer, self.reader, self.config.pairs)
