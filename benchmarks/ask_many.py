"""Sixteen questions about one video of eight frames: a context beside transformers' InstructBlipVideo of equal weights.

    python benchmarks/ask_many.py                  # twenty minutes on an idle core
    python benchmarks/ask_many.py --new-tokens 8 --repeats 3

All systems answer the same questions by greedy decoding, to the same number of tokens, and must say the same texts; one that
keeps the first question's soft prompt must say what `generate` says with that prompt. Random weights now and then make two
words equally likely but for rounding; answers that part there alone are named below the table. Times are of the same
repeat, systems in turn; speed is beside transformers one by one, and a batch stands beside transformers' batch too. The
first question (which encodes) and further ones are told apart, each beside its floor: matrix products that must be done,
over the best speed of a plain matrix product in the same run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pair
import torch
from floor import ask_flops
from torch import nn
from train_step import peak_flops
from transformers import (
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoProcessor,
    InstructBlipVideoVideoProcessor,
)

from xblip import Sample, XBlip
from xblip.convert import convert
from xblip.sample import Media

FRAMES = 8
QUESTIONS = 16
WORDS = (5, 24)
"""Of a question, log-uniform as those of `train_step.py` are."""
TIE = 1e-5
"""Between two words' log-likelihoods: what rounding alone decides, in float32 after some layers."""


@dataclass(frozen=True)
class Asked:
    """What a system took: seconds of the first question and of all, and what it said."""

    first: float
    total: float
    texts: list[str]


def save_models(shapes: pair.Shapes, folder: Path) -> None:
    """Writes a random InstructBlipVideo into `folder`/theirs, and the bundle made of it into `folder`/ours."""
    tokenizer = pair.make_tokenizer(shapes.vocabulary, ["<s>"], [])
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    reader = pair.make_tokenizer(shapes.words, ["<s>"], ["</s>"])
    settings = pair.settings_of(shapes, vocabulary=len(tokenizer))
    config = InstructBlipVideoConfig(video_token_index=tokenizer.convert_tokens_to_ids("<video>"), **settings)
    torch.manual_seed(0)
    model = InstructBlipVideoForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.02)
    model.generation_config.eos_token_id = model.language_model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "theirs")
    frames = InstructBlipVideoVideoProcessor(size={"height": 224, "width": 224})
    # Its processor makes room for four frames whatever there are, and the soft tokens of others are dropped in silence.
    room = pair.QUERIES * FRAMES // 4
    InstructBlipVideoProcessor(frames, tokenizer, reader, num_query_tokens=room).save_pretrained(folder / "theirs")
    del model
    convert(folder / "theirs", folder / "ours")


def make_questions(shapes: pair.Shapes, count: int = QUESTIONS) -> list[str]:
    """Random words, as many as people ask with."""
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.uniform(*np.log(WORDS), count)).astype(int)
    return [" ".join(f"w{word}" for word in draw.integers(0, shapes.words - 8, length)) for length in lengths]


def make_video() -> np.ndarray:
    """(S, H, W, 3) uint8, already of the size that encoders take, so that no system resizes."""
    return np.random.default_rng(0).integers(0, 256, (FRAMES, 224, 224, 3), dtype=np.uint8)


class Theirs:
    """transformers' model with its processor: a question at a time, or all in one batch."""

    def __init__(self, folder: Path, video: np.ndarray, *, together: bool):
        self.model = InstructBlipVideoForConditionalGeneration.from_pretrained(folder / "theirs").eval()
        self.processor = InstructBlipVideoProcessor.from_pretrained(folder / "theirs")
        self.processor.tokenizer.padding_side = "left"  # or short questions of a batch get other answers
        self.video, self.together = video, together

    @torch.no_grad()
    def answer(self, questions: Sequence[str], options: dict[str, int]) -> list[str]:
        """Answers questions as one batch."""
        videos = [list(self.video)] * len(questions)
        inputs = self.processor(images=videos, text=list(questions), padding=True, return_tensors="pt")
        ids = self.model.generate(**inputs, do_sample=False, **options)[:, -options["max_new_tokens"] :]
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def ask(self, questions: Sequence[str], options: dict[str, int]) -> Asked:
        started = time.perf_counter()
        if self.together:
            texts = self.answer(questions, options)
            return Asked(float("nan"), time.perf_counter() - started, texts)
        texts = self.answer(questions[:1], options)
        first = time.perf_counter() - started
        texts += [self.answer([question], options)[0] for question in questions[1:]]
        return Asked(first, time.perf_counter() - started, texts)


class Ours:
    """The bundle: `ask` for every question, or a context that is asked one by one, with the first question and then all
    others as a batch, or with all as one."""

    def __init__(self, folder: Path, video: np.ndarray, *, way: str, requery: bool = True):
        self.model = XBlip.from_pretrained(folder / "ours", dtype="float32")
        self.video, self.way, self.requery = video, way, requery

    def ask(self, questions: Sequence[str], options: dict[str, int]) -> Asked:
        self.model.caches.clear()
        started = time.perf_counter()
        if self.way == "ask":
            answers = [self.model.ask(questions[0], video=self.video, **options)]
            first = time.perf_counter() - started
            answers += [self.model.ask(question, video=self.video, **options) for question in questions[1:]]
        elif self.way == "together":
            first = float("nan")
            answers = self.model.encode(video=self.video, requery=self.requery).ask_many(questions, **options)
        else:
            context = self.model.encode(video=self.video, requery=self.requery)
            answers = [context.ask(questions[0], **options)]
            first = time.perf_counter() - started
            if self.way == "context":
                answers += [context.ask(question, **options) for question in questions[1:]]
            else:
                answers += context.ask_many(questions[1:], **options)
        return Asked(first, time.perf_counter() - started, [answer.text for answer in answers])


def systems(folder: Path, video: np.ndarray) -> dict[str, Theirs | Ours]:
    """All systems by name; the first is what others are compared with."""
    return {
        "transformers": Theirs(folder, video, together=False),
        "transformers, one batch": Theirs(folder, video, together=True),
        "ask": Ours(folder, video, way="ask"),
        "context, one by one": Ours(folder, video, way="context"),
        "context, first and then a batch": Ours(folder, video, way="batch"),
        "context, one batch": Ours(folder, video, way="together"),
        "context, one soft prompt, one by one": Ours(folder, video, way="context", requery=False),
        "context, one soft prompt, then a batch": Ours(folder, video, way="batch", requery=False),
        "context, one soft prompt, one batch": Ours(folder, video, way="together", requery=False),
    }


def expected_of(system: Ours, questions: Sequence[str], options: dict[str, int]) -> list[str]:
    """What a context that keeps the first question's soft prompt must say: what `generate` says with that prompt."""
    samples = [sample_of(system, question, questions[0]) for question in questions]
    return [system.model.generate([sample], **options)[0].text for sample in samples]


def sample_of(system: Ours, question: str, read_for: str) -> Sample:
    """A question about the video, whose soft prompt is made for `read_for`."""
    return Sample(question, [Media("video", system.video, read_for)])


@torch.no_grad()
def part_at_tie(model: XBlip, sample: Sample, texts: tuple[str, str]) -> bool:
    """Whether two answers part at words that are equally likely but for rounding.

    Args:
      model: whose answers they are.
      sample: that was asked.
      texts: the answers, a token for each word.
    """
    first, second = (text.split() for text in texts)
    at = next((place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return False
    answers = [" ".join(words[: at + 1]) for words in (first, second)]
    [prompts] = model.soft_prompts([sample])
    batch = model.router.assemble([model.router.pieces(sample)] * 2, [prompts] * 2, answers=answers)
    likelihoods, mask = model.llm.token_log_likelihoods(batch)
    one, other = likelihoods[mask].view(2, -1)[:, at]
    return abs(one - other).item() < TIE


def floors(
    shapes: pair.Shapes, questions: Sequence[str], said: int, *, requery: bool, encodes_anew: bool
) -> tuple[float, float]:
    """Operations of the first question, and of all."""
    config = pair.make_config(shapes, vocabulary=shapes.vocabulary + 1, image_token=shapes.vocabulary)
    parts = [ask_flops(config, frames=FRAMES, asked=len(question.split()), said=said) for question in questions]
    first = sum(parts[0].values())
    kept = () if encodes_anew else ("video",) if requery else ("video", "queries", "soft prompt")
    return first, first + sum(value for part in parts[1:] for name, value in part.items() if name not in kept)


def measure(shapes: pair.Shapes, folder: Path, *, said: int, repeats: int) -> tuple[list[dict], set[tuple[str, int]]]:
    """Measures all systems; returns a row of the table for each, and which systems part at a tie from which answer.

    Raises:
      AssertionError: systems that must say the same do not.
    """
    questions, video = make_questions(shapes), make_video()
    options = {"max_new_tokens": said, "min_new_tokens": said}
    found = systems(folder, video)
    right = found["transformers"].ask(questions, options).texts
    times: dict[str, list[Asked]] = {name: [] for name in found}
    kept = expected_of(found["ask"], questions, options)
    ties: set[tuple[str, int]] = set()
    for _ in range(repeats):
        for name, system in found.items():
            asked = system.ask(questions, options)
            times[name].append(asked)
            keeps = "one soft prompt" in name
            for place, texts in enumerate(zip(kept if keeps else right, asked.texts, strict=True)):
                if texts[0] != texts[1] and (name, place) not in ties:
                    sample = sample_of(found["ask"], questions[place], questions[0 if keeps else place])
                    assert part_at_tie(found["ask"].model, sample, texts), f"{name} says something else"
                    ties.add((name, place))
    peak, rows = peak_flops(torch.float32, "cpu"), []
    for name, own in times.items():
        context = "context" in name
        first, total = floors(shapes, questions, said, requery="one soft prompt" not in name, encodes_anew=not context)
        ratios = [peer.total / asked.total for peer, asked in zip(times["transformers"], own, strict=True)]
        rows.append(
            {
                "system": name,
                "first": statistics.median(asked.first for asked in own),
                "further": statistics.median((asked.total - asked.first) / (len(questions) - 1) for asked in own),
                "total": statistics.median(asked.total for asked in own),
                "speed": statistics.median(ratios),
                "first_floor": first / peak,
                "further_floor": (total - first) / peak / (len(questions) - 1),
                "total_floor": total / peak,
            }
        )
    return rows, ties


def table(rows: Sequence[dict]) -> str:
    """Markdown."""
    lines = [
        "| system | first question | floor | each further | floor | all 16 | floor | speed | beside its batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    [peer] = [row["total"] for row in rows if row["system"] == "transformers, one batch"]
    for row in rows:
        cells = [
            f"{row[name]:.3f} s" if row[name] == row[name] else ""
            for name in ("first", "first_floor", "further", "further_floor", "total", "total_floor")
        ]
        beside = f"{peer / row['total']:.2f}x" if "batch" in row["system"] else ""
        lines.append(f"| {row['system']} | {' | '.join(cells)} | {row['speed']:.2f}x | {beside} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 32, 128], help="of every answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="shapes of the benchmark's own test")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    shapes = pair.TINY if given.tiny else pair.SMALL
    with tempfile.TemporaryDirectory() as folder:
        save_models(shapes, Path(folder))
        for said in given.new_tokens:
            say(
                f"\n{QUESTIONS} questions, answers of {said} tokens, {given.threads} thread(s), {given.repeats} repeats\n"
            )
            rows, ties = measure(shapes, Path(folder), said=said, repeats=given.repeats)
            say(table(rows))
            for name, place in sorted(ties):
                say(f"\nquestion {place + 1}, {name}: parts at words equally likely but for rounding")


if __name__ == "__main__":
    main(sys.argv[1:])
