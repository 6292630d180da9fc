"""Pairs of inputs and a question that tells them apart, as DisCRn's; each is asked in both orders.

A question is kept if it is answered right whichever input stands first: one that is answered by place is not, and the
labels of what is kept are balanced without swapping anything afterwards.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xblip import config as configs
from xblip.agreement import which_of
from xblip.caption_rows import Captioned
from xblip.errors import ConfigError, InputError
from xblip.metrics import normalise_answer
from xblip.writer import Reader, Told, Writer, check_holes

TRIES = 50
"""Draws for a pair, when captions are alike."""


@dataclass
class PairsConfig:
    """How pairs are drawn; the numbers are X-InstructBLIP's.

    Attributes:
      count: of pairs that are tried.
      candidates: inputs that are looked at for the second of a pair.
      nearest: among how many of them it is drawn, those whose captions share most words: far ones ask for nothing.
      answers: what the first and the second of two inputs are called; may hold `{modality}`.
    """

    count: int
    candidates: int = 100
    nearest: int = 10
    answers: list[str] = field(default_factory=lambda: ["the first one", "the second one"])


class Pair(NamedTuple):
    """Two inputs, of which the first is to have what is asked for."""

    id: str
    wanted: Captioned
    other: Captioned


def check_pairs(config: PairsConfig) -> None:
    """Raises `ConfigError` for numbers too small, or names that are not two."""
    configs.at_least(config, count=1, candidates=1, nearest=1)
    if len(config.answers) != 2:
        raise ConfigError(f"pairs.answers must be two names, of the first and the second, not {config.answers!r:.80}.")
    for answer in config.answers:
        check_holes(answer, (), {"modality"}, where="pairs.answers")


def draw_pairs(items: Sequence[Captioned], config: PairsConfig, *, seed: int) -> list[Pair]:
    """Draws pairs of different captions; of two modalities each, if there are several.

    Args:
      items: what there is.
      config: how many, and how near to each other.
      seed: of all chance.

    Raises:
      ConfigError: the two inputs of a pair would be called alike.
      InputError: no two captions differ.
    """
    by_modality: dict[str, list[Captioned]] = {}
    for item in items:
        by_modality.setdefault(item.media.modality, []).append(item)
    if len(by_modality) == 1 and config.answers[0] == config.answers[1]:
        raise ConfigError(
            f'pairs.answers calls both inputs of a pair "{config.answers[0]}", and the data have one modality: give two '
            "names."
        )
    words = {item.id: frozenset(normalise_answer(item.caption).split()) for item in items}
    others = {
        name: [item for key, own in by_modality.items() if key != name for item in own] or by_modality[name]
        for name in by_modality
    }
    rng = random.Random(f"{seed} pairs")
    pairs: list[Pair] = []
    for number in range(config.count):
        for _ in range(TRIES):
            wanted = rng.choice(items)
            choice = others[wanted.media.modality]
            drawn = rng.sample(choice, min(config.candidates, len(choice)))
            own = words[wanted.id]
            differing = [item for item in drawn if words[item.id] != own and item.media != wanted.media]
            near = sorted(differing, key=lambda item: -len(words[item.id] & own) / len(words[item.id] | own))
            if near:
                pairs.append(Pair(str(number), wanted, rng.choice(near[: config.nearest])))
                break
    if not pairs:
        raise InputError("No two captions differ, so no question tells inputs apart: leave `pairs` out.")
    return pairs


def compare(
    pairs: Sequence[Pair], told: dict[str, Told], writer: Writer, reader: Reader, config: PairsConfig
) -> list[dict[str, Any]]:
    """Asks a question about each pair, and whether it is answered right in both orders.

    Args:
      pairs: a batch.
      told: captions by id.
      writer, reader: who asks, and who answers.
      config: what inputs are called.

    Returns:
      A line for each: "question", "properties", and "replies" with the wanted input first and second; "fault" where it is
      not kept.
    """
    wanted, others = [told[pair.wanted.id] for pair in pairs], [told[pair.other.id] for pair in pairs]
    asked = writer.contrasts(wanted, others)
    lines = []
    for pair, one, two, contrast in zip(pairs, wanted, others, asked, strict=True):
        question = contrast.question if one.caption and two.caption else ""
        properties = [contrast.wanted, contrast.other]
        line = {"id": pair.id, "wanted": pair.wanted.id, "other": pair.other.id}
        lines.append({**line, "question": question, "properties": properties})
    found = [place for place, line in enumerate(lines) if line["question"]]
    questions = [lines[place]["question"] for place in found]
    first, second = [wanted[place] for place in found], [others[place] for place in found]
    replies = [reader.choices(*order, questions) if found else [] for order in ((first, second), (second, first))]
    for place, *said in zip(found, *replies, strict=True):
        called = [
            called_in(order, config) for order in ((wanted[place], others[place]), (others[place], wanted[place]))
        ]
        lines[place]["replies"] = said
        if [which_of(reply, names) for reply, names in zip(said, called, strict=True)] != [0, 1]:
            lines[place]["fault"] = "answered otherwise in one order"
    for line in lines:
        if not line["question"]:
            line["fault"] = "no question found"
    return lines


def called_in(order: Sequence[Told], config: PairsConfig) -> list[str]:
    """Returns what two inputs in this order are called."""
    return [name.format(modality=one.modality) for name, one in zip(config.answers, order, strict=True)]
