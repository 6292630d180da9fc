"""The report: what the numerals model answers on files that nothing was tuned on, beside what it should be compared with.

All of it is the evaluation's `crossmodal` task over the rows of `report_rows`; here stand the aims, the table of what is
read of one input, and what the experiments, `xblip augment` and CapFilt found, if they were run.

    python -m xblip_numerals.report --bundle FOLDER --world FOLDER --work FOLDER --out REPORT.md
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import PartialState

from xblip import crossmodal_page, markdown
from xblip.crossmodal_score import SOFT, TRUE
from xblip.errors import XBlipError
from xblip.evaluate import EvalConfig, evaluate
from xblip_numerals.capfilt_report import capfilt_sections
from xblip_numerals.experiments_report import experiment_sections
from xblip_numerals.phrases import MODALITIES, VALUES
from xblip_numerals.questions import Shelf
from xblip_numerals.report_rows import write_rows
from xblip_numerals.rules_report import augment_sections

BATCH = 64
AIMED = (
    "\nOn files that nothing was tuned on: hands of students and synthetic voices that no part of the model has "
    "met; pictures of handwriting and recordings that it has not met, by writers and speakers that it may know."
)
READ = "\nHow many questions each is of stands under One input: The parts."
TASK = "across"
SOURCES = {
    "image, handwriting": "handwriting",
    "image, sign": "hand sign",
    "audio, person": "speech",
    "audio, robot": "synthetic voice",
    "video": "video",
    "point_cloud": "point cloud",
}
"""What is told apart when one input is read, and how tables call it."""
AIMS = {
    "image, handwriting": 0.97,
    "image, sign": 0.90,
    "audio, person": 0.90,
    "video": 0.95,
    "point_cloud": 0.95,
}
"""Of the number read alone."""
ATTRIBUTE_AIM = 0.85
RATIO_AIMS = {"two inputs": 0.95, "three inputs": 0.85}
"""Of soft prompts' share in the product of the parts, for every kind of question."""
SHOWN = ("chance", "question alone", "one input alone", "people's captions", "own captions", SOFT, TRUE)
"""The README's columns."""


def evaluate_bundle(bundle: str, world: Path, folder: Path, *, split: str, count: int, seed: int) -> dict[str, Any]:
    """Asks a model all questions of the report, or those that are still to ask; returns the figures.

    Args:
      bundle: name or folder of the model.
      world: folder that `xblip_numerals.media` wrote.
      folder: where rows, predictions and figures go.
      split: whose files.
      count: questions of each kind for each set of modalities.
      seed: of the questions and intervals.
    """
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(Shelf.read(world, split), rows, count=count, seed=seed)
    describe = {name: f"Describe the {modality.noun}." for name, modality in MODALITIES.items()}
    task = {"kind": "crossmodal", "data": str(rows), "describe": describe}
    evaluate(EvalConfig(str(bundle), {TASK: task}, str(folder / "run"), batch_size=BATCH, seed=seed, use_cpu=True))
    return json.loads((folder / "run" / f"{TASK}.figures.json").read_text())


def facts_table(told: Mapping[str, Any]) -> crossmodal_page.Rows:
    """What is read of one input: facts below each other, sources side by side; the share and its interval."""
    table = [["fact", *SOURCES.values()]]
    for fact in VALUES:
        found = [told["parts"].get(f"{source}: {fact}") for source in SOURCES]
        cells = [crossmodal_page.shown(got) if got else "–" for got in found]
        if any(found):
            table.append([fact, *cells])
    return table


def attributes_mean(told: Mapping[str, Any]) -> float:
    """The mean over everything that is read of one input beside numbers, each source's fact alike."""
    return mean(got["value"] for part, got in told["parts"].items() if not part.endswith(": number"))


def aims_table(told: Mapping[str, Any]) -> crossmodal_page.Rows:
    """What was aimed at before the test files were asked about, and what came of it."""
    table = [["aim", "at least", "reached", "met"]]

    def add(name: str, aim: float, got: float, told_as: str) -> None:
        table.append([name, f"{aim:.2f}", told_as, "yes" if got >= aim else "**no**"])

    for source, aim in AIMS.items():
        got = told["parts"][f"{source}: number"]
        add(f"the number alone: {SOURCES[source]}", aim, got["value"], crossmodal_page.shown(got, scale=1, digits=3))
    got = attributes_mean(told)
    add("other facts, mean", ATTRIBUTE_AIM, got, f"{got:.3f}")
    for size, aim in RATIO_AIMS.items():
        kinds = {kind: found["ratio"] for kind, found in told["sizes"][size]["kinds"].items() if "ratio" in found}
        if not kinds:  # nothing is ever read right
            add(f"{size}: share of the product of the parts", aim, 0.0, "–")
            continue
        least = min(kinds, key=lambda kind: kinds[kind]["value"])
        below = sorted(kind for kind, ratio in kinds.items() if ratio["value"] < aim)
        got = kinds[least]
        reached = f"{crossmodal_page.shown(got, scale=1, digits=2)} ({least.replace('_', ' ')})"
        reached += f"; below: {', '.join(below).replace('_', ' ')}" if below else ""
        add(f"{size}: share of the product of the parts, worst of {len(kinds)} kinds", aim, got["value"], reached)
    return table


def readme_table(told: Mapping[str, Any]) -> str:
    """The README's tables, from the report's figures."""
    numbers = [told["parts"][f"{source}: number"] for source in SOURCES]
    shares, counts = [f"{100 * got['value']:.1f}" for got in numbers], [got["n"] for got in numbers]
    alone = [["the number of one input, %", *SOURCES.values()], ["right", *shares], ["n", *counts]]
    across = [["questions across, %", *SHOWN, "product of the parts", "n"]]
    for size in RATIO_AIMS:
        found = told["sizes"][size]
        shares = [f"{100 * found['ways'][way]['value']:.1f}" for way in SHOWN]
        across.append([size, *shares, f"{100 * found['product']['value']:.1f}", found["ways"][SOFT]["n"]])
    return f"{markdown.table(alone)}\n{markdown.table(across)}"


def write_report(told: Mapping[str, Any], out: Path, after: Sequence[crossmodal_page.Section] = ()) -> None:
    """Writes the report: Markdown, HTML beside it, and the figures as JSON.

    Args:
      told: figures of `evaluate_bundle`.
      out: the Markdown.
      after: what else was measured.
    """
    before: list[crossmodal_page.Section] = [
        ("Aims", [(AIMED, aims_table(told), "")]),
        ("What is read of one input, %", [(READ, facts_table(told), "")]),
    ]
    name = "numerals, files of the test split"
    out.write_text(crossmodal_page.as_markdown(told, name, before, after))
    out.with_suffix(".html").write_text(crossmodal_page.as_html(told, name, before, after))
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, help="name or folder of the model")
    parser.add_argument("--world", type=Path, required=True, help="folder that xblip_numerals.media wrote")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=20, help="questions per kind and set of modalities")
    parser.add_argument("--work", type=Path, required=True, help="folder of rows and predictions, to go on in")
    parser.add_argument("--experiments", type=Path, help="folder of xblip_numerals.experiments, to report on them too")
    parser.add_argument("--capfilt", type=Path, help="CAPFILT.json of xblip_numerals.capfilt, to report on it too")
    parser.add_argument("--augment", type=Path, help="output folder of xblip augment, to report on it too")
    parser.add_argument("--discrn", type=Path, help="output folder of xblip eval with its pairs of test files")
    parser.add_argument("--out", type=Path, required=True, help="Markdown; HTML and JSON are written beside it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        told = evaluate_bundle(
            arguments.bundle, arguments.world, arguments.work,
            split=arguments.split, count=arguments.count, seed=arguments.seed,
        )  # fmt: skip
    except XBlipError as error:
        raise SystemExit(f"error: {error}") from None
    if not PartialState().is_main_process:
        return
    asked = arguments.work / "run" / f"{TASK}.jsonl"
    after = experiment_sections(arguments.experiments, asked) if arguments.experiments else []
    after += augment_sections(arguments.augment, arguments.discrn) if arguments.augment else []
    after += capfilt_sections(arguments.capfilt) if arguments.capfilt else []
    write_report(told, arguments.out, after)


if __name__ == "__main__":
    main()
