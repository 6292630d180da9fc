"""Builds the numerals model from the public sets: world, LLM, encoders, bridges, bundle, report.

Two lanes run side by side with one thread each, since small networks gain little from a second thread and nothing when
two processes fight over the cores. A step whose output is there is not run again; delete its folder to redo it.

    python -m xblip_numerals.build --data FOLDER --out build/numerals
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from xblip_numerals.demo_files import make_files, make_questions
from xblip_numerals.language import MODALITIES
from xblip_numerals.sources import SPLITS, SourcesError, read_sources

CONFIGS = Path("configs/train")
ENCODERS = {"video": "image"}
"""Modalities that read with another one's encoder."""
LANES = (("video", "audio"), ("image", "point_cloud"))
"""Modalities that wait for each other."""
CAPTIONS = {"worded": ("train", 3), "train": ("train", 0), "val": ("val", 0), "test": ("test", 0)}
"""Manifests of captions: of which split, and how many descriptions each file has beside the canonical sentence."""
FEATURES = "float16"
"""What stored features are kept as."""
SOURCES = """
## What it was trained on

MNIST's test images (LeCun, Cortes, Burges; CC BY-SA 3.0), the Free Spoken Digit Dataset (Jackson et al.; CC BY-SA 4.0),
the Sign Language Digits Dataset (Mavi, Dikle; arXiv 2011.08927; Apache-2.0), synthetic voices of espeak-ng, and text made
by rules. It knows the numbers zero to nine and a few attributes of what shows them, in fixed phrasings of English, and
nothing else.
"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; options are appended to the commands, so that () leaves each step's own default.

    Attributes:
      world, llm, encoder, bridge, questions: further arguments of those steps, the last of the report's questions.
      rows: of the bridges' manifests, by split.
    """

    world: tuple[str, ...] = ()
    llm: tuple[str, ...] = ()
    encoder: tuple[str, ...] = ()
    bridge: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    rows: dict[str, int] = field(default_factory=lambda: {"train": 50_000, "val": 1_000})


REHEARSAL = Sizes(
    world=("--scale", "0.02"),
    llm=("--steps", "20"),
    encoder=("--epochs", "1"),
    bridge=("training.max_steps=2", "training.eval_steps=2", "training.save_steps=2", "data.eval_answers=4"),
    questions=("--count", "1", "--blocks", "1", "--attributes", "9"),
    rows={"train": 200, "val": 20},
)


@dataclass
class Step:
    """One process of the build.

    Attributes:
      name: shown while it runs; its output goes to logs/<name>.log.
      command: Python arguments.
      makes: exists when the step is done; None for a step that itself does only what is missing.
    """

    name: str
    command: list[str]
    makes: Path | None
    state: str = "waits"
    line: str = ""


class Lanes:
    """Runs lists of steps side by side and shows how each gets on."""

    def __init__(self, lanes: Sequence[Sequence[Step]], *, logs: Path):
        self.lanes = lanes
        self.logs = logs
        self.failed: Step | None = None

    def run(self) -> None:
        """Runs all steps.

        Raises:
          SystemExit: a step failed; its last lines are printed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._run_lane, args=(lane,)) for lane in self.lanes]
        for thread in threads:
            thread.start()
        console = Console()
        with Live(self._table(), console=console, refresh_per_second=2, transient=not console.is_terminal) as live:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.5)
                live.update(self._table())
        if self.failed:
            log = (self.logs / f"{self.failed.name}.log").read_text().splitlines()
            raise SystemExit(f"{self.failed.name} failed; the end of its log:\n" + "\n".join(log[-20:]))

    def _run_lane(self, lane: Sequence[Step]) -> None:
        for step in lane:
            if self.failed:
                return
            if step.makes and step.makes.exists():
                step.state = "was there"
                continue
            started = time.monotonic()
            step.state = "runs"
            status = self._run_step(step)
            minutes = (time.monotonic() - started) / 60
            step.state = f"done, {minutes:.1f} min" if status == 0 else "failed"
            print(f"{step.name}: {step.state}", flush=True)
            if status:
                self.failed = step

    def _run_step(self, step: Step) -> int:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, "-u", *step.command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        with (self.logs / f"{step.name}.log").open("wb", buffering=0) as log:
            line = b""
            while chunk := process.stdout.read1(4096):
                log.write(chunk)
                line = (line + chunk).replace(b"\r", b"\n").rstrip(b"\n").rsplit(b"\n", 1)[-1]
                step.line = line.decode(errors="replace")[-100:]
        return process.wait()

    def _table(self) -> Table:
        table = Table("step", "state", "now")
        for lane in self.lanes:
            for step in lane:
                table.add_row(step.name, step.state, step.line if step.state == "runs" else "")
        return table


def config_of(modality: str, stage: str = "instruct") -> Path:
    """The shipped config of a stage of training."""
    suffix = "" if stage == "instruct" else f"-{stage}"
    return CONFIGS / f"numerals-{modality.replace('_', '-')}{suffix}.yaml"


def places_of(parts: Path, modality: str, stage: str = "instruct") -> dict[str, Path]:
    """Where a stage finds what the build made in the folder `parts`, by the config's keys."""
    rows, name = parts / ("questions" if stage == "instruct" else "captions"), "worded" if stage == "align" else "train"
    return {
        "llm.source": parts / "llm",
        "branch.config.encoder": parts / "encoders" / ENCODERS.get(modality, modality),
        "data.features": parts / "features" / modality,
        "data.train": rows / f"{modality}-{name}.jsonl",
        "data.eval": rows / f"{modality}-val.jsonl",
    }


def check_built(*places: Path, by: str = "xblip_numerals.build") -> None:
    """Ends the program if what is needed is not there; `by` is what makes it."""
    for place in places:
        if not place.exists():
            raise SystemExit(f"error: {place} is missing. Run {by} first, or name its folder by --parts.")


def build(data: Path, out: Path, *, seed: int, sizes: Sizes) -> None:
    """Runs the whole build; see the module's description."""
    from xblip.resume import found_checkpoint

    if not CONFIGS.is_dir():
        raise SourcesError(f"There is no {CONFIGS} under {Path.cwd()}. Run the build from the root of the repository.")
    for split in SPLITS:
        read_sources(data, split)
    world, llm, logs = out / "world", out / "llm", out / "logs"

    def module(name: str, *arguments: object) -> list[str]:
        return ["-m", f"xblip_numerals.{name}", *map(str, arguments), "--seed", str(seed)]

    def encoder(name: str) -> Step:
        folder = out / "encoders" / name
        command = module("train_encoders", name, "--world", world, "--out", folder, "--threads", 1, *sizes.encoder)
        return Step(f"encoder-{name}", command, folder / "accuracy.json")

    def questions(name: str, split: str) -> Step:
        file = out / "questions" / f"{name}-{split}.jsonl"
        count = sizes.rows[split]
        command = module("questions", name, "--world", world, "--split", split, "--count", count, "--out", file)
        return Step(f"questions-{name}-{split}", command, file)

    def captions(name: str, rows: str) -> Step:
        file = out / "captions" / f"{name}-{rows}.jsonl"
        split, wordings = CAPTIONS[rows]
        options = ("--world", world, "--split", split, "--wordings", wordings, "--out", file)
        return Step(f"captions-{name}-{rows}", module("captions", name, *options), file)

    def configured(command: str, name: str, stage: str, **places: Path) -> list[str]:
        settings = places_of(out, name, stage) | places
        overrides = [f"{key}={value}" for key, value in settings.items()]
        return ["-m", "xblip.cli", command, str(config_of(name, stage)), *overrides]

    def features(name: str) -> Step:  # captions name every file that questions do
        command = configured("precompute", name, "align")
        return Step(f"features-{name}", [*command, "--to", str(out / "features" / name), "--dtype", FEATURES], None)

    def bridge(name: str) -> Step:
        folder = out / "branches" / name
        command = configured("train", name, "instruct", **{"training.output_dir": folder})
        if found_checkpoint(folder):  # of a build that was interrupted
            command.append("--resume")
        return Step(f"bridge-{name}", [*command, f"training.seed={seed}", *sizes.bridge], folder / "metrics.json")

    media = Step("world", module("media", "--data", data, "--out", world, *sizes.world), world / "test/manifest.jsonl")
    language = Step("llm", module("train_llm", "--out", llm, "--threads", 1, *sizes.llm), llm / "accuracy.json")
    asked = [questions(name, split) for name in MODALITIES for split in sizes.rows]
    told = [captions(name, rows) for name in MODALITIES for rows in CAPTIONS]
    work = out / "report"
    command = module("report_rows", "--world", world, "--out", work / "rows.jsonl", *sizes.questions)
    asked.append(Step("questions-report", command, work / "rows.jsonl"))
    Lanes([[media]], logs=logs).run()  # takes all cores by itself
    trained = [encoder(name) for name in ("image", "point_cloud", "audio")]
    Lanes([[language], [*asked, *told, *trained]], logs=logs).run()
    lanes = [[step(name) for name in names for step in (features, bridge)] for names in LANES]
    Lanes(lanes, logs=logs).run()
    write_bundle(out, out / "bundle")
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(LANES))]
    report = module(
        "report", "--bundle", out / "bundle", "--world", world, "--work", work, "--out", out / "REPORT.md"
    )  # fmt: skip
    Lanes([[Step("report", [*processes, *report], out / "REPORT.md")]], logs=logs).run()


def write_bundle(parts: Path, folder: Path) -> None:
    """Composes the trained parts to a bundle with half-precision weights."""
    import torch
    from safetensors.torch import load_file, save_file

    import xblip

    like = os.path.relpath(CONFIGS.parent / "model" / "numerals.yaml", parts)
    branches = "".join(f"  - branches/{name}\n" for name in MODALITIES)
    (parts / "model.yaml").write_text(f"base: {like}\nllm:\n  source: llm\nbranches:\n{branches}")
    model = xblip.load(parts / "model.yaml")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    with (folder / "README.md").open("a") as card:
        card.write(SOURCES)
    for file in folder.glob("*/bridge.safetensors"):
        save_file({name: value.to(torch.float16) for name, value in load_file(file).items()}, file)


def install(out: Path) -> None:
    """Puts bundle, report and demo files where the plugin ships them from."""
    package = Path(__file__).parent
    for name in ("bundle", "demo"):
        shutil.rmtree(package / name, ignore_errors=True)
    shutil.copytree(out / "bundle", package / "bundle")
    make_files(package / "demo", seed=0)
    make_questions(package / "demo", seed=0)
    for suffix in (".md", ".html", ".json"):
        shutil.copyfile(out / f"REPORT{suffix}", package.parent / f"REPORT{suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, with their manifest.jsonl")
    parser.add_argument("--out", type=Path, help="build/numerals, or build/rehearsal for a rehearsal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--install", action="store_true", help="ship the result with this plugin, in place of what is there"
    )
    parser.add_argument("--rehearsal", action="store_true", help="go through every step with next to nothing")
    arguments = parser.parse_args()
    try:
        sizes = REHEARSAL if arguments.rehearsal else Sizes()
        out = arguments.out or Path("build", "rehearsal" if arguments.rehearsal else "numerals")
        build(arguments.data, out, seed=arguments.seed, sizes=sizes)
        if arguments.install:
            install(out)
    except SourcesError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
