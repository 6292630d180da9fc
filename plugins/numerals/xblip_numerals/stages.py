"""What the stages before instruction tuning add: align -> generate -> instruct beside instruct alone, for every bridge.

All ways end in the same instruct stage: equal settings, rows, batches and steps. What comes before it is told with its own
steps and seconds, since these might have gone into more of the instruct stage. A third way begins with generate.

    python -m xblip_numerals.stages --parts build/numerals

Two lanes run side by side with one thread each. What is there is not run again; delete its folder to redo it.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xblip_numerals.build import LANES, Lanes, Step, config_of, places_of
from xblip_numerals.language import MODALITIES
from xblip_numerals.stages_report import ALIGNED, RECALL, RUN, WAYS, folder_of, write_report

STEPS = {"align": 500, "generate": 150, "instruct": 400}
BATCH = 32
EVERY = 40
"""Steps of the instruct stage between two evaluations."""
EVAL_ROWS = 300
RERANK = 16
"""The nearest by ITC, which ITM puts in order."""


def run_modality(parts: Path, out: Path, modality: str, *, steps: dict[str, int], seed: int) -> None:
    """Trains one modality by all of `WAYS`, and measures what its retriever finds.

    Args:
      parts: folder of the build.
      out: of the runs.
      modality: whose bridge.
      steps: of each stage.
      seed: of the stage instruct; the others have one seed.
    """
    for stages in WAYS.values():
        after = None
        for number, stage in enumerate(stages, start=1):
            folder = folder_of(out / modality, stages[:number], seed)
            own = seed if stage == "instruct" else 0
            run_stage(parts, modality, stage, folder, steps, seed=own, after=after)
            after = folder
    plain = {"data.train": parts / "captions" / f"{modality}-train.jsonl"}
    for name, given in zip(ALIGNED, ({}, plain), strict=True):
        folder = out / modality / name
        if not (folder / RECALL).exists():
            run_stage(parts, modality, "align", folder, steps, seed=0, given=given)
            measure_recall(parts, modality, folder)


def run_stage(
    parts: Path,
    modality: str,
    stage: str,
    out: Path,
    steps: dict[str, int],
    *,
    seed: int,
    after: Path | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Trains one stage by its shipped config; leaves what came of it in `RUN`.

    Args:
      parts: folder of the build.
      modality: whose bridge.
      stage: "align", "generate" or "instruct".
      out: where the branch goes.
      steps: of each stage.
      seed: of weights and batches.
      after: folder of the stage before; None to start from nothing.
      given: settings of its own, by the config's keys.
    """
    from xblip.train import train
    from xblip.train_config import load_train_config

    if (out / RUN).exists():
        return
    settings: dict[str, Any] = {
        **places_of(parts, modality, stage),
        "init.folder": after or '""',
        "training.output_dir": out,
        "training.seed": seed,
        "training.max_steps": steps[stage],
        "training.per_device_train_batch_size": BATCH,
        "training.eval_steps": steps[stage],
        "training.logging_steps": 1,
        "training.save_strategy": '"no"',
    }
    if stage == "instruct":
        questions, few = parts / "questions", out.parent / "eval.jsonl"
        few.parent.mkdir(parents=True, exist_ok=True)
        with (questions / f"{modality}-val.jsonl").open() as rows:
            few.write_text("".join(islice(rows, EVAL_ROWS)))
        settings |= {
            "data.eval": f"[{{path: {few}, root: {questions}}}]",
            "data.eval_answers": EVAL_ROWS,
            "training.eval_steps": min(EVERY, steps[stage]),
            "training.eval_on_start": "true",
        }
    settings |= given
    config = load_train_config(config_of(modality, stage), [f"{name}={value}" for name, value in settings.items()])
    began, worked = time.perf_counter(), time.process_time()
    metrics = train(config)
    wall, worked = time.perf_counter() - began, time.process_time() - worked
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    paces = [entry["samples_per_second"] for entry in history if "samples_per_second" in entry]
    trained = sum(BATCH / pace for pace in paces)
    run = {
        "steps": steps[stage],
        "batch": BATCH,
        "seconds": worked * trained / wall,  # without evaluations and what begins a run
        "accuracy": [[entry["step"], entry["eval_accuracy"]] for entry in history if "eval_accuracy" in entry],
        "metrics": {name: value for name, value in metrics.items() if name.startswith("eval_")},
    }
    (out / RUN).write_text(json.dumps(run, indent=1) + "\n")


def measure_recall(parts: Path, modality: str, folder: Path, *, split: str = "test") -> None:
    """Measures how often a retriever's first text for a file, and first file for a text, is right.

    All files of the split stand against all different captions of theirs; a file is right for a text if it has that caption.
    """
    import torch

    from xblip.retrieval import Retriever

    retriever = Retriever.from_pretrained(folder)
    manifest = parts / "captions" / f"{modality}-{split}.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    captions = [row["caption"] for row in rows]
    texts = sorted(set(captions))
    with torch.no_grad():
        paths = [manifest.parent / row[modality] for row in rows]
        encoded = [retriever.branch.encode(paths[start : start + 64]) for start in range(0, len(paths), 64)]
    sources = [own for part in encoded for own in part.split()]
    found: dict[str, Any] = {"files": len(rows), "texts": len(texts)}
    for name, rerank in (("itc", 0), ("itm", RERANK)):
        of_texts = retriever.rank_texts(sources, texts, top_k=1, rerank=rerank)
        of_files = retriever.rank_sources(sources, texts, top_k=1, rerank=rerank)
        right_texts = [texts[places[0].index] == said for places, said in zip(of_texts, captions, strict=True)]
        right_files = [captions[places[0].index] == said for places, said in zip(of_files, texts, strict=True)]
        found[name] = {"texts": sum(right_texts) / len(rows), "files": sum(right_files) / len(texts)}
    (folder / RECALL).write_text(json.dumps(found, indent=1) + "\n")


def run_all(parts: Path, out: Path, *, steps: dict[str, int], seeds: Sequence[int]) -> None:
    """Runs every modality in two lanes."""

    def step(modality: str, seed: int) -> Step:
        command = ["-m", "xblip_numerals.stages", "--parts", str(parts), "--out", str(out), "--modality", modality]
        command += ["--seeds", str(seed), "--steps", *(f"{stage}={count}" for stage, count in steps.items())]
        return Step(f"stages-{modality}-{seed}", command, None)

    lanes = [[step(name, seed) for seed in seeds for name in names] for names in LANES]
    Lanes(lanes, logs=out / "logs").run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", type=Path, default=Path("build/numerals"), help="folder that xblip_numerals.build made"
    )
    parser.add_argument("--out", type=Path, help="where runs go; PARTS/stages unless given")
    parser.add_argument(
        "--report", type=Path, help="Markdown to write, with plots beside it; OUT/STAGES.md unless given"
    )
    parser.add_argument("--modality", choices=list(MODALITIES), help="run this one alone, here, and write no report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", nargs="+", default=[], metavar="STAGE=COUNT", help=f"instead of {STEPS}")
    arguments = parser.parse_args()
    given = {stage: int(count) for stage, count in (entry.split("=") for entry in arguments.steps)}
    steps, out = STEPS | given, arguments.out or arguments.parts / "stages"
    if arguments.modality:
        for seed in arguments.seeds:
            run_modality(arguments.parts, out, arguments.modality, steps=steps, seed=seed)
        return
    run_all(arguments.parts, out, steps=steps, seeds=arguments.seeds)
    write_report(out, arguments.report or out / "STAGES.md", seeds=arguments.seeds, rows=EVAL_ROWS, rerank=RERANK)


if __name__ == "__main__":
    main()
