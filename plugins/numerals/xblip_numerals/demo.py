"""The demo: fourteen questions about files of all four kinds, and the model's answers beside the truth.

The files come with the plugin, which made them (`demo_files`): pen strokes of our own, which no part of the model was
trained on, and new recordings of the synthetic voices it has heard. Nothing is chosen by whether the answer is right.

    python -m xblip_numerals.demo --out build/demo
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import xblip

FOLDER = Path(__file__).parent / "demo"
EXPLAINED = 10
"""The question whose answer is explained: about three inputs, each of which counts."""


def main(arguments: list[str] | None = None) -> None:
    """Asks every question of `demo/questions.json`, prints a table, and explains one of the answers."""
    parser = argparse.ArgumentParser(description="Fourteen questions about files of four kinds.")
    parser.add_argument("--out", type=Path, help="write a page that explains one of the answers into this folder, anew")
    out = parser.parse_args(arguments).out
    console = Console()
    started = time.monotonic()
    model = xblip.load("numerals")
    loaded = time.monotonic()
    questions = json.loads((FOLDER / "questions.json").read_text())
    table = Table(title="One frozen language model, four bridges trained apart", show_lines=True)
    for column in ("question", "files", "answer", "truth"):
        table.add_column(column, overflow="fold")
    samples = [
        xblip.Sample(row["question"], [(name, FOLDER / file) for name, file in row["media"]]) for row in questions
    ]
    answers = model.generate(samples, do_sample=False)
    right = 0
    for row, answer in zip(questions, answers, strict=True):
        agrees = _plain(answer.text) == _plain(row["answer"])
        right += agrees
        color = "green" if agrees else "red"
        files = "\n".join(f"{name}: {file}" for name, file in row["media"])
        table.add_row(row["question"], files, f"[{color}]{answer.text}[/{color}]", row["answer"])
    console.print(table)
    asked = time.monotonic() - loaded
    console.print(
        f"{right} of {len(questions)} answers equal the truth; loading took {loaded - started:.1f} s, "
        f"{len(questions)} answers {asked:.1f} s."
    )
    _explain(console, model, questions[EXPLAINED], out)
    console.print(
        "\nWhat it answers to thousands of questions about unseen files: plugins/numerals/REPORT.md.\n\n"
        "Ask about your own files (a drawn digit, a recording of one, ...):\n"
        '  .venv/bin/xblip ask "Which number is in the image?" --image your.png\n'
        '  .venv/bin/xblip ask "Which number is larger, the image or the audio?" --image your.png --audio your.wav'
        "\n\nAsk on a page of your browser, with these examples and your own files, at http://127.0.0.1:8000:\n"
        "  .venv/bin/xblip serve numerals --ui"
    )


def _explain(console: Console, model: xblip.XBlip, row: dict[str, Any], out: Path | None) -> None:
    """Prints what an answer came from; writes its page into a folder of `out`, in the place of that of an earlier demo."""
    answer = model.ask(row["question"], media=[(name, FOLDER / file) for name, file in row["media"]], do_sample=False)
    explanation = answer.explain()
    console.print(f'\nWhat "{escape(answer.text)}" to "{escape(row["question"])}" came from:')
    console.print(explanation.table())
    if out:
        folder = out / "explanation"
        if (folder / "explanation.json").is_file():
            shutil.rmtree(folder)
        console.print(f"With pictures: {explanation.save(folder)}", soft_wrap=True)


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


if __name__ == "__main__":
    main()
