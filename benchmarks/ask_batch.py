"""Sixteen samples of four modalities, singly and mixed, as one batch of `generate` beside one by one: on the numerals model.

    python benchmarks/ask_batch.py                 # a minute on two idle cores

Both must say the same. Files are read before anything is timed, since that is done one by one in any case. Once with answers
as long as they are, which is a word or a few; then with answers as long as sentences, which is where a batch saves: weights
are read once for a step of all rows.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from xblip_numerals.demo import FOLDER

import xblip

SAMPLES = 16


def make_samples(model: xblip.XBlip) -> list[xblip.Sample]:
    """The demo's questions, from the first again when they are used up; files are read."""
    rows = json.loads((FOLDER / "questions.json").read_text())
    made = []
    for row in (rows[index % len(rows)] for index in range(SAMPLES)):
        media = [(name, model.branches[name].read(FOLDER / file)) for name, file in row["media"]]
        made.append(xblip.Sample(row["question"], media))
    return made


def measure(
    model: xblip.XBlip, samples: Sequence[xblip.Sample], options: dict[str, int], repeats: int
) -> tuple[float, float, float]:
    """Medians over repeats: seconds of a batch, seconds of one by one, and the ratio within a repeat.

    Raises:
      AssertionError: a batch says something else.
    """
    times = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        batch = model.generate(samples, **options)
        between = time.perf_counter()
        single = [model.generate([sample], **options)[0] for sample in samples]
        ended = time.perf_counter()
        assert [answer.text for answer in batch] == [answer.text for answer in single]
        if repeat:  # the first one warms up
            times.append((between - started, ended - between, (ended - between) / (between - started)))
    return tuple(map(statistics.median, zip(*times, strict=True)))


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 64], help="of every answer, beside its own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    model = xblip.load("numerals")
    samples = make_samples(model)
    say(f"{SAMPLES} samples, {given.threads} thread(s), {given.repeats} repeats\n")
    say("| answers | one by one | one batch | speed |\n|---|---|---|---|")
    for said in (None, *given.new_tokens):
        options = {"max_new_tokens": said, "min_new_tokens": said} if said else {}
        batch, single, ratio = measure(model, samples, options, given.repeats)
        say(f"| {f'{said} tokens' if said else 'their own'} | {single:.2f} s | {batch:.2f} s | {ratio:.2f}x |")


if __name__ == "__main__":
    main(sys.argv[1:])
